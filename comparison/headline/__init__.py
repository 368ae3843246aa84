"""The figure of the README: goodput and the age of refusals against load, of three servers on one core."""
