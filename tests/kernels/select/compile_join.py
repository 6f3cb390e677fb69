"""Compiles the kernels that join and count plans for sm_90, and prints what each takes. `test_join.py` runs it in a
process of its own, whose Triton must compile."""

from __future__ import annotations

import json

import compile_select
from join_cases import CASES
from test_compile import offline

from sparsekit.kernels import launch
from sparsekit.kernels.select import join_triton, totals_triton
from sparsekit.kernels.select.grid import Form
from sparsekit.plan import row_bounds


def main() -> None:
    offline()
    launch._start = compile_select._compile  # type: ignore[assignment]
    for case in CASES:
        a, b = [plan for plan in case.plans() if plan.row_ptr is not None][:1] * 2
        form = Form(a.samples, a.heads, a.rows)
        first, last, _, _ = row_bounds(a.geometry, a.samples, a.row_ptr.device)
        row_ptr, entries = join_triton.merge_triton(a, b, form, first, last, a.dense_rows)
        totals_triton.sums_triton(a)
        if a.tokens is not None and a.token_bits is not None:
            join_triton.drop_columns_triton(row_ptr, entries, a.tokens, a.token_bits, form, a.geometry)
    print(json.dumps(compile_select.MADE))


if __name__ == "__main__":
    main()
