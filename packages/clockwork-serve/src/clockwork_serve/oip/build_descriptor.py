"""Writes ``descriptors.binpb`` from the ``.proto`` files beside it; for developers, never used to serve.

python -m clockwork_serve.oip.build_descriptor      (needs grpcio-tools)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
TARGET: Final = HERE / "descriptors.binpb"
SOURCES: Final = ("health.proto", "reflection.proto", "model_config.proto", "inference.proto")


def build() -> bytes:
    """The sources as one serialised FileDescriptorSet."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    compiler: Any = protoc
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors.binpb"
        status = compiler.main(["protoc", f"-I{HERE}", f"--descriptor_set_out={out}", *SOURCES])
        if status != 0:
            sys.exit(f"protoc ended with status {status}")
        return out.read_bytes()


if __name__ == "__main__":
    TARGET.write_bytes(build())
