"""``clockwork explain`` from its command line to its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.messages import Answer, Outcome, Reason
from clockwork_serve.telemetry import Journal, refusals_path
from tests.cli.commands import Cli, interrupted
from tests.sim.overload import journal_of


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(journal_of(tmp_path_factory.mktemp("explain") / "journal"))


def refused(journal: str, cli: Cli) -> dict:
    return cli("explain", journal, "--refused", "--sample", "2", "--json").json


def test_many_and_one(journal: str, cli: Cli) -> None:
    many = refused(journal, cli)
    assert many["chosen"] == sum(many["causes"].values()) > 20
    name = many["sample"][1]

    lines = cli("explain", journal, name).out.splitlines()
    told = cli("explain", journal, name, "--json").json

    assert lines == told["lines"]  # the same words
    assert lines[0].startswith("Refused ")
    assert any(line.startswith(("Answered, if: ", "Nothing that was tried")) for line in lines)


def test_people_read_lines(journal: str, cli: Cli) -> None:
    assert "requests were late." in cli("explain", journal, "--late", "--since", "1s", "--sample", "1").out


def test_a_tenant_sees_its_own(journal: str, cli: Cli) -> None:
    name = refused(journal, cli)["sample"][0]
    whose = cli("explain", journal, name, "--json").json["tenant"]

    assert cli("explain", journal, name, "--tenant", whose).out.startswith("Refused ")
    other = {"a": "b", "b": "a"}[whose]
    shown = cli("explain", journal, name, "--tenant", other, code=1)
    assert f"expected a request of tenant {other}" in shown.err
    assert not shown.out


def test_an_unknown_id_says_which_are_like_it(journal: str, cli: Cli) -> None:
    shown = cli("explain", journal, "r11111", code=1).err
    assert "r11111: expected a request that reached the controller" in shown
    assert "nearest: r" in shown
    assert "What a gateway refuses by itself" in shown


def test_what_a_gateway_ended_by_itself_is_said(journal: str, cli: Cli) -> None:
    answer = Answer(
        request_id="g0-7", gateway="g0", outcome=Outcome.REJECTED, reason=Reason.QUEUE_FULL, message="full"
    )
    beside = Journal(refusals_path(Path(journal), "g0"))
    beside.on_step(1, (), (answer,))
    beside.close()
    shown = cli("explain", journal, "g0-7", code=1).err
    assert "g0-7: its gateway g0 ended it by itself (rejected: queue_full: full)" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found neither; give one of them"),
        (["r1", "--late"], "found both; give one of them"),
        (["--late", "--since", "soon"], "since: expected a time such as 90s"),
        (["--late", "--since", "0s"], "since: expected a time such as 90s"),
    ],
)
def test_what_is_wrong_is_named(journal: str, words: list[str], message: str, cli: Cli) -> None:
    assert message in cli("explain", journal, *words, code=2).err


def test_no_journal_is_named(tmp_path: Path, cli: Cli) -> None:
    assert "found nothing at" in cli("explain", tmp_path / "none", "r1", code=2).err


def test_ctrl_c_ends_it_in_a_line(journal: str) -> None:
    _, wrote = interrupted("explain", journal, "--refused", "--sample", "10000")  # it is reading
    assert wrote == ("", "interrupted: nothing was found so far\n")


def test_a_change_is_asked_for_and_one_that_cannot_be_is_named(journal: str, cli: Cli) -> None:
    name = refused(journal, cli)["sample"][0]

    lines = cli("explain", journal, name, "--if", "traffic=0", "--if", "priority=1").out.splitlines()
    told = cli("explain", journal, name, "--if", "traffic=0", "--if", "priority=1", "--json").json

    assert lines == told["lines"]
    assert lines[-1].startswith("With no other requests and priority 1: met at +")
    assert told["changed"]["outcome"] == "ok"
    wrote = cli("explain", journal, name, "--if", "memory:gpu9=1GiB", code=2)
    assert "expected a device that was there (gpu0, gpu1); found 'gpu9'" in wrote.err
    wrote = cli("explain", journal, "--late", "--if", "priority=1", code=2)
    assert "if: expected the ID of a request with it" in wrote.err
