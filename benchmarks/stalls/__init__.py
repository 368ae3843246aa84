"""Stalled processes: what happens to requests, and how stalls are detected."""
