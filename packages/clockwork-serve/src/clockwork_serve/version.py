"""The version of this package; what a controller saves names it."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.2.0"
