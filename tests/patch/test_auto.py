"""`dense_below_tokens: auto` of a model: settled where the config is applied, and said in the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crossovers import own, row
from tiny import TRIANGLE, ids, logits

import sparsekit
from sparsekit import SparsekitError
from sparsekit.config.settle import fingerprint
from sparsekit.models import facts
from sparsekit.patterns import BlockTopK

CONFIG = {"dense_below_tokens": "auto", "layers": {"2-3": TRIANGLE}}
TOPK = {"name": "block_topk", "top_k": 1, "block_tokens": 64, "force_sink": False}


def test_a_config_runs_from_its_crossover_on(tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = facts(tiny_llama)
    path = own(tmp_path, monkeypatch, row(fingerprint(sparsekit.load(CONFIG).resolve(known), known), False, True))
    plain = logits(tiny_llama, ids(tokens=199))
    with sparsekit.apply(tiny_llama, CONFIG) as handle:
        assert handle.config == sparsekit.load(CONFIG) and handle.resolved.config.dense_below_tokens == 200
        assert torch.equal(logits(tiny_llama, ids(tokens=199)), plain)
        assert handle.report().layers[3].why == "199 tokens, fewer than dense_below_tokens 200"
        logits(tiny_llama, ids(tokens=200))
        report = handle.report()
        assert report.layers[3].ran == "sparse"
        assert "dense_below_tokens auto is 200 (measured on cpu" in str(report) and str(path) in str(report)
    with sparsekit.apply(tiny_llama, {**CONFIG, "dense_below_tokens": 200}) as handle:
        assert handle.report().settled == ()


def test_a_config_without_a_row_is_not_applied(tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch, row(TOPK, True))
    with pytest.raises(
        SparsekitError, match=r"'auto': no table has this config on cpu .* size 16, float32; `sparsekit"
    ):
        sparsekit.apply(tiny_llama, CONFIG)
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_a_pattern_without_a_row_has_its_default(tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTopK, "pays_from_tokens", {"cpu": 150})
    config = {"layers": {"1": {**TOPK, "dense_below_tokens": "auto"}}}
    own(tmp_path, monkeypatch)
    for rows, least in (((), 150), ((row(TOPK, True, True),), 100)):
        own(tmp_path, monkeypatch, *rows)
        with sparsekit.apply(tiny_llama, config) as handle:
            for tokens, density in ((least - 1, 1.0), (least + 92, None)):
                logits(tiny_llama, ids(tokens=tokens))
                found = handle.report().layers[1].density
                assert found is not None and (found == density if density else found < 1)
            assert f"layers 1: block_topk: dense_below_tokens auto is {least}" in str(handle.report())


def test_what_a_check_gives_back_keeps_the_number(tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config with layers given back is another one, of which no table has a row."""
    known, config = facts(tiny_llama), {**CONFIG, "budget": {"kl": 1e-9}, "default": TRIANGLE, "layers": {"0": "dense"}}
    own(tmp_path, monkeypatch, row(fingerprint(sparsekit.load(config).resolve(known), known), True, True))
    report = sparsekit.check(tiny_llama, config, [ids(tokens=300)[0].tolist()], next_tokens=2)
    assert report.given_back and report.config.dense_below_tokens == 100
    assert sum("dense_below_tokens auto is 100 (measured on" in line for line in report.lines()) == 1
    plain = {key: value for key, value in config.items() if key != "dense_below_tokens"}
    report = sparsekit.check(tiny_llama, plain, [ids(tokens=300)[0].tolist()], next_tokens=2)
    assert "dense_below_tokens" not in report.config.to_dict()
