"""A server's processes on a Ray cluster: placed, named and restarted by Ray, which carries no request."""
