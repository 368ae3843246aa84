"""Files of API keys."""

from __future__ import annotations

import hashlib
from pathlib import Path


def entry(name: str, key: str, *may: str) -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nmay = {list(may)}\n'


def written(folder: Path, *entries: str) -> str:
    path = folder / "keys.toml"
    path.write_text("\n".join(entries))
    path.chmod(0o600)
    return str(path)


def replaced(path: str, content: str) -> None:
    new = Path(f"{path}.new")
    new.write_text(content)
    new.chmod(0o600)
    new.replace(path)
