"""transformers 5.24 calls a cache `cache`; before it was `past_key_values`. Models of a user's own may still say so."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from sparsekit.models import tiny
from sparsekit.patch.caches import cache_argument, cache_in, cache_of


class New(nn.Module):
    def forward(self, ids: Any, cache: Any = None) -> Any: ...


class Old(nn.Module):
    def forward(self, ids: Any, past_key_values: Any = None) -> Any: ...


class Wrapper(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


def test_the_cache_has_the_name_that_the_forward_gives_it() -> None:
    assert cache_argument(New(), 1) == {"cache": 1}
    assert cache_argument(Old(), 1) == {"past_key_values": 1}
    assert cache_argument(Wrapper(), 1) == cache_argument(tiny("llama"), 1)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_found_by_either_name(name: str) -> None:
    held = DynamicCache()  # empty, and false as a truth value
    assert cache_in({"ids": 1, name: held}) is held and cache_of(SimpleNamespace(**{name: held})) is held
    assert cache_in({"cache": None, "past_key_values": held}) is held
    assert cache_in({name: None}) is None and cache_of(SimpleNamespace()) is None


def test_a_model_here_reads_on_without_a_warning() -> None:
    model, ids = tiny("llama"), torch.arange(1, 9)[None]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        cache = cache_of(model(ids[:, :5], use_cache=True))
        rest = model(ids[:, 5:], **cache_argument(model, cache)).logits
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(rest, model(ids).logits[:, 5:])
