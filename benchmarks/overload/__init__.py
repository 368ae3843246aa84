"""A model at three times its capacity, and the most that could have been served."""
