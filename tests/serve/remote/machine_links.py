"""Both ends of a link between machines."""

from __future__ import annotations

from typing import Any

import msgspec

from clockwork_serve.messages import Role
from clockwork_serve.serve.remote.config import ClusterFiles, context_of
from clockwork_serve.serve.remote.link import MachineLink, connect_machine
from clockwork_serve.serve.transport import hello
from tests.serve.certificates import Certificates
from tests.serve.links import Side

SILENCE_S = 0.5


def ours(made: Certificates) -> ClusterFiles:
    return ClusterFiles(certificate=made.certificate, key=made.key, ca=made.ca)


def theirs(made: Certificates) -> ClusterFiles:
    return ClusterFiles(certificate=made.client_certificate, key=made.client_key, ca=made.ca)


async def connect(
    side: Side, port: int, files: ClusterFiles, silence_s: float = SILENCE_S, **fields: Any
) -> MachineLink:
    own = msgspec.structs.replace(hello(Role.WORKER, "w"), **fields)
    context = context_of(files, server=False)
    return await connect_machine(("127.0.0.1", port), context, own, side.on_frames, side.on_lost, silence_s)
