"""Graphs made by chance, half of which mix rows: the store must batch those, and only those, that do not."""
