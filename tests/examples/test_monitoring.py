"""The rules and the dashboard of ``examples/monitoring``, without a server: ``tests/end_to_end`` has one."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess

import pytest

from tests.examples import monitoring

pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed: make setup")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed; Debian's package prometheus has it"
)


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=monitoring.FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    assert f"{len(monitoring.rules())} rules found" in promtool(
        "check", "rules", "--lint=all", "clockwork.rules.yml"
    )
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")


@needs_promtool
def test_alerts_fire_for_what_they_say_and_for_nothing_else() -> None:
    assert "SUCCESS" in promtool("test", "rules", "clockwork.rules.test.yml")


def test_every_alert_is_seen_to_fire() -> None:
    told = (monitoring.FOLDER / "clockwork.rules.test.yml").read_text(encoding="utf-8")
    alerts = [rule["alert"] for rule in monitoring.rules() if "alert" in rule]
    assert len(alerts) == len(set(alerts)) > 20
    assert [name for name in alerts if f'alertname="{name}"' not in told] == []


def test_the_page_lists_every_alert_with_its_severity() -> None:
    page = monitoring.FOLDER.parents[1] / "docs" / "operate" / "monitoring.md"
    rows = re.findall(r"^\| `(Clockwork\w+)` \| (\w+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    alerts = {rule["alert"]: rule["labels"]["severity"] for rule in monitoring.rules() if "alert" in rule}
    assert len(rows) == len(alerts)
    assert dict(rows) == alerts


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    for rule in monitoring.rules():
        if "alert" not in rule:
            continue
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description", "action", "runbook"}, rule["alert"]
        assert all(rule["annotations"].values()), rule["alert"]


def test_each_expression_asks_for_metrics_by_name() -> None:
    for query in monitoring.queries():
        asked = monitoring.asked(query)
        assert asked, query.where
        assert all(re.fullmatch(r"clockwork_\w+|up|\w+:clockwork_\w+:\w+", name) for name in asked), asked


def test_what_the_rules_record_has_the_labels_that_are_asked_of_it() -> None:
    recorded = monitoring.recorded()
    for query in monitoring.queries():
        for name, labels in monitoring.asked(query).items():
            if ":" in name:
                assert labels <= recorded[name], query.where


def test_the_dashboard_is_whole_without_the_rules() -> None:
    panels = {panel["title"] for panel in monitoring.dashboard()["panels"]}
    assert panels >= {"Now", "Devices", "Models", "Tenants", "Health"}
    for query in monitoring.queries():
        if query.where in panels:
            assert not any(":" in name for name in monitoring.asked(query)), query.where


def test_the_dashboard_is_what_its_script_makes_of_grafana_s_schema() -> None:
    made = runpy.run_path(str(monitoring.FOLDER / "make_dashboard.py"))
    assert made["FILE"].read_text(encoding="utf-8") == made["dashboard"](), (
        "run examples/monitoring/make_dashboard.py"
    )


def test_every_field_of_the_dashboard_is_one_of_grafana_s_schema() -> None:
    """So one that is misspelt, or was added by hand, is found."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    shipped = monitoring.dashboard()
    read = Dashboard.from_json(shipped)
    assert json.loads(JSONEncoder().encode(read)) == shipped


def test_panels_have_ids_of_their_own_and_queries_a_data_source_that_is_chosen() -> None:
    panels = monitoring.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
            assert panel["description"], panel["title"]
    names = [one["name"] for one in monitoring.dashboard()["templating"]["list"]]
    assert names == ["datasource", "instance", "device", "model", "tenant"]
