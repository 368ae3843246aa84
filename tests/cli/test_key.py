"""``clockwork key``: what it prints is what a server reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from clockwork_serve.cli.entry import run
from clockwork_serve.serve.gateway.access import KeyRing, Right


def test_the_entry_is_one_that_a_server_reads_and_the_key_opens_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["key", "team-a"]) == 0
    assert run(["key", "ops", "--may", "admin", "--may", "metrics"]) == 0
    shown = capsys.readouterr()
    path = tmp_path / "keys.toml"
    path.write_text(shown.out)
    path.chmod(0o600)
    first, second = (line.split()[-1] for line in shown.err.splitlines())
    assert first not in shown.out
    assert len({first, second}) == 2
    assert len(first) >= 43
    ring = KeyRing(str(path))
    assert ring.authorize(Right.INFER, None, first.encode()).rights == {Right.INFER}
    assert ring.authorize(Right.ADMIN, None, second.encode()).rights == {Right.ADMIN, Right.METRICS}


def test_a_key_may_be_of_a_tenant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", "web", "--tenant", "shop"]) == 0
    shown = capsys.readouterr()
    path = tmp_path / "keys.toml"
    path.write_text(f'[[tenants]]\nname = "shop"\n\n{shown.out}')
    path.chmod(0o600)
    key = shown.err.split()[-1].encode()
    assert KeyRing(str(path)).authorize(Right.INFER, None, key).tenant == "shop"
    assert run(["key", "web", "--tenant", "a shop", "--json"]) == 2
    assert "tenant: expected 1 to 64 letters" in capsys.readouterr().err
    assert run(["key", "web", "--tenant", "shop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tenant"] == "shop"


def test_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", "a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sha256"] == hashlib.sha256(found["key"].encode()).hexdigest()
    assert (found["name"], found["may"]) == ("a", ["infer"])


@pytest.mark.parametrize("name", ["", "a b", 'a"', "é", "a" * 65])
def test_a_name_that_is_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", name]) == 2
    assert "name: expected 1 to 64 letters" in capsys.readouterr().err
