"""Which layers reuse whose plan: masses against attention written out, anchors against brute force, and the config."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError, apply, load, models
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.config import Reuse
from sparsekit.kernels import geometry_for
from sparsekit.lab.calibrate.reuse import ReuseSearch, choose_anchors, choose_reuse, kept_keys, one_to_one, row_mass
from sparsekit.patterns import BlockTopK, Dense, DynamicUnion, VerticalSlash, parse_pattern, static_plan

TOPK = {"name": "block_topk", "top_k": 2}
OPTIONS: dict[str, Any] = {"tokens": 700, "samples": 2, "tasks": ("needle4",), "quiet": True}


@pytest.fixture(scope="module")
def tiny(smollm2):
    return models.tiny("llama", vocab_size=49152, initializer_range=0.1), smollm2[1]


# ---- anchors


def _brute_force(lost: Tensor, anchors: int) -> float:
    best = math.inf
    for others in combinations(range(1, len(lost)), anchors - 1):
        chosen = (0, *others)
        best = min(best, sum(float(lost[i, max(a for a in chosen if a <= i)]) for i in range(len(lost))))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_anchors_lose_least(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lost = torch.rand(7, 7, generator=generator, dtype=torch.float64) - 0.2 * (seed % 2)
    lost.fill_diagonal_(0)
    for anchors in range(1, 8):
        chosen = choose_anchors(lost, anchors)
        assert chosen[0] == 0 and len(chosen) == anchors and chosen == sorted(set(chosen))
        spent = sum(float(lost[i, max(a for a in chosen if a <= i)]) for i in range(7))
        assert spent == pytest.approx(_brute_force(lost, anchors))


def test_as_few_anchors_as_are_allowed() -> None:
    lost = torch.zeros(6, 6, dtype=torch.float64)
    lost[3:, :3] = math.inf
    lost[5, 3:5] = math.inf
    assert choose_anchors(lost) == [0, 3, 5]
    lost[5, 3] = 0.3
    assert choose_anchors(lost) == [0, 3]
    lost.fill_(math.inf).fill_diagonal_(0)
    assert choose_anchors(lost) == list(range(6))


@pytest.mark.parametrize("seed", range(6))
def test_heads_take_one_head_each(seed: int) -> None:
    """As good as any permutation that differs in two heads; of so few, nearly as good as the best of all."""
    worth = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    of = one_to_one(worth)
    assert sorted(of) == list(range(6))
    sums = {p: float(worth[range(6), p].sum()) for p in permutations(range(6))}
    mine = sums[tuple(of)]
    assert all(
        mine >= total - 1e-9 for p, total in sums.items() if sum(x != y for x, y in zip(p, of, strict=True)) == 2
    )
    assert mine >= 0.9 * max(sums.values())
    assert one_to_one(torch.eye(5)) == list(range(5))


# ---- what is measured


@pytest.mark.parametrize("sinks", [False, True])
def test_mass_of_rows_is_attention_summed(sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 150, 16, generator=generator) for heads in (4, 2))
    softmax = Softmax(0.4, 5.0, torch.tensor([0.0, 1.0, -math.inf, 3.0])) if sinks else Softmax(0.25)
    z = softmax.logits(q.double() @ k.double().repeat_interleave(2, 1).mT)
    z = z.masked_fill(torch.ones(150, 150, dtype=torch.bool).triu(1), -math.inf)
    if softmax.sink_logits is not None:
        z = torch.cat([z, softmax.sink_logits.double()[None, :, None, None].expand(1, 4, 150, 1)], -1)
    p = z.softmax(-1)[0, ..., :150]
    got = row_mass(q, k, softmax, 64)
    assert got.shape == (4, 3, 150)
    for row, part in enumerate(p.split(64, 1)):
        torch.testing.assert_close(got[:, row].double(), part.sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "pattern",
    [
        BlockTopK(top_k=2, force_sink=False),
        VerticalSlash(vertical_tokens=9, slash_tokens=20),
        DynamicUnion(name="union", of=(BlockTopK(top_k=2), VerticalSlash(vertical_tokens=9, slash_tokens=9))),
    ],
)
def test_kept_keys_are_the_plans(pattern: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, heads, 500, 16, generator=generator) for heads in (4, 2))
    plan = pattern.select(q, k, geometry_for(q, k), Softmax(0.25))
    mask, future = plan.to_mask()[0], torch.ones(500, 500, dtype=torch.bool).triu(1)
    for row, part in enumerate(mask.split(plan.block_q, 1)):
        seen = future[row * plan.block_q : (row + 1) * plan.block_q]
        kept = kept_keys(plan, 4)[:, row, None] & ~seen
        assert torch.equal(kept, part)


def test_kept_keys_of_a_dense_plan_are_all() -> None:
    assert kept_keys(static_plan(Dense(), Geometry.of(300), torch.device("cpu")), 3).all()


def test_shares_are_what_a_run_of_the_config_keeps(tiny) -> None:
    """Of the dense model's q and k, by the definition: masks of the plans on the attention weights."""
    model, tokenizer = tiny
    found = choose_reuse(model, tokenizer, TOPK, anchors=2, **OPTIONS)
    from sparsekit.lab.calibrate.prompts import make_prompts
    from sparsekit.lab.tasks import prompt_ids
    from sparsekit.patch.capture import capture_attention

    prompts = make_prompts(model, tokenizer, tasks=["needle4"], tokens=[700], count=2, seeds=[0])
    own, kept = torch.zeros(4), torch.zeros(4)
    for prompt in prompts:
        masks = {}
        for layer, (q, k, _) in sorted(capture_attention(model, prompt_ids(tokenizer, prompt.sample)).items()):
            softmax = Softmax(q.shape[-1] ** -0.5)
            plan = parse_pattern(TOPK).select(q, k, geometry_for(q, k), softmax)  # type: ignore[attr-defined]
            masks[layer] = plan.to_mask()[0]
            z = softmax.logits(q @ k.repeat_interleave(2, 1).mT)[0]
            n = z.shape[-1]
            p = z.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
            own[layer] += (p * masks[layer]).sum(-1).mean() / 2
            there = masks[found.anchor[layer]][list(found.heads[layer])]
            kept[layer] += (p * there).sum(-1).mean() / 2
    assert found.own == pytest.approx(own.tolist(), abs=1e-5)
    assert found.kept == pytest.approx(kept.tolist(), abs=1e-5)


def test_the_config_says_and_runs_what_was_found(tiny) -> None:
    model, tokenizer = tiny
    found = choose_reuse(model, tokenizer, TOPK, anchors=1, layers=[1, 2, 3], **OPTIONS)
    assert found.anchors == (1,) and found.layers == (1, 2, 3)
    config = found.config
    assert config.provenance["anchors"] == [1]
    rule = config.layers["3"]
    assert isinstance(rule, Reuse)
    assert rule.reuse == 1 and (rule.heads or tuple(range(4))) == found.heads[2]
    assert load(config.dump()) == config
    ids = torch.randint(3, 250, (1, 1100), generator=torch.Generator().manual_seed(0))
    with apply(model, config) as handle, torch.inference_mode():
        model(ids)
        rows = handle.report().layers
    assert [row.plan_of for row in rows] == [None, None, 1, 1]
    head, table = found.table()
    assert table[0][:2] == ["1", "1-3"] and len(head) == len(table[0])


def test_a_recall_is_held_in_every_layer(tiny) -> None:
    model, tokenizer = tiny
    loose, tight = (choose_reuse(model, tokenizer, TOPK, recall=r, **OPTIONS) for r in (0.2, 1.0))
    assert len(loose.anchors) == 1
    assert all(kept >= own - 1e-9 for own, kept in zip(tight.own, tight.kept, strict=True))
    assert tight.config.provenance["least_recall"] == 1.0


def test_a_plan_serves_no_more_layers_than_it_may(tiny) -> None:
    model, tokenizer = tiny
    found = choose_reuse(model, tokenizer, TOPK, recall=0.1, run=2, **OPTIONS)
    assert found.anchors == (0, 2)
    assert found.anchor == (0, 0, 2, 2)
    assert all(sorted(heads) == list(range(4)) for heads in found.heads)
    assert choose_reuse(model, tokenizer, TOPK, anchors=3, run=2, **OPTIONS).config.provenance["longest_run"] == 2


def test_what_was_measured_is_not_measured_again(tiny, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    path = tmp_path / "records.jsonl"
    first = choose_reuse(model, tokenizer, TOPK, anchors=2, records=path, **OPTIONS)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(model, "forward", fail)
    again = choose_reuse(model, tokenizer, TOPK, anchors=2, records=path, **OPTIONS)
    assert _numbers(again) == _numbers(first)


def _numbers(found: ReuseSearch) -> Any:
    return found.anchor, found.heads, found.own, found.kept


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "static": ("triangle", {}, r"pattern = triangle\(.*\): it costs no index"),
    "ranked": ("s2o", {}, "it ranks keys within its own heads' order"),
    "both": (TOPK, {"anchors": 2, "recall": 0.9}, r"anchors = 2 and recall = 0\.9: one of the two"),
    "too many": (TOPK, {"anchors": 5}, "anchors = 5: at least 1 and at most 4"),
    "a recall above 1": (TOPK, {"recall": 1.5}, r"recall = 1\.5: a share"),
    "a run too short": (TOPK, {"anchors": 2, "run": 1}, "run = 1: 2 plans have to serve 4 layers; at least 2"),
    "a layer too many": (TOPK, {"layers": [1, 4]}, r"layers: 4: layers that are full causal attention are 0-3\."),
    "one layer": (TOPK, {"layers": [1]}, "layers: 1 of them; two at least"),
    "everything": ({"name": "block_topk", "top_k": 100}, {}, "it keeps every pair of a prompt of 700 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_says_nothing_is_refused(tiny, name: str) -> None:
    pattern, options, said = REFUSED[name]
    with pytest.raises(SparsekitError, match=said):
        choose_reuse(*tiny, pattern, **{**OPTIONS, "samples": 1, **options})
