"""The supervisor process, which starts, watches and restarts all others, and prepares models for them.

No request passes through it.
"""
