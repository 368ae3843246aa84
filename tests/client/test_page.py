"""The page of the client names every exception, every outcome and every example."""

from __future__ import annotations

from pathlib import Path

import pytest

import clockwork_serve
from clockwork_serve.messages import Outcome

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "use" / "client.md").read_text()
ERRORS = [
    name
    for name in clockwork_serve.__all__
    if isinstance(found := getattr(clockwork_serve, name), type) and issubclass(found, Exception)
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_exception_is_there(error):
    assert f"`{error}`" in PAGE


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_is_there(outcome):
    assert f"| `{outcome}` |" in PAGE


def test_every_example_is_there():
    examples = {path.name for path in (ROOT / "examples").glob("0*")}

    assert {name for name in examples if f"`examples/{name}`" in PAGE} == examples
