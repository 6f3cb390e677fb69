"""Constraints: expressions over axes, model, task, tokens and seed that a run must fulfil."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsekit.errors import SparsekitError, nearest, shown
from sparsekit.lab.sweep.axes import plain

__all__ = ["Constraint", "fulfilled"]


MOST_CHARACTERS = 500  # of an expression, so that no step of reading it can be deep


def _numbers_only(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The operation, refused for texts and lists, of which `*` and `%` could make gigabytes."""

    def checked(a: Any, b: Any) -> Any:
        if not isinstance(a, int | float) or not isinstance(b, int | float):
            raise TypeError(f"arithmetic is for numbers, not {shown(a)} and {shown(b)}")
        return operation(a, b)

    return checked


class Constraint:
    """An expression of names, numbers, words, comparisons, and, or, not, in, and arithmetic; nothing is called."""

    _BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
        ast.Add: _numbers_only(operator.add),
        ast.Sub: _numbers_only(operator.sub),
        ast.Mult: _numbers_only(operator.mul),
        ast.Div: _numbers_only(operator.truediv),
        ast.FloorDiv: _numbers_only(operator.floordiv),
        ast.Mod: _numbers_only(operator.mod),
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
        self.label = f"constraints: {shown(text)}"
        if len(text) > MOST_CHARACTERS:
            raise SparsekitError(
                f"{self.label} is longer than {MOST_CHARACTERS} characters; write several constraints."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's, about expressions such as `1 is 1`, which are refused below
                self.tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise SparsekitError(
                f"{self.label} is not a valid expression; for example: window_tokens <= tokens."
            ) from None

    def holds(self, names: Mapping[str, Any]) -> bool:
        try:
            return bool(self._value(self.tree, names))
        except (TypeError, ArithmeticError, RecursionError) as error:
            raise SparsekitError(f"{self.label}: {error}.") from None

    def _value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Name(id=name):
                raise SparsekitError(
                    f"{self.label}: unknown name {shown(name)}: one of {', '.join(names)}.{nearest(name, names)}"
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
        raise SparsekitError(f"{self.label}: only comparisons and arithmetic of names and numbers are allowed.")


def fulfilled(rules: Sequence[Constraint], place: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    names = {**place, **{name: plain(value) for name, value in said.items()}}
    return all(rule.holds(names) for rule in rules)
