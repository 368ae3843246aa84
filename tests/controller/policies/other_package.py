"""A package of policies that is not ours, as its metadata and its module in a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

POLICY = """
from clockwork_serve.controller.policies import PaperScheduler


class Counting:
    '''The paper's choices, by a policy that has one and is none; it tells which calls came.'''

    def __init__(self, belief):
        self.inner = PaperScheduler(belief)
        self.calls = set()

    def queued(self, queue):
        self.calls.add("queued")
        self.inner.queued(queue)

    def loaded(self, residency):
        self.calls.add("loaded")
        self.inner.loaded(residency)

    def exec_changed(self, device):
        self.calls.add("exec_changed")
        self.inner.exec_changed(device)

    def load_changed(self, device):
        self.inner.load_changed(device)

    def device_changed(self, device):
        self.inner.device_changed(device)

    def device_lost(self, device):
        self.inner.device_lost(device)

    def schedule(self, now_ns):
        self.calls.add("schedule")
        self.inner.schedule(now_ns)

    def fired(self, timer):
        self.inner.fired(timer)

    def check(self):
        assert self.calls
        self.inner.check()


class Lacking:
    def __init__(self, belief):
        pass

    def queued(self, queue):
        pass
"""


def written(folder: Path) -> str:
    """What Python is to import from for a package ``other-policies`` to be there."""
    (folder / "other_policies.py").write_text(POLICY)
    metadata = folder / "other_policies-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-policies\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[clockwork_serve.policies]\n"
        "counting = other_policies:Counting\n"
        "lacking = other_policies:Lacking\n"
        "gone = other_policies:Gone\n"
        "default = other_policies:Lacking\n"
    )
    return os.pathsep.join((str(folder), *sys.path))
