"""The HTTP port: connections, messages, routes."""
