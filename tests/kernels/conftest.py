"""Shares the interpreter's tests out among its processes, and makes the interpreter quick."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET"):
    import quick_interpreter

    quick_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a child of `children.interpret`: its share of the tests, the others being another child's."""
    if part := os.environ.get("INTERPRETED_PART"):
        first, step = map(int, part.split("/"))
        items[:] = items[first::step]
