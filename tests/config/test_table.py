"""Every setting."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.config import SETTINGS, Settings, default_cache, setting
from clockwork_serve.config.former import FORMER_COMMANDS, FORMER_OPTIONS, FORMER_SETTINGS
from clockwork_serve.config.table import NOT_SET

# The table of settings and the page that explains it say the same.


PAGE = Path(__file__).resolve().parents[2] / "docs" / "operate" / "configuration.md"


def test_the_page_has_each_setting_with_its_default_and_meaning() -> None:
    table = PAGE.read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", table, re.MULTILINE)

    assert rows == [(entry.name, entry.shown or NOT_SET, entry.help) for entry in SETTINGS]


def test_the_page_has_each_name_of_earlier_versions_with_what_does_its_work_now() -> None:
    table = PAGE.read_text().partition("\n## Names of earlier versions\n")[2].partition("\n## ")[0]
    former = {**FORMER_SETTINGS, **FORMER_COMMANDS, **FORMER_OPTIONS}

    assert re.findall(r"^\| `(.+?)` \| (.*) \|$", table, re.MULTILINE) == [*former.items()]


def test_one_name_serves_everywhere() -> None:
    assert setting("slo_ms").variable == "CLOCKWORK_SLO_MS"
    assert setting("slo_ms").flag == "--slo-ms"


def test_the_cache_is_the_user_s(tmp_path: Path) -> None:
    assert default_cache({"XDG_CACHE_HOME": str(tmp_path)}) == str(tmp_path / "clockwork-serve")
    assert default_cache({}).endswith("/.cache/clockwork-serve")


@pytest.mark.parametrize(
    ("store", "lease_s"), [("/srv/store", 1.0), ("file:///srv/store", 1.0), ("s3://bucket/store", 10.0)]
)
def test_a_lease_lasts_longer_at_a_url(store: str, lease_s: float) -> None:
    settings = Settings(store=store)
    assert settings.lease_time_s == lease_s
    assert msgspec.structs.replace(settings, lease_s=2.0).lease_time_s == 2.0
