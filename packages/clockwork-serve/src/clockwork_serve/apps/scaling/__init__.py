"""How many devices a running server wants: what came lately, its near future simulated, when to change.

It says a number, and starts no device.
"""
