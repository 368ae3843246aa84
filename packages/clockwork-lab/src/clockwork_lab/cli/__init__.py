"""The commands that this package adds to ``clockwork``, each a module that is imported when it is given."""
