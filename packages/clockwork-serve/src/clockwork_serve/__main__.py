"""``python -m clockwork_serve`` is ``clockwork``; nothing else happens here."""

from __future__ import annotations

from clockwork_serve.cli import main

if __name__ == "__main__":
    main()
