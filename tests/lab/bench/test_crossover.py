"""bench crossover: real times on a CPU, what follows from times, and the table that `auto` then reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from crossovers import HERE
from fp8_row import runs_here
from tiny import ids, logits
from typer.testing import CliRunner

import sparsekit
from sparsekit import SparsekitError, load
from sparsekit.call.softmax import Softmax
from sparsekit.cli import app
from sparsekit.config import LayerPatterns, ModelFacts
from sparsekit.kernels import geometry_for
from sparsekit.lab.bench import bench_crossover, crossover
from sparsekit.lab.bench.crossover_layers import Kind, Layers, attends, dense_calls, layers_of
from sparsekit.lab.bench.inputs import structured
from sparsekit.models import tiny
from sparsekit.patterns import BlockTopK, parse_pattern
from sparsekit.patterns.crossover import ENV, read_table

TRIANGLE = {"name": "triangle", "sink_tokens": 8, "window_tokens": 32, "last_tokens": 16}
TOPK = {"name": "block_topk", "top_k": 1, "block_tokens": 64, "force_sink": False}
FACTS = ModelFacts(num_layers=4, num_heads=4, num_key_heads=2, head_dim=16)


def _config(**fields: Any) -> sparsekit.SparseConfig:
    return load({"model": FACTS.model_dump(exclude_none=True), **fields})


def test_what_is_measured_is_what_auto_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model whose shape was measured, in the dtype and on the device."""
    monkeypatch.setenv(ENV, str(tmp_path / "own.jsonl"))
    given = {"patterns": [TRIANGLE, TOPK], "shape": "tiny", "lengths": [512, 2048], "device": "cpu", "repeat_ms": 20}
    config = load({"dense_below_tokens": "auto", "default": TRIANGLE, "layers": {"0": "dense", "3": TOPK}})
    rows = bench_crossover([config], out=tmp_path / "rows.jsonl", **given)  # type: ignore[arg-type]
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert Counter(row["case"] for row in rows) == {"correctness": 2, "dense": 4, "layer": 6, "crossover": 3}
    for row in rows:
        if row["case"] == "layer":
            assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["times_dense"] > 0
    triangle, topk, whole = read_table(tmp_path / "own.jsonl")
    assert triangle.place == HERE and [one.tokens for one in triangle.measured] == [512, 2048]
    assert (triangle.label, topk.label, whole.label) == (
        "triangle, sink_tokens 8, window_tokens 32, last_tokens 16",
        "block_topk, top_k 1, block_tokens 64, force_sink False",
        "config 0",
    )
    model = tiny("llama")
    with sparsekit.apply(model, config) as handle:
        least = handle.resolved.config.dense_below_tokens
        assert isinstance(least, int) and least == (whole.faster_from_tokens or least)
        logits(model, ids(tokens=400))
        assert handle.report().layers[1].why == f"400 tokens, fewer than dense_below_tokens {least}"
        assert str(tmp_path / "own.jsonl") in str(handle.report())
    auto = {"layers": {"3": {**TOPK, "dense_below_tokens": "auto"}}}
    with sparsekit.apply(model, auto) as handle:
        assert "no table has it" not in str(handle.report())


def test_rows_of_the_same_are_replaced_and_others_stay(tmp_path: Path) -> None:
    given: dict[str, Any] = {"heads": 2, "key_heads": 1, "dim": 16, "device": "cpu", "repeat_ms": 1}
    given["table"] = path = tmp_path / "folder" / "table.jsonl"
    bench_crossover(patterns=["triangle", "a_shape"], lengths=[128], **given)
    bench_crossover(patterns=["a_shape"], lengths=[192, 160], **given)
    bench_crossover(patterns=["a_shape"], lengths=[64], dtype="float16", **given)
    assert [(row.label, row.dtype, [one.tokens for one in row.measured]) for row in read_table(path)] == [
        ("triangle", "float32", [128]), ("a_shape", "float32", [160, 192]), ("a_shape", "float16", [64]),
    ]  # fmt: skip
    path.write_text("{}\n")
    with pytest.raises(SparsekitError, match="line 1: device is missing"):
        bench_crossover(patterns=["a_shape"], lengths=[64], **given)
    assert path.read_text() == "{}\n"


def test_a_label_is_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\u2028b.yaml"
    path.write_text(_config(default=TRIANGLE).dump())
    table = tmp_path / "table.jsonl"
    bench_crossover([str(path)], lengths=[64], device="cpu", repeat_ms=1, table=table)
    assert [row.label for row in read_table(table)] == [str(path)]


def test_rows_that_others_wrote_meanwhile_stay(tmp_path: Path) -> None:
    given: dict[str, Any] = {"heads": 2, "key_heads": 1, "dim": 16, "device": "cpu", "repeat_ms": 1, "lengths": [64]}
    given["table"] = path = tmp_path / "table.jsonl"
    other: list[Any] = [lambda: bench_crossover(patterns=["triangle"], **given)]
    bench_crossover(patterns=["a_shape"], show=lambda line: other and other.pop()(), **given)
    assert [row.label for row in read_table(path)] == ["triangle", "a_shape"]


def test_a_length_that_does_not_fit_is_said_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_memory(tokens: int, **given: Any) -> Any:
        if tokens > 64:
            raise RuntimeError("can't allocate memory\nby much")
        return structured(tokens, **given)

    monkeypatch.setattr(crossover, "structured", of_memory)
    given: dict[str, Any] = {"heads": 2, "key_heads": 1, "dim": 16, "device": "cpu", "repeat_ms": 1}
    given["table"] = path = tmp_path / "table.jsonl"
    rows = bench_crossover(patterns=["triangle"], lengths=[64, 128], **given)
    [failed] = [row for row in rows if row["case"] == "failed"]
    assert (failed["label"], failed["tokens"]) == ("dense attention", 128)
    assert failed["why"] == "128 tokens: can't allocate memory"
    assert [[one.tokens for one in row.measured] for row in read_table(path)] == [[64]]


def test_a_table_that_cannot_be_written_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "t.jsonl", tmp_path, Path("/proc/nowhere/t.jsonl")):
        with pytest.raises(SparsekitError, match=r"^crossover table .* (cannot be written|is a folder)"):
            bench_crossover(patterns=["a_shape"], lengths=[64], device="cpu", table=path, show=pytest.fail)


TIMES = {
    ("dense", "sdpa"): {"ms": 10.0, "ms_p20": 9.0, "ms_p80": 11.0},
    ("dense", "ours"): {"ms": 12.0, "ms_p20": 11.0, "ms_p80": 13.0},
}


def _compared(layers: Layers, key: dict[str, Any], **times: Any) -> tuple[float, bool]:
    one = crossover._Subject("it", key, layers, (4, 2, 16))
    dense = {name: ms for (_, name), ms in TIMES.items()}
    found = crossover._compared(one, 100, "sdpa", dense, {**TIMES, **times["times"]})
    assert (found.tokens, found.dense) == (100, "sdpa")
    return found.times_dense, found.faster


def test_faster_is_by_more_than_both_spread() -> None:
    kind = Kind(LayerPatterns(0, (parse_pattern("triangle"),), (0,) * 4))
    alone = Layers(Counter([kind]))
    for high, faster in ((8.9, True), (9.0, False), (9.5, False)):
        times = {("layer", kind): {"ms": 8.0, "ms_p20": 7.0, "ms_p80": high}, ("first", kind): {"ms": 99, "ms_p80": 99}}
        assert _compared(alone, {"pattern": {}}, times=times) == (1.25, faster)


def test_a_config_is_the_sum_of_its_layers_and_of_what_its_plans_cost_once() -> None:
    a, b = (Kind(LayerPatterns(0, (parse_pattern(name),), (0,) * 4)) for name in ("triangle", "a_shape"))
    times = {
        ("layer", a): {"ms": 5.0, "ms_p20": 4.0, "ms_p80": 6.0}, ("first", a): {"ms": 8.0, "ms_p80": 9.0},
        ("layer", b): {"ms": 2.0, "ms_p20": 2.0, "ms_p80": 3.0}, ("first", b): {"ms": 1.0, "ms_p80": 1.5},
    }  # fmt: skip
    layers = Layers(Counter({a: 3, b: 1}), own=4)
    ratio, faster = _compared(layers, {"config": "x"}, times=times)
    assert ratio == round(8 * 10 / (3 * 5 + 3 + 2 + 4 * 10), 4)
    assert faster  # 3 * 6 + 4 + 3 = 25, against 4 * 9
    dear = {**times, ("first", a): {"ms": 8.0, "ms_p80": 5.0 + 36 - 21}}
    assert _compared(layers, {"config": "x"}, times=dear)[1] is False
    ratio, faster = _compared(Layers(Counter({b: 1}), kernel=1), {"config": "x"}, times=times)
    assert ratio == round(2 * 10 / (2 + 12), 4) and faster  # 3 + 13 against 2 * 9
    assert _compared(Layers(Counter(), own=4), {"config": "x"}, times=times) == (1.0, False)  # nothing is faster


def test_the_layers_of_a_config() -> None:
    rules = {"0": "dense", "1,2": TRIANGLE, "3-4": TOPK, "5-6": {"reuse": 4}, "7": "dense"}
    facts = FACTS.model_copy(update={"num_layers": 10, "layer_types": ("full_attention",) * 8 + ("mamba",) * 2})
    found = layers_of(load({"layers": rules}).resolve(facts), facts)
    assert (found.own, found.kernel, found.count) == (2, 0, 8)
    assert sorted(found.sparse.values()) == [2, 2, 2] and sum(kind.anchor is not None for kind in found.sparse) == 1
    kernel = layers_of(load({"layers": rules, "dense_impl": "kernel"}).resolve(facts), facts)
    assert (kernel.own, kernel.kernel) == (0, 2)


def test_layers_in_fp8_are_timed_as_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**FACTS.model_dump(exclude_none=True), "head_dim": 128}
    layers = {"2": TRIANGLE, "3": {**TOPK, "block_tokens": 128}}
    rules = {"model": facts, "layers": layers, "dense_impl": "kernel"}
    config = load({**rules, "precision": {"0,2-3": "fp8"}})
    found = layers_of(config.resolve(), config.model)
    assert (found.own, found.kernel, found.count, len(found.sparse)) == (0, 1, 4, 3)

    def bench() -> list[dict[str, Any]]:
        table = tmp_path / "own.jsonl"
        return bench_crossover([config], lengths=[300], device="cpu", repeat_ms=1, table=table, out=tmp_path / "x")

    [failed] = [row for row in bench() if row["case"] == "failed"]
    assert "impl='fp8' cannot run on cpu: hopper_fp8: it is" in failed["why"]
    plans = runs_here(monkeypatch)
    rows = bench()
    assert [row["case"] for row in rows].count("crossover") == 1
    said = [row["layer"] for row in rows if row["case"] == "layer"]
    assert len(said) == 3 and all(layer.endswith(" in fp8") for layer in said)
    assert {(plan.block_q, plan.block_kv) for plan in plans} == {(128, 128)}


def test_a_timed_layer_computes_what_the_pattern_does() -> None:
    x = structured(400, heads=4, key_heads=2, dim=16)
    for call in dense_calls(x).values():
        torch.testing.assert_close(call(), sparsekit.attention(x.q, x.k, x.v, "dense").transpose(1, 2))
    facts = FACTS.model_copy(update={"num_layers": 2})
    layers = layers_of(load({"layers": {"0": TOPK, "1": {"reuse": 0}}}).resolve(facts), facts)
    made, reused = sorted(layers.sparse, key=lambda kind: kind.anchor is not None)
    expected = sparsekit.attention(x.q, x.k, x.v, TOPK).transpose(1, 2)
    call = attends(reused, x)
    for _ in range(2):  # the plan stays
        torch.testing.assert_close(call(), expected)
    torch.testing.assert_close(attends(made, x)(), expected)
    plan = parse_pattern(TOPK).plan(x.q, x.k, geometry_for(x.q, x.k), Softmax(0.25))
    assert plan.density() < 1


def test_a_pattern_that_is_wrong_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def select(self: BlockTopK, *_: Any) -> Any:
        raise SparsekitError("no plan today")

    monkeypatch.setattr(BlockTopK, "select", select)
    path = tmp_path / "good.yaml"
    path.write_text(_config(default=TRIANGLE).dump())
    bad = tmp_path / "bad.yaml"
    bad.write_text(_config(default=TRIANGLE, layers={"0": TOPK}).dump())
    options = ["--tokens", "128", "--device", "cpu", "--repeat-ms", "1", "-o", str(tmp_path / "t.jsonl")]
    result = CliRunner().invoke(app, ["bench", "crossover", str(bad), str(path), "--patterns", "block_topk", *options])
    assert result.exit_code == 1 and "failed: block_topk: no plan today" in result.stdout
    [row] = read_table(tmp_path / "t.jsonl")
    assert row.label == str(path) and f"{path}: faster " in result.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"shape": "llama-3.1-8"}, r"shape 'llama-3.1-8' is not one of .*Did you mean 'llama-3.1-8b'"),
        ({"shape": "tiny", "model": "smollm2-135m"}, "one of them"),
        ({"lengths": []}, "at least one prompt length"), ({"lengths": [64, 64]}, "each once"),
        ({"lengths": [2**29 + 1]}, "a prompt has at most 536,870,912 tokens"),
        ({"repeat_ms": 0}, "repeat_ms=0"), ({"repeat_ms": float("inf")}, "repeat_ms=inf"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"seed": 2**64, "heads": 2, "key_heads": 1, "dim": 16, "patterns": ["triangle"]}, "seed=18446744073709551616"),
        ({"patterns": ["dense"]}, "dense is what the others are measured against"),
        ({"patterns": ["triangel"]}, "unknown pattern 'triangel'"), ({"patterns": []}, "patterns: at least one"),
        ({"configs": [{"default": "triangle"}]}, "num_layers and num_heads are needed"),
        ({"configs": [{"default": "triangle", "model": {"num_layers": 2, "num_heads": 2}}]}, "num_key_heads of the"),
        ({"configs": [{"model": {"num_heads": 9}}], "shape": "tiny"}, r"config 0: model.num_heads: this config is for"),
        ({"heads": 0}, "heads=0: it should be from 1 to 1,024"), ({"dim": 10**9}, "dim=1000000000: it should be"),
        ({"heads": 3, "key_heads": 2}, "heads=3, key_heads=2: heads are a multiple"),
        ({"configs": [{"default": "triangle"}], "heads": 4}, "heads, key_heads and dim are of patterns"),
    ],
)  # fmt: skip
def test_what_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    given["configs"] = [load(one) for one in given.get("configs", ())]
    with pytest.raises(SparsekitError, match=said):
        bench_crossover(**{"device": "cpu", "table": tmp_path / "t.jsonl", "lengths": [64], **given})
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.gpu
def test_on_a_gpu_a_row_is_of_its_name(tmp_path: Path) -> None:
    facts = {**FACTS.model_dump(exclude_none=True), "head_dim": 64}
    config = _config(model=facts, default="triangle", layers={"0": TOPK})
    given: dict[str, Any] = {"lengths": [8192, 1024], "repeat_ms": 30, "table": tmp_path / "t.jsonl"}
    rows = bench_crossover([config], patterns=["triangle", TOPK], **given)
    found = read_table(tmp_path / "t.jsonl")
    assert [row.device for row in found] == [torch.cuda.get_device_name()] * 3
    assert {row.dtype for row in found} == {"bfloat16"} and all(len(row.measured) == 2 for row in found)
    impls = {row["impl"] for row in rows if row["case"] == "dense"}
    assert "sdpa" in impls and impls & {"hopper", "triton"}
