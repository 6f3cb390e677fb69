"""Layers that reuse a plan: they attend over the pairs that another layer chose in the same forward, and no others."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import close
from tiny import ids as _ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import sparsekit
from sparsekit import SparsekitError, load
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns
from sparsekit.kernels import preferred_tile
from sparsekit.models import tiny
from sparsekit.patch import attention
from sparsekit.patch.capture import wrap_attention
from sparsekit.patch.state import DOORS
from sparsekit.patterns import S2O, DynamicPattern, parse_pattern
from sparsekit.patterns.attention import plan_heads
from sparsekit.plan import BlockPlan

LONG = 520  # where every pattern of these sizes drops something
MAP = [2, 0, 0, 3]
TOPK = {"name": "block_topk", "top_k": 2, "force_sink": False}
PATTERNS: dict[str, dict[str, Any]] = {
    "block_topk": TOPK,
    "xattention": {"name": "xattention", "threshold": [0.3, 0.5, 0.9, 0.2], "stride": 8},
    "vertical_slash": {"name": "vertical_slash", "vertical_tokens": 12, "slash_tokens": 24},
    "flexprefill": {"name": "flexprefill", "gamma": 0.5, "min_budget_tokens": 64},
    "union": {"name": "union", "of": [TOPK, {"name": "a_shape", "sink_tokens": 3, "window_tokens": 70}]},
}
SHARED: dict[str, Any] = {"layers": {"1": TOPK, "2": {"reuse": 1}, "3": {"reuse": 1, "heads": MAP}}}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", initializer_range=0.1).double()


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@contextmanager
def _explicit(model: PreTrainedModel, config: dict[str, Any]) -> Iterator[None]:
    """Within this block the model's own attention runs under 4-D masks: those of the plans that the config means.

    The definition: a layer of its own has the mask of its pattern's plan; a layer that reuses has, in head h, that of
    head map[h] of the other layer, as of the same forward.
    """
    heads = model.config.num_attention_heads
    facts = {"num_layers": 4, "num_heads": heads}
    rules: dict[int, Any] = dict.fromkeys(range(4))
    for key, rule in load({"model": facts, **config}).to_dict()["layers"].items():
        first, _, last = key.partition("-")
        rules |= dict.fromkeys(range(int(first), int(last or first) + 1), rule)
    masks: dict[int, Tensor] = {}

    def masked(own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        rule = rules[module.layer_idx]
        if rule is None or q.shape[2] < 64:
            return own(module, q, k, v, mask, **kwargs)
        if isinstance(rule, dict) and "reuse" in rule:
            kept = masks[rule["reuse"]][:, rule.get("heads", list(range(heads)))]
        else:
            geometry = Geometry.of(q.shape[2], k.shape[2], batch=len(q))
            tiled = geometry.with_tile(*preferred_tile(q.device))
            plan = plan_heads([parse_pattern(rule)], (0,) * heads, q, k, tiled, Softmax(module.scaling))
            kept = plan.to_mask().expand(-1, heads, -1, -1)
            masks[module.layer_idx] = kept
        least = torch.finfo(q.dtype).min
        return own(module, q, k, v, q.new_zeros(kept.shape).masked_fill(~kept, least), **kwargs)

    with wrap_attention(model, masked):
        yield


def _plans_kept(model: PreTrainedModel) -> int:
    """Shared plans that this thread's calls hold."""
    return sum(len(call.plans) for call in DOORS[id(model.config)].calls.values())


# ---- the definition


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_layer_attends_over_the_pairs_that_another_chose(name: str, key_heads: int) -> None:
    model = tiny("llama", initializer_range=0.1, num_key_value_heads=key_heads).double()
    config = {"layers": {"1": PATTERNS[name], "2": {"reuse": 1}, "3": {"reuse": 1, "heads": MAP}}}
    ids = _ids(tokens=LONG)
    own = _logits(model, ids)
    with _explicit(model, config):
        expected = _logits(model, ids)
    with sparsekit.apply(model, config) as handle:
        got = _logits(model, ids)
        rows = handle.report().layers
    _close(got, expected)
    assert float((got - own).abs().max()) > 1e-2
    assert [row.ran for row in rows] == ["dense", "sparse", "sparse", "sparse"]
    assert [row.plan_of for row in rows] == [None, None, 1, 1]
    assert rows[2].density == rows[1].density
    assert rows[3].pattern.startswith("the plan of layer 1: ")


def test_heads_of_one_layer_may_run_their_own(model: PreTrainedModel) -> None:
    share = {"name": "xattention", "threshold": 0.5}
    config = {**SHARED, "heads": {"3": {"1": {"name": "a_shape", "sink_tokens": 4, "window_tokens": 30}, "2": share}}}
    ids = _ids(tokens=LONG)
    with sparsekit.apply(model, config) as handle:
        got = _logits(model, ids)
        layer = handle._applied.layers[3]
        assert isinstance(layer.plan, BlockPlan)
        kept = layer.plan.to_mask()
        there = handle._applied.layers[1].plan
        assert isinstance(there, BlockPlan)
    assert torch.equal(kept[:, [0, 3]], there.to_mask()[:, [2, 3]])
    i, j = torch.arange(LONG)[:, None], torch.arange(LONG)[None]
    assert torch.equal(kept[0, 1], (j <= i) & ((i - j < 30) | (j < 4)))
    assert not torch.equal(kept[0, 2], there.to_mask()[0, 0])
    assert bool(torch.isfinite(got).all())


def test_a_ranked_plan_is_reused_and_counted_by_each_layer() -> None:
    model = tiny("llama", initializer_range=0.1)
    s2o = {"name": "s2o", **S2O.test_points[0]}
    ids = _ids(tokens=LONG)
    with sparsekit.apply(model, {"layers": {"1": s2o}}) as handle:
        _logits(model, ids)
        alone = handle.report().layers[1].density
    with sparsekit.apply(model, {"layers": {"1": s2o, "2": {"reuse": 1}, "3": {"reuse": 1, "heads": MAP}}}) as handle:
        _logits(model, ids)
        rows = handle.report().layers
    assert rows[1].density == alone  # what layers 2 and 3 visit is noted elsewhere
    assert len({row.density for row in rows[1:]}) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_the_single_runs(model: PreTrainedModel, side: str) -> None:
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, slice(0, 130) if side == "left" else slice(LONG - 130, None)] = 0
    ids = _ids(2, LONG)
    with sparsekit.apply(model, SHARED):
        got = _logits(model, ids, attention_mask=mask)
        for sample in range(2):
            valid = mask[sample].bool()
            close(got[sample, valid], _logits(model, ids[sample, valid][None])[0])  # rotary angles are float32


def test_chunks_turns_and_decoding(model: PreTrainedModel) -> None:
    """A plan is that of the chunk in hand; decoding is the model's own, and a second turn has plans of its own."""
    ids = _ids(tokens=LONG + 3 + 300)
    parts = ids.split([200, LONG - 200, 1, 1, 1, 300], 1)

    def converse() -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        return [_logits(model, part, past_key_values=cache) for part in parts]

    own = converse()
    with _explicit(model, SHARED):
        expected = converse()
    with sparsekit.apply(model, SHARED) as handle:
        for got, wanted in zip(converse(), expected, strict=True):
            _close(got, wanted)
        assert _plans_kept(model) == 0
        with handle.pause():
            assert all(map(torch.equal, converse(), own))
    assert all(map(torch.equal, converse(), own))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate(model: PreTrainedModel, options: dict[str, Any]) -> None:
    ids, more = _ids(tokens=LONG), {"max_new_tokens": 4, "do_sample": False}
    with _explicit(model, SHARED), torch.inference_mode():
        expected = model.generate(ids, **more, **{k: v for k, v in options.items() if k == "num_beams"})
    with sparsekit.apply(model, SHARED) as handle, handle.prompt(tokens=LONG):
        assert torch.equal(model.generate(ids, **more, **options), expected)


def test_assisted_decoding(model: PreTrainedModel) -> None:
    draft = tiny("llama", initializer_range=0.1, num_hidden_layers=2).double()
    ids, more = _ids(tokens=LONG), {"max_new_tokens": 6, "do_sample": False}
    with sparsekit.apply(model, SHARED), sparsekit.apply(draft, {"layers": {"0": TOPK, "1": {"reuse": 0}}}):
        assert torch.equal(model.generate(ids, assistant_model=draft, **more), model.generate(ids, **more))


def test_no_index_is_estimated_twice(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plan = DynamicPattern.plan

    def noted(self: DynamicPattern, *args: Any) -> BlockPlan:
        asked.append(len(asked))
        return plan(self, *args)

    monkeypatch.setattr(DynamicPattern, "plan", noted)
    with sparsekit.apply(model, SHARED):
        _logits(model, _ids(tokens=LONG))
    assert len(asked) == 1


def test_layers_that_want_the_same_share_one_plan(model: PreTrainedModel) -> None:
    """And with it what kernels derive from a plan."""
    config = {"layers": {"0": TOPK, "1": {"reuse": 0}, "2-3": {"reuse": 0, "heads": MAP}}}
    with sparsekit.apply(model, config) as handle:
        _logits(model, _ids(tokens=LONG))
        plans = [layer.plan for layer in handle._applied.layers]
    assert plans[0] is plans[1]
    assert plans[2] is plans[3]
    assert plans[2] is not plans[0]


# ---- where the other layer ran dense, so does this one


def test_short_prompts_are_dense_everywhere(model: PreTrainedModel) -> None:
    ids = _ids(tokens=LONG)
    own = _logits(model, ids)
    with sparsekit.apply(model, {**SHARED, "dense_below_tokens": LONG + 1}) as handle:
        assert torch.equal(_logits(model, ids), own)
        assert {row.why for row in handle.report().layers[1:]} == {"520 tokens, fewer than dense_below_tokens 521"}
    patient = {"layers": {**SHARED["layers"], "1": {**TOPK, "dense_below_tokens": LONG + 1}}}
    with sparsekit.apply(model, patient) as handle:
        _close(_logits(model, ids), own)
        rows = handle.report().layers[1:]
        assert [row.density for row in rows] == [1, 1, 1]
        assert [row.why for row in rows] == ["the pattern kept every pair"] + ["the plan kept every pair"] * 2
        assert not any(row.sparse for row in rows)


def test_calls_that_are_the_models_own_are_so_everywhere(model: PreTrainedModel) -> None:
    mask = torch.ones(1, LONG, dtype=torch.long)
    mask[0, 100:120] = 0  # holes
    own = _logits(model, _ids(tokens=LONG), attention_mask=mask)
    with sparsekit.apply(model, SHARED) as handle:
        assert torch.equal(_logits(model, _ids(tokens=LONG), attention_mask=mask), own)
        assert {row.why for row in handle.report().layers} == {"the attention mask has holes"}


# ---- whose plan it is


def _between(model: PreTrainedModel, do: Callable[[], object]) -> Any:
    """Do something once, in a forward, after layer 1 and before layer 2."""
    done: list[bool] = []

    def hook(*_: Any) -> None:
        if not done:
            done.append(True)
            do()

    return model.model.layers[2].register_forward_pre_hook(hook)


@pytest.mark.parametrize("inner", ["the same model", "another model"])
def test_a_forward_within_a_forward(model: PreTrainedModel, inner: str) -> None:
    """As of micro-batches in a pipeline: each goes on with its own plan."""
    other = model if inner == "the same model" else tiny("llama", initializer_range=0.2).double()
    outer_ids, inner_ids = _ids(tokens=LONG), _ids(tokens=LONG, seed=1)
    with sparsekit.apply(model, SHARED), sparsekit.apply(other, SHARED):
        expected = _logits(model, outer_ids), _logits(other, inner_ids)
        got: list[Tensor] = []
        hook = _between(model, lambda: got.append(_logits(other, inner_ids)))
        assert torch.equal(_logits(model, outer_ids), expected[0])
        hook.remove()
    assert torch.equal(got[0], expected[1])


def test_threads_have_plans_of_their_own(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have planned layer 1 before either goes on to layer 2."""
    jobs = [_ids(tokens=LONG, seed=seed) for seed in range(2)]
    both, plan = threading.Barrier(2, timeout=60), LayerPatterns.plan
    with sparsekit.apply(model, SHARED):
        alone = [_logits(model, ids) for ids in jobs]

        def at_once(self: LayerPatterns, *args: Any) -> BlockPlan:
            made = plan(self, *args)
            both.wait()
            return made

        monkeypatch.setattr(LayerPatterns, "plan", at_once)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda ids: _logits(model, ids), jobs))
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("copied", [False, True])
def test_masks_that_were_copied_do_not_mix_forwards_up(model: PreTrainedModel, copied: bool) -> None:
    """As hooks copy them to another device: a copy tells its width alone, and another forward's plan may lie there."""
    held: list[BaseException] = []

    def copy(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()} if copied else kwargs

    def stop_within() -> None:
        """A forward that made its plan and goes no further; its frames, and with them its mask, are held."""
        hook = model.model.layers[2].register_forward_pre_hook(_fail)
        try:
            _logits(model, _ids(tokens=LONG, seed=1))
        except RuntimeError as error:
            held.append(error)
        hook.remove()

    with sparsekit.apply(model, SHARED):
        expected = _logits(model, _ids(tokens=LONG))
        for layer in model.model.layers:
            layer.register_forward_pre_hook(copy, with_kwargs=True)
        assert torch.equal(_logits(model, _ids(tokens=LONG)), expected)
        hook = _between(model, stop_within)
        if copied:
            with pytest.raises(SparsekitError, match="several forwards of this model are in progress in one thread"):
                _logits(model, _ids(tokens=LONG))
        else:
            assert torch.equal(_logits(model, _ids(tokens=LONG)), expected)
        assert held
        hook.remove()
        held.clear()
        gc.collect()
        assert torch.equal(_logits(model, _ids(tokens=LONG)), expected)


def _fail(*_: Any) -> None:
    raise RuntimeError("inside")


def test_a_plan_does_not_outlive_a_forward_that_failed(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT_PLAN_BYTES", 0)  # the report keeps totals alone
    made = _plans_made(monkeypatch)
    with sparsekit.apply(model, SHARED):
        expected = _logits(model, _ids(tokens=LONG))
        hook = model.model.layers[2].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="inside"):
            _logits(model, _ids(tokens=LONG, seed=1))
        hook.remove()
        gc.collect()
        assert _plans_kept(model) == 0
        assert [plan for plan in made if plan() is not None] == []
        assert torch.equal(_logits(model, _ids(tokens=LONG)), expected)


def _plans_made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[BlockPlan]]:
    made: list[weakref.ref[BlockPlan]] = []
    plan = LayerPatterns.plan

    def noted(self: LayerPatterns, *args: Any) -> BlockPlan:
        found = plan(self, *args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(LayerPatterns, "plan", noted)
    return made


def test_plans_go_with_their_last_layer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the forward ends: `there` is how many are kept as each layer begins."""
    monkeypatch.setattr(attention, "KEPT_PLAN_BYTES", 0)
    made = _plans_made(monkeypatch)
    there: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: there.append(_plans_kept(model)))
    config = {"layers": {"0": TOPK, "1": {"reuse": 0}, "2": TOPK, "3": {"reuse": 2, "heads": MAP}}}
    with sparsekit.apply(model, config) as handle:
        _logits(model, _ids(tokens=LONG))
        assert there == [0, 1, 0, 1]
        assert _plans_kept(model) == 0
        gc.collect()
        assert [plan for plan in made if plan() is not None] == []
        with sparsekit.apply(model, SHARED):  # in place of the first
            _logits(model, _ids(tokens=LONG))
        assert not handle.active


def test_a_plan_goes_with_its_handle(model: PreTrainedModel) -> None:
    """What the report keeps of it, too."""
    with sparsekit.apply(model, SHARED) as handle:
        _logits(model, _ids(tokens=LONG))
        plan = weakref.ref(handle._applied.layers[2].plan)
        assert plan() is not None
    sparsekit.clear_caches()
    del handle
    gc.collect()
    assert plan() is None


def test_a_layer_whose_plan_was_not_made_is_refused(model: PreTrainedModel) -> None:
    """Left out of a forward, as where layers are skipped: there is no older plan to fall back to."""
    ids = _ids(tokens=LONG)
    with sparsekit.apply(model, SHARED):
        expected = _logits(model, ids)
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList([layers[0], *layers[2:]])
        model.config.num_hidden_layers = 3
        with pytest.raises(SparsekitError, match="layer 2 reuses the plan of layer 1, which made none in this forward"):
            _logits(model, ids)
        model.model.layers, model.config.num_hidden_layers = layers, 4
        assert torch.equal(_logits(model, ids), expected)


def test_gradients_are_refused_and_leave_nothing(model: PreTrainedModel) -> None:
    """A checkpointed layer runs without gradients first; recomputed for its gradient, it is refused."""
    ids = _ids(tokens=LONG)
    with sparsekit.apply(model, SHARED):
        expected = _logits(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model.train()
        with pytest.raises(SparsekitError, match="forward only"):
            model(ids, use_cache=False).logits.sum().backward()
        gc.collect()
        assert _plans_kept(model) == 0
        model.eval()
        assert torch.equal(_logits(model, ids), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PATTERNS)
def test_on_a_gpu(name: str) -> None:
    """The pairs are those of the layer that chose them, on the card too."""
    model = tiny("llama", initializer_range=0.1).to("cuda")
    rule = {**PATTERNS[name], "dense_below_tokens": 0}
    config = {"layers": {"1": rule, "2": {"reuse": 1}, "3": {"reuse": 1, "heads": MAP}}}
    with sparsekit.apply(model, config) as handle:
        _logits(model, _ids(tokens=LONG).to("cuda"))
        made, same, mapped = (layer.plan for layer in handle._applied.layers[1:])
        rows = handle.report().layers
    assert isinstance(made, BlockPlan) and isinstance(mapped, BlockPlan)
    assert same is made
    mask = made.to("cpu").to_mask().expand(-1, 4, -1, -1)
    assert torch.equal(mapped.to("cpu").to_mask(), mask[:, MAP])
    assert [row.plan_of for row in rows] == [None, None, 1, 1]


def test_compiled_is_the_uncompiled_model() -> None:
    """By the backend that traces twice; "eager" does the first half of it."""
    model = tiny("llama", initializer_range=0.1)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, :163] = 0
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (_ids(tokens=LONG), {}),
        (_ids(2, LONG), {"attention_mask": mask}),
        (_ids(2, 400), {"attention_mask": mask[:, :400]}),
    ]
    torch._dynamo.reset()
    with sparsekit.apply(model, SHARED) as handle, torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for ids, kwargs in calls:
            expected, rows = _logits(model, ids, **kwargs), handle.report().layers
            torch.testing.assert_close(compiled(ids, **kwargs).logits, expected, atol=1e-5, rtol=1e-5)
            assert [row.density for row in handle.report().layers] == [row.density for row in rows]
        assert _plans_kept(model) == 0
    torch._dynamo.reset()
