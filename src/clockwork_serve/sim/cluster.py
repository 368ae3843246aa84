"""What is simulated: how many devices, of what size, on how many workers."""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.messages import DeviceSpec
from clockwork_serve.units import GIB, MIB


class Cluster(Struct, frozen=True, kw_only=True):
    """Devices to simulate, all alike: those of the paper, with 1376 pages of 16 MiB for weights.

    Where ``lanes_share``, they are like a CPU of one core: a LOAD and an INFER are not done at once.
    """

    devices: int = 1
    devices_per_worker: int = 1
    pages: int = 1376
    page_bytes: int = 16 * MIB
    lanes_share: bool = False

    def specs(self, kind: str) -> list[tuple[DeviceSpec, ...]]:
        """The devices of each worker."""
        specs = [
            DeviceSpec(
                device=f"gpu{at}", kind=kind, pages=self.pages, page_bytes=self.page_bytes,
                workspace_bytes=GIB, io_bytes=GIB, lanes_share=self.lanes_share,
            )
            for at in range(self.devices)
        ]  # fmt: skip
        step = self.devices_per_worker
        return [tuple(specs[at : at + step]) for at in range(0, len(specs), step)]
