"""Contexts around a forward: autocast, defaults of torch, tracing, replicas, copies, processes, threads, two handles.

In each a layer runs what its config says, or the call is refused in one line; never the dense model without a word.
"""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import by_reference, traces_names
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, Trainer, TrainingArguments

import sparsekit
from sparsekit import SparsekitError
from sparsekit.call.keys import Keys
from sparsekit.kernels import prepare
from sparsekit.models import tiny
from sparsekit.patch.state import DOORS, LAYERS
from sparsekit.patterns import pattern_class, pattern_names

TOKENS = 200
LONG = 520  # where every pattern of these sizes drops something
TRIANGLE = {"name": "triangle", "sink_tokens": 8, "window_tokens": 40, "last_tokens": 20}
SPARSE = {"layers": {"1-3": TRIANGLE}}
OTHER = {"default": {"name": "a_shape", "sink_tokens": 4, "window_tokens": 9}}
every_pattern = pytest.mark.parametrize("name", [name for name in pattern_names() if name != "dense"])


def _config(name: str) -> dict[str, Any]:
    return {"default": {"name": name, **pattern_class(name).test_points[0]}}


def _ids(batch: int = 1, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def _ran(handle: Any) -> list[str]:
    return [row.ran for row in handle.report().layers]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", initializer_range=0.1)


# ---- autocast


@every_pattern
@pytest.mark.parametrize("cached", [False, True])
def test_autocast(model: PreTrainedModel, name: str, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 weights: the rotary embedding makes q and k float32 again, v stays bfloat16; a cache makes them alike.

    Plan and kernel get one dtype and no autocast, the reference agrees, and decoding is the model's own.
    """
    got: list[Any] = []

    def spy(q: Tensor, keys: Keys, *args: Any, **kwargs: Any) -> Any:
        got.append((q.dtype, keys.k.dtype, keys.v.dtype, torch.is_autocast_enabled("cpu")))
        return prepare(q, keys, *args, **kwargs)

    monkeypatch.setattr(sparsekit.patch.attention, "prepare", spy)
    ids = _ids(tokens=LONG)

    def new() -> Any:
        return DynamicCache(config=model.config) if cached else None

    with torch.autocast("cpu", torch.bfloat16):
        stock = _logits(model, ids, past_key_values=new(), use_cache=cached)
        with sparsekit.apply(model, _config(name)) as handle:
            cache = new()
            sparse = _logits(model, ids, past_key_values=cache, use_cache=cached)
            assert sparse.dtype == stock.dtype
            assert _ran(handle) == ["sparse"] * 4
            assert set(got) == {(torch.bfloat16,) * 3 + (False,)}
            assert torch.is_autocast_enabled("cpu")
            if cache is not None:
                other = copy.deepcopy(cache)
                step = _logits(model, ids[:, :1], past_key_values=cache)
                with handle.pause():
                    assert torch.equal(_logits(model, ids[:, :1], past_key_values=other), step)
            monkeypatch.setattr(sparsekit.patch.attention, "prepare", by_reference)
            expected = _logits(model, ids, past_key_values=new(), use_cache=cached)
            scale = float(expected.abs().max())
            assert float((sparse - expected).abs().max()) < 0.05 * scale
            assert float((sparse - stock).abs().max()) > 0.1 * scale


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3", "phi3", "glm4"])
def test_autocast_of_families(family: str) -> None:
    """Soft-cap, sinks, norms of q and k, partial rotary: a dense config by sparsekit's kernel is the model."""
    model = tiny(family, layer_types=["full_attention"] * 4) if family in ("gemma2", "gpt_oss") else tiny(family)
    with torch.autocast("cpu", torch.bfloat16):
        own = _logits(model, _ids())
        with sparsekit.apply(model, {"default": "dense", "dense_impl": "kernel"}) as handle:
            ours = _logits(model, _ids())
            assert {row.impl for row in handle.report().layers} == {"torch"}
    assert ours.dtype == own.dtype
    assert float((ours - own).abs().max()) < 0.03 * float(own.abs().max())


@traces_names
def test_autocast_of_a_compiled_model(model: PreTrainedModel) -> None:
    """A graph runs without autocast, which was traced into it."""
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16), sparsekit.apply(model, SPARSE):
        expected = _logits(model, _ids(), use_cache=False)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        got = _logits(compiled, _ids(), use_cache=False)
    assert float((got - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_trainer_evaluates_in_bfloat16(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{"input_ids": _ids(seed=n)[0], "labels": _ids(seed=n)[0]} for n in range(2)]
    arguments = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to=[], disable_tqdm=True)
    with sparsekit.apply(model, SPARSE) as handle:
        loss = Trainer(model=model, args=arguments).evaluate(rows)["eval_loss"]
        assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            expected = torch.stack([model(**{name: row[name][None] for name in row}).loss for row in rows]).mean()
    assert loss == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.gpu
@every_pattern
def test_trainer_evaluates_in_bfloat16_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reference does, within the error that the untouched model has under autocast. One layer is sparse: the
    inputs of a second would differ by rounding, and where two blocks score alike so does what is selected."""
    model = tiny("llama", initializer_range=0.1, head_dim=64).cuda()
    rows = [{"input_ids": _ids(tokens=LONG, seed=n)[0], "labels": _ids(tokens=LONG, seed=n)[0]} for n in range(2)]
    ids = torch.stack([row["input_ids"] for row in rows]).cuda()
    arguments = TrainingArguments(str(tmp_path), bf16=True, report_to=[], disable_tqdm=True)
    exact = _logits(model, ids)
    with torch.autocast("cuda", torch.bfloat16):
        own_error = float((_logits(model, ids) - exact).abs().max())
    with sparsekit.apply(model, {"layers": {"0": _config(name)["default"]}}) as handle:
        loss = Trainer(model=model, args=arguments).evaluate(rows)["eval_loss"]
        assert _ran(handle) == ["sparse"] + ["dense"] * 3
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            ours = model(ids, labels=ids)
            monkeypatch.setattr(sparsekit.patch.attention, "prepare", by_reference)
            reference = model(ids, labels=ids)
    assert loss == pytest.approx(float(ours.loss), rel=1e-3)
    assert float((ours.logits - reference.logits).abs().max()) <= 2 * own_error
    assert float(ours.loss) == pytest.approx(float(reference.loss), rel=5e-3)


# ---- torch's defaults


@every_pattern
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_default_dtype(model: PreTrainedModel, name: str, default: torch.dtype) -> None:
    ids = _ids(tokens=LONG)
    with sparsekit.apply(model, _config(name)) as handle:
        expected = _logits(model, ids)
        try:
            torch.set_default_dtype(default)
            got = _logits(model, ids)
        finally:
            torch.set_default_dtype(torch.float32)
        assert _ran(handle) == ["sparse"] * 4
    assert torch.equal(got, expected)


@every_pattern
def test_default_device(model: PreTrainedModel, name: str) -> None:
    """Nothing is made where nobody said."""
    ids = _ids(tokens=LONG + 1)  # a length that no other test has planned
    own = _logits(model, ids)
    with sparsekit.apply(model, _config(name)) as handle, torch.device("meta"):
        got = _logits(model, ids, position_ids=torch.arange(LONG + 1, device="cpu")[None])
        assert _ran(handle) == ["sparse"] * 4
        assert all(row.density < 1 for row in handle.report().layers)
    assert got.device.type == "cpu" and not torch.equal(got, own)


# ---- tracing


@pytest.mark.parametrize("config", [SPARSE, {"default": "dense"}], ids=["sparse", "dense"])
def test_jit_trace_is_refused(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """What a layer does in one call would stay for good, also where it is dense."""
    run = _OnlyLogits(model)
    with torch.inference_mode(), sparsekit.apply(model, config) as handle:
        with pytest.raises(SparsekitError, match=r"torch\.jit\.trace .* use torch\.export"):
            torch.jit.trace(run, (_ids(),), check_trace=False)
        with handle.pause():
            traced = torch.jit.trace(run, (_ids(),), check_trace=False)
    assert torch.equal(traced(_ids()), _logits(model, _ids(), use_cache=False))


def test_export_is_the_model(model: PreTrainedModel) -> None:
    """What the refusal points at: an exported program asks at run time."""
    with torch.no_grad(), sparsekit.apply(model, SPARSE) as handle:
        expected = _logits(model, _ids(), use_cache=False)
        program = torch.export.export(_OnlyLogits(model), (_ids(),), strict=False).module()
        assert torch.equal(program(_ids()), expected)
        with handle.pause():
            own = _logits(model, _ids(), use_cache=False)
            assert torch.equal(program(_ids()), own)
    assert not torch.equal(own, expected)


class _OnlyLogits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


# ---- replicas and copies


def _replica(model: nn.Module) -> Any:
    """As nn.DataParallel makes them on each device; on a CPU it makes none."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        for name, child in module._modules.items():
            setattr(made, name, None if child is None else copies[child])
        for name, weight in module._parameters.items():
            setattr(made, name, None if weight is None else weight.detach().clone())
    return copies[model]


def test_replicas_run_as_the_model(model: PreTrainedModel) -> None:
    """Each in a thread of its own, as nn.DataParallel calls them."""
    with sparsekit.apply(model, SPARSE) as handle:
        expected = [_logits(model, _ids(seed=seed)) for seed in range(2)]
        replicas = [_replica(model) for _ in range(2)]
        assert all(id(module) not in LAYERS for replica in replicas for module in replica.modules())
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda n: _logits(replicas[n], _ids(seed=n)), range(2)))
        assert all(map(torch.equal, got, expected))
        assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]
        with handle.pause():
            own = _logits(model, _ids())
            assert torch.equal(_logits(replicas[0], _ids()), own)
    assert not torch.equal(own, expected[0])


def test_shallow_copies_run_as_the_model(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE):
        expected = _logits(model, _ids())
        assert torch.equal(_logits(copy.copy(model), _ids()), expected)
        for layer in model.model.layers:
            layer.self_attn = copy.copy(layer.self_attn)
        assert torch.equal(_logits(model, _ids()), expected)


@pytest.mark.parametrize("how", ["deepcopy", "quantize_dynamic", "one layer"])
def test_deep_copies_are_refused(model: PreTrainedModel, how: str) -> None:
    with sparsekit.apply(model, {"default": TRIANGLE}):
        expected = _logits(model, _ids())
        if how == "one layer":
            model.model.layers[1] = copy.deepcopy(model.model.layers[1])
            with pytest.raises(SparsekitError, match=r"copy of a model.*sparsekit\.apply\(copy"):
                _logits(model, _ids())
            return
        make: dict[str, Callable[[], Any]] = {
            "deepcopy": lambda: copy.deepcopy(model),
            "quantize_dynamic": lambda: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
        }
        made = make[how]()
        with pytest.raises(SparsekitError, match=r"copy of a model.*sparsekit\.apply\(copy"):
            _logits(made, _ids())
        with pytest.raises(SparsekitError, match="copy of a model"):
            made.generate(_ids(tokens=5), max_new_tokens=2)
        with sparsekit.apply(made, {"default": TRIANGLE}) as handle:
            got = _logits(made, _ids())
            assert _ran(handle) == ["sparse"] * 4
        assert torch.equal(got, expected) == (how == "deepcopy")
        assert torch.equal(_logits(model, _ids()), expected)


# ---- processes


def test_a_pickle_comes_back_as_the_model_itself(model: PreTrainedModel, tmp_path: Path) -> None:
    """Here and in a process that never saw sparsekit; and pickling says so."""
    own = _logits(model, _ids())
    with sparsekit.apply(model, SPARSE):
        with pytest.warns(UserWarning, match="a pickle of a model does not hold what sparsekit applied"):
            data = pickle.dumps(model)
        with pytest.warns(UserWarning, match="a pickle"):
            torch.save(model, tmp_path / "model.pt")
        here = pickle.loads(data)
        assert here.config._attn_implementation == "sdpa"
        assert torch.equal(_logits(here, _ids()), own)
        assert model.config._attn_implementation.startswith("sparsekit_")
    torch.save({"ids": _ids(), "own": own}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "want = torch.load('expected.pt')\n"
        "with torch.inference_mode():\n"
        "    assert torch.equal(model(want['ids']).logits, want['own'])\n"
        "assert 'sparsekit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ---- threads


def _held(model: PreTrainedModel, layer: int) -> tuple[threading.Event, threading.Event, Any]:
    """Two events, and a hook that sets the first before `layer`, and waits for the second."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        reached.set()
        assert go_on.wait(60)

    return reached, go_on, model.model.layers[layer].register_forward_pre_hook(wait)


@pytest.mark.parametrize("change", ["apply", "remove", "remove by model", "exit"])
def test_no_change_between_the_layers_of_a_running_forward(model: PreTrainedModel, change: str) -> None:
    handle = sparsekit.apply(model, SPARSE)
    expected = _logits(model, _ids())
    changes: dict[str, Callable[[], Any]] = {
        "apply": lambda: sparsekit.apply(model, OTHER),
        "remove": handle.remove,
        "remove by model": lambda: sparsekit.remove(model.model),
        "exit": lambda: handle.__exit__(),
    }
    reached, go_on, hook = _held(model, layer=2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_logits, model, _ids())
        assert reached.wait(60)
        try:
            with pytest.raises(SparsekitError, match="a forward of this model is running"):
                changes[change]()
            assert handle.active
        finally:
            go_on.set()
        assert torch.equal(running.result(), expected)
    hook.remove()
    changes[change]()
    assert not handle.active
    sparsekit.remove(model)


def test_a_forward_that_failed_holds_nothing(model: PreTrainedModel) -> None:
    """Its error is kept, and with it its frames; it runs no longer all the same."""
    handle = sparsekit.apply(model, SPARSE)

    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with ThreadPoolExecutor(1) as pool:
        failed = pool.submit(_logits, model, _ids())
        assert isinstance(failed.exception(), RuntimeError)
        hook.remove()
        handle.remove()
    assert model.config._attn_implementation == "sdpa"


def test_applied_while_a_forward_runs(model: PreTrainedModel) -> None:
    """A forward that began without sparsekit has other masks: its layers do not guess."""
    reached, go_on, hook = _held(model, layer=1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_logits, model, _ids())
        assert reached.wait(60)
        with sparsekit.apply(model, SPARSE):
            go_on.set()
            with pytest.raises(SparsekitError, match="sparsekit was applied while this forward ran"):
                running.result()
    hook.remove()


# ---- two handles on one set of modules


@pytest.mark.parametrize("first", ["model", "base"])
def test_the_modules_count_and_not_the_object_that_holds_them(model: PreTrainedModel, first: str) -> None:
    own = _logits(model, _ids())
    whole, base = model, model.model
    one, two = (whole, base) if first == "model" else (base, whole)
    before = sparsekit.apply(one, SPARSE)
    after = sparsekit.apply(two, OTHER)
    assert not before.active
    assert "another config was applied" in before.report().warning
    with sparsekit.apply(tiny("llama", initializer_range=0.1), OTHER):
        pass
    expected = _logits(model, _ids())
    before.remove()  # does nothing
    assert after.active and torch.equal(_logits(model, _ids()), expected)
    sparsekit.remove(one)  # by the other object
    assert not after.active
    assert torch.equal(_logits(model, _ids()), own)
    assert model.config._attn_implementation == "sdpa" and not DOORS


def test_the_object_may_go_and_the_modules_stay() -> None:
    model = tiny("llama", initializer_range=0.1)
    base = model.model
    with torch.inference_mode():
        own = base(_ids()).last_hidden_state
        handle = sparsekit.apply(model, SPARSE)
        del model
        assert not torch.equal(base(_ids()).last_hidden_state, own)
        assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]
        handle.remove()
        assert torch.equal(base(_ids()).last_hidden_state, own)
    assert base.config._attn_implementation == "sdpa"


def test_a_part_of_a_patched_models_layers_is_refused(model: PreTrainedModel) -> None:
    part = type(model)(model.config).eval()
    part.model.layers = model.model.layers[:2]
    with sparsekit.apply(model, SPARSE) as handle:
        expected = _logits(model, _ids())
        with pytest.raises(SparsekitError, match="shares some of its layers"):
            sparsekit.apply(part, {"default": TRIANGLE})
        assert handle.active
        assert torch.equal(_logits(model, _ids()), expected)


# ---- apply is atomic


def _state(model: PreTrainedModel) -> Any:
    modules = [(id(module), sorted(map(str, module.__dict__))) for module in model.modules()]
    names = [module.config._attn_implementation for module in model.modules() if isinstance(module, PreTrainedModel)]
    return modules, names, sorted(LAYERS), sorted(DOORS)


@pytest.mark.parametrize("where", ["own_attention", "facts_of", "name_for", "open_door", "guard", "guard: done"])
@pytest.mark.parametrize("patched", [False, True])
def test_any_exception_leaves_the_model_alone(
    model: PreTrainedModel, where: str, patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours or of a model that is not as expected, half way through."""
    handle = sparsekit.apply(model, SPARSE) if patched else None
    before, logits = _state(model), _logits(model, _ids())
    calls = iter([None, None])
    where, _, done = where.partition(": ")
    stock = getattr(sparsekit.patch.handle, where)

    def breaks(*args: Any) -> Any:
        if done:
            stock(*args)
        if where == "own_attention" and next(calls, 1) is None:  # the third layer's
            return stock(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(sparsekit.patch.handle, where, breaks)
    with pytest.raises(KeyboardInterrupt):
        sparsekit.apply(model, OTHER)
    assert _state(model) == before
    assert torch.equal(_logits(model, _ids()), logits)
    assert handle is None or handle.active
    sparsekit.remove(model)


@pytest.mark.parametrize("where", ["unguard", "close_door"])
@pytest.mark.parametrize("done", [False, True])
def test_what_was_not_taken_off_whole_stays(
    model: PreTrainedModel, where: str, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while another config takes the place of the first, before a step and behind it."""
    handle = sparsekit.apply(model, SPARSE)
    before, logits = _state(model), _logits(model, _ids())
    stock = getattr(sparsekit.patch.handle, where)

    def breaks(*args: Any) -> None:
        if done:
            stock(*args)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(sparsekit.patch.handle, where, breaks)
        with pytest.raises(MemoryError):
            sparsekit.apply(model, OTHER)
    assert handle.active and _state(model) == before
    assert torch.equal(_logits(model, _ids()), logits)
    with pytest.raises(SparsekitError, match="would take sparsekit off"):
        model.set_attn_implementation("eager")
    handle.remove()
    assert not LAYERS.keys() & {id(module) for module in model.modules()} and id(model.config) not in DOORS


@pytest.mark.parametrize("index", [-1, 4])
def test_a_layer_number_that_is_none(model: PreTrainedModel, index: int) -> None:
    own = _logits(model, _ids(), use_cache=False)
    model.model.layers[3].self_attn.layer_idx = index
    before = _state(model)
    with pytest.raises(SparsekitError, match=rf"a LlamaAttention has layer_idx {index}, out of 0-3"):
        sparsekit.apply(model, SPARSE)
    assert _state(model) == before
    assert torch.equal(_logits(model, _ids(), use_cache=False), own)


def test_what_is_no_model() -> None:
    for what, message in (
        (nn.DataParallel(tiny("llama")), r"DataParallel is not a Hugging Face model; .* DataParallel\.module"),
        (nn.Linear(2, 2), "Linear is not a Hugging Face model"),
        ("llama", "str is not a Hugging Face model"),
        (tiny("llama").model.layers[0], "LlamaDecoderLayer is not a Hugging Face model"),
        (tiny("llama").model.layers[0].self_attn, "LlamaAttention is not a Hugging Face model"),
    ):
        with pytest.raises(SparsekitError, match=message):
            sparsekit.apply(what, SPARSE)


@pytest.mark.parametrize("enter", [lambda handle: handle.pause(), lambda handle: handle.prompt(tokens=5)])
def test_a_handle_that_has_ended_says_so(model: PreTrainedModel, enter: Callable[[Any], Any]) -> None:
    """Its block would change nothing; that of the handle which took its place does."""
    first = sparsekit.apply(model, SPARSE)
    second = sparsekit.apply(model, OTHER)
    with pytest.raises(SparsekitError, match="another config was applied to this model's layers"), enter(first):
        pass
    with enter(second):
        second.remove()
    with pytest.raises(SparsekitError, match=r"removed from this model: by remove\(\)"), enter(second):
        pass


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(model: PreTrainedModel, make: Callable[[Any], Any]) -> None:
    with sparsekit.apply(model, SPARSE) as handle, pytest.raises(SparsekitError, match="a handle cannot be copied"):
        make(handle)


def test_a_layer_that_was_replaced_is_told(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE) as handle:
        assert not handle.report().warning
        model.model.layers[2].self_attn = type(model.model.layers[2].self_attn)(model.config, 2)
        gc.collect()
        assert "the attention of layers 2 was replaced or deleted after apply" in handle.report().warning
