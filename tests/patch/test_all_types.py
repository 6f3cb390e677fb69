"""Every type of transformers' causal-LM mapping, built small: `apply` is right or refuses, and `explain` says the same.

Right: a triangle in every layer gives the logits of the model's own attention under that triangle as an explicit mask,
in just those layers whose own mask is plain causal. Afterwards, and after a refusal, the model is bit for bit itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import NOT_BUILT, PARTS, small, small_config
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsekit
from sparsekit import SparsekitError, explain, models
from sparsekit.cli.about import validate
from sparsekit.patch.capture import wrap_attention
from sparsekit.patch.state import DOORS, HANDLES, LAYERS

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TOKENS, SINK, NEAR, LAST = 200, 8, 40, 20
TRIANGLE = {"name": "triangle", "sink_tokens": SINK, "window_tokens": NEAR, "last_tokens": LAST}
IDS = torch.randint(3, 250, (1, TOKENS), generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()

# Why a model may be refused.
REASONS = (
    "no attention layer goes through transformers' AttentionInterface",
    "decides by the name of the attention implementation what to compute",
    "looks into its attention mask",
    "its layers cannot be told apart",
    "its attention is not causal",
    "which no kernel here computes",
)

# Its text prompts come with a mask composed for pictures, which patch/mask.py does not see through.
COMPOSED = {"gemma4_unified"}

seen: dict[str, list[str]] = defaultdict(list)  # outcome -> types


def _param(model_type: str) -> Any:
    marks = [pytest.mark.xfail(reason="a composed mask", strict=False)] if model_type in COMPOSED else []
    return pytest.param(model_type, marks=marks)


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """What `apply` may touch: implementations of all parts, hooks, and what is remembered of the modules."""
    modules = list(model.modules())
    return {
        "implementations": [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in modules],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "remembered": [
            m for m in modules if id(m) in LAYERS or m in HANDLES or id(getattr(m, "config", None)) in DOORS
        ],
        "attributes": [sorted(vars(m)) for m in modules],
    }


def _is_plain_causal(module: Any, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the model's own attention looks at all earlier tokens, by the mask that it is given."""
    if q.shape[2] != TOKENS or k.shape[2] != TOKENS:
        return False
    if mask is None:
        told = kwargs.get("is_causal")
        return bool(module.is_causal if told is None else told)
    kept = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool((kept == CAUSAL).all())


def _causal_layers(model: PreTrainedModel) -> set[int]:
    """The layers whose attention is full and causal, as they run."""
    found = set()

    def look(own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        if _is_plain_causal(module, q, k, mask, kwargs):
            found.add(module.layer_idx)
        return own(module, q, k, v, mask, **kwargs)

    with wrap_attention(model, look):
        _logits(model)
    return found


def _with_explicit_mask(model: PreTrainedModel, layers: set[int]) -> Tensor:
    """The model's own attention, under the triangle as a float mask in those layers."""
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
    kept = (j <= i) & ((j < SINK) | (i - j < NEAR) | (i >= TOKENS - LAST))
    triangle = torch.where(kept, 0.0, torch.finfo(torch.float32).min)[None, None]

    def masked(own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return own(module, q, k, v, triangle if module.layer_idx in layers else mask, **kwargs)

    with wrap_attention(model, masked):
        return _logits(model)


def _outcome(model: PreTrainedModel) -> tuple[str, dict[int, str], Tensor | None]:
    """(the refusal or nothing, what each layer ran, logits) of a triangle in every layer."""
    try:
        with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
            logits = _logits(model)
            rows = handle.report().layers
    except SparsekitError as error:
        return str(error), {}, None
    assert len({row.layer for row in rows}) == len(rows)
    return "", {row.layer: row.ran for row in rows}, logits


def _told(facts_of: Any) -> tuple[str, list[str]]:
    """(the refusal or nothing, what each layer runs) by `explain`; `validate` refuses the same."""
    try:
        facts = models.facts(facts_of)
        runs = [row.runs for row in explain({"default": TRIANGLE}, TOKENS, facts).layers]
    except SparsekitError as error:
        return str(error), []
    assert validate({"default": TRIANGLE}, facts)
    return "", runs


@pytest.mark.parametrize("model_type", [_param(name) for name in TYPES])
def test_a_type_is_right_or_refused(model_type: str) -> None:
    if model_type in NOT_BUILT:
        pytest.skip(NOT_BUILT[model_type])
    model = small(model_type)
    own, before = _logits(model), _state(model)
    refused, rows, logits = _outcome(model)
    assert _state(model) == before
    assert torch.equal(_logits(model), own)

    told, runs = _told(model)
    assert told == refused
    if model_type not in PARTS:
        assert _told(small_config(model_type)) == (told, runs)
    seen["refused" if refused else "right"].append(model_type)
    if logits is None:
        assert any(re.search(reason, refused) for reason in REASONS), refused
        assert "\n" not in refused
        return

    sparse = {layer for layer, ran in rows.items() if ran == "sparse"}
    assert sparse == _causal_layers(model)
    expected, scale = _with_explicit_mask(model, sparse), max(float(own.abs().max()), 1.0)
    assert float((logits - expected).abs().max()) < 1e-5 * scale
    assert (float((logits - own).abs().max()) > 1e-2 * float(own.abs().max())) == bool(sparse)
    assert {layer: ran for layer, ran in enumerate(runs) if layer in rows} == rows
    assert {ran for layer, ran in enumerate(runs) if layer not in rows} <= {"own"}


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    """Of a run of all types: shown, and held against what is known to run."""
    yield
    right, refused = seen["right"], seen["refused"]
    print(f"\n{len(TYPES)} types: {len(right)} right, {len(refused)} refused, {len(NOT_BUILT)} not built")
    if len(right) + len(refused) == len([name for name in TYPES if name not in NOT_BUILT]):
        assert len(right) >= 0.6 * len(TYPES)
