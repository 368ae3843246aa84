"""What the analysis of rows knows of one value: where its rows are, or that none has a say in it.

``RowAxis`` says that an axis is, in row-major order, ``outer`` x the rows of the batch x ``inner``: so it
stays known where exporters merge the batch with heads or steps, and take it out again. A value without rows
is *fixed*: the same whatever the requests are. Its elements are *sized* where they follow from how many rows
there are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Label = Hashable | None
"""An axis by what it stands for; None: elements along it are computed with each other."""


class Mixes(Exception):
    """An operator whose answers for one row may depend on others; its text says why."""


@dataclass(frozen=True, slots=True)
class RowAxis:
    """Where the rows are: ``axis`` is ``outer`` x rows x ``inner`` long."""

    axis: int
    outer: int = 1
    inner: int = 1

    def at(self, axis: int) -> RowAxis:
        """The same on another axis."""
        return replace(self, axis=axis)

    @property
    def plain(self) -> bool:
        """Whether the axis is the rows and nothing else."""
        return self.outer == 1 and self.inner == 1


@dataclass(frozen=True, slots=True)
class Value:
    """A value at one number of rows. ``mixed`` says why it is not known to keep rows apart.

    ``shape`` is None where it depends on values. ``known`` are the elements, of small fixed values only, and
    ``sized`` which of them follow from the number of rows. ``items``: it is a sequence of these.
    """

    dtype: int
    shape: Shape | None
    rows: RowAxis | None = None
    known: Array | None = None
    sized: Array | bool = False
    mixed: str = ""
    items: tuple[Value, ...] | None = None

    @property
    def is_sized(self) -> bool:
        """Whether any element follows from the number of rows."""
        return bool(np.any(self.sized))

    @property
    def sizes(self) -> Shape:
        """The shape. Raises ``Mixes`` where it depends on values."""
        if self.shape is None:
            raise Mixes("works on a size that depends on values")
        return self.shape

    def unknown(self) -> Value:
        """The same without its elements."""
        return self if self.known is None else replace(self, known=None, sized=self.is_sized)

    def with_mixed(self, reason: str) -> Value:
        """The same, not known to keep rows apart."""
        return replace(self, rows=None, known=None, sized=False, mixed=reason, items=None)


@dataclass(slots=True)
class Operation:
    """One operator with what goes in, and the shapes of what comes out."""

    op: str
    version: int
    attributes: Mapping[str, Any]
    inputs: Sequence[Value | None]
    names: Sequence[str]
    outputs: Sequence[Shape | None]
    count: int
    """How many rows there are."""
    drop: list[tuple[int, str]] = field(default_factory=list)
    """Outputs that a rule has a veto for, although the others are good."""

    def given(self, number: int) -> Value | None:
        """An input, or None if it is left out."""
        return self.inputs[number] if number < len(self.inputs) else None

    def value(self, number: int) -> Value:
        """An input that has to be there."""
        value = self.given(number)
        if value is None:
            raise Mixes(f"has no input {number}")
        return value

    def output(self, number: int = 0) -> Shape:
        """The shape of an output. Raises ``Mixes`` where it depends on values."""
        shape = self.outputs[number]
        if shape is None:
            raise Mixes("has an output whose size depends on values")
        return shape

    def fixed(self, *numbers: int) -> None:
        """Raise ``Mixes`` if one of these inputs depends on rows, or on how many there are."""
        for number in numbers:
            value = self.given(number)
            if value is not None and (value.rows is not None or value.is_sized):
                said = "depends on requests" if value.rows else "depends on the number of rows"
                raise Mixes(f"has a setting (input {number}) that {said}")

    def known(self, number: int) -> list[Any] | None:
        """The elements of an input, None if it is left out. Raises ``Mixes`` where they are not known."""
        value = self.given(number)
        if value is None:
            return None
        if value.known is None:
            raise Mixes(f"has a setting (input {number}) that is not constant")
        found: list[Any] = value.known.reshape(-1).tolist()
        return found

    def setting(self, name: str, number: int) -> list[int] | None:
        """A setting that is an attribute in some versions and an input in others."""
        if name in self.attributes:
            found = self.attributes[name]
            return list(found) if isinstance(found, (list, tuple)) else [int(found)]
        return self.known(number)


def axis_of(axis: int, rank: int) -> int:
    """An axis from 0, which may have been counted from behind."""
    return axis + rank if axis < 0 else axis


def labelled(
    pairs: Sequence[tuple[Value | None, Sequence[Label]]], outputs: Sequence[Sequence[Label]]
) -> list[RowAxis | None]:
    """Where rows are in the outputs, by what each axis of each input and output stands for."""
    found: tuple[Label, RowAxis] | None = None
    for value, labels in pairs:
        if value is None or value.rows is None:
            continue
        if value.rows.axis >= len(labels):
            raise Mixes("takes inputs of another rank")
        label = labels[value.rows.axis]
        if label is None or labels.count(label) > 1:
            raise Mixes(f"computes along axis {value.rows.axis}, which is the rows")
        if found is not None and found != (label, value.rows.at(0)):
            raise Mixes("brings rows together with other rows")
        found = label, value.rows.at(0)
    if found is None:
        return [None] * len(outputs)
    label, rows = found
    for value, labels in pairs:
        if value is None or value.rows is not None:
            continue
        if value.is_sized:
            raise Mixes("computes with the number of rows")
        if label in labels and value.sizes[labels.index(label)] != 1:
            raise Mixes("treats rows otherwise by their place in the batch")
    for labels in outputs:
        if label not in labels:
            raise Mixes("computes along the rows")
    return [rows.at(labels.index(label)) for labels in outputs]


def aligned(rank: int, to: int) -> list[Label]:
    """Labels of a value that is broadcast to rank ``to``: axes are counted from behind."""
    return [axis + to - rank for axis in range(rank)]


def regrouped(value: Value, shape: Shape, count: int) -> RowAxis:
    """Where rows are once the elements, in their order, have another shape."""
    assert value.rows is not None
    rows, sizes = value.rows, value.sizes
    inner = rows.inner * math.prod(sizes[rows.axis + 1 :])
    for axis, size in enumerate(shape):
        behind = math.prod(shape[axis + 1 :])
        if not behind or inner % behind:
            continue
        within = inner // behind
        if size and size % (within * count) == 0:
            return RowAxis(axis, size // (within * count), within)
    raise Mixes(f"reshapes {list(sizes)} to {list(shape)}, which takes rows apart")
