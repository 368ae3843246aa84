"""Measurements of what the docs promise: one module a question, run as ``python -m benchmarks.NAME``.

What is in ``qa`` and ``comparison`` today was here before: ``python -m qa.faults`` still finds it.
"""

from pathlib import Path

__path__ += [str(Path(__file__).parents[1] / folder) for folder in ("qa", "comparison")]
