"""bench prefill: every config against the model as it is, in one run."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsekit import SparsekitError
from sparsekit.call.softmax import Softmax
from sparsekit.cli import app
from sparsekit.config import load
from sparsekit.kernels import geometry_for
from sparsekit.lab.bench import bench_prefill, prefill
from sparsekit.lab.bench.inputs import structured
from sparsekit.models import tiny
from sparsekit.patch import apply
from sparsekit.patterns import parse_pattern

TRIANGLE = """
version: 1
dense_below_tokens: 0
layers:
  "2-3": {name: triangle, sink_tokens: 8, window_tokens: 32, last_tokens: 16}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "triangle.yaml"
    path.write_text(TRIANGLE)
    return str(path)


def test_rows_and_file(config: str, tmp_path: Path) -> None:
    lines: list[str] = []
    model = tiny("llama")
    rows = bench_prefill(
        [config], model=model, lengths=[300, 1200], device="cpu", out=str(tmp_path / "rows.jsonl"), show=lines.append
    )
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["tokens"], row["config"]) for row in rows] == [
        (300, "untouched"), (300, config), (1200, "untouched"), (1200, config)
    ]  # fmt: skip
    stock, ours = rows[2:]
    assert stock["sparse_layers"] == 0 and ours["sparse_layers"] == 2
    assert "plan_ms" not in stock and 0 < ours["plan_ms"] < ours["ms"]
    assert stock["tile_density"] == 1 and 0.5 < ours["tile_density"] < 0.9
    assert not any(key == "density" for row in rows for key in row)  # which is a share of pairs elsewhere
    assert ours["faster"] == pytest.approx(stock["ms"] / ours["ms"], rel=1e-3)
    assert len(lines) == 4 and config in lines[1] and "tile density" in lines[1]
    assert model.config._attn_implementation == "sdpa"


def test_what_is_read_before_the_untouched_model_is_timed(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole prompt, for which cuDNN's attention compiles anew; of one that takes minutes its beginning."""
    monkeypatch.setattr(prefill, "WHOLE_TOKENS", 600)
    monkeypatch.setattr(prefill, "WARM_TOKENS", 200)
    read: list[tuple[str, int, int]] = []
    own = prefill.read_at_once

    def kept(model: Any, prompt: Any, handle: Any, given: Any) -> Any:
        read.append(("config" if handle else "untouched", prompt.shape[1], given[0].shape[2]))
        return own(model, prompt, handle, given)

    monkeypatch.setattr(prefill, "read_at_once", kept)
    bench_prefill([config], model=tiny("llama"), lengths=[600, 601], rounds=1, attends="structured", device="cpu")
    assert read == [
        (who, tokens, tokens) for whole, warm in ((600, 600), (601, 200)) for who, tokens in
        (("config", whole), ("untouched", warm), ("untouched", whole), ("config", whole))
    ]  # fmt: skip


def test_layers_that_kept_every_pair_are_not_counted_as_sparse() -> None:
    wide = load({"default": {"name": "triangle", "window_tokens": 4096}})
    [_, row] = bench_prefill([wide], model=tiny("llama"), lengths=[300], rounds=1, device="cpu")
    assert (row["sparse_layers"], row["tile_density"]) == (0, 1.0)


def test_layers_with_a_window_of_their_own_have_no_density() -> None:
    config = load({"dense_below_tokens": 0, "default": {"name": "triangle", "window_tokens": 32, "last_tokens": 16}})
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny("gemma3_text", layer_types=kinds, sliding_window=64)
    with apply(model, config) as handle, torch.inference_mode():
        model(torch.full((1, 400), 5), use_cache=True)
        told = [layer.tile_density for layer in handle.report().layers if layer.tile_density is not None]
    [_, row] = bench_prefill([config], model=model, lengths=[400], rounds=1, device="cpu")
    assert len(told) == row["sparse_layers"] == 2
    assert row["tile_density"] == pytest.approx(sum(told) / 2, abs=1e-4) and row["tile_density"] < 1
    windows = tiny("mistral", sliding_window=32)
    [_, row] = bench_prefill([config], model=windows, lengths=[400], rounds=1, device="cpu")
    assert (row["tile_density"], row["sparse_layers"]) == (1, 0)


def test_structured_inputs_take_the_place_of_what_random_weights_attend_to() -> None:
    """The pattern sees them, in every sparse layer, and the model is itself again afterwards."""
    model = tiny("llama")
    pattern = {"name": "xattention", "threshold": 0.9, "stride": 4, "dense_below_tokens": 0}
    given = {"model": model, "lengths": [1200], "rounds": 1, "device": "cpu"}
    before = model(torch.full((1, 8), 5)).logits
    [_, flat] = bench_prefill([load({"default": pattern})], **given)
    [stock, row] = bench_prefill([load({"default": pattern})], attends="structured", **given)
    assert (flat["attends"], stock["attends"], row["attends"]) == ("weights", "structured", "structured")
    made = structured(1200, heads=4, key_heads=2, dim=16)
    plan = parse_pattern(pattern).plan(made.q, made.k, geometry_for(made.q, made.k), Softmax(scale=0.25))
    assert row["tile_density"] == pytest.approx(plan.tile_density(), abs=1e-4)
    assert row["tile_density"] < 0.9 * flat["tile_density"] and row["sparse_layers"] == 4
    assert torch.equal(model(torch.full((1, 8), 5)).logits, before)
    with pytest.raises(SparsekitError, match="'structure' is not"):
        bench_prefill([load({"default": pattern})], attends="structure", **given)


def test_command(config: str) -> None:
    result = CliRunner().invoke(
        app, ["bench", "prefill", config, "--shape", "tiny", "--tokens", "200", "--rounds", "1"]
    )
    assert result.exit_code == 0, result.output
    assert "untouched" in result.output and config in result.output


def test_faults(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SparsekitError, match=r"triangle\.yaml stands twice"):
        bench_prefill([config, config], model=tiny("llama"), lengths=[300], device="cpu")
    with pytest.raises(SparsekitError, match=r"llama-3\.1-8b"):
        bench_prefill([config], shape="llama-3.1-8", device="cpu")
    assert CliRunner().invoke(app, ["bench", "prefill", "nowhere.yaml", "--shape", "tiny"]).exit_code == 1


# ---- fused layers


@pytest.mark.parametrize(
    ("model", "device", "message"),
    [
        (None, "cuda", "needs Liger-Kernel: pip install liger-kernel"),
        (None, "cpu", "on cpu: Liger-Kernel runs on a GPU"),
        ("loaded", "cuda", "give its name, or fuse your own before"),
    ],
)
def test_fused_layers_that_cannot_be(
    model: str | None, device: str, message: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("sparsekit.lab.bench.prefill.version", missing)
    with pytest.raises(SparsekitError, match=message):
        bench_prefill([config], model=model and tiny("llama"), lengths=[300], fused=True, device=device)


def test_fused_layers_are_named_in_every_row(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which has no layers of a CPU."""
    fused: list[str] = []
    types = ModuleType("liger_kernel.transformers.monkey_patch")
    types.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, types.__name__, types)
    monkeypatch.setattr("sparsekit.lab.bench.prefill._liger", lambda model, device: "0.8.5")
    monkeypatch.setattr(
        "transformers.integrations.liger.apply_liger_kernel", lambda model, given: fused.append(model.config.model_type)
    )
    monkeypatch.setattr("sparsekit.lab.bench.prefill.model_or_shape", lambda *given: ("tiny", tiny("llama")))
    rows = bench_prefill([config], shape="llama-3.2-1b", lengths=[300], rounds=1, fused=True, device="cpu")
    assert fused == ["llama"] and [row["layers"] for row in rows] == ["liger-kernel 0.8.5"] * 2
    types.MODEL_TYPE_TO_APPLY_LIGER_FN = {}  # type: ignore[attr-defined]
    with pytest.raises(SparsekitError, match="no layers of llama"):
        bench_prefill([config], shape="llama-3.2-1b", lengths=[300], rounds=1, fused=True, device="cpu")


@pytest.mark.gpu
def test_sparse_layers_among_fused_ones_are_those_among_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed; no layer was fused")
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.llama import modeling_llama

    for name, value in list(vars(modeling_llama).items()):  # it replaces classes and functions there
        monkeypatch.setattr(modeling_llama, name, value)
    model, ids = tiny("llama", head_dim=64).cuda(), torch.randint(3, 250, (1, 700)).cuda()
    with torch.inference_mode(), apply(model, load(TRIANGLE)) as handle:
        expected = model(ids).logits
        apply_liger_kernel(model, None)
        got = model(ids).logits
        assert [row.ran for row in handle.report().layers] == ["dense"] * 2 + ["sparse"] * 2
    assert float((got - expected).abs().max()) < 1e-3
