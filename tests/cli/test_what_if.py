"""``clockwork what-if`` from its command line to its exit code."""

from __future__ import annotations

import re

import pytest

from tests.cli.commands import Cli, interrupted
from tests.pure import NEEDS_PURE
from tests.sim.overload import journal_of

pytestmark = NEEDS_PURE


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(journal_of(tmp_path_factory.mktemp("what_if") / "journal"))


def test_without_a_change_it_says_that_all_is_the_same(journal: str, cli: Cli) -> None:
    assert cli("what-if", journal).out.splitlines()[-1].startswith("the same: ")


def test_both_sides_are_shown_and_what_changed(journal: str, cli: Cli) -> None:
    shown = cli("what-if", journal, "--devices", "+1").out
    told = cli("what-if", journal, "--devices", "+1", "--json").json

    gained = told["gained"]
    assert gained["count"] > 10
    assert f"answered only with the change: {gained['count']:,} ({', '.join(gained['first'])}, ...)" in shown
    assert re.search(r"\n    recorded nothing\n    found    load [ab]-000\d/1 on added0, at once\n", shown)
    assert "durations of the answers that were executed: " in shown
    assert {one["name"] for one in told["tenants"]} == {"a", "b"}
    assert told["all"]["changed"]["in_time"] > told["all"]["recorded"]["in_time"]
    assert told["agrees"]


def test_a_gate_closes_below_its_share(journal: str, cli: Cli) -> None:
    words = ["what-if", journal, "--rate", "0.2", "--without-tenant", "b"]

    cli(*words, "--fail-below", "50")
    wrote = cli("what-if", journal, "--rate", "1.5", "--fail-below", "99.9", code=1)
    assert "less than 99.9 % would have been answered in time" in wrote.err
    assert re.search(r"    found    run a-000\d/1 on gpu\d for \d requests? in a batch of \d, ", wrote.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "2"], "devices: expected +N or -N, N from 1 to 99; found '2'"),
        (["--slo-ms", "x"], "slo_ms: expected MODEL=MS, found 'x'"),
        (["--slo-ms", "q=5"], "slo_ms: expected a model that the journal has, found 'q'"),
        (["--policy", "nobody"], "policy: expected one of"),
        (["--profile", "none.csv"], "zoo none.csv: expected a file in UTF-8"),
    ],
)
def test_what_is_wrong_is_named(journal: str, words: list[str], said: str, cli: Cli) -> None:
    assert said in cli("what-if", journal, *words, code=2).err


def test_ctrl_c_ends_it_in_a_line(journal: str) -> None:
    _, wrote = interrupted("what-if", journal, "--rate", "4")  # it is reading
    assert wrote == ("", "interrupted: nothing was found so far\n")
