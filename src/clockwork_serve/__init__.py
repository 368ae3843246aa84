"""Clockwork Serve: thousands of models on a few accelerators, each request in time or refused at once."""

__version__ = "0.1.0"
