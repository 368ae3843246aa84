"""How many devices a load needs: kinds and demand, the search, its simulations, the report and its page."""
