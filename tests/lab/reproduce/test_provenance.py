"""The provenance of a figure."""

from __future__ import annotations

import re
from pathlib import Path

from clockwork_lab.reproduce.run import commit, provenance


def test_it_names_machine_python_and_whether_the_brains_are_compiled():
    found = provenance()

    assert set(found) == {"version", "commit", "machine", "python", "brains"}
    assert re.search(r"\d+ cores, \d+ GiB", found["machine"])
    assert found["brains"] in {"compiled", "pure Python"}


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path):
    assert commit(tmp_path) in {"unknown (not a checkout)", "unknown (no git)"}
