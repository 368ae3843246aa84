"""The HTTP front end alone, against the least that such a server can do."""
