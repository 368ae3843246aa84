"""What the controller believes, as plain data that encodes as JSON, for screens."""

from __future__ import annotations

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, Residency
from clockwork_serve.controller.life import READY


def snapshot(belief: Belief, quarantined: dict[str, str]) -> dict[str, object]:
    """Queues, devices, resident models and tenants; and why models are ``quarantined``, by key."""
    return {
        "in_flight": len(belief.waiters),
        "waiting": {key: model.waiting for key, model in belief.models.items() if model.waiting},
        "models": len(belief.models),
        "quarantined": quarantined,
        "hung": {name: one.why for name, one in belief.hung.items()},
        "devices": [_device(device) for device in belief.devices.values()],
        "tenants": belief.tenants.snapshot(),
    }


def _device(device: DeviceBelief) -> dict[str, object]:
    ready: list[Residency] = [one for one in device.pages.holders() if one.state == READY]
    return {
        "device": device.name, "kind": device.spec.kind, "worker": device.worker, "warm": device.warm,
        "pages": device.spec.pages, "page_bytes": device.spec.page_bytes, "pages_used": device.pages.used,
        "resident": [residency.model.key for residency in ready],
        "codes": len(device.codes), "failed_codes": device.failed_codes,
        "pending_codes": len(device.pending_codes),
        "exec_outstanding": len(device.exec), "load_outstanding": len(device.load),
    }  # fmt: skip
