"""Sink diagnostics: scores of known attention, learned sinks, dropped mass and gradient against masks written out."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparsekit import SparsekitError, models
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.lab.calibrate.prompts import ask, make_prompts
from sparsekit.lab.calibrate.sinks import columns, inspect_model, sink_scores
from sparsekit.patch.capture import wrap_attention
from sparsekit.patterns import parse_pattern, static_plan

TRIANGLE = {"name": "triangle", "sink_tokens": 2, "window_tokens": 40, "last_tokens": 16}


def _qkv(n: int, dim: int = 8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, n, dim), (1, 2, n, dim), (1, 2, n, dim)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_uniform_attention_gives_the_harmonic_number() -> None:
    """T19: column 0 of uniform causal attention over 64 tokens: H_64 / 64 = .0741, far below .3."""
    q = torch.zeros(1, 1, 64, 8)
    found = sink_scores(columns(q, q, Softmax(1.0)).early)
    assert float(found[0, 0, 0]) == pytest.approx(sum(1 / i for i in range(1, 65)) / 64, rel=1e-5)
    assert float(found[0, 0, 0]) == pytest.approx(0.0741, abs=5e-5)
    assert float(found[0, 0, 63]) == pytest.approx(1 / 64, rel=1e-5)


def test_all_mass_on_key_0_is_a_score_of_1() -> None:
    """T19, and on another key: that column's score, counted from its own row on."""
    for sink in (0, 5):
        q, k = torch.ones(1, 1, 200, 1), torch.full((1, 1, 200, 1), -500.0)
        k[:, :, sink] = 500.0
        seen = columns(q, k, Softmax(1.0))
        score = sink_scores(seen.whole)[0, 0]
        assert float(score[sink]) == pytest.approx(1.0)
        assert score[sink + 1 :].max() < 1e-6
        assert float(seen.first) == pytest.approx(float(sink == 0))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_columns_are_those_of_the_whole_matrix(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.lab.calibrate.blocks.BLOCK_ENTRIES", 1)
    q, k, _ = _qkv(150)
    seen = columns(q, k, Softmax(0.7, softcap), score_tokens=64)
    z = q @ k.repeat_interleave(2, 1).mT * 0.7
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    weights = z.masked_fill(~torch.ones(150, 150, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    torch.testing.assert_close(seen.whole, weights.sum(2))
    torch.testing.assert_close(seen.early, weights[:, :, :64, :64].sum(2))
    torch.testing.assert_close(seen.first, weights[:, :, 64:, 0].mean(2))
    torch.testing.assert_close(seen.learned, torch.zeros(1, 4, dtype=torch.float64))


def test_learned_sinks() -> None:
    """T18: -inf is the plain softmax; 0 adds 1 to the denominator; rows sum to 1 - P_sink."""
    q, k, _ = _qkv(100)
    plain = columns(q, k, Softmax(0.5))
    none = columns(q, k, Softmax(0.5, sink_logits=torch.full((4,), -math.inf, dtype=torch.float64)))
    torch.testing.assert_close(none.whole, plain.whole)
    one = columns(q, k, Softmax(0.5, sink_logits=torch.zeros(4, dtype=torch.float64)))
    torch.testing.assert_close(one.lse.exp(), plain.lse.exp() + 1)
    torch.testing.assert_close(one.learned, (1 / one.lse.exp()).mean(-1))
    torch.testing.assert_close(one.whole.sum(-1) / 100, 1 - one.learned)


@pytest.fixture(scope="module")
def tiny(smollm2):
    return models.tiny("llama", vocab_size=49152), smollm2[1]


def _weights(model, ids):
    """The dense weights (L, H, N, N) of a prompt, and dy/dO of each layer, with the model's own eager attention."""
    weights, grads = {}, {}

    def attention(own, module, *args, **kwargs):
        out, found = own(module, *args, **kwargs)
        weights[module.layer_idx] = (found, args[2].repeat_interleave(2, 1))
        out.register_hook(lambda grad: grads.__setitem__(module.layer_idx, grad.transpose(1, 2)))
        return out, found

    model.set_attn_implementation("eager")
    with wrap_attention(model, attention):
        logits = model(ids[0][None], use_cache=False).logits
        logits[0, -1, ids[1]].backward()
    model.set_attn_implementation("sdpa")
    return weights, grads


def test_dropped_mass_and_gradient_are_those_of_the_mask(tiny) -> None:
    model, tokenizer = tiny
    config = {"layers": {"1-3": TRIANGLE}}
    options = {"samples": 1, "tokens": 300, "seeds": (0,), "tasks": ["needle4"], "quiet": True}
    found = inspect_model(model, tokenizer, config, gradient=True, **options)
    [prompt] = make_prompts(model, tokenizer, tasks=["needle4"], tokens=[300], count=1, seeds=[0])
    asked = ask(tokenizer, prompt.sample)
    weights, grads = _weights(model, asked)
    n = len(asked[0])
    kept = static_plan(parse_pattern(TRIANGLE), Geometry.of(n), torch.device("cpu")).to_mask()[0, 0]
    for layer in (1, 2, 3):
        p, v = weights[layer]
        mass = (p[0] * ~kept).sum(-1).mean(-1)
        assert found.layers[layer].dropped_mass == pytest.approx(mass.tolist(), rel=1e-3)
        theta = grads[layer] @ v.mT * p  # (1, H, N, N)
        dropped = (theta[0] * ~kept).sum(-1).abs().sum(-1) / theta[0].sum(-1).abs().sum(-1)
        assert found.layers[layer].dropped_gradient == pytest.approx(dropped.tolist(), rel=2e-3, abs=1e-5)
    assert found.layers[2].dropped_gradient[0] > 1e-3
    assert found.layers[0].dropped_mass == ()
    assert "drops at most" in " ".join(found.answer())


def test_a_planted_sink_is_found_where_it_stands(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key but that of position 3 is pushed away in layer 2: the answer is sink_tokens = 4."""
    model, tokenizer = tiny
    import sparsekit.lab.calibrate.sinks as module

    real = module.columns
    layer = [0]

    def planted(q, k, softmax, score_tokens):
        layer[0] += 1
        if layer[0] % 4 == 3:  # layers run in order, four a prompt
            q, k = torch.ones_like(q), torch.full_like(k, -5.0)
            k[:, :, 3] = 5.0
        return real(q, k, softmax, score_tokens)

    monkeypatch.setattr(module, "columns", planted)
    found = inspect_model(model, tokenizer, samples=2, tokens=300, quiet=True)
    assert found.sink_tokens == 4
    assert found.layers[2].sinks == {3: 1.0}
    assert found.layers[2].top[0]["position"] == 3 and found.layers[2].top[0]["samples"] == 2
    assert "Needs sink_tokens = 4" in found.answer()[0] and found.answer()[0].endswith("in layers 2.")
    json.dumps(found.to_dict())
    head, rows = found.table()
    assert len(rows) == 4 and all(len(row) == len(head) for row in rows)


def test_a_model_with_learned_sinks_and_sliding_layers(tiny) -> None:
    model = models.tiny("gpt_oss", vocab_size=49152, num_local_experts=2, num_experts_per_tok=1)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, 30.0)
    found = inspect_model(model, tiny[1], samples=1, tokens=256, quiet=True)
    assert [bool(layer.own) for layer in found.layers] == [True, False, True, False]
    assert min(found.layers[1].learned) > 0.99
    assert found.sink_tokens == 0
    assert found.answer()[0].startswith("Needs no sink tokens")
    assert "Learned sink logits take up to 1.00" in found.answer()[1]


def test_what_is_refused(tiny) -> None:
    model, tokenizer = tiny
    with pytest.raises(SparsekitError, match="give the config"):
        inspect_model(model, tokenizer, gradient=True)
    with pytest.raises(SparsekitError, match="the model has 4096 positions"):
        inspect_model(model, tokenizer, tokens=8192)
    with pytest.raises(SparsekitError, match=r"num_layers = 30.*but the model has 4"):
        inspect_model(model, tokenizer, {"model": {"num_layers": 30, "num_heads": 4}})
    with pytest.raises(SparsekitError, match="epsilon = 2"):
        inspect_model(model, tokenizer, epsilon=2)
