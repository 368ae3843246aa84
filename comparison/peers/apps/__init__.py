"""What runs in the servers themselves, each in its own Python: the models as that server wants them."""
