"""Compiles the kernel that copies heads' lists for sm_90, and prints what it takes. `test_heads.py` runs it in a
process of its own, whose Triton must compile."""

from __future__ import annotations

import json

import compile_select
import torch
from heads_cases import HEADS_CASES
from test_compile import offline

from sparsekit.kernels import launch
from sparsekit.kernels.select import heads_triton, plan_of_heads


def main() -> None:
    offline()
    launch._start = compile_select._compile  # type: ignore[assignment]
    for case in HEADS_CASES:
        row_ptr = plan_of_heads(case.plan(), case.heads).row_ptr
        assert row_ptr is not None
        for ptr in (row_ptr, row_ptr.long()):
            heads_triton.copy_lists_triton(case.plan(), torch.tensor(case.heads), ptr, int(row_ptr[-1]))
    print(json.dumps(compile_select.MADE))


if __name__ == "__main__":
    main()
