"""Protobuf's text format is read as protobuf reads it."""

from __future__ import annotations

import pytest

from clockwork_serve.store.pbtxt import PbtxtMessage, Word, parse_prototext
from clockwork_serve.store.settings import ProblemError


def test_scalars_lists_and_blocks_in_every_spelling():
    text = """
      # a comment
      name: "a" 'b'   max: 8, ratio: -1.5e3; hex: 0x10
      kind: TYPE_FP32
      dims: [ 1, -1 ]
      dims: 7
      latest { num_versions: 2 }
      other: < flag: true >
      items [ { key: "x" }, { key: "y" } ]
      empty: []
    """
    block = parse_prototext(text, "file")
    assert block.fields["name"] == ["ab"]
    assert block.fields["max"] == [8]
    assert block.fields["ratio"] == [-1500.0]
    assert block.fields["hex"] == [16]
    assert block.fields["kind"] == [Word("TYPE_FP32")]
    assert block.fields["dims"] == [1, -1, 7]
    assert block.fields["empty"] == []
    (latest,), (other,) = block.fields["latest"], block.fields["other"]
    assert isinstance(latest, PbtxtMessage)
    assert latest.fields == {"num_versions": [2]}
    assert isinstance(other, PbtxtMessage)
    assert other.fields == {"flag": [Word("true")]}
    assert [item.fields["key"] for item in block.fields["items"] if isinstance(item, PbtxtMessage)] == [
        ["x"],
        ["y"],
    ]
    assert block.lines["kind"] == 4


def test_numbers_are_those_of_protobuf():
    block = parse_prototext("a: 010 a: -0x10 a: 18446744073709551615 a: .5 a: 1f a: -inf", "file")
    assert block.fields["a"] == [8, -16, (1 << 64) - 1, 0.5, 1.0, float("-inf")]


def test_escapes_are_those_of_c():
    assert parse_prototext(r'a: "x\n\"\x41\101"', "file").fields["a"] == ['x\n"AA']


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("a: 1\nb: {", 2, "'}'"),
        ("a: 1\n\nb: @", 3, "a value"),
        ("a 1", 1, "':' or '{'"),
        ("a: }", 1, "a value"),
        ("a: [1 2]", 1, "',' or ']'"),
        ("1: 2", 1, "a field name"),
        ('a: "x', 1, "a closed string of Unicode with known escapes"),
        ('a: "x"\nb: "\\ud800"', 2, "a closed string of Unicode with known escapes"),
        ("a: 18446744073709551616", 1, "a number of at most 64 bits"),
        ("a: 1e", 1, "a number of at most 64 bits"),
        ("a {" * 100, 1, "at most 64 nested blocks"),
    ],
)
def test_nonsense_is_refused_with_its_line(text, line, expected):
    with pytest.raises(ProblemError) as caught:
        parse_prototext(text, "config.pbtxt")
    assert caught.value.problem.field == f"config.pbtxt line {line}"
    assert caught.value.problem.expected == expected
