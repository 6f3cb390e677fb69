"""Sink diagnostics: scores of known attention, learned sinks, dropped mass and gradient against masks written out."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparsekit import SparsekitError, apply, models
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.lab.calibrate.columns import columns, sink_scores
from sparsekit.lab.calibrate.inspection import Inspection, LayerSinks, read_inspection
from sparsekit.lab.calibrate.outputs import _layers
from sparsekit.lab.calibrate.prompts import ask, make_prompts
from sparsekit.lab.calibrate.sinks import inspect_model
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
        assert float(seen.share(torch.tensor([0]))) == pytest.approx(float(sink == 0))
        assert float(seen.mass(torch.tensor([0, 5]))) == pytest.approx(1.0)


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
    torch.testing.assert_close(seen.share(torch.tensor([0])), weights[:, :, 64:, 0].mean(2))
    torch.testing.assert_close(seen.share(torch.tensor([0, 7]), 1), weights[:, :, 64:, [0, 7]].sum(3).mean(2))
    torch.testing.assert_close(seen.learned, torch.zeros(1, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("tokens", "ends"), [(40, (40,)), (150, (64, 150)), (160, (64, 128, 160)), (1010, (64, 128, 256, 512, 1010))]
)
def test_runs_of_rows_are_those_of_shorter_prompts(tokens: int, ends: tuple[int, ...]) -> None:
    q, k, _ = _qkv(tokens)
    seen = columns(q, k, Softmax(0.7))
    assert seen.ends == ends
    short = columns(q[:, :, : ends[-2]], k[:, :, : ends[-2]], Softmax(0.7)) if len(ends) > 1 else seen
    for part in range(len(short.ends)):
        torch.testing.assert_close(seen.parts[part, ..., : short.parts.shape[-1]], short.parts[part])


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
    torch.testing.assert_close(one.mass(torch.empty(0, dtype=torch.int64)), (1 / one.lse[..., 64:].exp()).mean(-1))


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
    options = {"samples": 1, "tokens": 300, "seeds": (0,), "tasks": ["needle4"], "kept_sinks": (), "quiet": True}
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


@pytest.fixture(scope="module")
def built(smollm2):
    """Every answer is known. All tokens are alike but for a mark on the first.

    Layer 1: head 2 attends to the mark alone, and passes it on to feature 20, which the logits read; head 0 attends
    evenly, and adds four times as much. The feed-forward part blows channel 50 up at the first token; that of layer 2
    takes it back.
    """
    model = models.tiny(
        "llama",
        vocab_size=49152,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},  # dimension 5 of a head hardly turns
    )
    mark, bias, slow = 0, 3, 5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, bias] = 30.0
        model.model.embed_tokens.weight[:, mark] = 0.0
        model.lm_head.weight[:, 20] = torch.linspace(0, 100, 49152)
        one = model.model.layers[1]
        one.self_attn.q_proj.weight[2 * 16 + slow, bias] = one.self_attn.k_proj.weight[2 * 16 + slow, mark] = 40.0
        one.self_attn.v_proj.weight[2 * 16, mark] = one.self_attn.v_proj.weight[0, bias] = 1.0
        one.self_attn.o_proj.weight[20, 2 * 16] = 1.0
        one.mlp.gate_proj.weight[0, mark] = one.mlp.up_proj.weight[0, mark] = 100.0
        one.mlp.down_proj.weight[50, 0] = 10.0
        two = model.model.layers[2]
        two.mlp.gate_proj.weight[0, 50] = two.mlp.up_proj.weight[0, 50] = 1.0

    def put_mark(module, args, out):
        out = out.clone()
        out[:, 0, mark] += out.shape[1] > 1  # of a prompt, not of a token that is decoded
        return out

    model.model.embed_tokens.register_forward_hook(put_mark)
    ids = torch.ones(1, 9, dtype=torch.int64)
    norm = lambda layer: one.input_layernorm(model.model(ids, output_hidden_states=True).hidden_states[layer])[0]  # noqa: E731
    with torch.no_grad():
        added = norm(1)[0, mark] / norm(1)[1, bias]
        one.self_attn.o_proj.weight[21, 0] = 4 * added
        blown = model.model(ids, output_hidden_states=True).hidden_states[2][0, 0, 50] - 1
        x = two.post_attention_layernorm(torch.cat([torch.ones(50), blown[None] + 1, torch.ones(13)]))[50]
        two.mlp.down_proj.weight[50, 0] = -blown / (torch.nn.functional.silu(x) * x)
    return model, smollm2[1], float(blown) + 1


def test_a_head_that_does_nothing_is_named_with_its_output(built) -> None:
    model, tokenizer, _ = built
    found = inspect_model(model, tokenizer, samples=2, tokens=300, kept_sinks=(), quiet=True)
    assert found.sink_tokens == 1 and found.layers[1].sinks == {0: 1.0}
    assert [layer.idle for layer in found.layers] == [[], [2], [], []]
    [idle] = found.to_dict()["idle_heads"]
    assert (idle["layer"], idle["head"]) == (1, 2)
    assert idle["sink_mass"] == pytest.approx(1.0, abs=1e-6)
    assert found.layers[1].output == pytest.approx([4 / 17**0.5, 0, 1 / 17**0.5, 0], abs=1e-3)
    assert found.layers[1].sink_mass[0] < 0.02 and found.layers[0].output == (0.0, 0.0, 0.0, 0.0)
    assert found.layers[1].mass_by_length.keys() == {128, 300}
    assert found.layers[1].mass_by_length[128][2] == pytest.approx(1.0, abs=1e-6)
    assert found.layers[1].mass_by_length[128][0] == pytest.approx(sum(1 / n for n in range(65, 129)) / 64, rel=1e-4)
    said = found.answer()
    assert "1 of 16 heads do nothing" in " ".join(said) and "add 0.24 of what" in " ".join(said)
    assert any(line.startswith("Sink mitigation: none") for line in said)


def test_a_massive_activation_is_found_in_its_layer_and_channel(built) -> None:
    model, tokenizer, blown = built
    found = inspect_model(model, tokenizer, samples=1, tokens=300, kept_sinks=(), quiet=True)
    ratios = [layer.massive[0]["ratio"] for layer in found.layers]
    assert ratios[1] > 1000 and max(ratios[0], *ratios[2:]) < 100
    most = found.layers[1].massive[0]
    assert (most["channel"], most["position"], most["token"]) == (50, 0, "<|im_start|>")
    assert most["value"] == pytest.approx(blown, rel=1e-3) and most["ratio"] == pytest.approx(blown, rel=1e-3)
    assert found.layers[3].massive[0]["value"] == pytest.approx(30.0)  # before the model's last norm
    [line] = [line for line in found.answer() if line.startswith("Massive")]
    assert "channel 50 after layers 1, the most" in line


def test_what_the_answer_loses_without_the_sink(built) -> None:
    """Head 2 of layer 1 reads the first token alone: with one sink kept the answer is dense's, with none it is not."""
    model, tokenizer, _ = built
    found = inspect_model(model, tokenizer, samples=2, tokens=300, kept_sinks=(0, 4), quiet=True)
    kl = {(row["name"], row["sink_tokens"]): row["kl"] for row in found.kept}
    assert list(kl) == [(name, n) for name in ("a_shape", "triangle") for n in (0, 1, 4)]
    assert (found.kept[0]["window_tokens"], found.kept[0]["last_tokens"]) == (75, 37)
    assert kl["a_shape", 0] > 1e-3 and max(kl["a_shape", 1], kl["a_shape", 4]) < 1e-6
    assert max(kl["triangle", n] for n in (0, 1, 4)) < 1e-6  # the last rows see every key
    titles = [title for title, _ in found.more_tables()]
    assert len(titles) == 3 and "window 75, triangle's last rows 37" in titles[2]


def test_a_sink_is_found_where_it_stands(built) -> None:
    """The mark on the fourth token: the answer is sink_tokens = 4."""
    model, tokenizer, _ = built
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.roll(3, 1))
    try:
        found = inspect_model(model, tokenizer, samples=2, tokens=300, kept_sinks=(), quiet=True)
    finally:
        hook.remove()
    assert found.sink_tokens == 4
    assert found.layers[1].sinks == {3: 1.0}
    assert found.layers[1].top[0]["position"] == 3 and found.layers[1].top[0]["samples"] == 2
    assert "Needs sink_tokens = 4" in found.answer()[0] and found.answer()[0].endswith("in layers 1.")
    json.dumps(found.to_dict())
    for head, rows in (found.table(), *(table for _, table in found.more_tables())):
        assert rows and all(len(row) == len(head) for row in rows)
    assert len(found.table()[1]) == 4


def test_outputs_are_those_of_the_projections_columns(tiny) -> None:
    """Heads of a random model against o_proj's weight taken apart by hand, over the rows from 64 on."""
    model, tokenizer = tiny
    found = inspect_model(model, tokenizer, samples=1, tokens=300, seeds=(0,), kept_sinks=(), quiet=True)
    [prompt] = make_prompts(model, tokenizer, tasks=["needle4"], tokens=[300], count=1, seeds=[0])
    given = []
    project = model.model.layers[2].self_attn.o_proj
    hook = project.register_forward_pre_hook(lambda module, args: given.append(args[0][0, 64:].unflatten(1, (4, 16))))
    with torch.no_grad():
        model(ask(tokenizer, prompt.sample)[0][None])
    hook.remove()
    parts = torch.einsum("nhd,fhd->hnf", given[0], project.weight.unflatten(1, (4, 16)))
    expected = parts.flatten(1).norm(dim=1) / parts.sum(0).norm()
    assert found.layers[2].output == pytest.approx(expected.tolist(), rel=1e-4)


def test_layers_are_found_by_the_attention_that_they_hold() -> None:
    """One attention each, beside a layer without; two each, as LongCat-Flash has them; and none in a list."""

    def attention(number: int) -> torch.nn.Module:
        module = torch.nn.Linear(1, 1)
        module.layer_idx = number
        return module

    a, b, c, d = map(attention, range(4))
    mixed = torch.nn.ModuleList([torch.nn.Sequential(a), torch.nn.Identity(), torch.nn.Sequential(c)])
    assert _layers(torch.nn.Sequential(mixed), [a, c]) == dict(enumerate(mixed))
    pairs = torch.nn.ModuleList([torch.nn.ModuleList([a, b]), torch.nn.ModuleList([c, d])])
    assert _layers(torch.nn.Sequential(pairs), [a, b, c, d]) == {0: pairs[0], 1: pairs[0], 2: pairs[1], 3: pairs[1]}
    with pytest.raises(SparsekitError, match="no list holds its attention layers"):
        _layers(torch.nn.Sequential(a, b), [a, b])


def test_output_gates(tiny) -> None:
    """A gate of sigmoid(0) lets half through; a norm at that place is no gate."""
    options = {"samples": 1, "tokens": 300, "kept_sinks": (), "quiet": True}
    gated = models.tiny("qwen3_next", vocab_size=49152)
    for layer in gated.model.layers:
        if hasattr(layer, "self_attn"):  # the others are linear
            layer.self_attn.q_proj.weight.data.unflatten(0, (4, 32))[:, 16:] = 0.0
    found = inspect_model(gated, tiny[1], **options)
    full = [layer for layer in found.layers if not layer.own]
    assert full and all(layer.mitigation == ("output gate",) for layer in full)
    assert all(layer.gate == pytest.approx(0.5, abs=1e-6) for layer in full)
    assert all(layer.mitigation is None for layer in found.layers if layer.own)
    [line] = [line for line in found.answer() if line.startswith("Sink mitigation")]
    assert "output gate in layers" in line and "lets 0.50 of attention's output through" in line

    normed = inspect_model(models.tiny("bitnet", vocab_size=49152), tiny[1], **options)
    assert all(layer.mitigation == () and layer.between == "BitNetRMSNorm" for layer in normed.layers)
    assert "not counted as a gate: BitNetRMSNorm (layers 0-3)" in " ".join(normed.answer())


@pytest.mark.parametrize(
    ("logits", "mitigation"),
    [(30.0, ("sink logits",)), (0.0, ("softmax off by one",)), (-math.inf, ())],
)
def test_sinks_in_the_softmax(tiny, logits: float, mitigation: tuple[str, ...]) -> None:
    model = models.tiny("gpt_oss", vocab_size=49152, num_local_experts=2, num_experts_per_tok=1)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, logits)
    found = inspect_model(model, tiny[1], samples=1, tokens=256, kept_sinks=(), quiet=True)
    assert [layer.mitigation for layer in found.layers] == [mitigation] * 4
    assert [layer.idle for layer in found.layers] == [[], [0, 1, 2, 3] if logits == 30 else []] * 2


def test_a_model_with_learned_sinks_and_sliding_layers(tiny) -> None:
    model = models.tiny("gpt_oss", vocab_size=49152, num_local_experts=2, num_experts_per_tok=1)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, 30.0)
    found = inspect_model(model, tiny[1], samples=1, tokens=256, kept_sinks=(), quiet=True)
    assert [bool(layer.own) for layer in found.layers] == [True, False, True, False]
    assert min(found.layers[1].learned) > 0.99
    assert found.sink_tokens == 0
    assert found.answer()[0].startswith("Needs no sink tokens")
    assert "Learned sink logits take up to 1.00" in " ".join(found.answer())
    assert "Sink mitigation: sink logits in layers 0-3." in found.answer()


def test_what_is_written_is_read(built, tmp_path) -> None:
    model, tokenizer, _ = built
    found = inspect_model(model, tokenizer, samples=2, tokens=300, kept_sinks=(1,), quiet=True)
    (tmp_path / "found.json").write_text(json.dumps(found.to_dict()))
    assert json.dumps(read_inspection(tmp_path / "found.json").to_dict()) == json.dumps(found.to_dict())
    said = found.markdown()
    assert "- 1 of 16 heads do nothing" in said and "| a_shape | 0.0000 ± 0.0000 |" in said
    (tmp_path / "other.json").write_text('{"kind": "probe"}')
    with pytest.raises(SparsekitError, match=r"other\.json': not a file of `sparsekit inspect -o`"):
        read_inspection(tmp_path / "other.json")


def test_of_one_prompt_no_interval_is_known(built) -> None:
    """JSON has no number for an infinite width."""
    model, tokenizer, _ = built
    found = inspect_model(model, tokenizer, samples=1, tokens=300, kept_sinks=(1,), quiet=True)
    assert [row["kl_half_width"] for row in found.kept] == [None, None]
    assert "| a_shape | 0.0000 |" in found.markdown()
    json.dumps(found.kept, allow_nan=False)


def test_a_patched_model_is_seen_dense_and_left_as_it_was(tiny) -> None:
    model, tokenizer = tiny
    options = {"samples": 1, "tokens": 300, "kept_sinks": (1,), "quiet": True}
    dense = inspect_model(model, tokenizer, **options)
    with apply(model, {"default": {"name": "a_shape", "sink_tokens": 0, "window_tokens": 16}}) as handle:
        found = inspect_model(model, tokenizer, **options)
        assert handle.active and model.config._attn_implementation != "sdpa"
    assert found == dense


def test_activations_that_are_not_finite_are_refused(tiny) -> None:
    model = models.tiny("llama", vocab_size=49152)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(SparsekitError, match="what comes out of layer 2 is not finite in float32"):
        inspect_model(model, tiny[1], samples=1, tokens=300, kept_sinks=(), quiet=True)
    with pytest.raises(SparsekitError, match="training mode"):
        inspect_model(model.train(), tiny[1], samples=1, tokens=300, kept_sinks=(), quiet=True)


@pytest.mark.parametrize("sinks", [{0: 0.25}, {100: 1.0}])
def test_a_sink_that_sink_tokens_need_not_keep_is_not_denied(sinks: dict[int, float]) -> None:
    layer = LayerSinks(0, score=(0.1,), first=(0.1,), sinks=sinks, sink_mass=(0.1,))
    first = Inspection("tiny", 4, {"tokens": 300}, 0.3, 64, "", {}, (layer,)).answer()[0]
    assert first == (
        "Needs no sink tokens: none of the first 64 columns gets more than 0.3 of a head's attention in half of the "
        "prompts."
    )


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
