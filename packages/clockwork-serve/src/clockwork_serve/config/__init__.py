"""The settings of all processes, and their reader."""

from __future__ import annotations

from clockwork_serve.config.reader import read_settings
from clockwork_serve.config.table import CLUSTER_NAME, SETTINGS, Setting, Settings, default_cache, setting

__all__ = ["CLUSTER_NAME", "SETTINGS", "Setting", "Settings", "default_cache", "read_settings", "setting"]
