"""Devices: the hands that execute actions and decide nothing."""
