"""Every type of transformers' causal-LM mapping, built small: `apply` is right or refuses, and `explain` says the same.

Right: a triangle in every layer gives the logits of the model's own attention under that triangle as an explicit mask,
in just those layers whose own mask is plain causal. Afterwards, and after a refusal, the model is bit for bit itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from masked import causal_layers, logits_of, with_triangle
from small_models import NOT_BUILT, PARTS, small, small_config
from tiny import TOKENS, TRIANGLE, ids
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsekit
from sparsekit import SparsekitError, explain, models
from sparsekit.cli.about import validate
from sparsekit.patch.state import DOORS, LAYERS

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IDS = ids()

# Why a model may be refused.
REASONS = (
    "no attention layer goes through transformers' AttentionInterface",
    "decides by the name of the attention implementation what to compute",
    "looks into its attention mask",
    "its layers cannot be told apart",
    "its attention is not causal",
    "which no kernel here computes",
)

seen: dict[str, list[str]] = defaultdict(list)  # outcome -> types


def _table() -> dict[str, str]:
    """Type -> its outcome, as docs/compatibility.md has it."""
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    found = {}
    for outcome, count, types in re.findall(r"^\| (.*?) \| (\d+) \| (`.*`) \|$", page, re.MULTILINE):
        names = re.findall(r"`([\w.-]+)`", types)
        assert len(names) == int(count), outcome
        found |= dict.fromkeys(names, re.sub(r"\[\^\w+\]", "", outcome))
    return found


OUTCOMES = _table()


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """What `apply` may touch: implementations of all parts, hooks, and what is remembered of the modules."""
    modules = list(model.modules())
    return {
        "implementations": [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in modules],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "remembered": [m for m in modules if id(m) in LAYERS or id(getattr(m, "config", None)) in DOORS],
        "attributes": [sorted(vars(m)) for m in modules],
    }


def _outcome(model: PreTrainedModel) -> tuple[str, dict[int, str], Tensor | None]:
    """(the refusal or nothing, what each layer ran, logits) of a triangle in every layer."""
    try:
        with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
            logits = logits_of(model, IDS)
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


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_is_right_or_refused(model_type: str) -> None:
    if model_type in NOT_BUILT:
        pytest.skip(NOT_BUILT[model_type])
    model = small(model_type)
    own, before = logits_of(model, IDS), _state(model)
    refused, rows, logits = _outcome(model)
    assert _state(model) == before
    assert torch.equal(logits_of(model, IDS), own)

    told, runs = _told(model)
    assert told == refused
    if model_type not in PARTS:
        assert _told(small_config(model_type)) == (told, runs)
    if logits is None:
        seen["refused"].append(model_type)
        [reason] = [reason for reason in REASONS if reason in refused]
        outcome = OUTCOMES.get(model_type, f"refused: {reason}")
        assert outcome.startswith("refused: ") and reason in outcome
        assert "\n" not in refused
        return

    sparse = {layer for layer, ran in rows.items() if ran == "sparse"}
    assert sparse == causal_layers(model, IDS)
    expected, scale = with_triangle(model, IDS, sparse), max(float(own.abs().max()), 1.0)
    assert float((logits - expected).abs().max()) < 1e-5 * scale
    assert (float((logits - own).abs().max()) > 1e-2 * float(own.abs().max())) == bool(sparse)
    assert {layer: ran for layer, ran in enumerate(runs) if layer in rows} == rows
    assert {ran for layer, ran in enumerate(runs) if layer not in rows} <= {"own"}
    seen["right"].append(model_type)
    outcome = "runs sparse" if sparse else "runs, all layers its own"
    assert OUTCOMES.get(model_type, outcome) == outcome
    if sparse:
        seen["sparse"].append(model_type)


def test_the_page_has_every_type_of_the_release_that_it_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    [release] = re.findall(r"mapping of transformers (\S+),", page)
    if transformers.__version__ != release:
        pytest.skip(f"docs/compatibility.md is of transformers {release}, and this is {transformers.__version__}")
    assert OUTCOMES.keys() == set(TYPES)
    assert {name for name, outcome in OUTCOMES.items() if outcome == "not built here"} == set(NOT_BUILT)


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    """Of a run of all types: shown, and held against what is known to run."""
    yield
    sparse, right, refused = seen["sparse"], seen["right"], seen["refused"]
    print(
        f"\n{len(TYPES)} types: {len(right)} right, of which {len(sparse)} with sparse layers, {len(refused)} refused, "
        f"{len(NOT_BUILT)} not built"
    )
    if len(right) + len(refused) == len(set(TYPES) - set(NOT_BUILT)):
        assert len(sparse) >= 0.6 * len(TYPES)
