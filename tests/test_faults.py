"""The table of `faults.py`: each of its inputs is right, and the test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults import FAULTS, Fault

TESTS = Path(__file__).parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_it_is_right(fault: Fault) -> None:
    file, _, name = fault.test.partition("::")
    assert re.search(rf"^def {name or 'test_'}", (TESTS / file).read_text(), re.MULTILINE)
    assert fault.run()
