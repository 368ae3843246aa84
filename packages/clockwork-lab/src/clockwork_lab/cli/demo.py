"""``clockwork demo``: real models and inputs, one screen of results, by ``clockwork_lab.demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clockwork_serve.cli.options import setting_options, settings_from


@click.command()
@click.option("--json", "json_file", metavar="FILE", help="Also write the results to FILE, for machines.")
@click.option(
    "--seconds", type=float, default=35.0, metavar="SECONDS", help="Length of the load. [default: 35]"
)
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the load. [default: 0]")
@click.option("--offline", is_flag=True, help="Download nothing; use cached files, or the example models.")
@setting_options("cache")
def demo(json_file: str | None, config: str | None, cache: str | None, **choices: Any) -> int:
    """Serve real pretrained models under load and show what came of it (about 4 minutes, once fetched)."""
    from clockwork_lab.demo.start import DemoOptions, run

    settings = settings_from(None, config, {"cache": cache}, needs_repository=False)
    json = None if json_file is None else Path(json_file)
    return run(DemoOptions(json=json, cache=Path(settings.cache), **choices))
