"""Makes `kernel_cases`, the plans and the comparison that CPU and GPU tests share, importable from the tests here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a child of `children.interpret`: its share of the tests, the others being another child's."""
    if part := os.environ.get("INTERPRETED_PART"):
        first, step = map(int, part.split("/"))
        items[:] = items[first::step]
