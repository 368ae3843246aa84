"""What measurements share: servers as real processes, load generators, machines, results.

``benchmarks``, ``qa``, ``comparison`` and the tests import from here; nothing here imports them.
"""
