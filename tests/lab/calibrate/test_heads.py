"""Head search: scores against attention written out, choices against brute force, and the config that says them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sparsekit import SparsekitError, apply, load, models
from sparsekit.call.geometry import Geometry
from sparsekit.lab.calibrate.heads import assign, search_heads, threshold_ladder
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.tasks import prompt_ids
from sparsekit.patch.capture import capture_attention
from sparsekit.patterns import parse_pattern, static_plan

NARROW = {"name": "a_shape", "sink_tokens": 4, "window_tokens": 64}
WIDE = {"name": "triangle", "sink_tokens": 4, "window_tokens": 256, "last_tokens": 32}
OPTIONS = {"tokens": 700, "samples": 1, "quiet": True}


@pytest.fixture(scope="module")
def tiny(smollm2):
    return models.tiny("llama", vocab_size=49152), smollm2[1]


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_best_that_a_price_can_find(seed: int) -> None:
    """Within the target, and no combination of no more cost has less error than the prices' convex hull allows."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(4, 3, generator=generator)
    error = torch.rand(4, 3, generator=generator)
    cost[:, 2], error[:, 2] = 1, 0  # dense
    target = 0.6
    chosen = assign(error, cost, target)
    spent = cost.gather(1, chosen[:, None]).mean()
    got = error.gather(1, chosen[:, None]).sum()
    assert spent <= target
    for combination in product(range(3), repeat=4):
        other = torch.tensor(combination)[:, None]
        if cost.gather(1, other).mean() <= spent:
            assert error.gather(1, other).sum() >= got - 1e-6


def test_assignment_by_head_is_minferences() -> None:
    error = torch.tensor([[0.1, 0.3, 0.0], [0.2, 0.1, 0.0], [0.4, 0.5, 0.0]])
    cost = torch.tensor([[0.9, 0.4, 1.0], [0.5, 0.4, 1.0], [0.8, 0.7, 1.0]])
    assert assign(error, cost, 0.5, per_head=True).tolist() == [1, 1, 1]
    assert assign(error, cost, 1.0).tolist() == [2, 2, 2]
    with pytest.raises(SparsekitError, match=r"the cheapest candidates of all heads take 0\.5"):
        assign(error, cost, 0.2)


def test_errors_and_costs_are_those_of_each_head(tiny) -> None:
    model, tokenizer = tiny
    found = search_heads(model, tokenizer, [NARROW, WIDE], flops=0.7, **OPTIONS)
    [prompt] = make_prompts(model, tokenizer, tasks=["needle4"], tokens=[700], count=1, seeds=[0])
    ids = prompt_ids(tokenizer, prompt.sample)
    q, k, v = capture_attention(model, ids, [2])[2]
    n = ids.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    scores = q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
    attention = lambda mask: scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)  # noqa: E731
    for at, fields in enumerate((NARROW, WIDE)):
        plan = static_plan(parse_pattern(fields), Geometry.of(n), torch.device("cpu"))
        off = (attention(plan.to_mask()[0, 0]) - attention(causal)).abs().sum((0, 2, 3))
        expected = off / attention(causal).abs().sum((0, 2, 3))
        torch.testing.assert_close(found.error[2, :, at], expected.double(), rtol=1e-3, atol=1e-6)
        assert found.cost[2, :, at].tolist() == pytest.approx([plan.tile_density()] * 4)
    assert found.error[..., -1].abs().max() == 0 and found.candidates[-1].name == "dense"
    assert found.mean_cost <= 0.7
    head, rows = found.table()
    assert sum(int(row[1]) for row in rows) == 16 and all(len(row) == len(head) for row in rows)


def test_the_config_runs_what_was_chosen(tiny, tmp_path) -> None:
    """Heads of a layer that differ; resumed from records without a forward."""
    model, tokenizer = tiny
    file = tmp_path / "heads.jsonl"
    found = search_heads(model, tokenizer, [NARROW, WIDE], flops=0.7, records=file, **OPTIONS)
    again = load(found.config.dump(tmp_path / "c.yaml"))
    assert again == found.config == load(tmp_path / "c.yaml")
    for layer, row in zip(again.resolve().layers, found.chosen.tolist(), strict=True):
        assert [layer.patterns[i] for i in layer.pattern_of_head] == [found.candidates[i] for i in row]
    assert again.provenance["mean_cost"] == pytest.approx(found.mean_cost, abs=1e-4)
    data = {**again.to_dict(), "dense_below_tokens": 0}
    [prompt] = make_prompts(model, tokenizer, tasks=["needle4"], tokens=[700], count=1, seeds=[0])
    with torch.no_grad(), apply(model, data) as handle:
        model(prompt_ids(tokenizer, prompt.sample))
        measured = sum(layer.tile_density for layer in handle.report().layers) / 4
    assert measured == pytest.approx(found.mean_cost, rel=1e-6)

    other = models.tiny("llama", vocab_size=49152)
    other.forward = None  # would fail
    resumed = search_heads(other, tokenizer, [NARROW, WIDE], flops=0.7, records=file, **OPTIONS)
    assert torch.equal(resumed.chosen, found.chosen)


def test_thresholds_of_a_layer_are_one_pattern(tiny) -> None:
    model, tokenizer = tiny
    ladder = threshold_ladder(4)
    assert [pattern.threshold for pattern in ladder] == [0.9, 0.81, 0.729, 0.6561]
    found = search_heads(model, tokenizer, ladder, flops=0.9, **OPTIONS)
    assert not found.config.heads
    assert found.mean_cost <= 0.9 and found.mean_error > 0
    for layer, row in zip(found.config.resolve().layers, found.chosen.tolist(), strict=True):
        [pattern] = layer.patterns
        shares = [1.0 if i == len(ladder) else ladder[i].threshold for i in row]
        if pattern.name == "xattention":
            assert pattern.threshold in (shares[0], tuple(shares))
        else:
            assert shares == [1.0] * 4


def test_minferences_space_is_dense_at_its_own_target(tiny) -> None:
    """At 700 tokens an A-shape of 1024 sinks is everything, and so is the target."""
    found = search_heads(*tiny, **OPTIONS)
    assert found.target == 1
    assert [pattern.name for pattern in found.candidates].count("vertical_slash") == 4
    assert found.mean_error < 1e-4


def test_what_is_refused(tiny) -> None:
    with pytest.raises(SparsekitError, match="s2o needs a layer of its own"):
        search_heads(*tiny, ["s2o"], **OPTIONS)
    with pytest.raises(SparsekitError, match="no candidates"):
        search_heads(*tiny, ["dense"], **OPTIONS)
    with pytest.raises(SparsekitError, match="flops = 2"):
        search_heads(*tiny, [NARROW], flops=2, **OPTIONS)
