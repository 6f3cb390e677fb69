"""torch.compile: a patched model is one graph, prompts go through two custom ops in it, and the logits are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import TRIANGLE, traces_names
from tiny import ids as _ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import sparsekit
from sparsekit import SparsekitError
from sparsekit.models import tiny

pytestmark = traces_names
TOKENS = 200
SPARSE = {"layers": {"1": TRIANGLE}}
# Gemma 2 and gpt-oss: soft-cap, learned sinks, and a sliding layer, which runs here in Gemma 2.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"num_hidden_layers": 2}, SPARSE),
    "gemma2": (
        {"num_hidden_layers": 2, "sliding_window": 32},
        {"layers": {"0": {"name": "a_shape", "sink_tokens": 0, "window_tokens": 32}, "1": TRIANGLE}},
    ),
    "gpt_oss": ({"num_hidden_layers": 2, "sliding_window": 32}, SPARSE),
}


@torch.no_grad()
def _logits(model: Callable[..., Any], ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def _compiled(model: PreTrainedModel, backend: str = "eager", fullgraph: bool = True) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, fullgraph=fullgraph)
    return compiled


def _close(got: Tensor, expected: Tensor) -> None:
    """A compiled mask or cache may round otherwise; here in the seventh digit."""
    assert float((got - expected).abs().max()) < 1e-5


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):
        yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=2)


# ---- one graph


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_no_graph_break(family: str) -> None:
    """One graph; every layer that gets a descriptor is one op in it."""
    fields, config = MODELS[family]
    model = tiny(family, **fields)
    with sparsekit.apply(model, config), torch.no_grad():
        found = torch._dynamo.explain(model)(_ids())
    ops = [str(op) for op in found.ops_per_graph[0]]
    assert (found.graph_break_count, found.graph_count) == (0, 1), found.break_reasons
    # Gemma 2: a rule names the sliding layer, whose mask is made here too. gpt-oss: it stays the model's own.
    assert ops.count("sparsekit.prompt_call") == (2 if family == "gemma2" else 1)
    assert ops.count("sparsekit.attention") == (1 if family == "gpt_oss" else 2)


@pytest.mark.parametrize(("family", "backend"), [("llama", "aot_eager"), ("gemma2", "eager"), ("gpt_oss", "eager")])
def test_compiled_is_the_uncompiled_model(family: str, backend: str) -> None:
    """A prompt, a padded batch; then other lengths, for which the graph is not specialised again."""
    fields, config = MODELS[family]
    model = tiny(family, **fields)
    dense = _logits(model, _ids())
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :63] = 0
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (_ids(), {}),
        (_ids(2), {"attention_mask": mask}),
        (_ids(2, 150), {"attention_mask": mask[:, :150]}),
    ]
    with sparsekit.apply(model, config) as handle:
        compiled = _compiled(model, backend)
        for ids, kwargs in calls:
            expected, expected_rows = _logits(model, ids, **kwargs), handle.report().layers
            _close(_logits(compiled, ids, **kwargs), expected)
            rows = handle.report().layers
            assert [(r.ran, r.why, r.density) for r in rows] == [(r.ran, r.why, r.density) for r in expected_rows]
        assert float((_logits(compiled, _ids()) - dense).abs().max()) > 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompt_decode_and_second_turn(model: PreTrainedModel, cache: str) -> None:
    def turns(run: Callable[..., Any]) -> list[Tensor]:
        kept = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=320)
        return [_logits(run, ids, past_key_values=kept) for ids in (_ids(), _ids(tokens=1), _ids(tokens=80))]

    with sparsekit.apply(model, SPARSE):
        for got, expected in zip(turns(_compiled(model)), turns(model), strict=True):
            _close(got, expected)


def test_other_lengths_need_no_other_graph(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE):
        compiled = _compiled(model)
        for tokens in (200, 190):  # the second makes the length dynamic
            _logits(compiled, _ids(tokens=tokens))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for tokens in (150, 101, 240):
                _close(_logits(compiled, _ids(tokens=tokens)), _logits(model, _ids(tokens=tokens)))


def test_generate_through_a_compiled_forward(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE):
        expected = model.generate(_ids(), max_new_tokens=6, do_sample=False)
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        assert torch.equal(model.generate(_ids(), max_new_tokens=6, do_sample=False), expected)
        static = model.generate(_ids(), max_new_tokens=6, do_sample=False, cache_implementation="static")
        assert torch.equal(static, expected)


# ---- what a graph must not keep


def test_pause_remove_and_apply_again(model: PreTrainedModel) -> None:
    dense = _logits(model, _ids())
    with sparsekit.apply(model, SPARSE) as handle:
        compiled, sparse = _compiled(model), _logits(model, _ids())
        assert torch.equal(_logits(compiled, _ids()), sparse)
        with handle.pause():
            assert torch.equal(_logits(compiled, _ids()), dense)
        assert torch.equal(_logits(compiled, _ids()), sparse)
    assert torch.equal(_logits(compiled, _ids()), dense)
    with sparsekit.apply(model, {"default": {"name": "a_shape", "window_tokens": 9}}):
        other = _logits(model, _ids())
        assert not torch.equal(other, sparse)
        assert torch.equal(_logits(compiled, _ids()), other)


def test_the_prompts_length_is_read_at_run_time(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE) as handle:
        compiled = _compiled(model)
        alone = _logits(compiled, _ids())
        with handle.prompt(tokens=400):
            assert torch.equal(_logits(compiled, _ids()), _logits(model, _ids()))
            assert not torch.equal(_logits(compiled, _ids()), alone)


def test_models_and_layers_compiled_apart_do_not_share_graphs() -> None:
    """Graphs belong to code, which models and layers have in common: what runs must follow the module all the same."""
    models = [tiny("llama", num_hidden_layers=2) for _ in range(3)]
    first = sparsekit.apply(models[0], SPARSE)
    second = sparsekit.apply(models[1], {"layers": {"0": {"name": "a_shape", "window_tokens": 9}}})
    expected = [_logits(model, _ids()) for model in models]
    for model, logits in zip(models, expected, strict=True):
        assert torch.equal(_logits(_compiled(model), _ids()), logits)
    torch._dynamo.reset()
    for model in models:
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
    for model, logits in zip(models, expected, strict=True):
        assert torch.equal(_logits(model, _ids()), logits)
    assert [row.ran for row in first.report().layers] == ["dense", "sparse"]
    assert [row.ran for row in second.report().layers] == ["sparse", "dense"]


# ---- what goes to the model, what breaks the graph, what is refused


def test_masks_with_holes_go_to_the_model(model: PreTrainedModel) -> None:
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, 50:60] = 0
    dense = _logits(model, _ids(), attention_mask=mask)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        _close(_logits(_compiled(model), _ids(), attention_mask=mask), dense)
        assert {row.why for row in handle.report().layers} == {"the attention mask has holes"}


def test_short_prompts_below_the_threshold(model: PreTrainedModel) -> None:
    """With padding the length is known at run time alone: the op then runs the model's own attention."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[:, :80] = 0
    dense = _logits(model, _ids(2), attention_mask=mask)
    with sparsekit.apply(model, {"default": TRIANGLE, "dense_below_tokens": 150}) as handle:
        compiled = _compiled(model)
        _close(_logits(compiled, _ids(2), attention_mask=mask)[:, 80:], dense[:, 80:])
        assert {row.why for row in handle.report().layers} == {"120 tokens, fewer than dense_below_tokens 150"}
        _logits(compiled, _ids(2), attention_mask=torch.ones_like(mask))
        assert {row.ran for row in handle.report().layers} == {"sparse"}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_sequences_are_refused(family: str) -> None:
    """A graph cannot tell them from one sequence, and asks at run time; uncompiled they go to the model."""
    fields, config = MODELS[family]
    model = tiny(family, **fields)
    packed = {"position_ids": torch.cat([torch.arange(80), torch.arange(120)])[None], "use_cache": False}
    with sparsekit.apply(model, config):
        compiled = _compiled(model)
        with pytest.raises(SparsekitError, match="a compiled model got packed sequences"):
            _logits(compiled, _ids(), **packed)
        one = {"position_ids": torch.arange(TOKENS)[None], "use_cache": False}
        _close(_logits(compiled, _ids(), **one), _logits(model, _ids(), **one))


def _trained(run: Callable[..., Any], model: PreTrainedModel) -> list[Tensor]:
    model.zero_grad()
    run(_ids(), labels=_ids()).loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_gradients(model: PreTrainedModel) -> None:
    """Refused where a layer runs sparse, and exact otherwise: with gradients every layer breaks the graph."""
    expected = _trained(model, model)
    with sparsekit.apply(model, SPARSE) as handle:
        compiled = _compiled(model, fullgraph=False)
        with pytest.raises(SparsekitError, match="sparse attention is forward only"):
            compiled(_ids())
        with handle.pause():
            assert all(map(torch.equal, _trained(compiled, model), expected))
    with sparsekit.apply(model, {"default": "dense"}):
        assert all(map(torch.equal, _trained(compiled, model), expected))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="sparsekit: gradients"):
            _compiled(model)(_ids())


def test_attention_matrices(model: PreTrainedModel) -> None:
    """Dense layers give them, outside the graph; sparse layers refuse."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(_ids(), output_attentions=True).attentions
        compiled = _compiled(model, fullgraph=False)
        with sparsekit.apply(model, {"default": "dense"}):
            got = compiled(_ids(), output_attentions=True).attentions
            assert len(got) == 2
            assert all(map(torch.equal, got, expected))
        with sparsekit.apply(model, SPARSE), pytest.raises(SparsekitError, match="output_attentions=True"):
            compiled(_ids(), output_attentions=True)


def test_custom_masks_are_refused(model: PreTrainedModel) -> None:
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    with sparsekit.apply(model, SPARSE), pytest.raises(SparsekitError, match="custom 4-D masks"):
        _logits(_compiled(model, fullgraph=False), _ids(), attention_mask=mask)


def test_copies_are_refused(model: PreTrainedModel) -> None:
    """A copy is not known, compiled or not."""
    with sparsekit.apply(model, SPARSE) as handle:
        other = copy.deepcopy(model)
        with pytest.raises(SparsekitError, match="copy of a model"):
            _logits(_compiled(other, fullgraph=False), _ids())
        assert handle.report().layers[1].ran == "not run"


def test_the_ops_keep_their_contract(model: PreTrainedModel) -> None:
    """torch's own check of a custom op: its fake kernel, its schema."""
    with sparsekit.apply(model, SPARSE), torch.no_grad():
        _logits(model, _ids())
        layer = model.model.layers[1].self_attn
        lengths, nothing = [1, TOKENS, TOKENS, 0], None
        call = (
            id(model.config),
            nothing,
            nothing,
            nothing,
            0,
            lengths,
            nothing,
            True,
            torch.float32,
            torch.device("cpu"),
        )
        descriptor = torch.ops.sparsekit.prompt_call(*call)
        q, k = torch.randn(1, 4, TOKENS, 16), torch.randn(1, 2, TOKENS, 16)
        args = (q, k, k, descriptor, id(layer), 0.25, nothing, nothing, nothing, nothing, nothing, 0.0)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.sparsekit.prompt_call.default, call, test_utils=checks)
        torch.library.opcheck(torch.ops.sparsekit.attention.default, args, test_utils=checks)
    with pytest.raises(SparsekitError, match="which was removed from it"):
        torch.ops.sparsekit.prompt_call(*call)
    with pytest.raises(SparsekitError, match="which was removed from it"):
        torch.ops.sparsekit.attention(*args)
