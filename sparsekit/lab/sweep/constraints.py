"""Constraints: expressions over axes, model, task, tokens and seed that a run must fulfil."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsekit.errors import SparsekitError, nearest
from sparsekit.lab.sweep.axes import plain

__all__ = ["Constraint", "fulfilled"]


class Constraint:
    """An expression of names, numbers, words, comparisons, and, or, not, in, and arithmetic; nothing is called."""

    _BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    }
    _COMPARE: Mapping[type, Callable[[Any, Any], Any]] = {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
        ast.In: lambda a, b: a in b,
        ast.NotIn: lambda a, b: a not in b,
    }

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self.tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            raise SparsekitError(f"constraints: {text!r} is no expression, such as window_tokens <= tokens.") from None

    def holds(self, names: Mapping[str, Any]) -> bool:
        try:
            return bool(self._value(self.tree, names))
        except (TypeError, ArithmeticError) as error:
            raise SparsekitError(f"constraints: {self.text!r}: {error}.") from None

    def _value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Name(id=name):
                raise SparsekitError(
                    f"constraints: {self.text!r}: {name!r} is none of {', '.join(names)}.{nearest(name, names)}"
                )
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self._value(part, names) for part in parts]
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return not self._value(part, names)
            case ast.UnaryOp(op=ast.USub(), operand=part):
                return -self._value(part, names)
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, names) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, names) for part in parts)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in self._BINARY:
                return self._BINARY[type(op)](self._value(left, names), self._value(right, names))
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in self._COMPARE for op in ops):
                values = [self._value(part, names) for part in (left, *rest)]
                pairs = zip(ops, values, values[1:], strict=False)
                return all(self._COMPARE[type(op)](a, b) for op, a, b in pairs)
        raise SparsekitError(f"constraints: {self.text!r}: only comparisons and arithmetic of names and numbers.")


def fulfilled(rules: Sequence[Constraint], place: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    names = {**place, **{name: plain(value) for name, value in said.items()}}
    return all(rule.holds(names) for rule in rules)
