"""The one reader of settings: command line over environment over file over defaults. It starts nothing."""

from __future__ import annotations

from clockwork_serve.config.reader import Settings, read_settings
from clockwork_serve.config.table import SETTINGS, Setting, default_cache, setting

__all__ = ["SETTINGS", "Setting", "Settings", "default_cache", "read_settings", "setting"]
