"""The table of settings and the page that explains it say the same."""

from __future__ import annotations

import re
from pathlib import Path

from clockwork_serve.config import SETTINGS, default_cache, setting

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operate" / "configuration.md"


def test_the_page_has_each_setting_with_its_default_and_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)

    assert rows == [(entry.name, entry.shown or "(none)", entry.help) for entry in SETTINGS]


def test_one_name_serves_everywhere() -> None:
    assert setting("slo_ms").variable == "CLOCKWORK_SLO_MS"
    assert setting("slo_ms").flag == "--slo-ms"


def test_the_cache_is_the_user_s(tmp_path: Path) -> None:
    assert default_cache({"XDG_CACHE_HOME": str(tmp_path)}) == str(tmp_path / "clockwork-serve")
    assert default_cache({}).endswith("/.cache/clockwork-serve")
