"""Every public method of the four stock clients, called; what came is what the table in the docs says."""

from __future__ import annotations

import pytest

from harness.serving import Serving
from tests.end_to_end.conftest import ROOT
from tests.end_to_end.stock.cases import CASES
from tests.end_to_end.stock.conftest import CLIENTS, Stock

PAGE = ROOT / "docs" / "use" / "clients.md"
ABSENT = ""


def public_methods(name: str) -> list[str]:
    return [each for each in dir(CLIENTS[name].InferenceServerClient) if not each.startswith("_")]


def table() -> dict[str, list[str]]:
    """Method to cells, from the page: one for each client, then a remark."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells if row[0].strip("`") in CASES}


EVERY = [(name, method) for name in CLIENTS for method in public_methods(name)]


@pytest.mark.parametrize(("name", "method"), EVERY)
def test_a_method_does_what_the_page_says(stock_server: Serving, name: str, method: str) -> None:
    assert method in CASES, f"no case for {name}.{method}: add one to cases.py, and its row to {PAGE.name}"
    stock = Stock(name, stock_server)
    try:
        found = CASES[method](stock)
    finally:
        stock.close()
    assert method in stock.called
    told = table()[method][list(CLIENTS).index(name)]
    assert told == found, f"{PAGE.name}, row `{method}`, column {name}: expected {found}, found {told}"


def test_the_page_has_a_row_for_each_method_and_no_other() -> None:
    methods = {name: set(public_methods(name)) for name in CLIENTS}
    known = set().union(*methods.values())
    assert list(table()) == [method for method in CASES if method in known]
    for method, cells in table().items():
        absent = [name for name, cell in zip(CLIENTS, cells, strict=False) if cell == ABSENT]
        assert absent == [name for name in CLIENTS if method not in methods[name]], method
