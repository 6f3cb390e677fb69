"""`dense_below_tokens: auto` of a config: by its own row, or an error that names the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crossovers import HERE, own, row
from typer.testing import CliRunner

from sparsekit import SparsekitError, explain, load
from sparsekit.cli import app
from sparsekit.config import ModelFacts, SparseConfig
from sparsekit.config.settle import Machine, fingerprint, settle
from sparsekit.patterns import BlockTopK

FACTS = ModelFacts(num_layers=4, num_heads=4, num_key_heads=2, head_dim=16)
TOPK = {"name": "block_topk", "top_k": 1, "block_tokens": 64}
CONFIG: dict[str, Any] = {"dense_below_tokens": "auto", "layers": {"2-3": "triangle"}}


def on(config: Any, machine: Machine = Machine.of(torch.device("cpu"), torch.float32), **how: Any) -> SparseConfig:  # noqa: B008
    return settle(load(config).resolve(FACTS), FACTS, lambda: machine, **how).config


def key(config: Any, facts: ModelFacts = FACTS) -> str:
    return fingerprint(load(config).resolve(facts), facts)


def test_a_config_is_known_by_what_its_layers_run() -> None:
    same: list[dict[str, Any]] = [
        {"layers": {"2": "triangle", "3": "triangle"}},
        {"default": "triangle", "layers": {"0-1": "dense"}},
        {**CONFIG, "dense_below_tokens": 7, "min_queries": 99, "model": {"name": "x"}, "provenance": {"by": "me"}},
        {"layers": {"2-3": {"name": "triangle", "window_tokens": 512}}},
    ]
    assert {key(CONFIG)} == {key(one) for one in same}
    topk = {"layers": {"2-3": TOPK}}
    others: list[dict[str, Any]] = [
        {"layers": {"1-2": "triangle"}}, {"layers": {"2-3": {"name": "triangle", "window_tokens": 511}}},
        {**CONFIG, "dense_impl": "kernel"}, {**CONFIG, "heads": {"2": {"0": "dense"}}}, topk,
        {"layers": {"2-3": {**TOPK, "dense_below_tokens": 0}}}, {"layers": {"2": TOPK, "3": {"reuse": 2}}},
    ]  # fmt: skip
    assert len({key(one) for one in [CONFIG, *others]}) == len(others) + 1
    slides = FACTS.model_copy(update={"layer_types": ("full_attention", "x") * 2})
    assert key({"default": "triangle"}) != key({"default": "triangle"}, slides)
    kinds = ("full_attention", "sliding_attention") * 2
    slides = FACTS.model_copy(update={"layer_types": kinds, "sliding_window": 32})
    window = {"layers": {"1,3": {"name": "a_shape", "sink_tokens": 0, "window_tokens": 32}}}
    assert key(window) != key(window, slides)  # left out where the model has it, else counted beside full attention


def test_a_row_of_the_config_makes_it_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own(tmp_path, monkeypatch, row(key(CONFIG), False, True))
    given = load(CONFIG).resolve(FACTS)
    found = settle(given, FACTS, lambda: Machine.of(torch.device("cpu"), torch.float32))
    assert found.config.dense_below_tokens == 200 and given.config.dense_below_tokens == "auto"
    [said] = found.settled
    assert said.startswith("dense_below_tokens auto is 200 (measured on cpu") and said.endswith(f"in {path})")
    assert found.config.why_dense(100, 199) and not found.config.why_dense(100, 200)


def test_without_a_row_it_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch)
    monkeypatch.setattr("sparsekit.patterns.crossover.SHIPPED", tmp_path / "own.jsonl")
    match = (
        r"^dense_below_tokens = 'auto': no table has this config on cpu \(.*\), 4 heads over 2 of size 16, float32; "
        r"`sparsekit bench crossover CONFIG.yaml --model MODEL --dtype float32` measures it, or write a number "
        r"\(no table has a row of a config\)\.$"
    )
    with pytest.raises(SparsekitError, match=match):
        on(CONFIG)
    there = HERE._replace(device="NVIDIA H200")
    own(tmp_path, monkeypatch, row(key(CONFIG), True, place=there), row("0123456789abcdef", True, label="other.yaml"))
    with pytest.raises(SparsekitError, match=r"\(rows there are: of this config: NVIDIA H200, 4 heads over 2 of"):
        on(CONFIG)
    with pytest.raises(SparsekitError, match=r"rows there are: it on NVIDIA H200, .*; other.yaml on cpu"):
        on({**CONFIG, "layers": {"1": "triangle"}})
    assert on(CONFIG, strict=False).dense_below_tokens == 0
    with pytest.raises(SparsekitError, match="2 processes share the heads of each"):
        on(CONFIG, Machine(there.device, "float32", 2))
    with pytest.raises(SparsekitError, match=r"= 'auto' is no number yet; sparsekit.apply makes it one"):
        load(CONFIG).resolve(FACTS).config.why_dense(100, 100)


def test_patterns_are_settled_by_their_layers_head_shape_and_before_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"dense_below_tokens": "auto", "layers": {"0,3": {**TOPK, "dense_below_tokens": "auto"}}}
    as_settled = {"layers": {"0,3": {**TOPK, "dense_below_tokens": 200}}}
    own(tmp_path, monkeypatch, row(TOPK, False, True), row(key(as_settled), False, False, True))
    found = settle(load(config).resolve(FACTS), FACTS, lambda: Machine.of(torch.device("cpu"), torch.float32))
    assert found.config.dense_below_tokens == 300
    assert [str(layer) for layer in found.layers] == [str(layer) for layer in load(as_settled).resolve(FACTS).layers]
    of_layers, of_config = found.settled
    assert of_layers.startswith("layers 0,3: block_topk: dense_below_tokens auto is 200 (measured on")
    assert of_config.startswith("dense_below_tokens auto is 300 (measured on")
    half = HERE._replace(heads=2, key_heads=1)  # what one of two processes has of a layer
    own(tmp_path, monkeypatch, row(TOPK, True), row(TOPK, False, False, False, True, place=half))
    pattern = load({"default": {**TOPK, "dense_below_tokens": "auto"}}).resolve(FACTS)
    shared = settle(pattern, FACTS, lambda: Machine(HERE.device, "float32", 2))
    assert shared.layers[0].patterns[0].dense_below_tokens == 400  # type: ignore[attr-defined]


def test_a_config_without_auto_asks_no_device() -> None:
    resolved = load({"dense_below_tokens": 5, "default": TOPK}).resolve(FACTS)
    assert settle(resolved, FACTS, lambda: pytest.fail("asked")) is resolved


def test_explain_says_what_it_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = HERE._replace(device="NVIDIA H200", dtype="bfloat16")
    monkeypatch.setattr("sparsekit.config.costs._machine", lambda: Machine("NVIDIA H200", "bfloat16"))
    config = {**CONFIG, "model": FACTS.model_dump(exclude_none=True)}
    own(tmp_path, monkeypatch, row(key(CONFIG), False, False, True, place=here))
    short, long = explain(config, 299), explain(config, 300)
    assert short.layers[2].why == "299 tokens, fewer than dense_below_tokens 300" and short.layers[2].runs == "dense"
    assert long.layers[2].runs == "sparse"
    assert "dense_below_tokens auto is 300 (measured on NVIDIA H200" in str(long) and long.to_dict()["settled"]
    path = tmp_path / "c.yaml"
    path.write_text(load(config).dump())
    ran = CliRunner().invoke(app, ["explain", str(path), "--tokens", "299", "--json"])
    assert json.loads(ran.stdout)[2]["runs"] == "dense" and ran.stderr.startswith("dense_below_tokens auto is 300 (")
    monkeypatch.setattr("sparsekit.config.costs._machine", lambda: Machine("", "bfloat16"))
    unknown = explain(config, 299)
    assert unknown.layers[2].runs == "sparse"
    assert "not known here, and counted as 0: no table has this config on an unknown device" in str(unknown)
    assert "of this config: NVIDIA H200" in str(unknown)
    monkeypatch.setattr(BlockTopK, "pays_from_tokens", {"cuda": 900})
    topk = {"model": {"num_layers": 4, "num_heads": 4}, "default": {**TOPK, "dense_below_tokens": "auto"}}
    assert explain(topk, 899).layers[0].runs == "dense"
    assert "auto is 900, the pattern's default (no table has it on an unknown device, 4 heads over ?" in str(
        explain(topk, 900)
    )
