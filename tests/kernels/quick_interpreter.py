"""Triton's interpreter with less Python around each operation; what it computes is the same.

`conftest.py` installs it where TRITON_INTERPRET is set. Most of an interpreted test's time is not numpy's (Triton 3.9).
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    _no_idle_checks()
    _types_once()
    _shapes_once()
    _builtins_once()
    _device_functions_once()
    _no_copied_arguments()
    _no_search_for_constants()
    _types_of_operands_once()
    _shapes_of_operands_once()
    _dimensions_once()


def _no_idle_checks() -> None:
    """Every sum and product of integers is computed again in 64 bits, to assert that it did not overflow; and without
    `debug` nothing is asserted. Compiled kernels leave it out too."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _types_once() -> None:
    """Which numpy type a type is: every operation makes a table of all of them."""
    find, known = interpreter._get_np_dtype, {}

    def numpy_type(dtype: Any) -> Any:
        name = dtype.scalar.name  # a block's is its element's
        if name not in known:
            known[name] = find(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = numpy_type


def _shapes_once() -> None:
    """What a block's type and a tensor know of their shape: every operation counts and checks it again."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(tensors[type.name], handle=handle)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def _builtins_once() -> None:
    """Which names of triton.language an interpreted function finds replaced: every kernel looks through all of them."""

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None))]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # else it is replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        builtins_of(package)  # before any is replaced
    interpreter._patch_builtin = patch


def _device_functions_once() -> None:
    """A device function finds the names replaced that its kernel found, and at its first call those of its own module,
    for good. Every call replaces all of them again."""
    known = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in known:
            interpreter._patch_lang(self.fn)
            known.add(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


def _no_copied_arguments() -> None:
    """A replaced name calls the function itself: each call copies its arguments by name, and looks for one of them."""

    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch


def _no_search_for_constants() -> None:
    """Most of what may be a constexpr, or a list of them, is a tensor, a number, or a type to compare by name."""
    unwrap, equal = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    others = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)}

    def quick_unwrap(value: Any) -> Any:
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in others else unwrap(value)

    def quick_equal(self: Any, other: Any) -> bool:
        return self.name == other.name if type(other) is tl.dtype else equal(self, other)

    tl.core._unwrap_if_constexpr, tl.dtype.__eq__ = quick_unwrap, quick_equal


def _types_of_operands_once() -> None:
    """Which types an operation gives its two operands follows from those that they have, and a constant's from its
    value: each operation compares them, and each dimension of their shapes."""
    check = interpreter.TritonSemantic.binary_op_type_checking_impl
    known: dict[Any, tuple[Any, Any]] = {}

    def named(operand: Any) -> Any:
        return operand.type.name if type(operand) is tl.tensor else (type(operand), repr(operand))  # -0.0 is not 0.0

    def fit(self: Any, operand: Any, to: Any) -> Any:
        if type(operand) is not tl.tensor:
            return to  # a constant, made before
        if operand.dtype.name != to.scalar.name:
            operand = self.cast(operand, to.scalar)
        return operand if operand.type.name == to.name else _broadcast(operand, to)

    def operands(self: Any, one: Any, two: Any, *allowed: bool, **options: bool) -> tuple[Any, Any]:
        key = named(one), named(two), allowed, *options.items()
        if key not in known:
            made = check(self, one, two, *allowed, **options)
            known[key] = tuple(x.type if type(was) is tl.tensor else x for was, x in zip((one, two), made, strict=True))
            return made
        to_one, to_two = known[key]
        return fit(self, one, to_one), fit(self, two, to_two)

    interpreter.TritonSemantic.binary_op_type_checking_impl = operands


def _broadcast(operand: Any, to: Any) -> Any:
    """A block or a scalar as a block of type `to`."""
    shape, data, dtype = to.shape.values, operand.handle.data, operand.handle.dtype.scalar
    if operand.type.is_block():
        data = np.broadcast_to(data.reshape((1,) * (len(shape) - data.ndim) + data.shape), shape)
    else:
        data = np.full(shape, data, interpreter._get_np_dtype(dtype))
    return tl.tensor(interpreter.TensorHandle(data, dtype), to)


def _shapes_of_operands_once() -> None:
    """The same for operations that give their operands no other type."""
    broadcast = interpreter.TritonSemantic.broadcast_impl_value
    known: dict[tuple[str, str], tuple[Any, Any]] = {}

    def quick(self: Any, one: Any, two: Any) -> tuple[Any, Any]:
        key = one.type.name, two.type.name
        if key not in known:
            made = broadcast(self, one, two)
            known[key] = made[0].type, made[1].type
            return made
        to_one, to_two = known[key]
        one = one if one.type.name == to_one.name else _broadcast(one, to_one)
        return one, two if two.type.name == to_two.name else _broadcast(two, to_two)

    interpreter.TritonSemantic.broadcast_impl_value = quick


def _dimensions_once() -> None:
    """The type that a block has with one more dimension, and numpy's own index for it."""
    expand = interpreter.TritonSemantic.expand_dims
    known: dict[tuple[str, int], Any] = {}

    def expand_dims(self: Any, block: Any, axis: int) -> Any:
        key = block.type.name, axis
        if key not in known:
            made = expand(self, block, axis)
            if not block.type.is_block():
                return made
            known[key] = made.type
        handle = block.handle
        data = handle.data[(slice(None),) * axis + (None,)]
        return tl.tensor(interpreter.TensorHandle(data, handle.dtype.scalar), known[key])

    interpreter.TritonSemantic.expand_dims = expand_dims
