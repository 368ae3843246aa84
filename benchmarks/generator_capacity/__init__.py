"""How much load `clockwork bench` can send, and a server that takes any load."""
