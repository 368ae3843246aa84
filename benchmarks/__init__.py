"""Measurements of what the docs promise: one module a question, run as ``python -m benchmarks.NAME``."""
