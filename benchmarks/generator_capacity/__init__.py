"""The maximum load that `clockwork bench` can send, and a minimal server to send it to."""
