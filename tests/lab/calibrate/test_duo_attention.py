"""DuoAttention's gates: against masks written out, finite differences, and a model in which one head retrieves."""

from __future__ import annotations

import math

import pytest
import torch
from adversary import RELAYED, TRIANGLE, relay_model
from small import three_layers
from torch import Tensor

from sparsekit import SparsekitError, models
from sparsekit.call.geometry import Span
from sparsekit.config.convert import duo_attention_scores
from sparsekit.lab.calibrate.duo_attention import FULL, _rate, gated_states, train_gates
from sparsekit.lab.calibrate.ranking import read_scores
from sparsekit.lab.calibrate.rules import Given, apply_rule, parse_rule
from sparsekit.patch.capture import wrap_attention
from sparsekit.patterns import parse_pattern

N, PROMPT = 60, 53
STREAMING = parse_pattern({"name": "a_shape", "sink_tokens": 3, "window_tokens": 7})
LAST = parse_pattern({"name": "triangle", "sink_tokens": 3, "window_tokens": 7, "last_tokens": 6})
LAYERS = {"layer_types": ["full_attention"] * 3}


def _ids() -> Tensor:
    return torch.randint(3, 250, (N,), generator=torch.Generator().manual_seed(0))


def _written_out(model, ids: Tensor, pattern, prompt: int, layers=range(3)) -> Tensor:
    """Last hidden states with a mask of that pattern in these layers, the definition."""
    rows, keys = torch.arange(N)[:, None], torch.arange(N)[None]
    keep = pattern.keep(rows, keys, Span(0, N, N, prompt)) & (keys <= rows)

    def attention(own, module, q, k, v, mask, **kwargs):
        if module.layer_idx not in layers:
            return own(module, q, k, v, mask, **kwargs)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (kwargs.get("scaling") or q.shape[-1] ** -0.5)
        if kwargs.get("softcap") is not None:
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        scores = scores.masked_fill(~keep, -math.inf)
        if kwargs.get("s_aux") is not None:
            scores = torch.cat([scores, kwargs["s_aux"].to(scores).view(1, -1, 1, 1).expand(1, -1, N, 1)], -1)
        return (scores.softmax(-1)[..., :N] @ v).transpose(1, 2).contiguous(), None

    with torch.no_grad(), wrap_attention(model, attention):
        return model.model(ids[None], use_cache=False).last_hidden_state[0, prompt - 1 :]


@pytest.mark.parametrize("pattern", [STREAMING, LAST], ids=["a_shape", "triangle"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("gemma2", {**LAYERS, "attn_logit_softcapping": 2.0}),
        ("gpt_oss", {**LAYERS, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_gates_of_one_are_dense_and_of_zero_the_pattern(kind, fields, pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several row blocks, grouped heads, soft-cap and learned sinks; the answer's rows come after the prompt."""
    monkeypatch.setattr("sparsekit.lab.calibrate.blocks.BLOCK_ENTRIES", 16 * 4 * N)
    model, ids = three_layers(kind, **fields), _ids()
    with torch.no_grad():
        dense = model.model(ids[None], use_cache=False).last_hidden_state[0, PROMPT - 1 :]
    sparse = _written_out(model, ids, pattern, PROMPT)
    assert (sparse - dense).abs().max() > 1e-4
    last = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])  # rows are layers
    for full in FULL:
        h_full, h_ones = gated_states(model, ids, PROMPT, torch.ones(3, 2), pattern, full)
        assert h_full.shape == (N - PROMPT + 1, model.config.hidden_size)
        torch.testing.assert_close(h_full, dense, rtol=0, atol=0)
        torch.testing.assert_close(h_ones, dense, rtol=0, atol=0)
        _, h = gated_states(model, ids, PROMPT, torch.zeros(3, 2), pattern, full)
        torch.testing.assert_close(h, sparse, rtol=1e-5, atol=1e-6)  # transformers norms in float32
        _, h = gated_states(model, ids, PROMPT, last, pattern, full)
        torch.testing.assert_close(h, _written_out(model, ids, pattern, PROMPT, [2]), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("full", FULL)
def test_on_a_gpu_in_bfloat16(full: str) -> None:
    """Dense bit for bit at gates of 1, and gradients that float64 on the CPU has too."""
    model, ids = three_layers(), _ids()
    gates = torch.full((3, 2), 0.5, requires_grad=True)
    h_full, h = gated_states(model, ids, PROMPT, gates, LAST, full)
    (h_full - h).pow(2).mean().backward()
    on_gpu = model.to("cuda", torch.bfloat16)
    half = torch.full((3, 2), 0.5, device="cuda", requires_grad=True)
    h_full, h = gated_states(on_gpu, ids, PROMPT, half, LAST, full)
    (h_full - h).pow(2).mean().backward()
    assert torch.cosine_similarity(half.grad.cpu().flatten(), gates.grad.flatten(), dim=0) > 0.98
    _, h_ones = gated_states(on_gpu, ids, PROMPT, torch.ones(3, 2, device="cuda"), LAST, full)
    torch.testing.assert_close(h_ones, h_full, rtol=0, atol=0)


def test_full_is_of_the_dense_model_or_of_the_gated_ones_inputs() -> None:
    """Layers 0 and 1 stream and layer 2 does not: it puts out what it did in the dense model, or attends densely."""
    model, ids = three_layers(), _ids()
    gates = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    _, gated = gated_states(model, ids, PROMPT, gates, STREAMING, "gated")
    torch.testing.assert_close(gated, _written_out(model, ids, STREAMING, PROMPT, [0, 1]), rtol=1e-5, atol=1e-6)
    outputs = {}

    def keep(own, module, *args, **kwargs):
        outputs[module.layer_idx] = own(module, *args, **kwargs)
        return outputs[module.layer_idx]

    def give(own, module, *args, **kwargs):
        return outputs[2] if module.layer_idx == 2 else own(module, *args, **kwargs)

    with torch.no_grad():
        with wrap_attention(model, keep):
            model(ids[None], use_cache=False)
        with wrap_attention(model, give):
            expected = _written_out(model, ids, STREAMING, PROMPT, [0, 1])
    _, dense = gated_states(model, ids, PROMPT, gates, STREAMING, "dense")
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-6)
    assert (dense - gated).abs().max() > 1e-4


@pytest.mark.parametrize("full", FULL)
def test_the_gradient_is_that_of_finite_differences(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = three_layers(), _ids()

    def norm(self, x: Tensor) -> Tensor:  # transformers' rounds to float32
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight

    monkeypatch.setattr(type(model.model.norm), "forward", norm)

    def distance(gates: Tensor) -> Tensor:
        h_full, h = gated_states(model, ids, PROMPT, gates, STREAMING, full)
        return (h_full - h).pow(2).mean()

    gates = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    asked = [weight.requires_grad for weight in model.parameters()]
    distance(gates).backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == asked
    for at in ((0, 0), (0, 1), (1, 0), (2, 1)):
        step = torch.zeros(3, 2, dtype=torch.float64)
        step[at] = 1e-4
        numeric = float(distance(gates.detach() + step) - distance(gates.detach() - step)) / 2e-4
        assert numeric == pytest.approx(float(gates.grad[at]), rel=1e-5) and abs(numeric) > 1e-9


@pytest.mark.parametrize("full", FULL)
def test_the_head_that_retrieves_keeps_its_gate(full: str, tmp_path) -> None:
    """Of all key heads that of head 0 in layer 1, which alone reads the middle; its scores choose all other heads.

    With the dense model's output, the gate of layer 2 that reads the relay mends what layer 1 lost, and is kept too.
    """
    model, tokenizer = relay_model()
    options = {"tasks": [RELAYED], "tokens": [400], "full": full, "quiet": True}
    found = train_gates(model, tokenizer, TRIANGLE, steps=30, learning_rate=0.1, regularisation=5e-6, **options)
    gates = torch.tensor(found.gates)
    assert gates.shape == (3, 2) and gates.min() >= 0 and gates.max() <= 1
    assert gates[1, 0] == gates.max() > 0.5
    others = gates.flatten().sort().values[: -1 if full == "gated" else -2]
    assert others.max() < 0.1 and (full == "gated" or gates[2, 0] > 0.4)
    assert [step.mean_gate for step in found.steps[:1]] == [1.0] and found.steps[0].distance == 0
    assert found.loss(False) < found.loss(True)
    assert found.prompts == {"tasks": ["relayed"], "tokens": [400], "seed": 0} and len(found.steps) == 30

    file = tmp_path / "gates.tsv"
    file.write_text(found.to_tsv())
    for row, layer in zip(duo_attention_scores(file), found.gates, strict=True):
        assert row == pytest.approx(layer, abs=1e-6)
    scores = read_scores(file, model)
    assert scores[1, 0] == scores[1, 1] == duo_attention_scores(file)[1][0] and len(scores) == 12
    rule = parse_rule("head_share", {"share": 10 / 12, "rank": "scores"})
    chosen, said = apply_rule(rule, Given(models.facts(model), scores=scores))
    assert dict(chosen) == {0: (0, 1, 2, 3), 1: (2, 3), 2: (0, 1, 2, 3)}
    assert said["rank"] == "scores" and "probe" not in said


def test_gates_stay_between_0_and_1_and_sliding_layers_have_none(smollm2) -> None:
    """A rate that overshoots; of layers that keep their own attention the score is 1."""
    fields = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    model = models.tiny("gemma2", num_hidden_layers=3, vocab_size=49152, **fields)
    options = {"tasks": ["needle4"], "tokens": [200], "learning_rate": 3.0, "quiet": True}
    found = train_gates(model, smollm2[1], STREAMING, steps=4, **options)
    gates = torch.tensor(found.gates)
    assert gates[1].tolist() == [1.0, 1.0]
    assert gates.min() >= 0 and gates.max() <= 1
    assert [step.mean_gate for step in found.steps][:1] == [1.0] and found.steps[1].mean_gate == 0.0


def test_the_rate_rises_and_falls_over_a_fifth_each() -> None:
    rates = [_rate(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 0.5 and rates[19:81] == [1.0] * 62
    assert rates[90] == 0.5 and rates[99] == 0.1
    assert [_rate(step, 2) for step in range(2)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        (STREAMING, {"full": "gate"}, r"full = 'gate': one of dense, gated\. Did you mean 'gated'"),
        ("flexprefill", {}, "pattern 'flexprefill': want a static one"),
        (STREAMING, {"learning_rate": 0.0}, "lr = 0.0"),
        (STREAMING, {"regularisation": math.nan}, "reg = nan"),
        (STREAMING, {"tokens": [9000]}, "the model has 4096 positions"),
        (STREAMING, {"steps": 0}, "samples = 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(pattern, options, message) -> None:
    model, tokenizer = relay_model()
    with pytest.raises(SparsekitError, match=message):
        train_gates(model, tokenizer, pattern, **{"tasks": [RELAYED], "tokens": [400], "quiet": True, **options})


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    model, tokenizer = relay_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.fill_(math.inf)
    with pytest.raises(SparsekitError, match=r"step 1: loss = nan; use --dtype bfloat16 or float32"):
        train_gates(model, tokenizer, TRIANGLE, steps=2, tasks=[RELAYED], tokens=[400], quiet=True)


def test_a_table_of_another_model_is_refused(tmp_path) -> None:
    file = tmp_path / "gates.tsv"
    file.write_text("0.5\t0.5\n")
    with pytest.raises(SparsekitError, match="scores of 1 layers, but the model has 4"):
        read_scores(file, models.tiny("llama"))
    file.write_text("0.5\n" * 4)
    with pytest.raises(SparsekitError, match="1 key heads a layer, but the model has 2"):
        read_scores(file, models.tiny("llama"))
    with pytest.raises(SparsekitError, match=r"rank 'scores' needs a table of scores"):
        apply_rule(
            parse_rule("head_share", {"share": 0.5, "rank": "scores"}), Given(models.facts(models.tiny("llama")))
        )
