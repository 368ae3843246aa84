"""Reads a trace as Perfetto does, by its own description of the format, and asserts what holds of any."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # made by a protoc that is older than the library
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as format_

BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4
TABLES = ("event_categories", "event_names", "debug_annotation_names", "debug_annotation_string_values")


@dataclass(slots=True, eq=False)
class Drawn:
    """A slice or an instant; it lies on ``depth`` others of its track."""

    track: tuple[str, ...]
    name: str
    kind: str
    begin_ns: int
    end_ns: int
    args: dict[str, Any]
    flows: list[int]
    depth: int = 0


@dataclass(slots=True)
class Trace:
    """What a file holds; ``counts`` has the samples of each counter, ``flows`` the slices of each flow."""

    drawn: list[Drawn] = field(default_factory=list)
    counts: dict[tuple[str, ...], list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    flows: dict[int, list[Drawn]] = field(default_factory=lambda: defaultdict(list))
    tracks: dict[int, tuple[str, ...]] = field(default_factory=dict)
    wall: list[dict[int, int]] = field(default_factory=list)

    def of(self, kind: str) -> list[Drawn]:
        """What is of one category."""
        return [one for one in self.drawn if one.kind == kind]


def read_trace(data: Path | bytes) -> Trace:
    """What is in a file. Slices of a track lie one inside another, and every flow leads to another one."""
    trace = Trace()
    events: list[tuple[int, Any]] = []
    words: dict[str, dict[int, str]] = {table: {} for table in TABLES}
    packets = format_.Trace.FromString(data if isinstance(data, bytes) else data.read_bytes()).packet
    assert packets[0].sequence_flags == 1
    for packet in packets:
        assert packet.trusted_packet_sequence_id == 1
        for table in TABLES:
            for one in getattr(packet.interned_data, table):
                assert one.iid not in words[table]
                words[table][one.iid] = one.str.decode() if table == TABLES[-1] else one.name
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in trace.tracks
            trace.tracks[track.uuid] = (*trace.tracks.get(track.parent_uuid, ()), track.name)
        elif packet.HasField("clock_snapshot"):
            trace.wall.append({one.clock_id: one.timestamp for one in packet.clock_snapshot.clocks})
        elif packet.HasField("track_event"):
            events.append((packet.timestamp, packet.track_event))
    _draw(trace, sorted(events, key=lambda event: event[0]), words)
    return trace


def _draw(trace: Trace, events: list[tuple[int, Any]], words: dict[str, dict[int, str]]) -> None:
    open_: dict[int, list[Drawn]] = defaultdict(list)
    for at_ns, event in events:
        track, stack = trace.tracks[event.track_uuid], open_[event.track_uuid]
        if event.type == COUNTER:
            trace.counts[track].append((at_ns, event.counter_value))
        elif event.type == END:
            stack.pop().end_ns = at_ns
        else:
            (kind,) = (words["event_categories"][iid] for iid in event.category_iids)
            flows = [*event.flow_ids, *event.terminating_flow_ids]
            drawn = Drawn(
                track, words["event_names"][event.name_iid], kind, at_ns, at_ns, {}, flows, len(stack)
            )
            for one in event.debug_annotations:
                value = getattr(one, one.WhichOneof("value"))
                if one.HasField("string_value_iid"):
                    value = words["debug_annotation_string_values"][value]
                drawn.args[words["debug_annotation_names"][one.name_iid]] = value
            trace.drawn.append(drawn)
            for flow in flows:
                assert not any(one.kind in {"answer", "refusal"} for one in trace.flows[flow])
                trace.flows[flow].append(drawn)
            if event.type == BEGIN:
                stack.append(drawn)
    assert not any(open_.values())
    assert all(len(ends) > 1 for ends in trace.flows.values())
