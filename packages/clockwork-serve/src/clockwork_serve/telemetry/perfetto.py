"""A file in Perfetto's trace format: slices, instants and counters on tracks, flows from one to another.

The format is protobuf, which gRPC needs anyway. Chrome's JSON, by msgspec alone, took 716 instead of 198
bytes a request, for 3.6 instead of 7.7 us of CPU (a million made-up requests of two slices, two flows and a
counter), and knows neither ns nor tracks inside tracks. Only the messages and fields that are used are
described here, by the format's names and numbers (``protos/perfetto/trace`` in Perfetto's sources).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import IO, Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from clockwork_serve.errors import printable
from clockwork_serve.units import NS_PER_S

_SCHEMA: Final = {
    "Trace": "packet=1:TracePacket*",
    "TracePacket": """
        clock_snapshot=6:ClockSnapshot timestamp=8:uint64 trusted_packet_sequence_id=10:uint32
        track_event=11:TrackEvent interned_data=12:InternedData sequence_flags=13:uint32
        track_descriptor=60:TrackDescriptor""",
    "ClockSnapshot": "clocks=1:Clock*",
    "Clock": "clock_id=1:uint32 timestamp=2:uint64",
    "TrackDescriptor": """
        uuid=1:uint64 name=2:string parent_uuid=5:uint64 counter=8:CounterDescriptor child_ordering=11:int32
        sibling_order_rank=12:int32""",
    "CounterDescriptor": "unit_name=6:string",
    "TrackEvent": """
        category_iids=3:uint64* debug_annotations=4:DebugAnnotation* type=9:int32 name_iid=10:uint64
        track_uuid=11:uint64 counter_value=30:int64 flow_ids=47:fixed64* terminating_flow_ids=48:fixed64*""",
    "DebugAnnotation": """
        name_iid=1:uint64 bool_value=2:bool int_value=4:int64 double_value=5:double string_value=6:string
        string_value_iid=17:uint64""",
    "InternedData": """
        event_categories=1:Interned* event_names=2:Interned* debug_annotation_names=3:Interned*
        debug_annotation_string_values=29:Interned*""",
    "Interned": "iid=1:uint64 name=2:string",
}
_TYPES: Final = {
    "double": 1, "int64": 3, "uint64": 4, "int32": 5, "fixed64": 6, "bool": 8, "string": 9, "bytes": 12,
    "uint32": 13, "fixed32": 7,
}  # fmt: skip
_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4
BY_NAME, BY_RANK = 1, 3
_BOOTTIME, _REALTIME = 6, 1
_STATE_CLEARED, _STATE_NEEDED = 1, 2
INT64_MAX: Final = (1 << 63) - 1
_PACKETS: Final = 500
_NAME_CHARS: Final = 200
"""Longer names of models and tenants are cut; messages are as long as ``printable`` lets them be."""
_REPEATED: Final = frozenset({"model", "gateway", "tenant", "outcome", "reason", "cause", "status"})
"""Arguments with few different values, which are written once and then by number."""

Args = Mapping[str, str | bool | int | float]


def message_classes(schema: Mapping[str, str]) -> dict[str, Any]:
    """The messages of a schema, in a pool of their own: another library may define the same names.

    Of each message it has the fields that are used: ``name=number:type``, with ``*`` where it is repeated.
    """
    file = descriptor_pb2.FileDescriptorProto(name="used.proto", package="used")
    for message, fields in schema.items():
        described: Any = file.message_type.add(name=message)
        for text in fields.split():
            name, _, rest = text.partition("=")
            number, _, kind = rest.rstrip("*").partition(":")
            field = described.field.add(name=name, number=int(number), label=3 if rest[-1] == "*" else 1)
            field.type = _TYPES.get(kind, 11)
            if kind in schema:
                field.type_name = f".used.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"used.{name}")) for name in schema
    }


class TraceFile:
    """Writes slices, instants and counters of tracks to ``out``; all instants are ns on the journal's clock.

    Foreign text is made printable.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._made = message_classes(_SCHEMA)["Trace"]
        self._trace = self._made()
        self._packet().sequence_flags = _STATE_CLEARED
        self._iids: dict[tuple[str, str], int] = {}
        self._tracks = 0
        self.since_ns, self.until_ns = 0, INT64_MAX  # what is to be written, on the file's clock
        self.offset_ns = 0
        """From the journal's clock to the file's: a later run may have a clock that began anew."""

    def covers(self, from_ns: int, to_ns: int) -> bool:
        """Whether what lasts from one instant to another is to be written, in part at least."""
        return to_ns + self.offset_ns >= self.since_ns and not self.past(from_ns)

    def past(self, at_ns: int) -> bool:
        """Whether nothing that begins then is to be written."""
        return at_ns + self.offset_ns > self.until_ns

    def clipped(self, at_ns: int) -> int:
        """That instant, or the nearest one that is to be written."""
        return min(max(at_ns, self.since_ns - self.offset_ns), self.until_ns - self.offset_ns)

    def clock(self, at_ns: int, wall: datetime) -> None:
        """At that instant it was that time of day."""
        snapshot = self._packet().clock_snapshot
        snapshot.clocks.add(clock_id=_BOOTTIME, timestamp=at_ns + self.offset_ns)
        snapshot.clocks.add(clock_id=_REALTIME, timestamp=max(0, int(wall.timestamp() * NS_PER_S)))

    def track(self, name: str, parent: int = 0, *, rank: int = 0, ordering: int = 0, unit: str = "") -> int:
        """A new track; with a ``unit`` it counts. Those of one name inside one parent are shown as one."""
        self._tracks += 1
        track = self._packet().track_descriptor
        track.uuid, track.name = self._tracks, printable(name, _NAME_CHARS)
        if parent:
            track.parent_uuid = parent
        if rank:
            track.sibling_order_rank = rank
        if ordering:
            track.child_ordering = ordering
        if unit:
            track.counter.unit_name = unit
        return self._tracks

    def begin(
        self, track: int, name: str, kind: str, at_ns: int, args: Args, flows: Sequence[int] = ()
    ) -> None:
        """The beginning of a slice, through which these flows lead.

        Events may be written in any order, but those that are equal in time are taken in that one.
        """
        self._event(_BEGIN, track, name, kind, at_ns, args).flow_ids.extend(flows)

    def end(self, track: int, at_ns: int) -> None:
        """The end of the slice that began last."""
        event = self._packet(at_ns).track_event
        event.type, event.track_uuid = _END, track

    def instant(
        self, track: int, name: str, kind: str, at_ns: int, args: Args, flows: Sequence[int] = ()
    ) -> None:
        """Something that takes no time, at which these flows end."""
        self._event(_INSTANT, track, name, kind, at_ns, args).terminating_flow_ids.extend(flows)

    def count(self, track: int, at_ns: int, value: int) -> None:
        """A counter's value from then on."""
        event = self._packet(at_ns).track_event
        event.type, event.track_uuid, event.counter_value = _COUNTER, track, value

    def flush(self) -> None:
        """Write what was collected."""
        self._out.write(self._trace.SerializeToString())
        self._trace = self._made()  # one that is cleared keeps its memory, and takes more for what comes

    def _event(self, what: int, track: int, name: str, kind: str, at_ns: int, args: Args) -> Any:
        name_iid, kind_iid = self._iid("event_names", name), self._iid("event_categories", kind)
        known = [self._iid("debug_annotation_names", key) for key in args]
        values = [
            self._iid("debug_annotation_string_values", str(value)) if key in _REPEATED else 0
            for key, value in args.items()
        ]
        event = self._packet(at_ns).track_event
        event.type, event.track_uuid, event.name_iid = what, track, name_iid
        event.category_iids.append(kind_iid)
        add = event.debug_annotations.add
        for key_iid, value_iid, value in zip(known, values, args.values(), strict=True):
            if value_iid:
                add(name_iid=key_iid, string_value_iid=value_iid)
            elif isinstance(value, str):
                add(name_iid=key_iid, string_value=printable(value))
            elif isinstance(value, bool):
                add(name_iid=key_iid, bool_value=value)
            elif isinstance(value, int):
                add(name_iid=key_iid, int_value=min(max(value, -INT64_MAX), INT64_MAX))
            else:
                add(name_iid=key_iid, double_value=value)
        return event

    def _iid(self, table: str, text: str) -> int:
        """The number of a text, which is written when it is first used."""
        known = self._iids.get((table, text))
        if known is None:
            known = self._iids[table, text] = len(self._iids) + 1
            getattr(self._packet().interned_data, table).add(iid=known, name=printable(text, _NAME_CHARS))
        return known

    def _packet(self, at_ns: int | None = None) -> Any:
        if len(self._trace.packet) >= _PACKETS:
            self.flush()
        packet = self._trace.packet.add(trusted_packet_sequence_id=1, sequence_flags=_STATE_NEEDED)
        if at_ns is not None:
            packet.timestamp = min(max(at_ns + self.offset_ns, 0), INT64_MAX)
        return packet


class SliceRows:
    """Tracks of one name, as many as have to lie beside each other: slices of one track may not overlap."""

    def __init__(self, file: TraceFile, name: str, parent: int, rank: int = 0) -> None:
        self._file, self._name, self._parent, self._rank = file, name, parent, rank
        self._free: list[tuple[int, int]] = []  # (end of its last slice on the file's clock, track), sorted

    def place(self, begin_ns: int, end_ns: int) -> int:
        """The track for a slice: of those that are free by then, the one that was used last."""
        offset_ns = self._file.offset_ns
        at = bisect_right(self._free, (begin_ns + offset_ns, INT64_MAX)) - 1
        if at >= 0:
            _, track = self._free.pop(at)
        else:
            track = self._file.track(self._name, self._parent, rank=self._rank)
        insort(self._free, (end_ns + offset_ns, track))
        return track

    def slice(
        self, name: str, kind: str, begin_ns: int, end_ns: int, args: Args, flows: Sequence[int] = ()
    ) -> None:
        """A slice, if the file covers it."""
        end_ns = max(begin_ns, end_ns)
        if self._file.covers(begin_ns, end_ns):
            track = self.place(begin_ns, end_ns)
            self._file.begin(track, name, kind, begin_ns, args, flows)
            self._file.end(track, end_ns)


class StateTrack:
    """A track of which one slice follows another: what is the case until it changes."""

    def __init__(self, file: TraceFile, name: str, parent: int, rank: int = 0) -> None:
        self._file, self._track = file, file.track(name, parent, rank=rank)
        self._now: tuple[int, str, Args] | None = None

    def become(self, name: str, at_ns: int, args: Args | None = None) -> None:
        """What is the case from then on; nothing, if that has no name."""
        if self._now is not None and self._file.covers(self._now[0], at_ns):
            since_ns, before, known = self._now
            self._file.begin(self._track, before, "state", self._file.clipped(since_ns), known)
            self._file.end(self._track, self._file.clipped(at_ns))
        self._now = (at_ns, name, args or {}) if name else None
