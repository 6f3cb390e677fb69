"""Configs as they stand on the hub, not as class defaults make them: what `facts`, `apply` and `explain` make of them.

Sizes are small; the fields in question are the hub's, in their form and in proportion.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from masked import causal_layers, logits_of, with_triangle
from small_models import small, small_config
from tiny import TOKENS, TRIANGLE, ids
from torch import nn
from transformers import PreTrainedModel

import sparsekit
from sparsekit import SparsekitError, explain, models
from sparsekit.config import ModelFacts
from sparsekit.patch.capture import capture_attention
from sparsekit.patch.model import facts_of

IDS = ids()
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "rope_theta": 10_000.0}


def _check(model: PreTrainedModel, sparse: set[int], config: dict[str, Any] | None = None) -> None:
    """Just those layers are full causal attention and run sparse, rightly, and `explain` says so."""
    config = {"default": TRIANGLE} if config is None else config
    own = logits_of(model, IDS)
    assert sparse <= causal_layers(model, IDS)
    with sparsekit.apply(model, config) as handle:
        got = logits_of(model, IDS)
        assert {row.layer for row in handle.report().layers if row.ran == "sparse"} == sparse
    expected = with_triangle(model, IDS, sparse)
    assert float((got - expected).abs().max()) < 1e-5 * max(float(own.abs().max()), 1.0)
    assert torch.equal(got, own) == (not sparse)
    assert torch.equal(logits_of(model, IDS), own)
    told = explain(config, TOKENS, models.facts(model.config))
    assert {row.layer for row in told.layers if row.runs == "sparse"} == sparse


# ---- windows

WINDOWS: dict[str, tuple[str, dict[str, Any], set[int]]] = {
    "Phi-3-mini-128k: twice its positions": (
        "phi3",
        {"sliding_window": 1024, "original_max_position_embeddings": 256, "rope_parameters": LONG_ROPE},
        {0, 1, 2, 3},
    ),
    "as many tokens as positions": ("mistral", {"sliding_window": 512}, {0, 1, 2, 3}),
    "Phi-3-mini-4k: half its positions": ("phi3", {"sliding_window": 64}, set()),
    "Mistral v0.1": ("mistral", {"sliding_window": 64}, set()),
    "Mistral v0.3": ("mistral", {"sliding_window": None}, {0, 1, 2, 3}),
    "Starcoder2": ("starcoder2", {"sliding_window": 64}, set()),
    "Qwen2.5, not in use": (
        "qwen2",
        {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 2},
        {0, 1, 2, 3},
    ),
    "Qwen2, in use": ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, {0, 1}),
    "Moshi: a field that its layers do not read": ("moshi", {"sliding_window": 64}, {0, 1, 2, 3}),
    "layer_types that the class does not read": (
        "mistral",
        {"sliding_window": 64, "layer_types": ["full_attention"] * 4},
        set(),
    ),
    "Gemma 3: longer than its positions": ("gemma3_text", {"sliding_window": 4096}, {0, 1, 2, 3}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_layer_slides_where_its_window_cuts(name: str) -> None:
    model_type, fields, sparse = WINDOWS[name]
    _check(small(model_type, **fields), sparse)


def test_rules_name_layers_whose_window_cuts_nothing() -> None:
    """MInference's file for Phi-3-mini-128k has a rule for every layer."""
    model = small("phi3", sliding_window=1024)
    assert models.facts(model).sliding_window == (1024,) * 4
    _check(model, {1, 2}, {"layers": {"1-2": TRIANGLE}})


def test_such_a_window_is_not_forgotten_beyond_the_positions() -> None:
    model = small("mistral", sliding_window=128, max_position_embeddings=128)
    own = logits_of(model, IDS)
    with sparsekit.apply(model, {"layers": {"2": TRIANGLE}}):
        with pytest.raises(
            SparsekitError, match=r"layer 2 runs triangle.* prompt of 200 tokens.* window of 128 tokens"
        ):
            logits_of(model, IDS)
        logits_of(model, IDS[:, :128])
    with sparsekit.apply(model, {"default": "dense"}):
        assert torch.equal(logits_of(model, IDS), own)


# ---- kinds, and layers that are not one module each


def test_attention_beside_another_mixer_is_full_attention() -> None:
    _check(small("falcon_h1"), {0, 1, 2, 3})
    _check(small("falcon_h1"), {2}, {"layers": {"2": TRIANGLE}})


@pytest.mark.parametrize("kinds", [["mamba", "hybrid", "mamba", "hybrid", "mamba", "mamba"], ["hybrid"] * 6], ids=str)
def test_modules_that_serve_several_layers_are_refused(kinds: list[str]) -> None:
    """Zamba 2: the modules have layer_idx -1, and one serves several layers."""
    model = small("zamba2", layers_block_type=kinds, num_hidden_layers=6)
    own = logits_of(model, IDS)
    for config in ({"default": TRIANGLE}, {"layers": {"1": TRIANGLE}}, {"layers": {"5": TRIANGLE}}, {}):
        with pytest.raises(SparsekitError, match=r"Zamba2Attention has layer_idx -1.* cannot be told apart"):
            sparsekit.apply(model, config)
        with pytest.raises(SparsekitError, match=r"cannot be told apart"):
            explain(config, TOKENS, models.facts(model.config))
    assert torch.equal(logits_of(model, IDS), own)


def _shared(model: Any) -> None:
    model.model.layers[3].self_attn = model.model.layers[1].self_attn


def _twice(model: Any) -> None:
    model.model.layers[3].self_attn.layer_idx = 1


def _none(model: Any) -> None:
    model.model.layers[3].self_attn.layer_idx = None


def _beyond(model: Any) -> None:
    model.model.layers[3].self_attn.layer_idx = 4


@pytest.mark.parametrize("change", [_shared, _twice, _none, _beyond])
def test_layers_that_cannot_be_told_apart(change: Any) -> None:
    model = small("llama")
    change(model)
    own = logits_of(model, IDS)
    with pytest.raises(SparsekitError, match="its layers cannot be told apart") as error:
        sparsekit.apply(model, {"layers": {"1": TRIANGLE}})
    assert "\n" not in str(error.value)
    assert torch.equal(logits_of(model, IDS), own)


def test_a_module_under_two_names_is_one_layer() -> None:
    model: Any = small("llama")
    model.also = nn.ModuleList([model.model])
    _check(model, {0, 1, 2, 3})


# ---- decoders of encoder-decoder families


@pytest.mark.parametrize(
    "model_type", ["bart", "mbart", "pegasus", "blenderbot", "blenderbot-small", "marian", "plbart", "whisper"]
)
@pytest.mark.parametrize("depth", [(2, 4), (4, 2)], ids=str)
def test_decoders_of_another_depth_than_their_encoder(model_type: str, depth: tuple[int, int]) -> None:
    encoder, decoder = depth
    sizes = {"encoder_layers": encoder, "decoder_layers": decoder, "decoder_ffn_dim": 96, "decoder_attention_heads": 4}
    model = small(model_type, **sizes)
    facts = models.facts(model)
    assert (facts.num_layers, facts.num_heads, facts.head_dim, facts.intermediate_size) == (decoder, 4, 16, 96)
    assert models.facts(small_config(model_type, **sizes)) == facts
    _check(model, set(range(decoder)))
    _check(model, {decoder - 1}, {"layers": {str(decoder - 1): TRIANGLE}})
    with pytest.raises(SparsekitError, match=rf"has {decoder} layers|0-{decoder - 1}"):
        sparsekit.apply(model, {"layers": {str(decoder): TRIANGLE}})
    assert sorted(capture_attention(model, IDS)) == list(range(decoder))


# ---- fields that are a list, one a layer


def test_gemma3n_has_an_mlp_width_for_each_layer(tmp_path: Path) -> None:
    widths = [128, 128, 256, 128]
    config = small_config(
        "gemma3n_text",
        intermediate_size=widths,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    facts = models.facts(tmp_path)
    assert facts.intermediate_size == tuple(widths)
    same = facts.model_copy(update={"intermediate_size": 160})  # their mean
    assert explain({}, TOKENS, facts).linear_flops == explain({}, TOKENS, same).linear_flops
    written = sparsekit.load({"model": facts.model_dump(), "default": TRIANGLE})
    assert sparsekit.load(written.dump()).model == written.model
    assert [row.runs for row in explain(written, TOKENS).layers] == ["own"] * 3 + ["sparse"]


def test_laguna_has_a_number_of_heads_for_each_layer() -> None:
    model = small("laguna", num_attention_heads_per_layer=[4, 6, 2, 6], num_attention_heads=4)
    facts = models.facts(model)
    assert (facts.num_heads, facts.layer_heads) == (6, (4, 6, 2, 6))
    _check(model, {0, 1, 2, 3})
    own = logits_of(model, IDS)
    with sparsekit.apply(model, {"heads": {"1": {"5": TRIANGLE}, "2": {"0-1": TRIANGLE}}}) as handle:
        assert not torch.equal(logits_of(model, IDS), own)
        assert [row.ran for row in handle.report().layers] == ["dense", "sparse", "sparse", "dense"]
    for config in ({"heads": {"0-1": {"5": TRIANGLE}}}, {"heads": {"2": {"1-2": TRIANGLE}}}):
        with pytest.raises(SparsekitError, match=r"heads\..*: .*head"):
            sparsekit.apply(model, config)


def test_a_window_for_each_layer() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "other"]
    model = {"num_layers": 4, "num_heads": 4, "layer_types": kinds, "sliding_window": [32, None, 64, None]}
    facts = ModelFacts.model_validate(model)
    assert [facts.window(i) for i in range(4)] == [32, None, 64, None]
    rows = explain({"model": model, "default": TRIANGLE}, TOKENS).layers
    assert [row.runs for row in rows] == ["own", "sparse", "own", "own"]
    assert rows[0].pairs is not None and rows[2].pairs is not None and rows[0].pairs < rows[2].pairs
    with pytest.raises(SparsekitError, match="sliding_window has 3 values"):
        sparsekit.load({"model": {**model, "sliding_window": [32, None, 64]}})


def test_layers_whose_own_windows_differ() -> None:
    """As a config may have it where a class makes its window from a list: read off the modules."""
    model: Any = small("gemma3_text", sliding_window=32)
    model.model.layers[2].self_attn.sliding_window = 64
    assert facts_of(model).sliding_window == (32, None, 64, None)


# ---- what a processor gives


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "gemma4_unified"])
def test_a_text_prompt_as_the_processor_gives_it(model_type: str) -> None:
    """Its token types are zeros, no pictures, and the mask composed of them is plain causal."""
    model = small(model_type)
    types = "token_type_ids" if model_type == "gemma3" else "mm_token_type_ids"
    given = {types: torch.zeros_like(IDS), "attention_mask": torch.ones_like(IDS)}
    own = logits_of(model, IDS, **given)
    assert torch.equal(own, logits_of(model, IDS))
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        got = logits_of(model, IDS, **given)
        assert [row.ran for row in handle.report().layers] == ["own", "sparse"] * 2
    expected = with_triangle(model, IDS, {1, 3})
    assert float((got - expected).abs().max()) < 1e-5 * max(float(own.abs().max()), 1.0)
    assert torch.equal(logits_of(model, IDS, **given), own)


# ---- what kernels do not compute


def test_mimo_has_values_of_another_size_than_keys() -> None:
    model = small("mimo_v2_flash", v_head_dim=8)
    own = logits_of(model, IDS)
    with pytest.raises(SparsekitError, match=r"layer 0 runs triangle.* keys have size 16 and its values 8"):
        sparsekit.apply(model, {"default": TRIANGLE})
    with pytest.raises(SparsekitError, match="keys have size 16 and its values 8"):
        explain({"default": TRIANGLE}, TOKENS, models.facts(model.config))
    assert torch.equal(logits_of(model, IDS), own)
    with sparsekit.apply(model, {"default": "dense"}):
        assert torch.equal(logits_of(model, IDS), own)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "falcon", "qwen4_exp_text", "mpt", "xlnet", "zamba"])
def test_a_folder_is_refused_in_the_words_of_apply(model_type: str, tmp_path: Path) -> None:
    model = small(model_type)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(SparsekitError) as applied:
        sparsekit.apply(model, {"default": TRIANGLE})
    with pytest.raises(SparsekitError) as told:
        explain({"default": TRIANGLE}, TOKENS, models.facts(tmp_path))
    assert str(told.value) == str(applied.value)


def test_facts_leave_a_config_alone() -> None:
    config = small_config("gemma3")
    before = json.dumps(config.to_dict(), default=str)
    implementations = [config._attn_implementation, config.text_config._attn_implementation]
    models.facts(config)
    assert json.dumps(config.to_dict(), default=str) == before
    assert [config._attn_implementation, config.text_config._attn_implementation] == implementations


def test_a_config_that_makes_no_model_is_one_line() -> None:
    with pytest.raises(SparsekitError, match="facts of llama: its config makes no model") as error:
        models.facts(small_config("llama", hidden_act="no_such_function"))
    assert "\n" not in str(error.value)
