"""A mask is judged by what it is, not by what it was composed of; a prompt by what it has, not by what was told."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import traces_names
from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache, Gemma3Config, PreTrainedModel
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    create_causal_mask,
    or_masks,
    sliding_window_overlay,
)

import sparsekit
from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.models import tiny

TOKENS = 200
TRIANGLE = {"name": "triangle", "sink_tokens": 8, "window_tokens": 40, "last_tokens": 20}
WINDOW = {"name": "a_shape", "sink_tokens": 0, "window_tokens": 32}


def _ids(batch: int = 1, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def _ran(handle: Any) -> list[str]:
    return [row.ran for row in handle.report().layers]


def _close(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) < 1e-5 * max(float(expected.abs().max()), 1.0)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", initializer_range=0.1)


# ---- pictures and text


@pytest.fixture
def gemma3() -> PreTrainedModel:
    """Gemma 3 with a vision part; layers 0 and 2 slide."""
    text = {
        "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "sliding_window": 32, "initializer_range": 0.1,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=255, boi_token_index=253, eoi_token_index=254,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("rules", [{"1,3": TRIANGLE}, {"0,2": WINDOW, "1,3": TRIANGLE}], ids=["full", "sliding too"])
@pytest.mark.parametrize("cached", [False, True])
def test_text_through_a_model_with_pictures(gemma3: PreTrainedModel, rules: dict[str, Any], cached: bool) -> None:
    """Its processor gives token types with every prompt; all of text, the mask is plain causal, or a plain window."""
    types = torch.zeros(1, TOKENS, dtype=torch.long)
    with sparsekit.apply(gemma3, {"layers": rules}) as handle:
        expected = _logits(gemma3, _ids(), use_cache=cached)
        wanted = ["sparse" if "0,2" in rules else "own", "sparse"] * 2
        assert _ran(handle) == wanted
        got = _logits(gemma3, _ids(), token_type_ids=types, use_cache=cached)
        assert _ran(handle) == wanted
        _close(got, expected)


def test_a_picture_is_the_models_own(gemma3: PreTrainedModel) -> None:
    """Its tokens see each other; and the next turn, of text alone, runs sparse again."""
    types = torch.zeros(1, TOKENS, dtype=torch.long)
    types[:, 50:54] = 1
    turn, no_types = _ids(tokens=100, seed=1), torch.zeros(1, 100, dtype=torch.long)

    def converse() -> tuple[Tensor, Tensor]:
        cache = DynamicCache(config=gemma3.config.get_text_config())
        first = _logits(gemma3, _ids(), token_type_ids=types, past_key_values=cache)
        reports.append([(row.ran, row.why) for row in handle.report().layers])
        return first, _logits(gemma3, turn, token_type_ids=no_types, past_key_values=cache)

    reports: list[Any] = []
    with sparsekit.apply(gemma3, {"layers": {"0,2": WINDOW, "1,3": TRIANGLE}}) as handle:
        with handle.pause():
            own, _ = converse()
        got, _ = converse()
        assert _ran(handle) == ["sparse"] * 4
    assert torch.equal(got, own)
    assert {why for _, why in reports[1]} == {
        "the mask is not plain causal (packed sequences, or a custom mask function)"
    }
    plain = _logits(gemma3, _ids(), token_type_ids=torch.zeros_like(types))
    assert not torch.allclose(own, plain, atol=1e-3)


# ---- masks that a caller composes


def _blocks(first: int, last: int) -> Tensor:
    ids = torch.full((1, TOKENS), -1)
    ids[:, first:last] = 0
    return ids


NOTHING = _blocks(0, 0)
COMPOSED: dict[str, tuple[dict[str, Any], bool]] = {
    "no blocks": ({"block_sequence_ids": NOTHING}, True),
    "or no blocks": ({"or_mask_function": blockwise_overlay(NOTHING)}, True),
    "or causal": ({"or_mask_function": causal_mask_function}, True),
    "and causal": ({"and_mask_function": causal_mask_function}, True),
    "both": ({"or_mask_function": or_masks(causal_mask_function, blockwise_overlay(NOTHING)),
              "and_mask_function": causal_mask_function}, True),
    "a block": ({"block_sequence_ids": _blocks(20, 30)}, False),
    "or a block": ({"or_mask_function": blockwise_overlay(_blocks(20, 30))}, False),
    "and no block": ({"and_mask_function": blockwise_overlay(_blocks(0, TOKENS))}, False),
    "a function of the caller's": ({"and_mask_function": lambda b, h, q, k: k != 5}, False),
    "or everything": ({"or_mask_function": lambda b, h, q, k: q >= 0}, False),
    "packed": ({"position_ids": torch.cat([torch.arange(90), torch.arange(TOKENS - 90)])[None]}, False),
    "one sequence": ({"position_ids": torch.arange(TOKENS)[None]}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_masks(model: PreTrainedModel, name: str) -> None:
    """Where it is plain causal a layer runs sparse, elsewhere it is the model's own, mask and all."""
    arguments, plain = COMPOSED[name]

    def mask() -> Any:
        embeds = torch.zeros(1, TOKENS, 64)
        return create_causal_mask(model.config, embeds, None, None, **arguments)

    own = _logits(model, _ids(), attention_mask=mask(), use_cache=False)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        sparse = _logits(model, _ids(), use_cache=False)
        got = _logits(model, _ids(), attention_mask=mask(), use_cache=False)
        assert _ran(handle) == ["sparse" if plain else "dense"] * 4
    assert torch.equal(got, sparse if plain else own)
    assert not torch.equal(sparse, own)


def test_a_window_in_a_full_layer_is_refused(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, {"default": TRIANGLE}):
        embeds = torch.zeros(1, TOKENS, 64)
        mask = create_causal_mask(model.config, embeds, None, None, and_mask_function=sliding_window_overlay(9))
        with pytest.raises(SparsekitError, match="layer 0 got the mask of a sliding layer"):
            _logits(model, _ids(), attention_mask=mask)


# ---- arguments


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("attn_bias", False),
        pytest.param("attn_bias", True, marks=traces_names),
        ("position_bias", False),
        ("block_table", False),
        ("foo", False),
    ],
)
def test_unknown_arguments_are_refused_by_name(name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=2)
    run: Any = torch.compile(model, backend="eager") if compiled else model
    bias = torch.zeros(1, 4, TOKENS, TOKENS)
    own = _logits(model, _ids(), **{name: bias})
    with sparsekit.apply(model, {"layers": {"1": TRIANGLE}}):
        with pytest.raises(SparsekitError, match=rf"layer 1 runs triangle.* passes '{name}' to its attention function"):
            _logits(run, _ids(), **{name: bias})
        _logits(run, _ids(), **{name: None})
    with sparsekit.apply(model, {"default": "dense"}):
        assert torch.equal(_logits(model, _ids(), **{name: bias}), own)


# ---- what was told of the prompt


def _batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, :n], mask[row, :n] = _ids(tokens=n, seed=row)[0], 1
    return ids, mask


@pytest.mark.parametrize(("size", "told"), [(TOKENS, TOKENS), (TOKENS, [TOKENS, 137, 90]), (70, [TOKENS, 137, 90])])
def test_padding_on_the_right(model: PreTrainedModel, size: int, told: Any) -> None:
    """A sample's last rows are its own: in one call by its padding, in chunks by its number."""
    lengths = [TOKENS, 137, 90]
    ids, mask = _batch(lengths)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        alone = [_logits(model, _ids(tokens=n, seed=row))[0] for row, n in enumerate(lengths)]
        cache = DynamicCache(config=model.config)
        with handle.prompt(tokens=told):
            parts = [slice(at, at + size) for at in range(0, TOKENS, size)]
            got = torch.cat(
                [_logits(model, ids[:, p], attention_mask=mask[:, : p.stop], past_key_values=cache) for p in parts], 1
            )
    for row, n in enumerate(lengths):
        _close(got[row, :n], alone[row])


@pytest.mark.parametrize("length", [150, 100])
@pytest.mark.parametrize("told", [TOKENS, [TOKENS, TOKENS]])
def test_a_sample_that_ends_before_what_was_told_is_refused(model: PreTrainedModel, told: Any, length: int) -> None:
    """Inside a later chunk, and where one ends: rows before it were not those of its own end."""
    ids, mask = _batch([TOKENS, length])
    cache = DynamicCache(config=model.config)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle, handle.prompt(tokens=told):
        _logits(model, ids[:, :100], attention_mask=mask[:, :100], past_key_values=cache)
        with pytest.raises(SparsekitError, match=f"sample 1 ends at column {length}, not {TOKENS}; .* one number for"):
            _logits(model, ids[:, 100:], attention_mask=mask, past_key_values=cache)


def test_geometry_with_prompt() -> None:
    g = Geometry.of(100, 100, batch=3, kv_start=[0, 30, 0], kv_end=[100, 100, 60])
    assert g.with_prompt(100).prompt_tokens == (100, 70, 60)
    assert g.with_prompt(150).prompt_tokens == (150, 120, 60)
    assert g.with_prompt([100, 120, 50]).prompt_tokens == (100, 90, 50)


NO_NUMBERS = [
    torch.tensor(200.0), [torch.tensor(200.0)], torch.tensor(True), [200, torch.tensor(True)], torch.tensor([True]),
    torch.tensor([[200], [300]]), [torch.tensor([1, 2])], np.True_, np.array([True]), torch.tensor(200, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [0, -5, True, 3.0, "200", None, [], [200, 0], [200, True], [[200]], *NO_NUMBERS])
def test_what_is_no_number_of_tokens(model: PreTrainedModel, tokens: Any) -> None:
    with (
        sparsekit.apply(model, {"default": TRIANGLE}) as handle,
        pytest.raises(SparsekitError, match=r"handle\.prompt\(tokens=.*a whole number of at least 1"),
        handle.prompt(tokens=tokens),
    ):
        pass


@pytest.mark.parametrize(
    "tokens", [np.int64(TOKENS), torch.tensor(TOKENS), [torch.tensor(TOKENS)], np.array([TOKENS]), [np.int32(TOKENS)]]
)
def test_numbers_of_other_libraries(model: PreTrainedModel, tokens: Any) -> None:
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        expected = _logits(model, _ids())
        with handle.prompt(tokens=tokens):
            assert torch.equal(_logits(model, _ids()), expected)


@pytest.mark.parametrize("tokens", [1, 100, TOKENS - 64, [100]])
def test_a_prompt_longer_than_told_is_refused(model: PreTrainedModel, tokens: Any) -> None:
    with (
        sparsekit.apply(model, {"default": TRIANGLE}) as handle,
        handle.prompt(tokens=tokens),
        pytest.raises(SparsekitError, match=r"handle\.prompt\(tokens=.* this call ends \d+ columns after that"),
    ):
        _logits(model, _ids())


def test_numbers_that_are_not_the_batch(model: PreTrainedModel) -> None:
    with (
        sparsekit.apply(model, {"default": TRIANGLE}) as handle,
        handle.prompt(tokens=[TOKENS, TOKENS]),
        pytest.raises(SparsekitError, match="2 numbers for a batch of 1 samples"),
    ):
        _logits(model, _ids())


CALLS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "generate": lambda m: m.generate(_ids(), max_new_tokens=4, do_sample=False),
    "prompt lookup": lambda m: m.generate(
        _ids(tokens=TOKENS // 2).repeat(1, 2), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4
    ),
    "a short turn": lambda m: _turns(m, 30),
}


def _turns(model: PreTrainedModel, second: int) -> Tensor:
    cache = DynamicCache(config=model.config)
    _logits(model, _ids(), past_key_values=cache)
    return _logits(model, _ids(tokens=second), past_key_values=cache)


@pytest.mark.parametrize("tokens", [4096, TOKENS + 40])
@pytest.mark.parametrize("call", CALLS)
def test_decoding_before_the_end_that_was_told_is_refused(model: PreTrainedModel, call: str, tokens: int) -> None:
    """The prompt was shorter: its decoding is not taken for chunks of it."""
    with (
        sparsekit.apply(model, {"default": TRIANGLE}) as handle,
        handle.prompt(tokens=tokens),
        pytest.raises(SparsekitError, match=r"look like decoding, so the prompt was shorter"),
    ):
        CALLS[call](model)


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS + 1])
@pytest.mark.parametrize("static", [False, True])
def test_a_decoded_token_is_never_sparse(model: PreTrainedModel, tokens: int, static: bool) -> None:
    """Also where the number is wrong by one, so that the token seems to end the prompt."""
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    with sparsekit.apply(model, {"default": {"name": "a_shape", "sink_tokens": 1, "window_tokens": 9}}) as handle:
        expected = model.generate(_ids(), max_new_tokens=6, do_sample=False, **options)
        with handle.prompt(tokens=tokens):
            assert torch.equal(model.generate(_ids(), max_new_tokens=6, do_sample=False, **options), expected)


def test_many_tokens_without_a_cache(model: PreTrainedModel) -> None:
    """Each call has the prompt and what was decoded so far, at last far more than the prompt."""
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle, handle.prompt(tokens=TOKENS):
        expected = model.generate(_ids(), max_new_tokens=80, do_sample=False)
        assert expected.shape[1] == TOKENS + 80
        got = model.generate(_ids(), max_new_tokens=80, do_sample=False, use_cache=False)
        assert got.shape == expected.shape and torch.equal(got[:, : TOKENS + 1], expected[:, : TOKENS + 1])


def test_a_short_prompt_in_chunks_is_as_dense_as_the_whole(model: PreTrainedModel) -> None:
    ids = _ids(tokens=50)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        whole = _logits(model, ids)
        cache = DynamicCache(config=model.config)
        with handle.prompt(tokens=50):
            _close(torch.cat([_logits(model, part, past_key_values=cache) for part in ids.split(25, 1)], 1), whole)
            assert {row.why for row in handle.report().layers} == {"50 queries, fewer than min_queries 64"}


def test_padding_is_no_part_of_the_prompts_length(model: PreTrainedModel) -> None:
    """dense_below_tokens counts a sample's tokens, told or not."""
    ids, mask = _ids(), torch.ones(1, TOKENS, dtype=torch.long)
    mask[:, :80] = 0
    with sparsekit.apply(model, {"default": TRIANGLE, "dense_below_tokens": 150}) as handle:
        for told in (False, True):
            if told:
                with handle.prompt(tokens=TOKENS):
                    _logits(model, ids, attention_mask=mask)
            else:
                _logits(model, ids, attention_mask=mask)
            assert {row.why for row in handle.report().layers} == {"120 tokens, fewer than dense_below_tokens 150"}


def test_a_mask_goes_with_its_forward(model: PreTrainedModel) -> None:
    """Of a prompt with holes, and of a padded one that runs dense: the model's own masks, quadratic in its length."""
    holes = torch.ones(1, TOKENS, dtype=torch.long)
    holes[0, 70:75] = 0
    ids, padded = _batch([TOKENS, 90])

    def masks() -> list[Tensor]:
        gc.collect()
        found = (x for x in gc.get_objects() if isinstance(x, Tensor) and x.ndim == 4)
        return [x for x in found if x.shape[-2:] == (TOKENS, TOKENS)]

    before = masks()  # of other tests
    for config, given, mask in ((TRIANGLE, _ids(), holes), ("dense", ids, padded)):
        with sparsekit.apply(model, {"default": config}):
            _logits(model, given, attention_mask=mask, use_cache=False)
            assert all(any(mask is old for old in before) for mask in masks())
