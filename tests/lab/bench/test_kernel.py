"""bench kernel without a card: what a rate counts, and what is timed apart."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from sparsekit.call.geometry import Geometry
from sparsekit.lab.bench import kernel_pages, kernel_peers
from sparsekit.lab.bench.kernel_cases import PLANS, WINDOW, Shape, flops, plan_of
from sparsekit.plan import TokenRule, dense_plan, plan_from_rule


@pytest.mark.parametrize("block_kv", [64, 128])
def test_a_rate_counts_each_row_once(block_kv: int) -> None:
    """Triangle's first rows are dense as its last ones are, and visit far fewer tiles."""
    tokens, block_q = 2000, 128
    geometry = Geometry.of(tokens, block_q=block_q, block_kv=block_kv)
    plan = plan_from_rule(TokenRule(8, 512, tokens - 128), geometry)
    assert plan.row_ptr is not None and plan.dense_rows is not None
    tiles = 0
    for row, (dense, listed) in enumerate(zip(plan.dense_rows.tolist(), plan.row_ptr.diff().tolist(), strict=True)):
        tiles += -(-min((row + 1) * block_q, tokens) // block_kv) if dense else listed
    assert int(plan.dense_rows.sum()) > 1  # the first rows, and the last
    shape = Shape(tokens, 6, 2, 64, torch.bfloat16)
    assert flops(plan, shape) == tiles * 6 * 4 * block_q * block_kv * 64
    bits = torch.zeros(6 * plan.rows, 2, dtype=torch.int32)
    bits[-1] = torch.tensor([7, -1])  # 3 + 32 single columns, in the last head's last row
    columns = replace(
        plan,
        heads=6,
        row_ptr=torch.nn.functional.pad(plan.row_ptr.diff().repeat(6).cumsum(0), (1, 0)).int(),
        entries=plan.entries.repeat(6),  # type: ignore[union-attr]
        dense_rows=plan.dense_rows.repeat(6),
        tokens=torch.arange(64, dtype=torch.int32).repeat(1, 6, 1),
        token_bits=bits,
    )
    assert flops(columns, shape) == (tiles * 6 + 35 / block_kv) * 4 * block_q * block_kv * 64
    assert flops(dense_plan(geometry), shape) == 2 * tokens**2 * 64 * 6


@pytest.mark.parametrize(("case", "dense"), [("mixed", [0, 4]), ("mixed-groups", [0, 1])])
def test_a_quarter_of_the_heads_is_dense_scattered_or_in_groups(case: str, dense: list[int]) -> None:
    """The plan keeps what each head's own plan keeps, and a rate counts no more than that."""
    tokens = 1500
    shape = Shape(tokens, 8, 4, 64, torch.float32, "cpu")
    plan = plan_of(case, shape, (128, 64))
    geometry = Geometry.of(tokens, block_q=128, block_kv=64)
    alone = {True: dense_plan(geometry), False: plan_from_rule(TokenRule(8, 512, tokens - 128), geometry)}
    mask = plan.to_mask()[0]
    for head in range(8):
        assert torch.equal(mask[head], alone[head in dense].to_mask()[0, 0]), head
    tiles = 6 * alone[False].visited_tiles() + 2 * alone[True].visited_tiles()
    assert flops(plan, shape) == tiles * 4 * 128 * 64 * 64


@pytest.mark.parametrize("case", PLANS)
def test_a_case_keeps_the_same_pairs_in_every_tile(case: str) -> None:
    shape = Shape(2048, 4, 2, 16, torch.float32, "cpu")
    masks = []
    for tile in ((128, 128), (128, 64)):
        torch.manual_seed(0)  # of the columns
        masks.append(plan_of(case, shape, tile).to_mask())
    if case != "columns":  # a tile of other keys holds other columns
        assert torch.equal(*masks)
    at = torch.arange(2048)
    assert not bool((masks[0] & (at > at[:, None])).any()) and bool(masks[0].diagonal(dim1=-2, dim2=-1).all())
    if case == "window":
        assert torch.equal(masks[0][0, 0], (at <= at[:, None]) & (at[:, None] - at < WINDOW))


def test_the_time_of_flexattentions_mask_is_without_its_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def create(rule: Any, batch: None, heads: None, q_len: int, kv_len: int, *, device: str, _compile: bool) -> None:
        assert _compile
        asked.append((q_len, kv_len))
        if len(asked) == 1:
            time.sleep(0.3)  # what compiling takes

    monkeypatch.setattr(flex_attention, "create_block_mask", create)
    q = torch.zeros(1, 1, 1, 64)
    made = kernel_peers._flex("triangle", Shape(300, 1, 1, 64, torch.float32, "cpu"), q, q, q)
    assert asked == [(300, 300)] * 2
    assert 0 <= made.extra["plan_ms"] < 150


def test_a_chunk_reads_the_same_in_pages_and_copied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_pages, "CHUNK", 1024)
    shape = Shape(3000, 2, 1, 16, torch.float32)
    rows = list(kernel_pages.pages_rows(shape, ["torch"], 1, "cpu"))
    assert [(row["page"], row["pattern"], row["reads"]) for row in rows] == [
        (page, pattern, reads)
        for page in (16, 256)
        for pattern in ("triangle", "dense")
        for reads in ("pages", "gathered", "together")
    ]
    assert all(row["ms"] > 0 and row["error"] == 0 and row["chunk"] == 1024 for row in rows)
