"""The gradient probe: against theta written out, finite differences, and itself; records that an interrupt leaves."""

from __future__ import annotations

import json
import math

import pytest
import torch
from small import three_layers
from torch import Tensor

from sparsekit import SparsekitError, models
from sparsekit.lab.calibrate.probe import SECTIONS, Sections, probe, probe_batch, read_probe
from sparsekit.lab.calibrate.prompts import ask, make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.tasks import prompt_ids
from sparsekit.patch.capture import wrap_attention

CUT = Sections(sink_tokens=3, window_tokens=7, last_tokens=6)
N, TARGET = 40, 17


def _ids(n: int = N, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(seed))


def _with_theta(model, ids: Tensor, thetas: dict[int, Tensor]) -> Tensor:
    """The target's logit with `thetas` (1 or H, N, N) on the attention weights, the definition written out."""

    def attention(own, module, q, k, v, mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (scaling or q.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        n = q.shape[2]
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.to(scores).view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
        weights = scores.softmax(-1)[..., :n] * thetas.get(module.layer_idx, 1)
        return (weights @ v).transpose(1, 2).contiguous(), None

    with wrap_attention(model, attention):
        return model(ids[None], use_cache=False).logits[0, -1, TARGET]


def _explicit(model, ids: Tensor, *, heads: int = 1) -> list[Tensor]:
    """dy/dtheta of each layer, (heads, N, N), by autograd on theta itself."""
    count = model.config.num_hidden_layers
    thetas = {i: torch.ones(heads, len(ids), len(ids), dtype=torch.float64, requires_grad=True) for i in range(count)}
    _with_theta(model, ids, thetas).backward()
    return [thetas[i].grad for i in range(count)]


def _masks(n: int) -> dict[str, Tensor]:
    i, j = torch.arange(n)[:, None], torch.arange(n)
    near = (j <= i) & ((j < CUT.sink_tokens) | (i - j < CUT.window_tokens))
    last = (j <= i) & ~near & (i >= n - CUT.last_tokens)
    return {"streaming": near, "last": last, "middle": (j <= i) & ~near & ~last}


@pytest.mark.parametrize("n", [1, 5, 6, 10, 11, 40, 300])
def test_sections_partition_the_causal_mask(n: int) -> None:
    masks = _masks(n)
    assert (sum(mask.int() for mask in masks.values()) == torch.ones(n, n).tril().int()).all()
    assert CUT.pairs(n) == tuple(int(masks[name].sum()) for name in SECTIONS)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("gemma2", {"layer_types": ["full_attention"] * 3, "attn_logit_softcapping": 2.0}),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_gradient_is_that_of_theta_written_out(kind: str, fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: every section of every layer, layer and head; several row blocks, GQA, soft-cap, learned sinks."""
    monkeypatch.setattr("sparsekit.lab.calibrate.blocks.BLOCK_ENTRIES", 16 * 4 * N)
    model, ids = three_layers(kind, **fields), _ids()
    logit, sums = probe_batch(model, [ids], [TARGET], CUT)
    explicit, of_heads = _explicit(model, ids), _explicit(model, ids, heads=4)
    assert logit.item() == pytest.approx(_with_theta(model, ids, {}).item(), rel=1e-9)
    assert max(grad.abs().max() for grad in explicit) > 1e-7
    for layer in range(3):
        for at, mask in enumerate(_masks(N).values()):
            inside = explicit[layer][0][mask]
            torch.testing.assert_close(sums.gradient[layer, 0, at], inside.abs().sum(), rtol=1e-8, atol=1e-14)
            torch.testing.assert_close(sums.signed[layer, 0, at], inside.sum(), rtol=1e-8, atol=1e-14)
            expected = of_heads[layer][:, mask].abs().sum(-1)
            torch.testing.assert_close(sums.heads[layer, 0, :, at], expected, rtol=1e-8, atol=1e-14)
            expected = of_heads[layer][:, mask].sum(-1)
            torch.testing.assert_close(sums.head_signed[layer, 0, :, at], expected, rtol=1e-8, atol=1e-14)
        causal = explicit[layer][0].tril()
        torch.testing.assert_close(sums.gradient[layer, 0].sum(), causal.abs().sum())


def test_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: five pairs of theta, central differences, through the definition that the probe was compared with."""
    model, ids = three_layers(), _ids()

    def norm(self, x: Tensor) -> Tensor:  # transformers' rounds to float32, which is all that a difference would show
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight

    monkeypatch.setattr(type(model.model.norm), "forward", norm)
    explicit = _explicit(model, ids)
    generator, step = torch.Generator().manual_seed(3), 1e-4
    for layer in (0, 1):
        for _ in range(5):
            i = int(torch.randint(5, N, (1,), generator=generator))
            j = int(torch.randint(0, i + 1, (1,), generator=generator))
            values = []
            for sign in (1, -1):
                theta = torch.ones(1, N, N, dtype=torch.float64)
                theta[0, i, j] += sign * step
                with torch.no_grad():
                    values.append(_with_theta(model, ids, {layer: theta}))
            assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(
                float(explicit[layer][0, i, j]), rel=1e-3, abs=1e-11
            )


def test_rows_sum_to_output_times_its_gradient() -> None:
    """T7: sum over j of dy/dtheta_ij = sum over heads of dy/dO_i . O_i, so a section's sums do too."""
    model, ids = three_layers(), _ids()
    found = {}

    def attention(own, module, q, k, v, mask, **kwargs):
        out, weights = own(module, q, k, v, mask, **kwargs)
        out.retain_grad()
        found[module.layer_idx] = out
        return out, weights

    with wrap_attention(model, attention):
        model(ids[None], use_cache=False).logits[0, -1, TARGET].backward()
    _, sums = probe_batch(model, [ids], [TARGET], CUT)
    for layer, out in found.items():
        assert out.grad.abs().max() > 0
        torch.testing.assert_close(sums.signed[layer, 0].sum(), (out * out.grad).sum(), rtol=1e-7, atol=1e-13)


def test_the_last_layers_middle_is_free_and_masses_add_up() -> None:
    """Only the final row feeds the answer there; each row of weights sums to 1 in each head."""
    _, sums = probe_batch(three_layers(), [_ids()], [TARGET], CUT)
    middle = SECTIONS.index("middle")
    assert sums.gradient[2, 0, middle] == 0 < sums.gradient[1, 0, middle]
    torch.testing.assert_close(sums.mass.sum(-1), torch.full((3, 1), 4.0 * N, dtype=torch.float64))
    torch.testing.assert_close(sums.head_mass.sum(-1), torch.full((3, 1, 4), 1.0 * N, dtype=torch.float64))


def test_a_batch_is_its_samples_alone() -> None:
    model = three_layers()
    prompts = [_ids(40), _ids(23, seed=1), _ids(31, seed=2)]
    logits, together = probe_batch(model, prompts, [3, 4, 5], CUT)
    for b, ids in enumerate(prompts):
        logit, alone = probe_batch(model, [ids], [3 + b], CUT)
        torch.testing.assert_close(logits[b], logit[0])
        for name in ("gradient", "signed", "mass", "heads", "head_signed", "head_mass"):
            torch.testing.assert_close(getattr(together, name)[:, b], getattr(alone, name)[:, 0])


def test_parameters_and_model_are_as_before() -> None:
    model = three_layers()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (weight.requires_grad, weight.clone()) for name, weight in model.named_parameters()}
    probe_batch(model, [_ids()], [TARGET], CUT)
    for name, weight in model.named_parameters():
        assert weight.grad is None
        assert weight.requires_grad == before[name][0]
        assert torch.equal(weight, before[name][1])
    assert not model.get_input_embeddings()._forward_hooks


def test_layers_that_are_not_full_attention_are_left_alone() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = three_layers("qwen3", layer_types=kinds, sliding_window=8, use_sliding_window=True)
    _, sums = probe_batch(model, [_ids()], [TARGET], CUT)
    assert sums.seen == {1}


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens save about twice the bytes for the backward pass: what grows with N^2 would save four times."""
    saved = []
    for n in (256, 512):
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            probe_batch(three_layers(), [_ids(n)], [TARGET], CUT)
        saved.append(total)
    assert saved[1] / saved[0] < 2.2


# ---- the probe of a model


@pytest.fixture(scope="module")
def tiny(smollm2):
    return models.tiny("llama", vocab_size=49152), smollm2[1]


def test_probe_goes_on_where_it_was_interrupted(tiny, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    options = {"samples": 5, "tokens": 300, "seeds": (0, 1), "sections": CUT, "quiet": True}
    whole = probe(model, tokenizer, **options)
    file, calls = tmp_path / "probe.jsonl", []
    import sparsekit.lab.calibrate.probe as module

    real = module.probe_batch

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "probe_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        probe(model, tokenizer, records=file, **options)
    file.write_text(file.read_text() + '{"id": "half of a li')  # killed while it wrote
    again = probe(model, tokenizer, records=file, **options)
    assert len(calls) == 4 + 2
    assert again.to_dict() == whole.to_dict()
    probe(model, tokenizer, records=file, **options)
    assert len(calls) == 6
    batched = probe(model, tokenizer, batch=3, **options)
    for one, other in zip(whole.layers, batched.layers, strict=True):
        assert one.gradient == pytest.approx(other.gradient, rel=1e-3)

    out = tmp_path / "probe.json"
    out.write_text(json.dumps(whole.to_dict()))
    assert read_probe(out) == whole
    head, rows = whole.table()
    assert len(rows) == 4 and all(len(row) == len(head) for row in rows)
    assert max(whole.relative()) == 1 and whole.relative()[3] == 0
    assert whole.layers[0].gradient_error["middle"] > 0


def test_a_changed_weight_is_anotherthree_layers(tiny, tmp_path) -> None:
    model, tokenizer = tiny
    options = {"samples": 1, "tokens": 400, "seeds": (0,), "quiet": True, "records": tmp_path / "r.jsonl"}
    first = probe(model, tokenizer, **options)
    other = models.tiny("llama", vocab_size=49152)
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight[0, 0] += 1
    assert probe(other, tokenizer, **options) != first
    assert len(Records(tmp_path / "r.jsonl")) == 2


def test_records_survive_what_cut_them(tmp_path) -> None:
    file = tmp_path / "r.jsonl"
    kept = Records(file)
    kept.add({"n": 1}, "a")
    kept.add({"n": 2}, "\u00e9")
    whole = file.read_text()
    for cut in (b'{"id": "b", "ke', b'{"id": "\xc3', b'{"id'):
        file.write_bytes(whole.encode() + cut)
        assert len(Records(file)) == 2 and file.read_text() == whole
    file.write_text(whole.rstrip("\n"))  # all but the line's end
    Records(file).add({"n": 3}, "c")
    assert file.read_text().startswith(whole) and len(Records(file)) == 3
    with pytest.raises(SparsekitError, match=r"records '/dev/full': No space left on device; make room"):
        Records("/dev/full").add({"n": 1}, "a")


def test_what_is_refused(tiny, tmp_path) -> None:
    model, tokenizer = tiny
    with pytest.raises(SparsekitError, match=r"tokens = 5000: the model has 4096 positions"):
        probe(model, tokenizer, tokens=5000)
    with pytest.raises(SparsekitError, match=r"unknown task 'nedle4'.*needle4"):
        probe(model, tokenizer, tasks=["nedle4"])
    with pytest.raises(SparsekitError, match="samples = 0"):
        probe(model, tokenizer, samples=0)
    with pytest.raises(SparsekitError, match="last_tokens = 0"):
        Sections(last_tokens=0)
    (tmp_path / "x.jsonl").write_text("hello\n")
    with pytest.raises(SparsekitError, match=r"line 1: no record of `sparsekit calibrate`"):
        probe(model, tokenizer, records=tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SparsekitError, match="not a file of"):
        read_probe(tmp_path / "x.json")


def test_prompts_are_dealt_to_seeds_and_tasks(tiny) -> None:
    model, tokenizer = tiny
    found = make_prompts(model, tokenizer, tasks=["needle4", "passkey"], tokens=[256, 300], count=10, seeds=[0, 5])
    keys = [(p.task.name, p.tokens, p.seed, p.index) for p in found]
    assert len(set(keys)) == 10
    assert {(name, n, seed) for name, n, seed, _ in keys} == {
        (name, n, seed) for name in ("needle4", "passkey") for n in (256, 300) for seed in (0, 5)
    }
    ids, target = ask(tokenizer, found[0].sample)
    assert tokenizer.decode([target]) == found[0].sample.answers[0][0]
    assert torch.equal(ids[:-1], prompt_ids(tokenizer, found[0].sample)[0])  # a blank, which is a token of its own
    assert tokenizer.decode(ids[-1:]) == " "


@pytest.mark.gpu
def test_on_a_card_as_on_the_cpu() -> None:
    model, ids = models.tiny("llama"), [_ids(300), _ids(200, seed=1)]
    cpu = probe_batch(model, ids, [3, 4], CUT)[1]
    card = probe_batch(model.cuda(), ids, [3, 4], CUT)[1]
    for name in ("gradient", "mass", "heads", "head_signed", "head_mass"):
        torch.testing.assert_close(getattr(card, name).cpu(), getattr(cpu, name), rtol=2e-3, atol=1e-9)


@pytest.mark.gpu
def test_eight_billion_parameters_at_2k_tokens_fit_60_gb() -> None:
    """Llama-3.1-8B's shape, random weights in bfloat16: parameters, activations and the probe's own blocks."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    torch.cuda.reset_peak_memory_stats()
    _, sums = probe_batch(model, [_ids(2000)], [TARGET], Sections())
    assert torch.cuda.max_memory_allocated() < 60e9
    assert len(sums.seen) == 32 and torch.isfinite(sums.gradient).all()
    assert sums.gradient[:-1, 0, SECTIONS.index("middle")].min() > 0
