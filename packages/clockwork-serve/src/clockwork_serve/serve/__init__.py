"""Brains in real time: driver, processes and the links between them. Nothing here decides."""
