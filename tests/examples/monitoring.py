"""What the rules and the dashboard of ``examples/monitoring`` ask Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "monitoring"
BY_PROMETHEUS = frozenset({"job", "instance"})
"""Labels that Prometheus gives every sample, and all that its own ``up`` has."""
_CHOICE = re.compile(r"label_values\((.+), (\w+)\)")


class Query(NamedTuple):
    """An expression, where it stands, and labels that the text beside it shows."""

    where: str
    expression: str
    shown: frozenset[str]


def rules() -> list[dict[str, Any]]:
    """All rules."""
    found = yaml.safe_load((FOLDER / "clockwork.rules.yml").read_text(encoding="utf-8"))
    return [rule for group in found["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """The dashboard as it is shipped."""
    found: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return found


def queries(instance: str = "127.0.0.1:8002") -> Iterator[Query]:
    """Every expression, with Grafana's variables as it fills them in for one server and all that it has."""
    for rule in rules():
        texts = " ".join(rule.get("annotations", {}).values())
        name = rule.get("alert") or rule["record"]
        yield Query(name, rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", texts)))
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            shown = frozenset(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            yield Query(panel["title"], _filled(target["expr"], instance), shown)
    for variable in dashboard()["templating"]["list"]:
        if found := _CHOICE.fullmatch(variable["query"]):
            yield Query(variable["name"], _filled(found[1], instance), frozenset({found[2]}))


def _filled(expression: str, instance: str) -> str:
    text = expression.replace("$__rate_interval", "1m").replace("$__range", "1h")
    return re.sub(r"\$\w+", ".*", text.replace("$instance", instance))


def asked(query: Query) -> dict[str, set[str]]:
    """The labels that an expression wants of each metric."""
    found: dict[str, set[str]] = {}
    _walk(promql_parser.parse(query.expression), found)
    return found


def lacking(query: Query, known: Mapping[str, frozenset[str]]) -> set[str]:
    """Metrics and labels that a query wants, or what shows it, and that are not among those known."""
    wanted = asked(query)
    labels = {label for name in wanted for label in known.get(name, ())}
    return {
        *(name for name in wanted if name not in known),
        *(f"{name}{{{label}}}" for name in wanted for label in wanted[name] - known.get(name, frozenset())),
        *(query.shown - labels),
    }


def _walk(expression: Any, found: dict[str, set[str]]) -> set[str]:
    """Note matchers, groupings and matchings; the names of the metrics inside."""
    if isinstance(expression, promql_parser.MatrixSelector):
        return _walk(expression.vector_selector, found)
    if isinstance(expression, promql_parser.VectorSelector):
        assert expression.name, "a metric is named"
        found.setdefault(expression.name, set()).update(
            matcher.name for matcher in expression.matchers.matchers
        )
        return {expression.name}
    labels: set[str] = set()
    match expression:
        case promql_parser.BinaryExpr():
            parts = [expression.lhs, expression.rhs]
            if expression.modifier is not None and expression.modifier.matching is not None:
                labels.update(expression.modifier.matching.labels)
        case promql_parser.AggregateExpr():
            parts = [expression.expr]
            if expression.modifier is not None:
                labels.update(expression.modifier.labels)
        case promql_parser.Call():
            parts = list(expression.args)
        case promql_parser.ParenExpr() | promql_parser.UnaryExpr() | promql_parser.SubqueryExpr():
            parts = [expression.expr]
        case _:
            parts = []
    inside = {name for part in parts for name in _walk(part, found)}
    for name in inside:
        found[name] |= labels
    return inside


def recorded() -> Mapping[str, frozenset[str]]:
    """What the rules record, and the labels that it has: the name begins with them."""
    names = [rule["record"] for rule in rules() if "record" in rule]
    return {name: frozenset(name.partition(":")[0].split("_")) | BY_PROMETHEUS for name in names}
