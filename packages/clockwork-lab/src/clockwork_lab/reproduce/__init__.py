"""The paper's figures, made again: published curves, policies, limits, from one run. It serves nothing."""
