"""The server: brains driven in real time, their processes, and the links between them."""
