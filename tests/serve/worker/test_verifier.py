"""Weights are verified in the background, each once, and damage is reported."""

from __future__ import annotations

import pytest

from clockwork_serve.errors import DamageError, DeviceError
from clockwork_serve.integrity import damage
from clockwork_serve.messages import Weights
from clockwork_serve.serve.worker.host import Verifier


class VerifyingDevice:
    """A device that can verify: it finds ``bad`` weights damaged, and cannot read ``odd`` ones."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def verify(self, weights: Weights) -> None:
        self.seen.append(weights.weights_id)
        if weights.weights_id == "bad":
            raise damage("weights", "bad", weights.path, "other content")
        if weights.weights_id == "odd":
            raise DeviceError("it cannot be read")


def blob(name: str) -> Weights:
    return Weights(weights_id=name, path=f"/cache/{name}.bin", size=1)


def test_all_are_verified_and_damage_is_reported() -> None:
    device, found = VerifyingDevice(), list[DamageError]()
    verifier = Verifier([device], found.append)  # type: ignore[list-item]
    for name in ("good", "odd", "bad", "last"):
        verifier.add(blob(name))
    verifier.join()
    assert sorted(device.seen) == ["bad", "good", "last", "odd"]
    assert [(error.what, error.name) for error in found] == [("weights", "bad")]


@pytest.mark.parametrize("path", ["/a/folder", ""])
def test_weights_that_are_no_file_of_their_own_are_not_verified(path: str) -> None:
    device = VerifyingDevice()
    verifier = Verifier([device], lambda error: None)  # type: ignore[list-item]
    verifier.add(Weights(weights_id="w", path=path, size=1))
    verifier.join()
    assert device.seen == []


def test_after_close_nothing_is_verified() -> None:
    device = VerifyingDevice()
    verifier = Verifier([device], lambda error: None)  # type: ignore[list-item]
    verifier.close()
    verifier.add(blob("late"))
    verifier.join()
    assert device.seen == []
