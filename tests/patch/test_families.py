"""Every family of models: dense is the model itself, triangle is the model with that mask, other layers stay their own.

One table of tiny random models, built from their config classes. docs/models.md has the same table.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from masked import with_triangle
from small_models import small
from tiny import TRIANGLE
from tiny import close as _close
from tiny import logits as _logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, modeling_utils

import sparsekit
from sparsekit import SparsekitError, explain, models
from sparsekit.models import tiny

TOKENS = 200
WINDOW = 32
OWN_WINDOW = {"name": "a_shape", "sink_tokens": 0, "window_tokens": WINDOW}

# Family -> model type and config fields. What makes a family special is set so that a mistake shows in its logits.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral, sliding": ("mistral", {"sliding_window": WINDOW}),
    "Mixtral": ("mixtral", {"sliding_window": None}),
    "Qwen2": ("qwen2", {}),
    "Qwen2-MoE": ("qwen2_moe", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Phi-3": ("phi3", {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "Gemma 2": ("gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 40}),
    "Gemma 3": ("gemma3_text", {"sliding_window": WINDOW, "num_hidden_layers": 6, "head_dim": 256}),
    "GLM-4": ("glm4", {}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", {"attention_multiplier": 0.4}),
    "Cohere 2": ("cohere2", {"sliding_window": WINDOW, "logit_scale": 1.0}),
    "SmolLM3": ("smollm3", {}),
    "gpt-oss": ("gpt_oss", {"sliding_window": WINDOW}),
    "Qwen3-Next": ("qwen3_next", {}),
    # Their files branch on the name of the implementation.
    "GPT-2": ("gpt2", {}),
    "Gemma 4": (
        "gemma4_text",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 256,
        },
    ),
}
SLIDING = ["Mistral, sliding", "Gemma 2", "Gemma 3", "Cohere 2", "gpt-oss", "Gemma 4"]

families = pytest.mark.parametrize("family", FAMILIES)
sliding_families = pytest.mark.parametrize("family", SLIDING)


@cache
def _model(family: str) -> PreTrainedModel:
    """Weights large enough that attention is far from uniform. Tests leave the model as it was."""
    kind, fields = FAMILIES[family]
    model = tiny(kind, initializer_range=0.1, **fields)
    if family == "Gemma 2":  # transformers 5.19 gives it PyTorch's attention, which drops its soft-cap; later ones this
        model.set_attn_implementation("eager")
    if family == "Gemma 4":  # does not scale q.k down: logits of random weights reach 500, and rounding shows
        for name, weight in model.named_parameters():
            if name.endswith("q_norm.weight"):
                weight.data.mul_(0.05)
    return model


def _ids(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _padded() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two prompts, the second with 63 tokens of left padding: ids, what is valid, and the arguments of a forward."""
    ids, mask = torch.cat([_ids(), _ids(seed=1)]), torch.ones(2, TOKENS, dtype=torch.long)
    ids[1, :63], mask[1, :63] = 0, 0
    return ids, mask.bool(), {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _kinds(model: PreTrainedModel) -> list[str]:
    """The kind of each layer, from its config."""
    config: Any = model.config
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
        types = types * config.num_hidden_layers
    return list(types)


def _range_of(model: PreTrainedModel, kind: str) -> str:
    return ",".join(str(i) for i, k in enumerate(_kinds(model)) if k == kind)


def _with_explicit_mask(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The stock model, whose full layers get the triangle as an explicit mask."""
    return with_triangle(model, ids, {i for i, kind in enumerate(_kinds(model)) if kind == "full_attention"})


# ---- what every family shows


@families
def test_dense_is_the_model_bit_for_bit(family: str) -> None:
    """One prompt, a padded batch, and the tokens after a prompt."""
    model = _model(family)
    ids, valid, padding = _padded()

    def run() -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        first = _logits(model, _ids(), past_key_values=cache)
        return [first, _logits(model, _ids(5), past_key_values=cache), _logits(model, ids, **padding)[valid]]

    stock, again = run(), run()
    with sparsekit.apply(model, {"default": "dense"}):
        ours = run()
    for a, b, c in zip(stock, again, ours, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@families
def test_triangle_is_the_model_with_that_mask(family: str) -> None:
    """And layers that are not full causal attention keep their own, which `explain` says too."""
    model = _model(family)
    expected, dense, kinds = _with_explicit_mask(model, _ids()), _logits(model, _ids()), _kinds(model)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        got, rows = _logits(model, _ids()), handle.report().layers
    _close(got, expected)
    full = kinds.count("full_attention")
    assert (float((got - dense).abs().max()) > 0.05) == (full > 0)
    for row in rows:
        own = f"{kinds[row.layer]} layer of the model"
        assert (row.ran, row.why) == (("sparse", "") if kinds[row.layer] == "full_attention" else ("own", own))
    assert {row.layer for row in rows} == {i for i, kind in enumerate(kinds) if kind != "linear_attention"}
    told = explain({"default": TRIANGLE}, TOKENS, models.facts(model)).layers
    assert [row.runs for row in told] == ["sparse" if kind == "full_attention" else "own" for kind in kinds]


@sliding_families
@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
def test_sliding_layers_run_as_a_shape(family: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that names them: the model's own result, without its mask of N x N."""
    model = _model(family)
    ids, valid, padding = _padded()
    if not padded:
        ids, valid, padding = _ids(), torch.ones(1, TOKENS, dtype=torch.bool), {}
    own = _logits(model, ids, **padding)[valid]
    original = sparsekit.patch.state.Call.original_mask
    built: list[bool] = []

    def original_mask(call: Any, *args: Any) -> Tensor | None:
        built.append(call.window)
        return original(call, *args)

    monkeypatch.setattr(sparsekit.patch.state.Call, "original_mask", original_mask)
    with sparsekit.apply(model, {"layers": {_range_of(model, "sliding_attention"): OWN_WINDOW}}) as handle:
        got, rows = _logits(model, ids, **padding)[valid], handle.report().layers
    _close(got, own)
    assert True not in built
    for row in rows:
        if _kinds(model)[row.layer] == "sliding_attention":
            assert (row.ran, row.why) == ("sparse", "")
            assert row.density < 0.35
        else:
            assert row.ran == "dense"


@pytest.mark.parametrize("family", ["Gemma 3", "gpt-oss"])
def test_sliding_and_full_layers_together(family: str) -> None:
    """Two kinds of masks in one forward do not get mixed up."""
    model = _model(family)
    expected = _with_explicit_mask(model, _ids())
    config = {"default": TRIANGLE, "layers": {_range_of(model, "sliding_attention"): OWN_WINDOW}}
    with sparsekit.apply(model, config) as handle:
        _close(_logits(model, _ids()), expected)
        assert {row.ran for row in handle.report().layers} == {"sparse"}


def test_a_narrower_window_is_the_model_with_that_window() -> None:
    model, narrow = _model("Mistral, sliding"), tiny("mistral", initializer_range=0.1, sliding_window=20)
    with sparsekit.apply(model, {"layers": {"0-3": {**OWN_WINDOW, "window_tokens": 20}}}):
        _close(_logits(model, _ids()), _logits(narrow, _ids()))


@pytest.mark.parametrize(
    "pattern",
    [
        TRIANGLE,
        {"name": "a_shape", "sink_tokens": 1, "window_tokens": WINDOW},
        {"name": "a_shape", "sink_tokens": 0, "window_tokens": WINDOW + 1},
    ],
    ids=str,
)
def test_what_a_sliding_layer_does_not_compute_is_refused(pattern: dict[str, Any]) -> None:
    model = _model("Gemma 3")
    with pytest.raises(SparsekitError, match=r"layer 1: .* cannot replace a sliding_attention .* window is 32 tokens"):
        sparsekit.apply(model, {"layers": {"1": pattern}})
    with pytest.raises(SparsekitError, match=r"layer 1: heads 0-2: dense.* cannot replace a sliding_attention"):
        sparsekit.apply(model, {"heads": {"1": {"3": OWN_WINDOW}}})
    assert model.config._attn_implementation == "sdpa"


def test_a_window_by_default_alone_leaves_sliding_layers_alone() -> None:
    """What `default` says is for full layers; a sliding one is run here only where a rule names it."""
    with sparsekit.apply(_model("Gemma 3"), {"default": OWN_WINDOW}) as handle:
        _logits(_model("Gemma 3"), _ids())
        assert [row.ran for row in handle.report().layers] == ["own"] * 5 + ["sparse"]


def test_a_size_that_layers_differ_in_is_not_told() -> None:
    """Gemma 4's head sizes: what needs them is not predicted, and named as missing."""
    facts = models.facts(_model("Gemma 4"))
    assert (facts.head_dim, facts.num_heads, facts.num_layers) == (None, 4, 6)
    found = explain({"default": TRIANGLE}, TOKENS, facts)
    assert (found.prefill_ratio, found.missing) == (None, ("head_dim",))


def test_linear_layers_cannot_be_named() -> None:
    with pytest.raises(SparsekitError, match=r"layer 0: triangle.* cannot replace a linear_attention layer"):
        sparsekit.apply(_model("Qwen3-Next"), {"layers": {"0": TRIANGLE}})


def test_explain_counts_a_window_as_what_it_replaces() -> None:
    """Naming the sliding layers saves nothing in the count: the model computes no more than their window either."""
    facts = models.facts(_model("Gemma 3"))
    own = explain({}, 4096, facts)
    named = explain({"layers": {_range_of(_model("Gemma 3"), "sliding_attention"): OWN_WINDOW}}, 4096, facts)
    assert [row.runs for row in named.layers] == ["sparse"] * 5 + ["dense"]
    assert named.prefill_flops == own.prefill_flops == named.dense_prefill_flops == own.dense_prefill_flops
    short = explain({"dense_below_tokens": 5000, "layers": {"0": OWN_WINDOW}}, 4096, facts).layers[0]
    assert (short.runs, short.tiles) == ("own", own.layers[0].tiles)


# ---- the last layers of Gemma 4 run the last queries alone


@pytest.mark.skipif(
    not hasattr(modeling_utils, "slice_logits_to_keep"),
    reason="in this release of transformers Gemma 4 runs all queries in all layers",
)
@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
@pytest.mark.parametrize("keep", [1, 5])
def test_layers_that_run_the_last_queries_alone(padded: bool, keep: int) -> None:
    model = _model("Gemma 4")
    ids, _, padding = _padded()
    if not padded:
        ids, padding = _ids(), {}
    own = _logits(model, ids, logits_to_keep=keep, **padding)
    with sparsekit.apply(model, {"default": "dense"}):
        _close(_logits(model, ids, logits_to_keep=keep, **padding), own)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        last = _logits(model, ids, logits_to_keep=keep, **padding)
        assert [row.ran for row in handle.report().layers[4:]] == ["not run", "not run"]
        _close(last, _logits(model, ids, **padding)[:, -keep:])


# ---- parts of other models


def _gemma3_with_vision() -> PreTrainedModel:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = _model("Gemma 3").config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "head_dim": 16},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=255,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).eval()


def _llava() -> PreTrainedModel:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=_model("Llama").config.to_dict(),
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 28, "patch_size": 14},
        image_token_index=255,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("build", "sparse"), [(_gemma3_with_vision, {5}), (_llava, {0, 1, 2, 3})], ids=["gemma3", "llava"]
)
def test_decoder_inside_a_multimodal_model(build: Any, sparse: set[int]) -> None:
    """Text prompts through the decoder; the vision part keeps its attention implementation."""
    model = build()
    own = _logits(model, _ids())
    with sparsekit.apply(model, {"default": "dense"}):
        assert torch.equal(_logits(model, _ids()), own)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert not torch.equal(_logits(model, _ids()), own)
        assert {row.layer for row in handle.report().layers if row.ran == "sparse"} == sparse
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert torch.equal(_logits(model, _ids()), own)


# ---- refused


def _bart() -> PreTrainedModel:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=256,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        )
    )


def _bert() -> PreTrainedModel:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


def _deepseek_v32() -> PreTrainedModel:
    return tiny(
        "deepseek_v32",
        num_hidden_layers=1,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        index_topk=16,
        index_head_dim=128,
        index_n_heads=2,
    )


REFUSED = {
    "Falcon": (lambda: tiny("falcon"), "decides by the name of the attention implementation"),
    "MPT": (lambda: tiny("mpt"), "no attention layer goes through transformers' AttentionInterface"),
    "BLOOM": (lambda: tiny("bloom"), "no attention layer goes through transformers' AttentionInterface"),
    "DeepSeek-V3.2": (_deepseek_v32, "decides by the name of the attention implementation"),
    "GPT-2 with `reorder_and_upcast_attn`": (
        lambda: tiny("gpt2", reorder_and_upcast_attn=True),
        "decides by the name of the attention implementation",
    ),
    "BART": (_bart, "is an encoder-decoder model"),
    "BERT": (_bert, "its attention is not causal"),
    "Zamba 2": (lambda: small("zamba2"), "Zamba2Attention has layer_idx -1, out of 0-3, so its layers cannot be told"),
    "HRM-Text": (lambda: small("hrm_text"), "2 attention modules have layer_idx 0, so its layers cannot be told apart"),
    "Qwen4-Exp": (lambda: small("qwen4_exp_text"), "Qwen4ExpTextAttention looks into its attention mask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name: str) -> None:
    build, message = REFUSED[name]
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(SparsekitError, match=message) as error:
        sparsekit.apply(model, {"default": TRIANGLE})
    assert "\n" not in str(error.value)
    assert model.config._attn_implementation == before


def test_a_decoders_cross_attention_stays_its_own() -> None:
    """GPT-2 with cross-attention to states of another model: only its self-attention is a layer of the config."""
    model = tiny("gpt2", add_cross_attention=True, initializer_range=0.1)
    states = torch.randn(1, 70, 64, generator=torch.Generator().manual_seed(0))
    own = _logits(model, _ids(), encoder_hidden_states=states)
    with sparsekit.apply(model, {"default": "dense"}) as handle:
        assert torch.equal(_logits(model, _ids(), encoder_hidden_states=states), own)
        assert len(handle.report().layers) == 4
    with sparsekit.apply(model, {"default": {**TRIANGLE, "window_tokens": TOKENS}}):
        _close(_logits(model, _ids(), encoder_hidden_states=states), own)


def test_a_feature_that_no_kernel_computes_is_refused() -> None:
    """Arguments of the attention function that change its result are not dropped."""
    model = _model("Llama")
    module = model.model.layers[1].self_attn
    for name, message in {
        "position_bias": "passes 'position_bias' to its attention function",
        "sinks": "passes 'sinks'",
        "dropout": "no dropout, and the model asks for 0.1",
    }.items():
        value = 0.1 if name == "dropout" else torch.zeros(1, 4, TOKENS, TOKENS)

        def add(mod: Any, args: Any, kwargs: dict[str, Any], name: str = name, value: Any = value) -> Any:
            return args, {**kwargs, name: value}

        if name == "dropout":
            module.attention_dropout, module.training = 0.1, True
        else:
            hook = module.register_forward_pre_hook(add, with_kwargs=True)
        try:
            with sparsekit.apply(model, {"default": TRIANGLE}), pytest.raises(SparsekitError, match=message):
                _logits(model, _ids())
        finally:
            if name == "dropout":
                module.attention_dropout, module.training = 0.0, False
            else:
                hook.remove()


def test_values_of_another_size_than_keys_are_refused() -> None:
    """DeepSeek-V3's latent attention: dense runs as ever, a sparse layer says so."""
    heads = {"num_key_value_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    model = tiny("deepseek_v3", q_lora_rank=16, kv_lora_rank=16, **heads, **experts)
    own = _logits(model, _ids())
    with sparsekit.apply(model, {"default": "dense"}):
        assert torch.equal(_logits(model, _ids()), own)
    for config in ({"default": TRIANGLE}, {"layers": {"2": TRIANGLE}}, {"dense_impl": "kernel"}):
        with pytest.raises(SparsekitError, match=r"layer . runs .*size 32 and its values 16.*leave the layer dense"):
            sparsekit.apply(model, config)
        with pytest.raises(SparsekitError, match="keys have size 32 and its values 16"):
            explain(config, TOKENS, models.facts(model))
    assert torch.equal(_logits(model, _ids()), own)


# ---- the page


def _table_rows(section: str) -> Iterator[list[str]]:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    lines = iter(text[text.index(section) :].splitlines())
    for line in lines:
        if line.startswith("|---"):
            break
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_the_same_families() -> None:
    assert [row[0] for row in _table_rows("## Families")] == list(FAMILIES)
    assert [row[0] for row in _table_rows("## Refused")] == list(REFUSED)
    for name, *_, window in _table_rows("## Families"):
        assert (window == "yes") == (name in SLIDING)
