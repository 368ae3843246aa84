"""The load generator: a scenario's requests sent to any server, and each counted from when it was due.

A parent process makes the schedule, starts processes that do nothing but send, reads from memory shared with
them what became of every request, and computes. It never corrects what it measured: a run in which the
generator itself was late is called invalid.
"""
