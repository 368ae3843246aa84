"""A reader of protobuf's text format without a schema; it knows the grammar, never what a field means."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from clockwork_serve.store.problems import problem

_TOKEN = re.compile(
    r"""(?P<space>[\s]+|\#[^\n]*)
      | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
      | (?P<number>[-+]?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)[fF]?)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<mark>[{}<>\[\]:,;-])""",
    re.VERBOSE,
)
_MOST_NESTED = 64


@dataclass(slots=True, frozen=True)
class Word:
    """A bare word: an enum value, or true and false."""

    text: str


@dataclass(slots=True)
class Block:
    """One message: every field with its values in the order written, and the line of its first one."""

    fields: dict[str, list[object]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: object, line: int) -> None:
        """Append a value of a field."""
        self.fields.setdefault(name, []).append(value)
        self.lines.setdefault(name, line)


@dataclass(slots=True, frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def parse_prototext(text: str, where: str) -> Block:
    """The top-level message in ``text``. Raises ``ProblemError`` with the line that makes no sense."""
    return _Reader(_tokens(text, where), where).block(closing="", depth=0)


def _tokens(text: str, where: str) -> list[_Token]:
    tokens = []
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            found = text[position : position + 20].splitlines()[0]
            raise problem(
                f"{where} line {line}", expected="protobuf text", found=found, advice="correct that line"
            )
        kind = match.lastgroup or ""
        if kind != "space":
            tokens.append(_Token(kind, match.group(), line))
        line += match.group().count("\n")
        position = match.end()
    tokens.append(_Token("end", "end of file", line))
    return tokens


class _Reader:
    def __init__(self, tokens: list[_Token], where: str) -> None:
        self._tokens = tokens
        self._next = 0
        self._where = where

    def block(self, closing: str, depth: int) -> Block:
        block = Block()
        if depth > _MOST_NESTED:
            raise self._wrong(f"at most {_MOST_NESTED} nested blocks")
        while self._peek().text != closing or not closing:
            if self._peek().kind == "end":
                if closing:
                    raise self._wrong(f"'{closing}'")
                break
            name = self._take("word", "a field name")
            self._field(block, name, depth)
            if self._peek().text in (",", ";"):
                self._next += 1
        self._next += 1
        return block

    def _field(self, block: Block, name: _Token, depth: int) -> None:
        colon = self._peek().text == ":"
        if colon:
            self._next += 1
        if self._peek().text == "[":
            self._next += 1
            while self._peek().text != "]":
                block.add(name.text, self._value(depth, scalar=colon), name.line)
                if self._peek().text == ",":
                    self._next += 1
                elif self._peek().text != "]":
                    raise self._wrong("',' or ']'")
            self._next += 1
            block.fields.setdefault(name.text, [])
            block.lines.setdefault(name.text, name.line)
            return
        block.add(name.text, self._value(depth, scalar=colon), name.line)

    def _value(self, depth: int, *, scalar: bool) -> object:
        token = self._peek()
        if token.text in ("{", "<"):
            self._next += 1
            return self.block("}" if token.text == "{" else ">", depth + 1)
        if not scalar:
            raise self._wrong("':' or '{'")
        self._next += 1
        if token.kind == "string":
            return self._strings(token)
        if token.kind == "number":
            number = _number(token.text)
            if number is None:
                self._next -= 1
                raise self._wrong("a number of at most 64 bits")
            return number
        if token.kind == "word":
            return Word(token.text)
        self._next -= 1
        raise self._wrong("a value")

    def _strings(self, first: _Token) -> str:
        """Adjacent strings are one, as in C."""
        parts = [first]
        while self._peek().kind == "string":
            parts.append(self._take("string", "a string"))
        try:
            text = "".join(str(ast.literal_eval(part.text)) for part in parts)
            text.encode()
        except (ValueError, SyntaxError):
            self._next -= 1
            raise self._wrong("a string of Unicode with known escapes") from None
        return text

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, kind: str, wanted: str) -> _Token:
        token = self._peek()
        if token.kind != kind:
            raise self._wrong(wanted)
        self._next += 1
        return token

    def _wrong(self, wanted: str) -> Exception:
        token = self._peek()
        return problem(
            f"{self._where} line {token.line}", expected=wanted, found=token.text, advice="correct that line"
        )


def _number(text: str) -> int | float | None:
    """A number; None for a whole one that no field of protobuf holds."""
    try:
        whole = int(text, 16) if text.lower().lstrip("+-").startswith("0x") else int(text.rstrip("fF"), 10)
    except ValueError:
        return float(text.rstrip("fF"))
    return whole if -(1 << 63) <= whole < 1 << 64 else None
