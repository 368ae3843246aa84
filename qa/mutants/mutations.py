"""What can be broken in a module: the operators of mutmut, and two of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import get_ignored_lines

from qa.mutants.planted import SOURCE, Mutant

SILENT = frozenset({"__all__", "__slots__"})


class Visitor(MutationVisitor):  # type: ignore[misc]
    """Breaks all but lists of names and what failed assertions say."""

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Called for each part of a module; true to go on below it."""
        if isinstance(node, cst.Assert):
            node.test.visit(self)
            return False
        if isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", "") in SILENT:
            return False
        return bool(super().on_visit(node))


@dataclass(slots=True, frozen=True)
class Module:
    """A module of a brain, and all that can be broken in it."""

    name: str
    source: str
    tree: cst.Module
    mutations: list[Any]
    kinds: dict[int, str]

    @classmethod
    def read(cls, path: Path) -> Module:
        """Read it and find what can be broken."""
        source = path.read_text()
        wrapper = MetadataWrapper(cst.parse_module(source))
        kinds: dict[int, str] = {}
        operators = [(of, _tagged(make, make.__name__, kinds)) for of, make in mutation_operators]
        operators += [(of, _tagged(make, kind, kinds)) for of, make, kind in OURS]
        visitor = Visitor(operators, get_ignored_lines(str(path), source, wrapper))
        tree = wrapper.visit(visitor)
        return cls(str(path.relative_to(SOURCE).with_suffix("")), source, tree, visitor.mutations, kinds)

    def mutant(self, number: int) -> Mutant:
        """One of its mutants, with the first line that differs, as it was and as it is."""
        made = self.mutations[number]
        source = deep_replace(self.tree, made.original_node, made.mutated_node).code
        before, after = self.source.splitlines(), source.splitlines()
        at = next(
            (at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after) - 1
        )
        kind = self.kinds[id(made.mutated_node)]
        return Mutant(self.name, number, kind, at + 1, before[at].strip(), after[at].strip(), source)


def _negated(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def _dropped(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    statement = node.body[0]
    is_text = isinstance(statement, cst.Expr) and isinstance(statement.value, cst.SimpleString)
    if isinstance(statement, cst.Expr | cst.AugAssign | cst.Del) and not is_text:
        yield node.with_changes(body=[cst.Pass()])


OURS = (
    (cst.If, _negated, "condition"), (cst.While, _negated, "condition"),
    (cst.SimpleStatementLine, _dropped, "statement"),
)  # fmt: skip
"""What the tool does not break by itself: a condition turned round, a statement left out."""

NAMES = {
    "operator_arg_removal": "argument None", "operator_assignment": "assigned None",
    "operator_augmented_assignment": "+= to =", "operator_if_exp": "a if b else c",
    "operator_keywords": "is, in, break", "operator_match": "case", "operator_name": "True, False",
    "operator_number": "number", "operator_remove_unary_ops": "not", "operator_string": "text",
    "operator_lambda": "lambda", "operator_swap_op": "+ - < == and",
}  # fmt: skip


def _tagged(
    operator: Callable[[Any], Iterable[Any]], name: str, kinds: dict[int, str]
) -> Callable[[Any], Any]:
    def run(node: Any) -> Iterator[Any]:
        for made in operator(node):
            dropped = name == "operator_arg_removal" and len(made.args) < len(node.args)
            kinds[id(made)] = "argument dropped" if dropped else NAMES.get(name, name)
            yield made

    return run
