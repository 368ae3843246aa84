"""Reproduction of the paper's figures: published curves, policies and limits, from one run."""
