"""The page about workloads: every field of every table, its default, nothing that is not there."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from msgspec import NODEFAULT
from msgspec.structs import fields

from clockwork_serve.workload.scenario import (
    ClusterTable,
    FaultTable,
    LoadTable,
    ModelSet,
    Ramp,
    Scenario,
    TenantTable,
    read_scenario,
)
from clockwork_serve.workload.tables import _USED, DEFAULTS, Arrival, FaultKind, Mapping
from tests.workload.scenarios import ROOT

PAGE = (ROOT / "docs" / "use" / "workloads.md").read_text()
TABLES = {
    "## The run": Scenario,
    "## `[[models]]`": ModelSet,
    "## `[[loads]]`": LoadTable,
    "### Ramps": Ramp,
    "## `[[tenants]]`": TenantTable,
    "## `[cluster]`": ClusterTable,
    "## `[[faults]]`": FaultTable,
}


def section(title: str) -> str:
    after = PAGE[PAGE.index(f"\n{title}") + 1 :]
    return re.split(r"\n##+ ", after)[0]


def rows(title: str) -> list[list[str]]:
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", section(title), re.MULTILINE)
    return [[name, *rest.split(" | ")] for name, rest in found]


@pytest.mark.parametrize("title", TABLES)
def test_each_field_is_there_with_its_default(title) -> None:
    special = {"cluster": "one device", "faults": "none", "tenants": "none", "groups": "none"}
    expected = []
    for one in fields(TABLES[title]):
        if one.name == "source":
            continue
        default = one.default
        shown = "required" if default is NODEFAULT else "none" if default is None else default
        shown = str(shown).lower() if isinstance(shown, bool) else shown  # as TOML has it
        shown = special.get(one.name, f"{shown:g}" if isinstance(shown, float) else str(shown))
        expected.append((one.name, shown))

    assert sorted((row[0], row[1]) for row in rows(title)) == sorted(expected)


def test_each_field_says_which_arrivals_use_it() -> None:
    for name, _, used, _ in rows("## `[[loads]]`"):
        by = {kind for kind in get_args(Arrival) if name in _USED[kind]}
        if name not in DEFAULTS or used == "all":
            assert not by
        elif used == "all but closed":
            assert by == set(get_args(Arrival)) - {"closed"}
        elif not used.startswith("with "):
            assert by == set(used.replace(" 2019", "").split(", ")), name


@pytest.mark.parametrize(
    ("title", "names"), [("### Arrivals", get_args(Arrival)), ("### Traces", get_args(Mapping))]
)
def test_each_choice_is_explained(title, names) -> None:
    assert [row[0] for row in rows(title)][1:] == list(names)


def test_each_kind_of_fault_is_explained() -> None:
    kinds = next(row[2] for row in rows("## `[[faults]]`") if row[0] == "kind")

    assert set(re.findall(r"`(\w+)`", kinds)) == set(get_args(FaultKind))


def test_the_first_scenario_of_the_page_is_read_and_its_mistake_is_the_one_shown(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert text is not None
    (tmp_path / "first.toml").write_text(text.group(1))
    assert read_scenario("first.toml").loads[0].rate_rps == 400

    (tmp_path / "first.toml").write_text(text.group(1).replace("rate_rps", "rate_rsp"))
    with pytest.raises(Exception, match="did you mean") as caught:
        read_scenario("first.toml")
    assert f"    {caught.value}\n" in PAGE


def test_each_example_is_named() -> None:
    examples = {file.stem for file in (ROOT / "examples" / "scenarios").glob("*.toml")}

    assert {"fig5", "mixed", "burst", "zipf", "azure"} <= examples
