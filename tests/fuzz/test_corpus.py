"""Every input that is kept is read or refused: good ones are accepted, and none ends a parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.engine import CORPUS, NAMES, check, target

INPUTS = [(name, path) for name in NAMES for path in sorted((CORPUS / name).glob("*.seed"))]


@pytest.mark.parametrize(("name", "path"), INPUTS, ids=[f"{name}-{path.stem}" for name, path in INPUTS])
def test_an_input_is_read_or_refused(name: str, path: Path) -> None:
    accepted = check(target(name), path.read_bytes())

    assert accepted or not path.name.startswith("good")


def test_every_parser_has_an_input_that_it_accepts() -> None:
    assert [name for name in NAMES if not list((CORPUS / name).glob("*.seed"))] == []
    assert sorted(path.name for path in CORPUS.iterdir() if path.name not in NAMES) == []


def test_the_corpus_is_small() -> None:
    sizes = {name: sum(path.stat().st_size for path in (CORPUS / name).glob("*.seed")) for name in NAMES}

    assert {name: size for name, size in sizes.items() if size > 64_000} == {}
