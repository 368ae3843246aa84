"""What is fuzzed: one module for each neighbourhood of parsers, each with its ``TARGETS``."""
