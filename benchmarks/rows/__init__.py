"""Graphs made by chance, half of which mix rows: does the store batch those, and only those, that do not?"""
