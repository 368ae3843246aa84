"""The controller's whole state, forked in memory, or saved as bytes and restored.

The state is plain records: no closures, no clocks, no handles. So a second controller can continue exactly
like the first, in the same process (``fork``) or in another one, now or later (``save``, ``restore``):
to explain a decision, to plan, to try how many devices are enough, or to keep a warm standby.

*Records* (``record.Record``) and their containers are copied. Everything else that a state refers to is
immutable (numbers, strings, messages, settings) and is shared by a fork. References between records, and the
order of every heap with its stale entries, are kept: decisions depend on them.

No field is named here: a record's fields are its ``__slots__``, and its ``__dict__`` if it has one. A fork of
1,000 models has to take a few milliseconds, so classes of which there are thousands of records declare the
types of their fields (``field: type`` in the body of the class). For each of them a function is written
once that copies just these. A field without a declared type is copied by what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cache, partial
from hashlib import sha256
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

from msgspec import MsgspecError, Struct, msgpack

from clockwork_serve import messages
from clockwork_serve.controller import config
from clockwork_serve.controller.cluster import Queue
from clockwork_serve.controller.policies import installed_modules
from clockwork_serve.controller.record import Record
from clockwork_serve.errors import StateError
from clockwork_serve.version import VERSION

PLAIN: Final[frozenset[type]] = frozenset({bool, float, int, str, type(None)})
"""Types of values that are saved as they are."""
VALUES: Final[frozenset[type]] = PLAIN | {bytes, frozenset}
"""Types of values that a fork shares, beside messages, settings and enumerations."""
CONTAINERS: Final[frozenset[type]] = frozenset({dict, list, set, tuple})

Root = TypeVar("Root")
Copier = Callable[[Any], Any]


def check_pure() -> None:
    """Raise ``StateError`` if the records are compiled: mypyc makes none without its ``__init__``."""
    if hasattr(Queue, "__mypyc_attrs__"):
        raise StateError(
            "state: expected brains in pure Python; found them compiled by mypyc, which can not be forked "
            "or restored: build without CLOCKWORK_MYPYC"
        )


# ------------------------------------------------------------
# The fields of a class, and their declared types.


@cache
def fields_of(kind: type[Any]) -> tuple[str, ...]:
    """The names of a record's fields, in a definite order."""
    names: list[str] = []
    for base in reversed(kind.__mro__):
        slots = base.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    return (*names, "__dict__") if kind.__dictoffset__ else tuple(names)


@cache
def types_of(kind: type) -> dict[str, Any]:
    """The types of a record's fields that its class declares, by name."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(kind, localns=unknown, include_extras=True)
        except NameError as error:  # imported for type checkers only: such a field is copied by what it holds
            unknown[str(error.name)] = object


def is_record(declared: Any) -> bool:
    """Whether what is declared so is a record."""
    return isinstance(declared, type) and issubclass(declared, Record)


def is_value(declared: Any) -> bool:
    """Whether what is declared so never changes, and holds nothing that does."""
    if isinstance(declared, UnionType) or get_origin(declared) in {frozenset, tuple}:
        return all(map(is_value, get_args(declared)))
    if declared is ...:  # as in tuple[int, ...]
        return True
    return isinstance(declared, type) and (declared in VALUES or issubclass(declared, Struct | Enum))


# ------------------------------------------------------------
# The function that copies a record, written from what its class declares. A list, dict, set or tuple in a
# declared field is in no other one, unless it is declared ``SHARED``.

COPIER: Final = """
def bind(make, copiers, twins, held, copy):
    get = twins.get
    def copied(old):
        new = twins[old] = make()
        {}
        return new
    return copied
"""


def lines_of(field: str, declared: Any) -> list[str]:
    """What copies one field."""
    kind, parts, old = get_origin(declared), get_args(declared), f"old.{field}"
    if kind is Annotated:  # SHARED
        return [f"new.{field} = copy({old}) if (made := held.get(id({old}))) is None else made"]
    if is_value(declared):
        return [f"new.{field} = {old}"]
    if kind in {dict, list, set} and all(map(is_value, parts)):
        return [f"new.{field} = {old}.copy()"]
    if kind is dict:
        items = f"made[{copy_of(parts[0], 'key')}] = {copy_of(parts[1], 'item')}"
        return [f"new.{field} = made = {{}}", f"for key, item in {old}.items(): {items}"]
    if kind is list:
        item = f"made.append({copy_of(parts[0], 'item')})"
        return [f"new.{field} = made = []", f"if {old}:", f"    for item in {old}: {item}"]
    if kind is tuple and parts[1:] == (...,):
        items = f"made += (({copy_of(parts[0], 'item')}),)"
        return ["made = ()", f"for item in {old}: {items}", f"new.{field} = made"]
    return [f"one = {old}", f"new.{field} = {copy_of(declared, 'one')}"]


def copy_of(declared: Any, one: str) -> str:
    """An expression: the copy of what the variable ``one`` refers to."""
    if is_value(declared):
        return one
    if isinstance(declared, UnionType) and get_args(declared)[1:] == (type(None),):
        return f"None if {one} is None else {copy_of(get_args(declared)[0], one)}"
    if is_record(declared):  # or of a subclass
        return f"twin if (twin := get({one})) is not None else copiers[type({one})]({one})"
    return f"copy({one})"


@cache
def binder_of(kind: type) -> Callable[..., Copier]:
    """What makes, for one fork, the function that copies a record of this class."""
    lines = [line for field in fields_of(kind) for line in lines_of(field, types_of(kind).get(field, object))]
    made: dict[str, Any] = {}
    exec(COPIER.format("\n        ".join(lines)), made)  # noqa: S102 - made of names of fields alone
    bind: Callable[..., Copier] = made["bind"]
    return bind


# ------------------------------------------------------------
# A fork. A record with declared fields is copied whole when it is first reached, while it is in the
# processor's cache. Others are filled from a list, one after another: so Python's stack limits no state.


def fork(root: Root) -> Root:
    """A controller that continues exactly like this one; neither disturbs the other."""
    check_pure()
    try:
        return Forking(at_once=True).fork(root)
    except RecursionError:  # records with declared fields that are a long chain
        return Forking(at_once=False).fork(root)


class Copiers(dict[type, Copier]):
    """By class: what copies a record that has no copy yet."""

    def __init__(self, make: Callable[[type], Copier]) -> None:
        self._make = make

    def __missing__(self, kind: type) -> Copier:
        copier = self[kind] = self._make(kind)
        return copier


class Forking:
    """One fork in the making: the copies of records, which compare by identity."""

    def __init__(self, *, at_once: bool) -> None:
        self._twins: dict[Any, Any] = {}
        self._at_once = at_once
        self._copiers = Copiers(self._copier)
        """By class: what copies a record that has no copy yet."""
        self._containers: dict[int, Any] = {}
        """Copies of lists, dicts, sets and tuples, by ``id``: some are referred to more than once."""
        self._empty: list[tuple[Any, Any]] = []
        """Records and their copies which have no fields yet."""
        self._shared: set[type] = set(VALUES)
        """Types of immutable values found so far."""

    def fork(self, root: Root) -> Root:
        """The copy of ``root`` and of all that it refers to."""
        copy: Root = self._twin(root)
        empty, shared, twin = self._empty, self._shared, self._twin
        while empty:
            old, new = empty.pop()
            kind: Any = type(old)
            for name in fields_of(kind):
                value = getattr(old, name)
                setattr(new, name, value if type(value) in shared else twin(value))
        return copy

    def _copier(self, kind: type) -> Copier:
        make: Callable[[], Any] = partial(kind.__new__, kind)  # takes half as long as ``kind.__new__(kind)``
        if self._at_once and types_of(kind):
            return binder_of(kind)(make, self._copiers, self._twins, self._containers, self._twin)
        return partial(self._later, make)

    def _later(self, make: Callable[[], Any], old: Any) -> Any:
        new = self._twins[old] = make()
        self._empty.append((old, new))
        return new

    def _twin(self, value: Any) -> Any:
        """The copy of a record or container; anything else itself."""
        kind: Any = type(value)
        if kind in self._shared:
            return value
        if kind in CONTAINERS:
            return self._container(value)
        if kind not in self._copiers:
            if issubclass(kind, Struct | Enum):
                self._shared.add(kind)
                return value
            if not issubclass(kind, Record):
                raise TypeError(f"state: expected a Record or a value that never changes; found a {kind}")
        found = self._twins.get(value)
        return self._copiers[kind](value) if found is None else found

    def _container(self, old: Any) -> Any:
        found = self._containers.get(id(old))
        if found is not None:
            return found
        shared, twin = self._shared, self._twin
        if type(old) is tuple:
            made = tuple([twin(one) for one in old])
            if all(one is other for one, other in zip(old, made, strict=True)):
                made = old
            return self._containers.setdefault(id(old), made)
        self._containers[id(old)] = new = type(old)()
        if type(old) is dict:
            for key, one in old.items():
                new[key if type(key) in shared else twin(key)] = one if type(one) in shared else twin(one)
        elif type(old) is set:
            new.update([twin(one) for one in old])
        elif old and type(old[0]) is tuple:
            new += self._entries(old)
        else:
            new += [one if type(one) in shared else twin(one) for one in old]
        return new

    def _entries(self, old: list[Any]) -> Iterable[Any]:
        """Copies of a list's tuples, such as a heap's: column by column, for most columns are numbers."""
        if set(map(type, old)) != {tuple} or len(set(map(len, old))) != 1:
            return [self._twin(one) for one in old]
        columns: list[Iterable[Any]] = []
        get, twin = self._twins.get, self._twin
        for column in zip(*old, strict=True):
            kinds = set(map(type, column))
            if kinds <= self._shared:
                columns.append(column)
            elif kinds <= self._copiers.keys():
                columns.append([new if (new := get(one)) is not None else twin(one) for one in column])
            else:
                columns.append([twin(one) for one in column])
        return zip(*columns, strict=True)


# ------------------------------------------------------------
# Saved as bytes: all objects by number, each as its class and what it holds. A number in a list of its own
# refers to another one; what is not so wrapped is a value that refers to nothing.


def save(root: object) -> bytes:
    """The whole state as bytes, from which ``restore`` makes a controller that continues exactly like it."""
    check_pure()
    return Saving().save(root)


@cache
def names_of(kind: Any) -> tuple[str, ...]:
    """The names of its fields or members, by which it is noticed that another version of it was saved."""
    if issubclass(kind, Enum):
        return tuple(kind.__members__)
    if issubclass(kind, Struct):
        return tuple(kind.__struct_fields__)
    return tuple(fields_of(kind)) if is_record(kind) else ()


def name_of(kind: type) -> str:
    """A class's name in a saved state."""
    return f"{kind.__module__}.{kind.__qualname__}"


class Saving:
    """One state on its way to bytes."""

    __slots__ = ("_kinds", "_numbers", "found")

    def __init__(self) -> None:
        self.found: list[Any] = []
        """All objects, by number."""
        self._numbers: dict[int, int] = {}
        """Number by ``id``; ``found`` keeps every object alive, so that no id is reused."""
        self._kinds: dict[Any, int] = {}
        """Number by class."""

    def save(self, root: object) -> bytes:
        """The bytes of ``root`` and of all objects that it refers to."""
        self._reference(root)
        objects: list[tuple[int, Any]] = []
        while len(objects) < len(self.found):  # which grows meanwhile
            objects.append(self._object(self.found[len(objects)]))
        body = msgpack.encode(([(name_of(kind), names_of(kind)) for kind in self._kinds], objects))
        return msgpack.encode((VERSION, sha256(body).digest(), body))

    def _reference(self, value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.found)
            self.found.append(value)
        return (number,)

    def _object(self, found: Any) -> tuple[int, Any]:
        kind: Any = type(found)
        holds: Any
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
            holds = [self._reference(getattr(found, name)) for name in fields_of(kind)]
        return self._kinds.setdefault(kind, len(self._kinds)), holds


def restore(saved: bytes, kind: type[Root]) -> Root:
    """The controller (of class ``kind``) whose state was saved.

    Raises ``StateError`` if another version saved it, if it is damaged, or no saved state at all.
    """
    check_pure()
    try:
        version, digest, body = msgpack.decode(saved, type=tuple[str | int, bytes, bytes])
    except (MsgspecError, ValueError) as error:
        raise StateError("state: expected what a controller saved; found other bytes") from error
    if version != VERSION:
        raise StateError(
            f"state: expected one that clockwork {VERSION} saved; found one of version {version}: "
            "start a controller without it, or restore it with that version"
        )
    if sha256(body).digest() != digest:
        raise StateError("state: expected the bytes that its hash vouches for; found others: save it again")
    kinds, objects = msgpack.decode(body)
    root = Restoring(kinds, objects).root()
    if type(root) is not kind:
        raise StateError(f"state: expected a {kind.__name__}; found a {type(root).__name__}")
    return root


def records(kind: type[Record] = Record) -> Iterator[type[Record]]:
    """All classes of records that were imported."""
    for one in kind.__subclasses__():
        yield one
        yield from records(one)


def classes() -> dict[str, type]:
    """All classes of which a state may hold an object, by name."""
    installed_modules()  # imports other packages' policies, and so their records
    values = [one for module in (messages, config) for one in vars(module).values() if isinstance(one, type)]
    of_values = [kind for kind in values if issubclass(kind, Struct | Enum)]
    return {name_of(kind): kind for kind in (*CONTAINERS, frozenset, *of_values, *records())}


class Restoring:
    """One state on its way from bytes."""

    __slots__ = ("_kinds", "_made", "_objects")

    def __init__(self, kinds: list[Any], objects: list[Any]) -> None:
        known = classes()
        self._kinds: list[Any] = [checked(known.get(name), name, names) for name, names in kinds]
        self._objects = objects
        self._made: list[Any] = [self._begun(*one) for one in objects]
        """By number; None stands for a tuple or frozenset that is not made yet."""

    def root(self) -> Any:
        """Fill all objects; returns the first."""
        for made, (at, holds) in zip(self._made, self._objects, strict=True):
            kind = self._kinds[at]
            if kind is list:
                made += [self._value(one) for one in holds]
            elif kind is dict:
                for key, value in zip(holds[::2], holds[1::2], strict=True):
                    made[self._value(key)] = self._value(value)
            elif is_record(kind):
                for name, value in zip(fields_of(kind), holds, strict=True):
                    setattr(made, name, self._value(value))
        return self._made[0]

    def _begun(self, at: int, holds: Any) -> Any:
        """An object, so that others can refer to it; containers and records are still empty."""
        kind = self._kinds[at]
        if kind is tuple or kind is frozenset:
            return None
        if kind is set:
            return set(holds)
        if issubclass(kind, Enum):
            return kind(holds)
        return msgpack.decode(holds, type=kind) if issubclass(kind, Struct) else kind.__new__(kind)

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


def checked(kind: Any, name: str, names: list[str]) -> Any:
    """The class of that name, if it is as it was when it was saved."""
    if kind is None:
        raise StateError(f"state: expected records of this version; found a {name}, which it has not")
    if names_of(kind) != tuple(names):
        ours, theirs = sorted({*names_of(kind)} - {*names}), sorted({*names} - {*names_of(kind)})
        raise StateError(
            f"state: expected a {name} with {', '.join(ours) or 'other order'}; found one with "
            f"{', '.join(theirs) or 'none of it'}: another version saved it, start a controller without it"
        )
    return kind
