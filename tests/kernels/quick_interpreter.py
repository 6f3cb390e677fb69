"""Triton's interpreter with less Python around each operation; what it computes is the same.

`conftest.py` installs it where TRITON_INTERPRET is set. Most of an interpreted test's time is not numpy's (Triton 3.9).
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    _no_idle_checks()
    _types_once()
    _shapes_once()
    _builtins_once()
    _device_functions_once()
    _equal_shapes_as_they_are()


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


def _equal_shapes_as_they_are() -> None:
    """Most operands need no broadcast; each dimension of each is compared as a constexpr."""
    broadcast = interpreter.TritonSemantic.broadcast_impl_value

    def quick(self: Any, lhs: Any, rhs: Any) -> Any:
        one, two = lhs.type, rhs.type
        if one.is_block() and two.is_block() and one.shape.values == two.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    interpreter.TritonSemantic.broadcast_impl_value = quick
