"""One scenario on virtual time: what it asks for, how it went, in numbers and in words. It serves nothing."""
