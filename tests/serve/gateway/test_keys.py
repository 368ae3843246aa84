"""API keys from a file: its content, the rights, and changes of the file."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway.access import AccessDenied, KeyRing, Right, check_keys
from tests.serve.gateway.keys import entry, replaced, written


@pytest.fixture
def path(tmp_path: Path) -> str:
    return written(tmp_path, entry("team-a", "alpha", "infer"), entry("ops", "omega", "admin", "infer"))


def test_a_key_may_be_in_either_header(path: str) -> None:
    ring = KeyRing(path)
    assert ring.authorize(Right.INFER, b"Bearer alpha", None).name == "team-a"
    assert ring.authorize(Right.INFER, b"bearer  alpha ", None).name == "team-a"
    assert ring.authorize(Right.INFER, None, b"alpha").name == "team-a"
    # A proxy's own credentials are not ours.
    assert ring.authorize(Right.INFER, b"Basic YTpi", b"alpha").name == "team-a"
    assert ring.authorize(Right.ADMIN, b"Bearer omega", None).name == "ops"


@pytest.mark.parametrize(
    ("authorization", "api_key", "found"),
    [
        (None, None, "found none"),
        (b"Basic YTpi", None, "found none"),
        (b"Bearer alph", None, "unknown"),
        (b"Bearer", None, "found none"),
        (b"Bearer ", None, "unknown"),
        (b"Bearer wrong", b"alpha", "unknown"),
        (None, b"", "unknown"),
        (None, hashlib.sha256(b"alpha").hexdigest().encode(), "unknown"),
        (None, b"\xff\x00", "unknown"),
    ],
)
def test_a_missing_or_unknown_key_is_denied(
    path: str, authorization: bytes | None, api_key: bytes | None, found: str
) -> None:
    with pytest.raises(AccessDenied, match=found) as caught:
        KeyRing(path).authorize(Right.INFER, authorization, api_key)
    assert not caught.value.known


def test_a_known_key_without_the_right_is_denied(path: str) -> None:
    with pytest.raises(AccessDenied, match="team-a: expected the right 'admin', found only infer") as caught:
        KeyRing(path).authorize(Right.ADMIN, b"Bearer alpha", None)
    assert caught.value.known
    with pytest.raises(AccessDenied, match="'metrics'"):
        KeyRing(path).authorize(Right.METRICS, b"Bearer omega", None)


def test_a_holder_may_have_two_keys_so_that_one_can_replace_the_other(tmp_path: Path) -> None:
    ring = KeyRing(written(tmp_path, entry("a", "old", "infer"), entry("a", "new", "infer")))
    assert {ring.authorize(Right.INFER, None, key).name for key in (b"old", b"new")} == {"a"}


GOOD = entry("a", "k", "infer")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "keys"),
        ("keys = []", "keys"),
        ("[[keys]\n", "keys as TOML"),
        ('[[keys]]\nname = "a"\nkey = "secret"\nmay = ["infer"]', "`key`"),
        (GOOD.replace("infer", "everything"), "everything"),
        (GOOD.replace("['infer']", "[]"), "may"),
        (GOOD.replace('"a"', '"a b"'), "name"),
        (GOOD.replace('"a"', '""'), "name"),
        (GOOD.replace('sha256 = "', 'sha256 = "0'), "sha256"),
        (GOOD + entry("b", "k", "admin"), "each sha256 once"),
        (GOOD + "more = 1\n", "more"),
        ("\xff", "keys as TOML"),
    ],
)
def test_an_invalid_key_file_is_an_error(tmp_path: Path, content: str, words: str) -> None:
    path = written(tmp_path)
    Path(path).write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        KeyRing(path)
    message = str(caught.value)
    assert message.startswith("api_keys: expected ")
    assert words in message
    assert path in message
    assert "clockwork key NAME" in message
    assert "secret" not in message


def test_a_missing_key_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_keys: expected a readable file; found No such file"):
        KeyRing(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_key_file_that_others_may_write_is_rejected(path: str, mode: int) -> None:
    Path(path).chmod(mode)
    with pytest.raises(ConfigError, match=f"only its owner may write; found mode {mode:04o} .*chmod 600"):
        KeyRing(path)


def test_a_key_file_that_everyone_may_read_is_warned_of(path: str, caplog: pytest.LogCaptureFixture) -> None:
    Path(path).chmod(0o640)
    check_keys(path)
    assert not caplog.records
    Path(path).chmod(0o644)
    check_keys(path)
    assert "chmod 600" in caplog.text


def test_a_changed_key_file_is_loaded(path: str) -> None:
    ring = KeyRing(path)
    replaced(path, entry("team-b", "beta", "infer"))
    ring.authorize(Right.INFER, None, b"alpha")
    ring.refresh()
    assert ring.authorize(Right.INFER, None, b"beta").name == "team-b"
    with pytest.raises(AccessDenied):
        ring.authorize(Right.INFER, None, b"alpha")


def test_an_invalid_change_is_logged_once_and_ignored(path: str, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(path)
    good = Path(path).read_text()
    replaced(path, "nonsense")
    for _ in range(3):
        ring.refresh()
        assert ring.authorize(Right.INFER, None, b"alpha").name == "team-a"
    Path(path).unlink()
    ring.refresh()
    assert ring.authorize(Right.INFER, None, b"alpha").name == "team-a"
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    replaced(path, good + entry("c", "gamma", "infer"))
    ring.refresh()
    assert ring.authorize(Right.INFER, None, b"gamma").name == "c"


def test_denials_are_logged_without_the_key(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ring = KeyRing(path)
    for right, key in ((Right.INFER, b"guess"), (Right.ADMIN, b"alpha"), (Right.INFER, None)):
        with pytest.raises(AccessDenied):
            ring.authorize(right, None, key)
    ring.refresh()
    ring.refresh()
    (record,) = caplog.records
    assert record.getMessage() == ("api_keys: denied 2 requests without a known key and 1 without the right")
