"""The same load on a real server and on virtual time, and how far they agree."""
