"""The faults that `tests/mutants.py` puts in: Cosmic Ray's, and two of our own.

Of Cosmic Ray's operator replacements one is kept for each operator (`<` to `<=`, `+` to `-`), as
`a << b` for `a + b` only asks whether the line is run. Ours are what tired people do: a statement
that is missing (a call, a `raise`, `+=`, an attribute that is not set) and an argument by name that
is not handed on. (Not kept: its exception replacer, which fails at `except module.Error`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider
from parso.python.tree import Name

_BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul"
_COMPARISON = "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
_KEPT = [
    *(f"ReplaceBinaryOperator_{name}" for name in _BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in _COMPARISON.split()),
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert"),
    *("ReplaceUnaryOperator_Delete_Not", "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceBreakWithContinue", "NumberReplacer"),
    *("ReplaceContinueWithBreak", "ZeroIterationForLoop"),
]


class RemoveStatement(Operator):
    """`pass` where something was done."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.parent is None or node.parent.type != "simple_stmt":
            return
        if node.type == "expr_stmt":
            target, operator = node.children[0], node.children[1].get_code().strip()
            sets = operator != "=" or target.type in ("atom_expr", "power")
            removable = operator.endswith("=") and sets
        else:
            removable = node.type in ("atom_expr", "power", "await_expr", "raise_stmt", "del_stmt")
        if removable:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return Name("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropKeyword(Operator):
    """`f(x, seed=seed)` becomes `f(x)`."""

    @staticmethod
    def _named(node: Any) -> list[Any]:
        if node.type != "arglist" or node.parent.type == "classdef":
            return []
        arguments = [child for child in node.children if child.type == "argument"]
        return [
            child
            for child in arguments
            if child.children[1].type == "operator" and child.children[1].value == "="
        ]

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        for argument in self._named(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        at = node.children.index(self._named(node)[index])
        last = at == len(node.children) - 1
        del node.children[at - last : at + 2 - last]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


_theirs = OperatorProvider()
OPERATORS: dict[str, type[Operator]] = {name: _theirs[name] for name in _KEPT}
OPERATORS |= {"RemoveStatement": RemoveStatement, "DropKeyword": DropKeyword}
