"""The controller's whole state, forked in memory, or saved as bytes and restored.

The state is plain records: no closures, no clocks, no handles. So a second controller can continue exactly
like the first, in the same process (``fork``) or in another one, now or later (``save``, ``restore``):
to explain a decision, to plan, to try how many devices are enough, or to keep a warm standby.

*Records* (``record.Record``) and their containers are copied. Everything else that a state refers to is
immutable (numbers, strings, messages, settings) and is shared by a fork. References between records, and the
order of every heap with its stale entries, are kept: decisions depend on them.

A fork of 1,000 models has to take a few milliseconds, so the records that exist once per model, request or
duration are copied field by field here, and all others by the names of their fields. A field that is
forgotten here is found by ``tests/controller/test_state.py``.
"""

from __future__ import annotations

import sys
from enum import Enum
from functools import partial
from hashlib import sha256
from typing import Any, Final, TypeVar

from msgspec import MsgspecError, Struct, msgpack

from clockwork_serve import messages
from clockwork_serve.controller import (
    admission,
    belief,
    cluster,
    codes,
    config,
    deadlines,
    estimates,
    feasibility,
    fleet,
    hangs,
    pages,
    placement,
    promises,
    quarantine,
    results,
    tenants,
    timers,
)
from clockwork_serve.controller.cluster import (
    DeviceBelief,
    Queue,
    Residency,
    ServedModel,
    Strategy,
    Waiter,
)
from clockwork_serve.controller.codes import BatchChoice
from clockwork_serve.controller.estimates import Samples
from clockwork_serve.controller.policies import FACTORIES, installed_modules
from clockwork_serve.controller.record import Record
from clockwork_serve.errors import StateError
from clockwork_serve.messages import Extent

FORMAT: Final = 14
"""Of saved states. To be raised with every change of a record's fields or of what they mean."""

MODULES: Final = (
    admission, belief, cluster, codes, deadlines, estimates, feasibility, fleet, hangs, pages, placement,
    promises, quarantine, results, tenants, timers, *(sys.modules[each.__module__] for each in FACTORIES),
)  # fmt: skip
"""Where the classes of records are, beside the controller's own: also in the modules of policies."""

Root = TypeVar("Root")

# Records without their fields: half as long as by the class's own ``__new__``.
new_batch: Final = partial(BatchChoice.__new__, BatchChoice)
new_model: Final = partial(ServedModel.__new__, ServedModel)
new_queue: Final = partial(Queue.__new__, Queue)
new_residency: Final = partial(Residency.__new__, Residency)
new_strategy: Final = partial(Strategy.__new__, Strategy)
new_waiter: Final = partial(Waiter.__new__, Waiter)

ATOMS: Final[frozenset[type]] = frozenset({bool, bytes, float, frozenset, int, str, type(None)})
"""Types of immutable values that refer to no record."""
CONTAINERS: Final[frozenset[type]] = frozenset({dict, list, set, tuple})
BUILTIN: Final[dict[str, type]] = {
    "dict": dict, "frozenset": frozenset, "list": list, "set": set, "tuple": tuple,
}  # fmt: skip


def classes_of_records() -> dict[str, type]:
    """All classes of records, by name."""
    return {
        name: kind
        for module in (*installed_modules(), *MODULES)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Record)
    }


def classes_of_values() -> dict[str, type]:
    """All classes of messages, settings and enumerations that a state may refer to, by name."""
    return {
        name: kind
        for module in (messages, config)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Struct | Enum)
    }


def check_pure() -> None:
    """Raise ``StateError`` if the records are compiled: mypyc makes none without its ``__init__``."""
    if hasattr(Queue, "__mypyc_attrs__"):
        raise StateError(
            "state: expected brains in pure Python; found them compiled by mypyc, which can not be forked "
            "or restored: build without CLOCKWORK_MYPYC"
        )


def fields_of(record: object) -> tuple[str, ...]:
    """The names of a record's fields, in a definite order."""
    kind = type(record)
    compiled: tuple[str, ...] | None = getattr(kind, "__mypyc_attrs__", None)
    if compiled is not None:
        return tuple([name for name in compiled if name != "__dict__"])
    names: list[str] = []
    for base in reversed(kind.__mro__):
        slots = base.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    names += getattr(record, "__dict__", ())
    return tuple(names)


# ------------------------------------------------------------
# A fork: each record is copied when it is first reached; copies without fields are filled from a list.


def fork(root: Root) -> Root:
    """A controller that continues exactly like this one; neither disturbs the other."""
    check_pure()
    forking = Forking()
    copy: Root = forking.twin(root)
    forking.fill()
    return copy


class Forking:
    """One fork in the making."""

    __slots__ = ("_containers", "_copied", "_empty", "_fields", "_shared", "_twins")

    def __init__(self) -> None:
        self._twins: dict[object, Any] = {}
        """Copies of records, which compare by identity."""
        self._containers: dict[int, Any] = {}
        """Copies of lists, dicts and tuples, by ``id``: some are referred to more than once."""
        self._empty: list[tuple[Any, Any]] = []
        """Records and their copies which have no fields yet."""
        self._fields: dict[type, tuple[str, ...]] = {}
        self._shared: set[type] = set(ATOMS)
        """Types of immutable values found so far."""
        self._copied: set[type] = set()
        """Types of records found so far."""

    def fill(self) -> None:
        """Fill the copies that have no fields yet."""
        empty, shared = self._empty, self._shared
        while empty:
            old, new = empty.pop()
            names = self._fields.get(type(old))
            if names is None:
                names = fields_of(old)
                if not hasattr(old, "__dict__"):
                    self._fields[type(old)] = names
            for name in names:
                value = getattr(old, name)
                setattr(new, name, value if type(value) in shared else self.twin(value))

    def twin(self, value: Any) -> Any:  # noqa: PLR0911 - one branch for each kind of record
        """The copy of a record or container; anything else itself."""
        kind: Any = type(value)
        if kind in self._shared:
            return value
        if kind in CONTAINERS:
            return self._container(value)
        if kind not in self._copied:
            if issubclass(kind, Struct | Enum):
                self._shared.add(kind)
                return value
            if not issubclass(kind, Record):
                raise TypeError(f"state: expected a Record or a value that never changes; found a {kind}")
            self._copied.add(kind)
        found = self._twins.get(value)
        if found is not None:
            return found
        if kind is Residency:
            return self._residency(value)
        if kind is Strategy:
            return self._strategy(value)
        if kind is ServedModel:
            return self._model(value)
        if kind is Queue:
            return self._queue(value)
        if kind is Waiter:
            return self._waiter(value)
        if kind is BatchChoice:
            return self._batch(value)
        if kind is Samples:
            self._twins[value] = samples = value.copy()
            return samples
        new = kind.__new__(kind)
        self._twins[value] = new
        self._empty.append((value, new))
        if kind is DeviceBelief:  # records that refer to a device refer to these two, too
            new.exec, new.agenda = self.twin(value.exec), self.twin(value.agenda)
        return new

    # Containers. Sets hold no records, and no list is shared whose entries are numbers.

    def _container(self, old: Any) -> Any:
        found = self._containers.get(id(old))
        if found is not None:
            return found
        if type(old) is set:
            self._containers[id(old)] = new = old.copy()
            return new
        if type(old) is tuple:
            made = tuple([self.twin(item) for item in old])
            if all(one is other for one, other in zip(old, made, strict=True)):
                made = old
            self._containers[id(old)] = made
            return made
        self._containers[id(old)] = new = type(old)()
        if type(old) is dict:
            shared = self._shared
            for key, value in old.items():
                new[key if type(key) in shared else self.twin(key)] = self.twin(value)
        elif old:
            new += self._items(old)
        return new

    def _items(self, old: list[Any]) -> list[Any]:
        """Copies of a list's items, which are of one type. In entries of a heap only the last is a record."""
        first, get = old[0], self._twins.get
        if type(first) is not tuple:
            return old if type(first) in self._shared else [self.twin(one) for one in old]
        if type(first[0]) is not int and type(first[0]) is not Extent:
            return [self.twin(one) for one in old]
        if len(first) == 2:
            return [(key, get(one) or self.twin(one)) for key, one in old]
        if len(first) == 3:
            return [(key, order, get(one) or self.twin(one)) for key, order, one in old]
        return [(*entry[:-1], self.twin(entry[-1])) for entry in old]

    # What there is one of for each model, each on a device, each request, each size of a batch

    def _model(self, old: ServedModel) -> ServedModel:
        new = new_model()
        twins = self._twins
        twins[old] = new
        new.arrived_ns = old.arrived_ns
        new.band_ns = old.band_ns
        new.base_ns = old.base_ns
        new.batch = old.batch
        new.code = old.code
        new.code_id = old.code_id
        new.demand_ns = old.demand_ns
        new.gap_ns = old.gap_ns
        new.popularity = old.popularity
        new.key = old.key
        new.load_key = old.load_key
        new.model = old.model
        new.order = old.order
        new.pace_at_ns = old.pace_at_ns
        new.pace_ns = old.pace_ns
        new.priority = old.priority
        new.quarantined = old.quarantined
        new.queue_limit = old.queue_limit
        new.removed = old.removed
        new.dirty = old.dirty
        new.waiting = old.waiting
        new.residencies = residencies = {}
        for name, residency in old.residencies.items():
            residencies[name] = twins.get(residency) or self._residency(residency)
        new.sole = None if old.sole is None else twins[old.sole]
        new.queues = queues = {}
        for key, queue in old.queues.items():
            queues[key] = twins[queue] if queue in twins else self._queue(queue)
        new.main = None if old.main is None else twins[old.main]
        return new

    def _residency(self, old: Residency) -> Residency:
        new = new_residency()
        get = self._twins.get
        self._twins[old] = new
        new.considered = old.considered
        new.extent = old.extent
        new.in_flight = old.in_flight
        new.ready_ns = old.ready_ns
        new.demand_ns = old.demand_ns
        new.reserved = old.reserved
        new.share_ns = old.share_ns
        new.slow = old.slow
        new.state = old.state
        new.used = old.used
        new.version = old.version
        new.code = get(old.code) or self.twin(old.code)
        new.device = get(old.device) or self.twin(old.device)
        new.model = get(old.model) or self._model(old.model)
        return new

    def _queue(self, old: Queue) -> Queue:
        new = new_queue()
        get = self._twins.get
        self._twins[old] = new
        new.alone = old.alone
        new.band_ns = old.band_ns
        new.to_recheck = old.to_recheck
        new.dues = old.dues.copy()
        new.filling_until_ns = old.filling_until_ns
        new.least = old.least
        new.level = old.level
        new.order = old.order
        new.place_ns = old.place_ns
        new.rows = old.rows
        new.signature = old.signature
        new.sizes = old.sizes
        new.watch = None if old.watch is None else self.twin(old.watch)
        new.model = get(old.model) or self._model(old.model)
        new.waiters = [self.twin(one) for one in old.waiters] if old.waiters else []
        new.reserved = [self.twin(one) for one in old.reserved] if old.reserved else []
        new.undecided = [self.twin(one) for one in old.undecided] if old.undecided else []
        new.strategies = ()
        for strategy in old.strategies:
            new.strategies += (get(strategy) or self._strategy(strategy),)
        return new

    def _strategy(self, old: Strategy) -> Strategy:
        new = new_strategy()
        twins = self._twins
        get = twins.get
        twins[old] = new
        new.key_ns = old.key_ns
        new.queue = twins[old.queue] if old.queue in twins else self._queue(old.queue)
        new.residency = residency = get(old.residency) or self._residency(old.residency)
        new.device = device = residency.device
        new.lane = device.exec
        new.agenda = device.agenda
        new.batches = self._containers.get(id(old.batches)) or self._container(old.batches)
        new.least = get(old.least) or self.twin(old.least)
        return new

    def _waiter(self, old: Waiter) -> Waiter:
        new = new_waiter()
        self._twins[old] = new
        new.alone = old.alone
        new.cause = old.cause
        new.cold = old.cold
        new.demand_ns = old.demand_ns
        new.due_ns = old.due_ns
        new.promised_ns = old.promised_ns
        new.tensor_refs = old.tensor_refs
        new.request = old.request
        new.retries = old.retries
        new.slo_ns = old.slo_ns
        new.state = old.state
        new.device = None if old.device is None else self.twin(old.device)
        new.place = None if old.place is None else self.twin(old.place)
        new.queue = self._twins[old.queue] if old.queue in self._twins else self._queue(old.queue)
        return new

    def _batch(self, old: BatchChoice) -> BatchChoice:
        new = new_batch()
        self._twins[old] = new
        new.count = old.count
        new.size = old.size
        new.samples = self.twin(old.samples)
        return new


# ------------------------------------------------------------
# Saved as bytes: all objects by number, each as its kind and what it holds. A number in a list of its own
# refers to another one; what is not so wrapped is a value that refers to nothing.


PLAIN: Final = frozenset({bool, float, int, str, type(None)})


def save(root: object) -> bytes:
    """The whole state as bytes, from which ``restore`` makes a controller that continues exactly like it."""
    check_pure()
    return Saving().save(root)


class Saving:
    """One state on its way to bytes."""

    __slots__ = ("_kinds", "_numbers", "found")

    def __init__(self) -> None:
        self.found: list[Any] = []
        """All objects, by number."""
        self._numbers: dict[int, int] = {}
        """Number by ``id``; ``found`` keeps every object alive, so that no id is reused."""
        self._kinds: dict[tuple[str, tuple[str, ...]], int] = {}
        """Number by the names of a class and its fields."""

    def save(self, root: object) -> bytes:
        """The bytes of ``root`` and of all objects that it refers to."""
        self._reference(root)
        objects: list[tuple[int, Any]] = []
        while len(objects) < len(self.found):  # which grows meanwhile
            objects.append(self._object(self.found[len(objects)]))
        body = msgpack.encode((list(self._kinds), objects))
        return msgpack.encode((FORMAT, sha256(body).digest(), body))

    def _reference(self, value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.found)
            self.found.append(value)
        return (number,)

    def _object(self, found: Any) -> tuple[int, Any]:
        kind = type(found)
        holds: Any
        names: tuple[str, ...] = ()
        if kind is dict:
            holds = [self._reference(one) for item in found.items() for one in item]
        elif kind is set or kind is frozenset:
            holds = sorted(found)
        elif kind is list or kind is tuple:
            holds = [self._reference(one) for one in found]
        elif isinstance(found, Enum):
            holds = found.value
        elif isinstance(found, Struct):
            holds = msgpack.encode(found)
        else:
            assert isinstance(found, Record), f"a {kind} is in the state"
            names = fields_of(found)
            holds = [self._reference(getattr(found, name)) for name in names]
        return self._kinds.setdefault((kind.__name__, names), len(self._kinds)), holds


def restore(saved: bytes, kind: type[Root]) -> Root:
    """The controller (of class ``kind``) whose state was saved.

    Raises ``StateError`` if another version saved it, if it is damaged, or no saved state at all.
    """
    check_pure()
    try:
        found, digest, body = msgpack.decode(saved, type=list[Any])
    except (MsgspecError, ValueError) as error:
        raise StateError("state: expected what a controller saved; found other bytes") from error
    if found != FORMAT:
        raise StateError(
            f"state: expected format {FORMAT}; found {found!r}: it was saved by another version, "
            "start a controller without it"
        )
    if type(body) is not bytes or sha256(body).digest() != digest:
        raise StateError("state: expected the bytes that its hash vouches for; found others: save it again")
    kinds, objects = msgpack.decode(body)
    root = Restoring(kinds, objects, kind).root()
    if type(root) is not kind:
        raise StateError(f"state: expected a {kind.__name__}; found a {type(root).__name__}")
    return root


class Restoring:
    """One state on its way from bytes."""

    __slots__ = ("_kinds", "_made", "_names", "_objects", "_records", "_values")

    def __init__(self, kinds: list[Any], objects: list[Any], root: type) -> None:
        self._records = {**classes_of_records(), root.__name__: root}
        self._values = classes_of_values()
        self._names: list[tuple[str, ...]] = [tuple(names) for _, names in kinds]
        """Names of fields, by number of the class."""
        self._kinds: list[Any] = [self._class(name, tuple(names)) for name, names in kinds]
        self._objects = objects
        self._made: list[Any] = [self._begun(*one) for one in objects]
        """By number; None stands for a tuple or frozenset that is not made yet."""

    def _class(self, name: str, names: tuple[str, ...]) -> Any:
        kind: Any = BUILTIN.get(name) or self._values.get(name)
        if kind is not None:
            return kind
        kind = self._records.get(name)
        if kind is None:
            raise StateError(f"state: expected records of this version; found a {name}, which it has not")
        expected = set(fields_of(kind.__new__(kind)))
        if expected and expected != set(names):  # none: its fields are not known before they are set
            raise StateError(
                f"state: expected a {name} of {', '.join(sorted(expected))}; found one of "
                f"{', '.join(sorted(names))}: it was saved by another version, start a controller without it"
            )
        return kind

    def root(self) -> Any:
        """Fill all objects; returns the first."""
        for number, (at, holds) in enumerate(self._objects):
            kind, made = self._kinds[at], self._made[number]
            if kind is list:
                made += [self._value(one) for one in holds]
            elif kind is dict:
                for key, value in zip(holds[::2], holds[1::2], strict=True):
                    made[self._value(key)] = self._value(value)
            elif kind.__name__ in self._records:
                for name, value in zip(self._names[at], holds, strict=True):
                    setattr(made, name, self._value(value))
        return self._made[0]

    def _begun(self, at: int, holds: Any) -> Any:
        """An object, so that others can refer to it; containers and records are still empty."""
        kind = self._kinds[at]
        if kind is tuple or kind is frozenset:
            return None
        if kind is set:
            return set(holds)
        if kind is list or kind is dict or kind.__name__ in self._records:
            return kind.__new__(kind)
        return msgpack.decode(holds, type=kind) if issubclass(kind, Struct) else kind(holds)

    def _value(self, value: Any) -> Any:
        if type(value) is not list:
            return value
        number = value[0]
        made = self._made[number]
        if made is None:  # no tuple holds itself, but through a record or a list
            at, holds = self._objects[number]
            if self._kinds[at] is frozenset:
                made = frozenset(holds)
            else:
                made = tuple([self._value(one) for one in holds])
            self._made[number] = made
        return made
