"""A night of seeds that was interrupted goes on; one of other code begins anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.seeds import PlayedSeed
from qa.simulator_nightly import code_hash, read_done, write_done

ROOT = Path(__file__).parents[2]


def test_what_was_played_is_read_again_unless_the_code_is_another(tmp_path: Path):
    path = tmp_path / "done.jsonl"
    done = {3: PlayedSeed(3, 200, {"crash": 1}, {"infer": 5})}
    write_done(path, done, "abc", 100).close()
    assert read_done(path, "abc", 100) == done
    assert read_done(path, "abd", 100) == {}
    assert read_done(path, "abc", 200) == {}
    with path.open("a") as file:
        file.write('{"seed": 4, "requ')  # it was killed
    assert read_done(path, "abc", 100) == done
    assert read_done(tmp_path / "nothing", "abc", 100) == {}
    assert len(code_hash()) == 24


@pytest.mark.slow
def test_a_night_goes_on_where_it_stopped(tmp_path: Path):
    def night(*more: str) -> tuple[int, dict]:
        out = tmp_path / "out.json"
        command = [
            sys.executable, "-m", "qa.simulator_nightly", "--count", "50", "--requests", "60",
            "--done", str(tmp_path / "done"), "--json", str(out), *more,
        ]  # fmt: skip
        status = subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
        return status, json.loads(out.read_bytes())

    status, first = night("--minutes", "0.0001")
    assert (status, first["figures"]["played"]) == (2, 40)
    assert "10 seeds are not played yet" in first["invalid"]
    status, second = night()
    assert second["figures"]["played"] == 50
    assert second["figures"]["failed"] == []
    assert status in {0, 1}, "fifty short seeds need not meet each pair of faults"
