"""Builds the package; with ``CLOCKWORK_MYPYC=1`` the brains and the simulator's loop are compiled by mypyc.

Decides nothing. Records (``msgspec.Struct``) cannot be compiled, so a module that defines one stays as it is;
so does the protocol of policies, of which other packages' interpreted classes must be instances.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup

SOURCE = Path("src/clockwork_serve")

PROTOCOL = SOURCE / "controller" / "policies" / "base.py"

LOOP = ("checks", "faults", "host", "simulation", "tally")
"""Modules of the simulator that every simulated request passes through."""


def hot() -> list[str]:
    """The modules of the controller, the worker and the simulator's loop that mypyc can compile."""
    files = [*SOURCE.glob("controller/**/*.py"), *SOURCE.glob("worker/**/*.py")]
    files += [SOURCE / "sim" / f"{name}.py" for name in LOOP]
    return sorted(
        str(path)
        for path in files
        if path.name != "__init__.py" and path != PROTOCOL and "(Struct" not in path.read_text()
    )


def main() -> None:
    """Run setuptools."""
    if os.environ.get("CLOCKWORK_MYPYC") != "1":
        setup()
        return
    from mypyc.build import mypycify

    setup(ext_modules=mypycify(["--strict", *hot()], opt_level="3", group_name="clockwork_brains"))


if __name__ == "__main__":  # as setuptools runs it
    main()
