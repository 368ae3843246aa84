"""Whole programs made of the parts below; no part of the server may need one of them."""
