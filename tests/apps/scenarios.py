"""Small scenarios that the tests of this folder simulate."""

from __future__ import annotations

from pathlib import Path

ZOO = """model,weights_mb,load_ms,infer_b1_ms,infer_b2_ms
small,16,2,4,6
large,64,8,10,
"""

STEADY = """
name = "steady"
seconds = 4
warmup_s = 1

[cluster]
zoo = "two.csv"
memory_mib = 256

[[models]]
name = "s"
kind = "small"
copies = 2

[[loads]]
name = "web"
models = ["s"]
arrivals = "poisson"
rate_rps = 100
slo_ms = 100
"""

SURGE = (
    STEADY
    + """
[[models]]
name = "l"
kind = "large"

[[loads]]
name = "surge"
models = ["l"]
arrivals = "fixed"
rate_rps = 200
slo_ms = 50
start_s = 2.5
"""
)


def written(folder: Path, text: str = STEADY) -> str:
    """A scenario in a file, beside its table of models."""
    (folder / "two.csv").write_text(ZOO)
    file = folder / "scenario.toml"
    file.write_text(text)
    return str(file)
