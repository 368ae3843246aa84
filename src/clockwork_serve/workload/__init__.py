"""Arrival processes, trace readers, scenarios: what is asked for and when; it knows no clock and no server."""
