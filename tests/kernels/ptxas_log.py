"""What ptxas says of the kernels that Triton compiles."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from triton import knobs


@contextmanager
def ptxas_log() -> Iterator[io.StringIO]:
    """Its words about the kernel that is compiled inside, which must not be in Triton's cache."""
    with redirect_stdout(io.StringIO()) as said, knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        yield said
    assert "Compiling entry function" in said.getvalue(), "nothing was compiled"
