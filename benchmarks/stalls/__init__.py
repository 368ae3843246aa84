"""Processes that stall: what becomes of requests, and who notices."""
