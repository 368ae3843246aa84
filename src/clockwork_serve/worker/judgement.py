"""Why an action whose turn it is can not start: its window, the pages. It looks, and changes nothing."""

from __future__ import annotations

from clockwork_serve.messages import Extent, Infer, Load, Status, Unload
from clockwork_serve.worker.admission import Refusal
from clockwork_serve.worker.pages import WEIGHTS_READY, Held, Pages


def judge_load(action: Load, pages: Pages, now_ns: int) -> Refusal | None:
    """Weights go only where nothing is."""
    late_ns = now_ns - action.window.latest_ns
    if late_ns > 0:
        return too_late(late_ns)
    holders = pages.overlapping(action.extent)
    for held in holders:
        if held.state is not WEIGHTS_READY or held.readers:
            return Status.IN_USE, f"{_pages(held.extent)} are in use by {held.model}"
    if holders:
        return Status.NO_ROOM, f"{_pages(holders[0].extent)} hold {holders[0].model}; UNLOAD it first"
    return None


def leaving(extent: Extent, pages: Pages) -> bool:
    """Whether an extent holds only what no controller wants: it is believed gone, and goes when unread."""
    return all(held.stale for held in pages.overlapping(extent))


def judge_unload(action: Unload, held: Held | None, pages: Pages, now_ns: int) -> Refusal | None:
    """Weights go only while nothing reads them. ``held`` is what is in the action's extent.

    Stale ones are gone for the controller, and the worker unloads them itself (with an id below zero).
    """
    late_ns = now_ns - action.window.latest_ns
    if late_ns > 0:
        return too_late(late_ns)
    if held is None or held.model != action.model or held.state is not WEIGHTS_READY:
        return missing(pages, action)
    if held.stale and action.action_id > 0:
        return missing(pages, action)
    if held.readers:
        return Status.IN_USE, f"an INFER reads its weights in {_pages(held.extent)}"
    return None


def missing(pages: Pages, action: Infer | Unload) -> Refusal:
    """Its extent does not hold its weights."""
    extent = action.extent
    found = [
        f"{held.model} version {held.version}{' that is to go' if held.stale else ''}"
        for held in pages.overlapping(extent)
    ]
    expected = f"expected its weights, version {action.version}, in {_pages(extent)}"
    return Status.WEIGHTS_MISSING, f"{expected}; found {', '.join(found) or 'none'}"


def too_late(late_ns: int) -> Refusal:
    """Its window closed before its turn came."""
    return Status.TOO_LATE, f"its window closed {late_ns} ns before its lane was free"


def _pages(extent: Extent) -> str:
    return f"pages {extent.first}..{extent.first + extent.count - 1}"
