"""A server under mixed load with faults for hours: what grows, leaks, drifts or goes wrong, and a verdict."""
