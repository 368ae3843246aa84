"""The load generator: sends a scenario's requests to any server, and measures each from when it was due.

A parent process makes the schedule, starts processes that only send, reads the outcome of every request from
shared memory, and computes the report. Results are not corrected afterwards: a run in which the generator
itself was late is reported as invalid.
"""
