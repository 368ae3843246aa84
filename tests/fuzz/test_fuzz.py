"""Every parser fed for a while what is nearly right: none may trip, hang or grow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import __main__ as program
from tests.fuzz import mutators
from tests.fuzz.__main__ import Fuzzer, fuzz
from tests.fuzz.engine import NAMES, Target, Wrong, changed, check, everything, has_atheris, plain
from tests.fuzz.targets import files

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("CLOCKWORK_FUZZ_SECONDS", "8"))
"""Three are too few: a type that `config_pbtxt` no longer checked took four to be found."""
SIMPLE = {
    "addresses", "bench_records", "client_answers", "compression", "crash_report", "hpack",
    "region_names",
}  # fmt: skip
"""The first two seconds, thousands of inputs, reach all edges that eight reach."""
SIMPLE_SHARE = 3 / 8


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    with closing(Fuzzer()) as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 200)
@pytest.mark.parametrize("name", NAMES)
def test_a_parser_does_not_trip_over_what_is_nearly_right(name: str, tmp_path: Path, fuzzer: Fuzzer) -> None:
    seed = 1 if os.environ.get("CI") else Random().randrange(1, 2**31)
    seconds = SECONDS * SIMPLE_SHARE if name in SIMPLE else SECONDS
    row = fuzzer.fuzzed(name, seconds, tmp_path, seed)

    assert not row.failure, row.failure
    assert row.inputs > 0


@pytest.mark.slow
def test_the_memory_of_who_starts_it_is_not_its_own(tmp_path: Path) -> None:
    started = f"from tests.fuzz.__main__ import fuzz; fuzz(['hpack'], 1, Path({str(tmp_path)!r}), 1, 1)"
    held = "held = bytearray(600 << 20); held[::4096] = b'x' * (len(held) // 4096)"
    code = f"from pathlib import Path; {held}; {started}"

    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)

    assert ended.stdout.strip().endswith(b"ok"), ended.stdout


@pytest.mark.slow
@pytest.mark.skipif(not has_atheris(), reason="atheris is not installed: nothing is guided")
def test_all_that_parsers_run_of_ours_is_instrumented() -> None:
    code = (
        "import sys; from tests.fuzz.process import *; [module_of(name) for name in ('http_infer', 'hpack')];"
        "print({name for name, module in sys.modules.items() if name.partition('.')[0] in OURS"
        " and 'Atheris' not in type(module.__spec__.loader).__name__})"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)

    assert ended.stdout.decode().strip() == "set()"


@pytest.mark.slow
def test_who_does_not_end_in_time_is_told_and_the_next_is_another_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Fuzzer()) as fuzzer:
        with monkeypatch.context() as impatient:
            impatient.setattr(program, "_GRACE_S", -0.9)
            assert "exit status -1" in fuzzer.fuzzed("hpack", 1, tmp_path, 1).failure
        assert not fuzzer.fuzzed("hpack", 1, tmp_path, 1).failure


@pytest.mark.slow
def test_a_row_tells_what_was_done(tmp_path: Path) -> None:
    (row,) = fuzz(["hpack"], 1, tmp_path, 1, 1)

    assert not row.failure, row.failure
    assert row.inputs > 0
    assert str(row).endswith("ok")


@pytest.mark.timeout(60)
def test_a_made_up_repository_waits_for_no_pipe_and_reaches_nothing_outside_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for text in ("p a\nf a text", f"l d {outside}\nf d/x text", "l a a\nf a/b text"):
        files._repository(text.encode())

    assert list(outside.iterdir()) == []


def test_it_works_without_guidance_too(tmp_path: Path) -> None:
    assert plain("hpack", 0.3, tmp_path, 1) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_declared_is_let_through() -> None:
    with pytest.raises(KeyError):
        check(Target("x", lambda data: {}[data], (ValueError,), mutators.raw), b"")


@pytest.mark.slow
def test_what_takes_long_or_much_is_wrong() -> None:
    def slow(data: bytes) -> None:
        end = time.thread_time() + 1.05
        while time.thread_time() < end:
            pass

    with pytest.raises(Wrong, match="s of CPU for 3 bytes"):
        check(Target("x", slow, (), mutators.raw), b"abc")
    # In a process of its own: only memory beyond all that was ever taken is seen.
    greedy = "check(Target('x', lambda data: b'x' * (1 << 28), (), None), b'abc')"
    code = f"from tests.fuzz.engine import Target, check; {greedy}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert b"MiB more for 3 bytes" in ended.stderr


def test_an_error_without_words_is_wrong() -> None:
    def silent(data: bytes) -> None:
        raise ValueError

    with pytest.raises(Wrong, match="an error of 0 bytes"):
        check(Target("x", silent, (ValueError,), mutators.raw), b"abc")


def test_seeds_are_changed_and_mostly_stay_nearly_right() -> None:
    """Of each target's inputs some are new, and some are still accepted or refused with words."""
    dice = Random(1)
    for target in everything():
        seeds = [path.read_bytes() for path in target.seeds()]
        made = {changed(target, dice.choice(seeds), dice) for _ in range(60)}
        assert len(made - set(seeds)) > 20, target.name
