"""What processes and journals of two versions must agree on: the place of each field in a message."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest
from msgspec import Struct

from clockwork_serve import messages
from clockwork_serve.messages import ControllerEffect, ControllerEvent, Frame

FIELDS = Path(__file__).with_name("fields.txt")
"""The fields of each message that is encoded as an array, in their order; a new one is added at the end."""


def table() -> dict[str, list[str]]:
    """The fields by the names of messages; lines that are indented continue the one before."""
    found: dict[str, list[str]] = {}
    for line in FIELDS.read_text(encoding="utf-8").replace("\n    ", " ").splitlines():
        name, _, fields = line.partition(":")
        found[name] = fields.split()
    return found


def arrays() -> dict[str, type[Struct]]:
    """The messages that are encoded as arrays, by name."""
    return {
        name: kind
        for name, kind in vars(messages).items()
        if isinstance(kind, type) and issubclass(kind, Struct) and kind.__struct_config__.array_like
    }


def test_all_that_links_and_journals_carry_are_arrays():
    kinds = {*get_args(Frame), *get_args(ControllerEvent), *get_args(ControllerEffect)}
    assert kinds <= set(arrays().values())


def test_every_message_is_in_the_table_and_nothing_else():
    assert set(table()) == set(arrays())


@pytest.mark.parametrize("name", sorted(arrays()))
def test_fields_keep_their_places_and_new_ones_stand_last(name: str):
    kept = table()[name]
    # Another order? Old journals and other machines would read one field as another. One more? Append it.
    assert list(arrays()[name].__struct_encode_fields__) == kept


def test_a_message_of_a_version_with_fewer_or_more_fields_at_the_end_is_read():
    cancel = messages.Quarantined(model="m/1", why="w", since_ns=5, code_id="c")
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(cancel))
    for shown in (fields[:-1], [*fields, "of a later version"]):
        found = msgspec.msgpack.decode(msgspec.msgpack.encode(shown), type=messages.Quarantined)
        assert (found.model, found.why, found.since_ns) == ("m/1", "w", 5)
