"""Tests of the protocol's records and codecs."""
