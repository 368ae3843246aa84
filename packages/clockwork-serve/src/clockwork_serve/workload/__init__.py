"""Arrival processes, trace readers, scenarios: what is asked for and when, no clock and no server known."""
