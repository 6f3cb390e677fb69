"""Every kind of call: padded batches, chunks, turns, caches, ways to generate, and what is refused.

The judge is the stock model with the same mask given explicitly, or sparsekit's own one-shot prefill of one prompt.
docs/models.md says for each call what holds, and names its test.
"""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from tiny import TRIANGLE, by_reference
from tiny import close as _close
from tiny import ids as _ids
from tiny import logits as _logits
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import QuantizedLayer

import sparsekit
from sparsekit import SparsekitError
from sparsekit.call.softmax import Softmax
from sparsekit.models import tiny
from sparsekit.patch import Handle
from sparsekit.patch.capture import wrap_attention
from sparsekit.patterns import DynamicPattern, StaticPattern, pattern_class, pattern_names

TOKENS = 200
SPARSE = {"layers": {"1-3": TRIANGLE}}

LONG = 520  # where every pattern of these sizes drops something

PATTERNS: dict[str, dict[str, Any]] = {
    name: {"name": name, **pattern_class(name).test_points[0]} for name in pattern_names()
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)
static_patterns = pytest.mark.parametrize("name", pattern_names(StaticPattern))


@pytest.fixture
def model() -> PreTrainedModel:
    """Weights large enough that attention is far from uniform, and greedy tokens from ties."""
    return tiny("llama", initializer_range=0.1)


def _ran(handle: Handle) -> list[str]:
    return [layer.ran for layer in handle.report().layers]


def _pairs(model: PreTrainedModel, layer: int = 3) -> Tensor:
    """bool (B, H, Q, K): the pairs of a layer's last plan."""
    plan = sparsekit.patch.state.LAYERS[id(model.model.layers[layer].self_attn)].plan
    assert isinstance(plan, sparsekit.plan.BlockPlan)
    return plan.to_mask()


@contextmanager
def _explicit(model: PreTrainedModel, kept: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """The stock model, in which layers 1-3 get `kept(i, j)` as an explicit mask wherever a call has 64 queries or more.

    `i` and `j` are key indices; for caches that hold no spare keys.
    """

    def run(own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        if module.layer_idx > 0 and q.shape[2] >= 64:
            j = torch.arange(k.shape[2])[None]
            i = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
            mask = ((j <= i) & kept(i, j))[None, None]
        return own(module, q, k, v, mask, **kwargs)

    with wrap_attention(model, run):
        yield


def _triangle(prompt: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda i, j: (j < 8) | (i - j < 40) | (i >= prompt - 20)


# ---- batches


def _batch(lengths: list[int], side: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prompts of these lengths padded on one side: ids, what is valid, and the arguments of a forward."""
    most = max(lengths)
    ids, mask = torch.zeros(len(lengths), most, dtype=torch.long), torch.zeros(len(lengths), most, dtype=torch.long)
    for row, n in enumerate(lengths):
        at = slice(most - n, most) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = _ids(tokens=n, seed=row)[0], 1
    return ids, mask.bool(), {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@every_pattern
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_the_single_runs(model: PreTrainedModel, name: str, side: str) -> None:
    """Each sample keeps the pairs that it keeps alone, its own sinks and last rows, and gets the same logits."""
    lengths = [LONG, 337, 90]
    ids, valid, arguments = _batch(lengths, side)
    with sparsekit.apply(model, {"default": PATTERNS[name], "dense_impl": "kernel"}) as handle:
        batch = _logits(model, ids, **arguments)
        assert (handle.report().layers[3].density < 0.9) == (name != "dense")
        together = _pairs(model)
        for row, n in enumerate(lengths):
            alone = _logits(model, _ids(tokens=n, seed=row))[0]
            at = valid[row].nonzero()[:, 0]
            if name != "s2o":  # what it may visit is no more than a bound; what it did visit shows in the logits
                pairs = together[min(row, len(together) - 1)][:, at][..., at]
                assert (pairs == _pairs(model)[0]).all()
            _close(batch[row, valid[row]], alone)


@every_pattern
def test_padded_chunks_are_the_single_runs(model: PreTrainedModel, name: str) -> None:
    """A batch with left padding in two calls, each sample against its own calls alone; one is absent from the first."""
    lengths, cut = [LONG, 337, 150], 300
    ids, valid, arguments = _batch(lengths, "left")
    mask, positions = arguments["attention_mask"], arguments["position_ids"]

    def run(ids: Tensor, mask: Tensor, positions: Tensor, cut: int) -> Tensor:
        cache, parts = DynamicCache(config=model.config), []
        for part in (slice(0, cut), slice(cut, ids.shape[1])):
            if part.start == part.stop:
                continue
            told = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            parts.append(_logits(model, ids[:, part], past_key_values=cache, **told))
        return torch.cat(parts, 1)

    with sparsekit.apply(model, {"default": PATTERNS[name], "min_queries": 2}) as handle:
        batch = run(ids, mask, positions, cut)
        assert _ran(handle) == ["dense" if name == "dense" else "sparse"] * 4
        for row, n in enumerate(lengths):
            here = valid[row]
            one = slice(row, row + 1)
            alone = run(ids[one, here], mask[one, here], positions[one, here], max(cut - (LONG - n), 0))
            _close(batch[row, here], alone[0])


def test_generate_with_a_padded_batch(model: PreTrainedModel) -> None:
    ids, _, arguments = _batch([TOKENS, 137], "left")
    with sparsekit.apply(model, SPARSE):
        both = model.generate(ids, attention_mask=arguments["attention_mask"], max_new_tokens=8, do_sample=False)
        for row, n in enumerate([TOKENS, 137]):
            alone = model.generate(_ids(tokens=n, seed=row), max_new_tokens=8, do_sample=False)
            assert torch.equal(both[row, TOKENS:], alone[0, n:])


def test_masks_with_holes_are_the_models_own(model: PreTrainedModel) -> None:
    """One sample with a hole sends the whole call to the model's own attention, and the report says so."""
    ids, mask = _ids(batch=2), torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 50:60] = 0
    own = _logits(model, ids, attention_mask=mask)
    with sparsekit.apply(model, SPARSE) as handle:
        assert torch.equal(_logits(model, ids, attention_mask=mask), own)
        assert {row.why for row in handle.report().layers} == {"the attention mask has holes"}


def _packed() -> Tensor:
    return torch.cat([torch.arange(90), torch.arange(TOKENS - 90)])[None]


def test_packed_sequences_are_the_models_own(model: PreTrainedModel) -> None:
    """transformers sees restarting position ids where a call has neither mask nor cache, and keeps the parts apart."""
    arguments = {"position_ids": _packed(), "use_cache": False}
    own = _logits(model, _ids(), **arguments)
    _close(own[:, :90], _logits(model, _ids()[:, :90]))
    with sparsekit.apply(model, SPARSE) as handle:
        assert torch.equal(_logits(model, _ids(), **arguments), own)
        assert "packed" in handle.report().layers[1].why


def test_packed_sequences_with_a_cache_are_one_sequence_as_in_transformers(model: PreTrainedModel) -> None:
    """With a cache transformers does not look: its attention, dense or ours, reaches back over the restart."""
    stock = _logits(model, _ids(), position_ids=_packed())
    apart = _logits(model, _ids(), position_ids=_packed(), use_cache=False)
    assert not torch.allclose(stock, apart, atol=1e-2)
    with _explicit(model, _triangle(TOKENS)):
        expected = _logits(model, _ids(), position_ids=_packed())
    with sparsekit.apply(model, SPARSE):
        _close(_logits(model, _ids(), position_ids=_packed()), expected)


def test_packed_lengths_for_flash_attention_are_refused(model: PreTrainedModel) -> None:
    lengths = torch.tensor([0, 90, TOKENS], dtype=torch.int32)
    arguments = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 110, "max_length_k": 110}
    with (
        sparsekit.apply(model, SPARSE),
        pytest.raises(SparsekitError, match=r"layer 1 runs triangle.* passes 'cu_seq_lens_q'"),
    ):
        _logits(model, _ids(), **arguments)


# ---- soft-cap and learned sinks


@every_pattern
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_cap_and_learned_sinks(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two implementations agree on every pattern, and leaving the feature out would show."""
    fields = {"gemma2": {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16}, "gpt_oss": {}}[family]
    model = tiny(family, initializer_range=0.1, layer_types=["full_attention"] * 4, **fields)
    ids, config = _ids(tokens=LONG), {"default": PATTERNS[name], "dense_impl": "kernel"}
    with sparsekit.apply(model, config) as handle:
        got = _logits(model, ids)
        assert {row.impl for row in handle.report().layers} == {"torch"}
        monkeypatch.setattr(sparsekit.patch.attention, "prepare", by_reference)
        _close(_logits(model, ids), got)
        assert {row.impl for row in handle.report().layers} == {"reference"}
        plain = lambda scale, softcap, sinks: Softmax(scale)  # noqa: E731
        monkeypatch.setattr(sparsekit.patch.call, "Softmax", plain)
        assert float((_logits(model, ids) - got).abs().max()) > 0.05


# ---- chunks and turns


def _in_chunks(model: PreTrainedModel, ids: Tensor, size: int, cache: Any = None) -> Tensor:
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [_logits(model, ids[:, at : at + size], past_key_values=cache) for at in range(0, ids.shape[1], size)]
    return torch.cat(parts, 1)


@static_patterns
@pytest.mark.parametrize("size", [64, 70, 198])
def test_chunks_of_a_known_prompt_are_the_whole(model: PreTrainedModel, name: str, size: int) -> None:
    """Rest chunks of 8, 60 and 2 tokens included: they are a part of the prompt, and no decoding."""
    with sparsekit.apply(model, {"default": PATTERNS[name]}) as handle:
        whole = _logits(model, _ids())
        with handle.prompt(tokens=TOKENS):
            _close(_in_chunks(model, _ids(), size), whole)


def test_chunks_of_an_unknown_prompt_are_a_superset(model: PreTrainedModel) -> None:
    """The last rows of every chunk are then dense, and a rest of fewer than `min_queries` tokens is too."""
    with sparsekit.apply(model, SPARSE) as handle:
        _logits(model, _ids())
        whole = _pairs(model)[0, 0]
        cache, at = DynamicCache(config=model.config), 0
        for size in (80, 70):
            _logits(model, _ids()[:, at : at + size], past_key_values=cache)
            chunk = _pairs(model)[0, 0]
            part = whole[at : at + size, : at + size]
            assert not (part & ~chunk).any()
            assert (chunk & ~part).sum() > 0
            assert torch.equal(chunk[:-20], part[:-20])
            at += size
        _logits(model, _ids()[:, at:], past_key_values=cache)
        assert torch.equal(_pairs(model)[0, 0], chunk)  # 50 queries: decoding, which leaves the record alone
        assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]


# Parameters with which a dynamic pattern keeps everything.
EVERYTHING = {
    "vertical_slash": {"vertical_tokens": LONG, "slash_tokens": LONG},
    "block_topk": {"top_k": 100},
    "flexprefill": {"gamma": 1.0},
    "xattention": {"threshold": 1.0},
    "s2o": {"tau": 0.0, "max_tokens": None},
}


@pytest.mark.parametrize("name", pattern_names(DynamicPattern))
def test_dynamic_patterns_in_chunks(model: PreTrainedModel, name: str) -> None:
    """Estimated from each chunk's own queries: a superset of nothing, but dense where the budget covers everything."""
    ids = _ids(tokens=LONG)
    own = _logits(model, ids)
    if name in EVERYTHING:
        with sparsekit.apply(model, {"default": {"name": name, **EVERYTHING[name]}}):
            _close(_in_chunks(model, ids, 200), own)
    with sparsekit.apply(model, {"default": PATTERNS[name]}) as handle:
        assert float((_in_chunks(model, ids, 200) - own).abs().max()) > 0.05
        assert _ran(handle) == ["sparse"] * 4


@pytest.mark.parametrize("second", [110, 30], ids=["sparse", "short"])
def test_second_turn_on_a_kept_cache(model: PreTrainedModel, second: int) -> None:
    """Prompt, answer, next prompt: its queries count from the start of the conversation, its last rows from its end.

    A turn of fewer than `min_queries` tokens is decoding: dense and exact.
    """
    ids = _ids(tokens=TOKENS + 5 + second)
    parts = ids.split([TOKENS, *[1] * 5, second], 1)

    def converse() -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        return [_logits(model, part, past_key_values=cache) for part in parts]

    def kept(i: Tensor, j: Tensor) -> Tensor:
        return _triangle(TOKENS if int(i[-1]) < TOKENS else ids.shape[1])(i, j)

    with _explicit(model, kept):
        expected = converse()
    with sparsekit.apply(model, SPARSE):
        got = converse()
    for a, b in zip(got, expected, strict=True):
        _close(a, b)


def test_reuse_of_a_prefix(model: PreTrainedModel) -> None:
    """One prefilled prefix, two continuations: each is the whole prompt in one call."""
    prefix, ends = _ids(tokens=100), [_ids(tokens=100, seed=seed) for seed in (1, 2)]
    with sparsekit.apply(model, SPARSE) as handle, handle.prompt(tokens=TOKENS):
        cache = DynamicCache(config=model.config)
        _logits(model, prefix, past_key_values=cache)
        for end in ends:
            got = _logits(model, end, past_key_values=copy.deepcopy(cache))
            _close(got, _logits(model, torch.cat([prefix, end], 1))[:, 100:])


def test_a_cropped_cache(model: PreTrainedModel) -> None:
    """A cache cut back to a common prefix."""
    one, two = _ids(), torch.cat([_ids()[:, :120], _ids(seed=1)[:, :80]], 1)
    with sparsekit.apply(model, SPARSE) as handle, handle.prompt(tokens=TOKENS):
        cache = DynamicCache(config=model.config)
        _logits(model, one, past_key_values=cache)
        cache.crop(120 - TOKENS)
        _close(_logits(model, two[:, 120:], past_key_values=cache), _logits(model, two)[:, 120:])


@pytest.mark.parametrize("size", [TOKENS, 80])
def test_static_cache(model: PreTrainedModel, size: int) -> None:
    """A cache with more room than keys: what is not there yet is not seen."""
    with sparsekit.apply(model, SPARSE) as handle, handle.prompt(tokens=TOKENS):
        cache = StaticCache(config=model.config, max_cache_len=300)
        _close(_in_chunks(model, _ids(), size, cache), _logits(model, _ids()))
        assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]


class _EightBits(QuantizedLayer):
    """A cache of whole numbers to 127, a scale a tensor; what came last stays as it is until there are 30 of it."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().amax() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, qtensor: tuple[Tensor, Tensor]) -> Tensor:
        return qtensor[0].to(self.dtype) * qtensor[1]


@pytest.mark.parametrize("kind", ["8 bits", "FP8"])
@pytest.mark.parametrize("size", [20, 70])
def test_quantised_caches(model: PreTrainedModel, kind: str, size: int) -> None:
    """Chunks read what such a cache gives back: all pairs of it as the untouched model does, or those of a pattern."""
    fp8 = getattr(cache_utils, "Fp8QuantizedLayer", None)
    if kind == "FP8" and fp8 is None:
        pytest.skip(f"transformers {transformers.__version__} has no cache in FP8")

    def run() -> Tensor:
        layers = [fp8() if kind == "FP8" and fp8 else _EightBits(residual_length=30) for _ in range(4)]
        return _in_chunks(model, _ids(), size, Cache(layers=layers))

    own = run()
    exact = _logits(model, _ids())
    assert float((own - exact).abs().max()) > 1e-3  # it rounds
    for rule, same in (({**TRIANGLE, "window_tokens": TOKENS}, True), (TRIANGLE, False)):
        with sparsekit.apply(model, {"layers": {"1-3": rule}}) as handle, handle.prompt(tokens=TOKENS):
            got = run()
            assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]
        assert (float((got - own).abs().max()) < 1e-4) == same


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("size", [20, 70, TOKENS])
def test_sliding_layers_in_chunks(family: str, kind: str, size: int) -> None:
    """Caches that drop keys behind the window: still the model's own result, padding included."""
    fields = {} if family == "mistral" else {"layer_types": ["sliding_attention", "full_attention"] * 2}
    model = tiny(family, initializer_range=0.1, sliding_window=32, **fields)
    rule = {"name": "a_shape", "sink_tokens": 0, "window_tokens": 32}
    ids, valid, arguments = _batch([TOKENS, 137], "left")
    mask, positions = arguments["attention_mask"], arguments["position_ids"]

    def run() -> Tensor:
        cache: Any = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=300)
        parts = []
        for at in range(0, TOKENS, size):
            part = slice(at, at + size)
            told = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            parts.append(_logits(model, ids[:, part], past_key_values=cache, **told))
        return torch.cat(parts, 1)[valid]

    own = run()
    config = {"layers": {"0-3" if family == "mistral" else "0,2": rule}, "min_queries": 2, "dense_below_tokens": 20}
    with sparsekit.apply(model, config) as handle:
        _close(run(), own)
        assert _ran(handle) == ["sparse" if family == "mistral" or i % 2 == 0 else "dense" for i in range(4)]
        with handle.prompt(tokens=TOKENS):
            _close(run(), own)


def test_forwards_of_several_threads_keep_their_calls_apart(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both masks are made before any layer is planned: each thread's layers read its own padding."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :60] = 0
    jobs = [(_ids(seed=seed), mask[seed : seed + 1]) for seed in range(2)]
    both, plan = threading.Barrier(2, timeout=60), sparsekit.config.layers.plan_heads
    with sparsekit.apply(model, {"default": TRIANGLE}):
        alone = [_logits(model, ids, attention_mask=padding) for ids, padding in jobs]

        def at_once(*args: Any) -> Any:
            both.wait()
            return plan(*args)

        monkeypatch.setattr(sparsekit.config.layers, "plan_heads", at_once)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda job: _logits(model, job[0], attention_mask=job[1]), jobs))
    for got, expected, (_, padding) in zip(together, alone, jobs, strict=True):
        assert torch.equal(got[padding.bool()], expected[padding.bool()])


# ---- ways to generate

# In a block that tells the prompt's length, each of these answers as plain greedy decoding after a one-shot prefill.
WAYS: dict[str, dict[str, Any]] = {
    "prefill_chunk_size": {"prefill_chunk_size": 70},
    "prefill_chunk_size below min_queries": {"prefill_chunk_size": 30},
    "static cache": {"cache_implementation": "static"},
    "static cache, chunks": {"cache_implementation": "static", "prefill_chunk_size": 70},
    "no cache": {"use_cache": False},
    "assisted": {"assistant_model": 2},
    "assisted by itself": {"assistant_model": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate_the_same(model: PreTrainedModel, way: str) -> None:
    """Judged by the stock model with the explicit mask during its one-shot prefill."""
    options = dict(WAYS[way])
    if "assistant_model" in options:
        options["assistant_model"] = tiny("llama", initializer_range=0.1, num_hidden_layers=options["assistant_model"])
    ids = _ids(tokens=TOKENS // 2).repeat(1, 2) if way == "prompt lookup" else _ids()
    with _explicit(model, _triangle(TOKENS)):
        expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert not torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), expected)
    with sparsekit.apply(model, SPARSE) as handle, handle.prompt(tokens=TOKENS):
        assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False, **options), expected)
        assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["beams", "samples", "sampled beams"],
)
def test_several_sequences_of_one_prompt(model: PreTrainedModel, options: dict[str, Any]) -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        return model.generate(_ids(), max_new_tokens=10, **{"do_sample": False, **options})

    with _explicit(model, _triangle(TOKENS)):
        expected = run()
    with sparsekit.apply(model, SPARSE):
        assert torch.equal(run(), expected)


def test_candidates_are_not_the_prompt(model: PreTrainedModel) -> None:
    """Prompt lookup first calls with the prompt and its candidates: told the length, the last rows stay in place."""

    def dense_from() -> int:
        _logits(model, _ids(tokens=TOKENS + 4))
        kept = _pairs(model)[0, 0].sum(1)
        return next(row for row in range(60, len(kept)) if int(kept[row]) == row + 1)

    with sparsekit.apply(model, SPARSE) as handle:
        assert dense_from() == TOKENS + 4 - 20
        with handle.prompt(tokens=TOKENS):
            assert dense_from() == TOKENS - 20


@pytest.mark.gpu
def test_offloaded_caches() -> None:
    """Keys that wait on the host and come back layer by layer; transformers has these for CUDA alone."""
    model = tiny("llama", initializer_range=0.1).cuda()
    ids = _ids().cuda()

    def logits(**options: Any) -> torch.Tensor:
        """(10, vocabulary): of the tokens that the untouched model decodes, so that a near tie changes none of them."""
        forced = LogitsProcessorList([_Force(tokens)]) if tokens is not None else None
        # Compiled, as it decodes with a static cache on a card, PyTorch 2.11 crashes in the untouched model.
        said = model.generate(
            ids, max_new_tokens=10, do_sample=False, logits_processor=forced, return_dict_in_generate=True,
            output_logits=True, disable_compile=True, **options,
        )  # fmt: skip
        return torch.cat(said.logits)

    tokens = None
    tokens = logits().argmax(-1)
    for name in ("offloaded", "offloaded_static"):
        for options in ({}, {"prefill_chunk_size": 70}):
            own = (logits(cache_implementation=name, **options) - logits()).abs().max()
            with sparsekit.apply(model, SPARSE) as handle, handle.prompt(tokens=TOKENS):
                got = (logits(cache_implementation=name, **options) - logits()).abs().max()
                assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]
            assert float(got) <= max(2 * float(own), 1e-4), (name, options, float(own), float(got))


class _Force(LogitsProcessor):
    """Greedy decoding says these tokens, whatever the logits are."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[self.step]] = 0
        self.step += 1
        return forced


def test_continuous_batching_is_refused(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has attention functions of its own: transformers names ours, or switches, which we refuse."""
    with sparsekit.apply(model, SPARSE) as handle:
        with pytest.raises(ValueError, match=r"sparsekit_\d+ is not supported for continuous batching"):
            model.generate_batch([_ids()[0].tolist()], max_new_tokens=2)
        continuous = importlib.import_module("transformers.generation.continuous_batching.continuous_api")
        if not hasattr(continuous, "is_flash_attn_2_available"):
            pytest.skip("this transformers looks for flash attention elsewhere")
        for version, there in ((2, True), (3, False)):
            monkeypatch.setattr(continuous, f"is_flash_attn_{version}_available", lambda there=there, **_: there)
        monkeypatch.setattr(type(model), "_check_and_adjust_attn_implementation", lambda self, name, **_: name)
        monkeypatch.setattr(type(model), "get_correct_attn_implementation", lambda self, name, **_: name)
        with pytest.raises(SparsekitError, match=r"set_attn_implementation\('flash_attention_2'\).*handle\.remove"):
            model.generate_batch([_ids()[0].tolist()], max_new_tokens=2)
        assert handle.report().warning == ""
        _logits(model, _ids())
        assert _ran(handle) == ["dense", "sparse", "sparse", "sparse"]


# ---- other calls


def test_output_attentions(model: PreTrainedModel) -> None:
    """Refused where a layer is sparse, by call and by generate; all dense, the model answers as it would."""
    with sparsekit.apply(model, SPARSE):
        with pytest.raises(SparsekitError, match=r"output_attentions=True: layer 1 runs triangle"):
            _logits(model, _ids(), output_attentions=True)
        with pytest.raises(SparsekitError, match="output_attentions=True"):
            model.generate(_ids(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        with pytest.raises(ValueError, match=r"output_attentions.*not supported"):
            model.config.output_attentions = True
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        own = model(_ids(), output_attentions=True).attentions
        with sparsekit.apply(model, {"default": "dense"}):
            got = model(_ids(), output_attentions=True).attentions
    assert len(got) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, own, strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refused where a layer is sparse; all dense or paused, the model's own attention gets them."""
    mask = torch.ones(1, 1, TOKENS, TOKENS).tril().bool()
    mask[..., :7] = False
    mask[..., :7, :7] = torch.eye(7).bool()
    if dtype != torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min)
    own = _logits(model, _ids(), attention_mask=mask)
    with sparsekit.apply(model, SPARSE) as handle:
        with pytest.raises(SparsekitError, match=r"layer 1 should run triangle.*\(1, 1, 200, 200\).*custom 4-D masks"):
            _logits(model, _ids(), attention_mask=mask)
        with handle.pause():
            assert torch.equal(_logits(model, _ids(), attention_mask=mask), own)
    with sparsekit.apply(model, {"default": "dense"}):
        assert torch.equal(_logits(model, _ids(), attention_mask=mask), own)


def test_a_custom_mask_after_a_plain_call_is_still_refused(model: PreTrainedModel) -> None:
    mask = torch.ones(1, 1, TOKENS, TOKENS).tril().bool()
    with sparsekit.apply(model, SPARSE):
        _logits(model, _ids())
        with pytest.raises(SparsekitError, match="custom 4-D masks"):
            _logits(model, _ids(), attention_mask=mask)


def test_input_embeddings(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE), torch.inference_mode():
        given = model(inputs_embeds=model.get_input_embeddings()(_ids())).logits
        assert torch.equal(given, _logits(model, _ids()))


def test_hidden_states_come_out(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE), torch.inference_mode():
        out = model(_ids(), output_hidden_states=True)
        assert len(out.hidden_states) == 5
        assert torch.equal(out.logits, _logits(model, _ids()))


def test_gradients_are_refused(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, SPARSE):
        for mode in (model.train, model.eval):
            mode()
            with pytest.raises(SparsekitError, match=r"forward only.*inference_mode.*handle\.pause") as error:
                model(_ids())
            assert "\n" not in str(error.value)
        with torch.no_grad():
            model(_ids())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_while_paused_is_the_models_own(model: PreTrainedModel, checkpointing: bool) -> None:
    """Two forwards with different masks before the backward: recomputed layers get the mask of their own forward."""
    stock = copy.deepcopy(model)
    ids = _ids(batch=2)
    masks = [torch.ones(2, TOKENS, dtype=torch.long) for _ in range(2)]
    masks[0][0, :50] = 0

    def loss(of: PreTrainedModel) -> Tensor:
        return of(ids, attention_mask=masks[0], labels=ids).loss + of(ids, attention_mask=masks[1], labels=ids).loss

    for one in (model, stock):
        one.train()
        if checkpointing:
            one.gradient_checkpointing_enable()
    loss(stock).backward()
    with sparsekit.apply(model, SPARSE) as handle, handle.pause():
        loss(model).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
