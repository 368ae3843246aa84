"""The worker process around its brain: its link, its lanes, verification of weights, crash reports."""
