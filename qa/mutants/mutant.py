"""A module with one thing broken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SOURCE = Path("packages/clockwork-serve/src/clockwork_serve")


@dataclass(slots=True)
class Mutant:
    """One change to one module: the ``number``th there is. ``by`` is the test or the seed that noticed.

    ``seed`` is what the first seed that noticed said, where seeds were asked beside the tests.
    """

    module: str
    number: int
    kind: str
    line: int
    before: str
    after: str
    source: str
    fate: str = ""
    by: str = ""
    seed: str = ""
