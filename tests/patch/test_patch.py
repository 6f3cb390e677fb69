"""sparsekit under Hugging Face models: what runs sparse, what stays the model's own, and that it comes off again."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TRIANGLE
from tiny import ids as _ids
from tiny import logits as _logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparsekit
from sparsekit import SparsekitError
from sparsekit.models import tiny

SPARSE = {"layers": {"1-3": TRIANGLE}}
TOKENS = 200


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


def _masked_reference(model: PreTrainedModel, ids: Tensor, layers: range) -> Tensor:
    """The stock model with the explicit triangle mask in `layers`, by hooks: what sparse prefill must compute."""
    i, j = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])[None]
    kept = (j <= i) & ((j < 8) | (i - j < 40) | (i >= ids.shape[1] - 20))

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kept[None, None]}

    hooks = [model.model.layers[n].self_attn.register_forward_pre_hook(hook, with_kwargs=True) for n in layers]
    try:
        return _logits(model, ids)
    finally:
        for h in hooks:
            h.remove()


# ---- it computes what it says


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "olmo2", "granite"])
def test_triangle_is_the_model_with_that_mask(family: str) -> None:
    model = tiny(family)
    expected, dense = _masked_reference(model, _ids(), range(1, 4)), _logits(model, _ids())
    with sparsekit.apply(model, SPARSE) as handle:
        got = _logits(model, _ids())
        ran = [layer.ran for layer in handle.report().layers]
    assert ran == ["dense", "sparse", "sparse", "sparse"]
    assert float((got - expected).abs().max()) < 1e-5
    assert float((got - dense).abs().max()) > 1e-3


# Gemma 2 (soft-cap) and gpt-oss (learned sinks) have no sdpa form in transformers.
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss"]
FORMS = [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if a == "eager" or f not in ("gemma2", "gpt_oss")]


@pytest.mark.parametrize(("family", "attention"), FORMS)
def test_dense_config_is_the_model_bit_for_bit(family: str, attention: str) -> None:
    model = tiny(family)
    model.set_attn_implementation(attention)
    before = _logits(model, _ids())
    assert torch.equal(before, _logits(model, _ids()))
    with sparsekit.apply(model, {"default": "dense"}):
        assert torch.equal(_logits(model, _ids()), before)
    assert torch.equal(_logits(model, _ids()), before)
    assert model.config._attn_implementation == attention


def test_dense_layers_by_our_kernel_are_close() -> None:
    model = tiny("llama")
    before = _logits(model, _ids())
    with sparsekit.apply(model, {"default": "dense", "dense_impl": "kernel"}) as handle:
        assert float((_logits(model, _ids()) - before).abs().max()) < 1e-5
        assert [layer.impl for layer in handle.report().layers] == ["torch"] * 4


def test_heads_of_their_own(model: PreTrainedModel) -> None:
    config = {"heads": {"0-3": {"0-1": TRIANGLE, "3": {"name": "a_shape", "window_tokens": 9}}}}
    dense = _logits(model, _ids())
    with sparsekit.apply(model, config) as handle:
        mixed = _logits(model, _ids())
        layer = handle.report().layers[0]
    assert not torch.equal(mixed, dense)
    assert layer.pattern.startswith("heads 0-1: triangle(")
    with sparsekit.apply(model, {"heads": {"0-3": {"0-3": "dense"}}}):
        assert torch.equal(_logits(model, _ids()), dense)


# ---- prefill, decode, chunks, padding


def test_decode_and_short_calls_are_the_models_own(model: PreTrainedModel) -> None:
    ids = _ids()
    own = _logits(model, ids[:, :63])
    with sparsekit.apply(model, {"default": TRIANGLE}):
        assert torch.equal(_logits(model, ids[:, :63]), own)
        cache = DynamicCache(config=model.config)
        _logits(model, ids, past_key_values=cache)
        keys = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        sparse_then = _logits(model, ids[:, :5], past_key_values=cache)
    again = DynamicCache(config=model.config)
    for n, (k, v) in enumerate(keys):
        again.update(k, v, n)
    assert torch.equal(_logits(model, ids[:, :5], past_key_values=again), sparse_then)


@pytest.mark.parametrize("cut", [64, 100, 136])
def test_second_turn_and_chunks_count_from_the_start(model: PreTrainedModel, cut: int) -> None:
    ids = _ids()
    with sparsekit.apply(model, SPARSE) as handle:
        whole = _logits(model, ids)
        cache = DynamicCache(config=model.config)
        with handle.prompt(tokens=TOKENS):
            parts = [
                _logits(model, ids[:, :cut], past_key_values=cache),
                _logits(model, ids[:, cut:], past_key_values=cache),
            ]
    assert float((torch.cat(parts, 1) - whole).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 70}, {"num_beams": 2}], ids=str
)
def test_generate(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Whatever the cache, the prompt's end known: the same tokens as after a one-shot prefill."""
    ids = _ids()
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    with sparsekit.apply(model, SPARSE) as handle, handle.prompt(tokens=TOKENS):
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, **beams)
        got = model.generate(ids, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(got, plain)
        assert [layer.ran for layer in handle.report().layers] == ["dense", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_the_single_runs(model: PreTrainedModel, side: str) -> None:
    lengths = [TOKENS, 137, 90]
    ids, mask = torch.zeros(3, TOKENS, dtype=torch.long), torch.zeros(3, TOKENS, dtype=torch.long)
    for row, n in enumerate(lengths):
        at = slice(TOKENS - n, TOKENS) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = _ids(tokens=n, seed=row)[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with sparsekit.apply(model, SPARSE):
        batch = _logits(model, ids, attention_mask=mask, position_ids=positions)
        for row, n in enumerate(lengths):
            alone = _logits(model, _ids(tokens=n, seed=row))[0]
            assert float((batch[row, mask[row].bool()] - alone).abs().max()) < 1e-5


def test_masks_with_holes_go_to_the_model(model: PreTrainedModel) -> None:
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, 50:60] = 0
    own = _logits(model, _ids(), attention_mask=mask)
    with sparsekit.apply(model, SPARSE) as handle:
        assert torch.equal(_logits(model, _ids(), attention_mask=mask), own)
        assert {layer.why for layer in handle.report().layers} == {"the attention mask has holes"}


def test_packed_sequences_go_to_the_model(model: PreTrainedModel) -> None:
    positions = torch.cat([torch.arange(90), torch.arange(TOKENS - 90)])[None]
    own = _logits(model, _ids(), position_ids=positions, use_cache=False)
    with sparsekit.apply(model, SPARSE) as handle:
        assert torch.equal(_logits(model, _ids(), position_ids=positions, use_cache=False), own)
        assert "packed" in handle.report().layers[1].why


def test_short_prompts_below_the_threshold(model: PreTrainedModel) -> None:
    own = _logits(model, _ids())
    with sparsekit.apply(model, {**SPARSE, "dense_below_tokens": 201}) as handle:
        assert torch.equal(_logits(model, _ids()), own)
        assert handle.report().layers[1].why == "200 tokens, fewer than dense_below_tokens 201"
        with handle.prompt(tokens=500):
            assert not torch.equal(_logits(model, _ids()), own)


# ---- what the model's own attention gets, and what is done once for all layers

DENSE_BELOW = {"default": TRIANGLE, "dense_below_tokens": TOKENS + 1}


@pytest.fixture
def own_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of transformers' SDPA function."""
    seen: list[dict[str, Any]] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        seen.append({"q": q, "k": k, "v": v, "mask": mask, **kwargs})
        return stock(module, q, k, v, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
    return seen


def _padded(columns: int) -> Tensor:
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, :columns] = 0
    return mask


@pytest.mark.parametrize("paused", [False, True], ids=["applied", "paused"])
@pytest.mark.parametrize("mask", [None, _padded(0), _padded(30)], ids=["no mask", "ones", "padded"])
@pytest.mark.parametrize("tokens", [TOKENS, 1], ids=["prompt", "decode"])
def test_own_attention_gets_what_it_always_got(
    model: PreTrainedModel, own_calls: list[dict[str, Any]], tokens: int, mask: Tensor | None, paused: bool
) -> None:
    """The same tensors under the same names; no mask where there was none, which SDPA's causal kernels need."""

    def run() -> list[dict[str, Any]]:
        cache = DynamicCache(config=model.config)
        if tokens == 1:
            before = None if mask is None else mask[:, :-1]
            _logits(model, _ids(tokens=TOKENS - 1), past_key_values=cache, attention_mask=before)
        own_calls.clear()
        _logits(model, _ids(tokens=tokens), past_key_values=cache, attention_mask=mask)
        return own_calls[:]

    untouched = run()
    with sparsekit.apply(model, DENSE_BELOW) as handle, handle.pause() if paused else nullcontext():
        ours = run()
    assert len(ours) == len(untouched) == 4
    for got, expected in zip(ours, untouched, strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(got[name], value) if isinstance(value, Tensor) else got[name] == value, name


def test_layers_do_not_ask_twice(
    model: PreTrainedModel, own_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a call is dense is found once, and its mask is built and cut once, however many layers ask."""
    asked: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return function(*args, **kwargs)

        return count

    masks = ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._local_mapping, "sdpa", counted("mask", masks["sdpa"]))
    decide = sparsekit.patch.decide
    monkeypatch.setattr(decide, "_why_dense", counted("dense", decide._why_dense))
    with sparsekit.apply(model, DENSE_BELOW) as handle:
        _logits(model, _ids(), attention_mask=_padded(30))
        assert sorted(asked) == ["dense", "mask"]
        assert len({id(call["mask"]) for call in own_calls}) == 1
        assert {row.why for row in handle.report().layers} == {"170 tokens, fewer than dense_below_tokens 201"}


def test_a_function_registered_anew_is_the_models_own(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every layer has at hand is looked up again with each prompt."""
    seen: list[int] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.layer_idx)
        return stock(module, *args, **kwargs)

    with sparsekit.apply(model, DENSE_BELOW):
        _logits(model, _ids())
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", other)
        cache = DynamicCache(config=model.config)
        _logits(model, _ids(), past_key_values=cache)
        assert seen == [0, 1, 2, 3]
        _logits(model, _ids(tokens=1), past_key_values=cache)
        assert seen == 2 * [0, 1, 2, 3]


def test_a_layer_that_keeps_its_own_says_so_in_a_short_prompt(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, DENSE_BELOW) as handle:
        first = sparsekit.patch.state.LAYERS[id(model.model.layers[0].self_attn)]
        first.own = "a reason"
        _logits(model, _ids())
        rows = handle.report().layers
    assert [(row.ran, row.why) for row in rows[:1]] == [("own", "a reason")]
    assert {row.ran for row in rows[1:]} == {"dense"}


def test_what_changes_between_two_layers_is_seen(model: PreTrainedModel) -> None:
    """The answer that layers share holds for one state: pause() and prompt() within a forward give another."""
    with sparsekit.apply(model, DENSE_BELOW) as handle, ExitStack() as stack:
        hooks = {1: handle.prompt(tokens=500), 2: handle.pause()}
        for layer, change in hooks.items():
            attention = model.model.layers[layer].self_attn
            attention.register_forward_pre_hook(lambda *_, change=change: stack.enter_context(change))
        _logits(model, _ids())
        rows = handle.report().layers
    short = "200 tokens, fewer than dense_below_tokens 201"
    assert [(row.ran, row.why) for row in rows] == [("dense", short), ("sparse", ""), *[("dense", "paused")] * 2]


def test_a_descriptor_belongs_to_one_model(model: PreTrainedModel) -> None:
    """Another model refuses it; its own knows it, also after a copy from device to device."""
    other = tiny("llama")
    with sparsekit.apply(model, SPARSE), sparsekit.apply(other, SPARSE):
        expected = _logits(model, _ids())
        descriptor = create_causal_mask(model.config, torch.zeros(1, TOKENS, 64), None, None)
        for mask in (descriptor, descriptor.clone()):
            assert torch.equal(_logits(model, _ids(), attention_mask=mask), expected)
            with pytest.raises(SparsekitError, match="a model that sparsekit does not know"):
                _logits(other, _ids(), attention_mask=mask)


# ---- layers that are not full causal attention


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
def test_window_layers_keep_their_own(family: str) -> None:
    model = tiny(family, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=32)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        _logits(model, _ids())
        rows = handle.report().layers
    assert [row.ran for row in rows] == ["own", "sparse", "own", "sparse"]
    assert rows[0].why == "sliding_attention layer of the model"
    with pytest.raises(SparsekitError, match=r"layer 2: triangle.*cannot replace a sliding_attention"):
        sparsekit.apply(model, {"layers": {"2": TRIANGLE}})
    assert model.config._attn_implementation in {"sdpa", "eager"}


def test_a_model_of_window_layers_only_keeps_them() -> None:
    model = tiny("mistral", sliding_window=32)
    own = _logits(model, _ids())
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        assert torch.equal(_logits(model, _ids()), own)
        assert {row.ran for row in handle.report().layers} == {"own"}


# ---- off again


def test_apply_then_remove_is_bitwise(model: PreTrainedModel) -> None:
    before = _logits(model, _ids())
    handle = sparsekit.apply(model, SPARSE)
    assert not torch.equal(_logits(model, _ids()), before)
    handle.remove()
    handle.remove()
    sparsekit.remove(model)
    assert torch.equal(_logits(model, _ids()), before)
    assert model.config._attn_implementation == "sdpa"


def test_remove_by_model_and_by_block(model: PreTrainedModel) -> None:
    before = _logits(model, _ids())
    sparsekit.apply(model, SPARSE)
    sparsekit.remove(model)
    assert torch.equal(_logits(model, _ids()), before)
    with pytest.raises(RuntimeError, match="inside"), sparsekit.apply(model, SPARSE):
        raise RuntimeError("inside")
    assert torch.equal(_logits(model, _ids()), before)


def test_applying_twice_replaces(model: PreTrainedModel) -> None:
    before = _logits(model, _ids())
    first = sparsekit.apply(model, SPARSE)
    second = sparsekit.apply(model, {"default": "dense"})
    assert not first.active
    assert torch.equal(_logits(model, _ids()), before)
    second.remove()
    assert model.config._attn_implementation == "sdpa"


def test_a_bad_config_changes_nothing(model: PreTrainedModel) -> None:
    handle = sparsekit.apply(model, SPARSE)
    sparse = _logits(model, _ids())
    for bad in (
        {"layers": {"40": "dense"}},
        {"heads": {"0": {"4": "dense"}}},
        {"model": {"num_layers": 32}},
        {"defalt": "dense"},
    ):
        with pytest.raises(SparsekitError):
            sparsekit.apply(model, bad)
    assert handle.active
    assert torch.equal(_logits(model, _ids()), sparse)


def test_pause(model: PreTrainedModel) -> None:
    before = _logits(model, _ids())
    with sparsekit.apply(model, SPARSE) as handle:
        with handle.pause():
            assert torch.equal(_logits(model, _ids()), before)
            assert handle.report().layers[1].why == "paused"
        assert not torch.equal(_logits(model, _ids()), before)


def test_training_runs_when_paused_and_is_refused_otherwise(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE) as handle:
        with pytest.raises(SparsekitError, match=r"forward only.*inference_mode"):
            model(_ids())
        with handle.pause():
            model(_ids(), labels=_ids()).loss.backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad is not None


def test_nothing_of_ours_is_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = _logits(model, _ids())
    with sparsekit.apply(model, SPARSE):
        model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "sparsekit" not in file.read_text()
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path), _ids()), before)


def test_two_models_stay_apart() -> None:
    one, two = tiny("llama"), tiny("llama", num_hidden_layers=3)
    own = _logits(one, _ids()), _logits(two, _ids())
    a = sparsekit.apply(one, {"default": TRIANGLE})
    sparse = _logits(one, _ids())
    assert torch.equal(_logits(two, _ids()), own[1])
    b = sparsekit.apply(two, {"layers": {"2": {"name": "a_shape", "window_tokens": 5}}})
    assert torch.equal(_logits(one, _ids()), sparse)
    a.remove()
    assert torch.equal(_logits(one, _ids()), own[0])
    assert not torch.equal(_logits(two, _ids()), own[1])
    b.remove()
    assert torch.equal(_logits(two, _ids()), own[1])


def test_models_that_share_a_config_object() -> None:
    one = tiny("llama")
    other = type(one)(one.config).eval()
    own, sibling = _logits(one, _ids()), _logits(other, _ids())
    with sparsekit.apply(one, SPARSE) as handle:
        assert torch.equal(_logits(other, _ids()), sibling)
        with sparsekit.apply(other, {"default": TRIANGLE, "min_queries": 100}) as second:
            assert not torch.equal(_logits(other, _ids()), sibling)
            short = _logits(other, _ids(tokens=90))
            with second.pause():
                assert torch.equal(_logits(other, _ids(tokens=90)), short)
        assert torch.equal(_logits(other, _ids()), sibling)
        assert not torch.equal(_logits(one, _ids()), own)
        assert handle.report().warning == ""
    assert torch.equal(_logits(one, _ids()), own)
    assert one.config._attn_implementation == "sdpa"


def test_a_shared_config_that_was_switched_back_in_between() -> None:
    one = tiny("llama")
    other = type(one)(one.config).eval()
    first = sparsekit.apply(one, SPARSE)
    one.config._attn_implementation = "eager"
    second = sparsekit.apply(other, SPARSE)
    second.remove()
    first.remove()
    assert one.config._attn_implementation == "eager" and not sparsekit.patch.state.DOORS


def test_a_copy_is_applied_to_or_removed_from(model: PreTrainedModel) -> None:
    """It is no second patched model, and never the dense one without a word; afterwards it stands alone."""
    before = _logits(model, _ids())
    with sparsekit.apply(model, SPARSE):
        sparse = _logits(model, _ids())
        twin, other = copy.deepcopy(model), copy.deepcopy(model)
        for tokens in (TOKENS, 5):
            with pytest.raises(SparsekitError, match=r"copy of a model.*sparsekit\.apply\(copy"):
                _logits(twin, _ids(tokens=tokens))
        sparsekit.remove(twin)
        assert twin.config._attn_implementation == "sdpa"
        assert torch.equal(_logits(twin, _ids()), before)
        with sparsekit.apply(other, SPARSE):
            assert torch.equal(_logits(other, _ids()), sparse)
        assert torch.equal(_logits(model, _ids()), sparse)
    assert torch.equal(_logits(twin, _ids()), before)
    assert torch.equal(_logits(other, _ids()), before)


def test_a_forgotten_model_is_freed() -> None:
    model = tiny("llama")
    sparsekit.apply(model, SPARSE)
    _logits(model, _ids())
    ghost = weakref.ref(model)
    del model
    gc.collect()
    assert ghost() is None
    assert not sparsekit.patch.state.DOORS


def test_a_switch_of_the_implementation_is_refused(model: PreTrainedModel) -> None:
    """By the method of the model or of what is inside it, as continuous batching calls it; nothing changes."""
    methods = [part for part in (model, model.model) if "set_attn_implementation" in part.__dict__]
    with sparsekit.apply(model, SPARSE) as handle:
        sparse = _logits(model, _ids())
        for part in (model, model.model):
            for name in ("eager", {"": "eager"}):
                with pytest.raises(SparsekitError, match=r"set_attn_implementation\(.*eager.*handle\.remove\(\) first"):
                    part.set_attn_implementation(name)
        model.set_attn_implementation(model.config._attn_implementation)
        assert torch.equal(_logits(model, _ids()), sparse)
        assert handle.report().warning == ""
        twin, here = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        twin.set_attn_implementation("eager")
        here.model.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    assert [part.config._attn_implementation for part in (model, twin, here)] == ["eager"] * 3
    assert methods == [part for part in (model, model.model) if "set_attn_implementation" in part.__dict__] == []


def test_the_switch_of_another_part_is_free() -> None:
    model = tiny_vision()
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        model.set_attn_implementation({"vision_config": "eager"})
        assert model.config.vision_config._attn_implementation == "eager"
        with pytest.raises(SparsekitError, match=r"handle\.remove"):
            model.set_attn_implementation("eager")
        assert handle.report().warning == ""
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"


def tiny_vision() -> PreTrainedModel:
    from transformers import AutoModelForImageTextToText, Gemma3Config

    text = {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=255, boi_token_index=253, eoi_token_index=254,
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config).eval()


def test_a_switch_in_the_config_is_reported(model: PreTrainedModel) -> None:
    handle = sparsekit.apply(model, SPARSE)
    model.config._attn_implementation = "eager"
    assert "set to 'eager' after apply" in handle.report().warning
    handle.remove()
    assert model.config._attn_implementation == "eager"


# ---- refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(_ids(), attention_mask=torch.ones(1, 1, TOKENS, TOKENS).bool().tril()), "custom 4-D masks"),
        (lambda m: m(_ids(), output_attentions=True), "output_attentions"),
    ],
)
def test_refused_calls(model: PreTrainedModel, call: Callable[[PreTrainedModel], Any], message: str) -> None:
    with (
        sparsekit.apply(model, {"default": TRIANGLE}),
        torch.inference_mode(),
        pytest.raises(SparsekitError, match=message),
    ):
        call(model)


@pytest.mark.parametrize("family", ["falcon", "mpt"])
def test_models_outside_the_interface(family: str) -> None:
    model = tiny(family)
    before = _logits(model, _ids())
    with pytest.raises(SparsekitError, match="cannot be applied"):
        sparsekit.apply(model, {"default": TRIANGLE})
    assert torch.equal(_logits(model, _ids()), before)


def test_report_reads_well(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE) as handle:
        assert {layer.ran for layer in handle.report().layers} == {"not run"}
        _logits(model, _ids())
        report = handle.report()
    sparse = report.layers[1]
    assert sparse.impl == "torch"
    assert 0 < sparse.density < 1
    assert sparse.plan_bytes > 0
    assert sparse.ms is not None
    assert "triangle(sink_tokens=8" in str(report)
    assert report.to_dicts()[0]["layer"] == 0
    assert "was removed" in handle.report().warning
