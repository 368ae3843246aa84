"""How many devices a running server wants: what came lately, its near future simulated, when to change."""
