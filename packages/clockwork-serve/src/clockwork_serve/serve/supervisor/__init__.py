"""The process that starts, watches and restarts all others, and prepares models for them."""
