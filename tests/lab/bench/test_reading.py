"""bench prefill --chunk-tokens: a prompt in chunks is the prompt, and its row says what all chunks took."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.cli import app
from sparsekit.config import SparseConfig, load
from sparsekit.kernels.select.grid import block_grid, slash_grid
from sparsekit.lab.bench import bench_prefill, reading
from sparsekit.lab.bench.inputs import structured
from sparsekit.lab.bench.shapes import SHAPES
from sparsekit.models import facts as model_facts
from sparsekit.models import tiny
from sparsekit.patch import LayerReport, apply
from sparsekit.patch.state import Call
from sparsekit.patterns import Triangle, VerticalSlash, parse_pattern, static_plan

N, CHUNK = 1100, 256
BLOCKS = {"name": "block_topk", "top_k": 3, "dense_below_tokens": 0}


def config_of(kernel: bool = True, below: Any = "dense") -> SparseConfig:
    """Two layers of `below`, two of triangle."""
    triangle = {"name": "triangle", "sink_tokens": 8, "window_tokens": 32, "last_tokens": 16}
    impl = "kernel" if kernel else "model"
    return load({"dense_below_tokens": 0, "dense_impl": impl, "layers": {"0-1": below, "2-3": triangle}})


def test_the_row_is_of_all_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    """Triangle's last rows are the prompt's alone, so that what is visited is that of the prompt at once."""
    model = tiny("llama")
    lines: list[str] = []
    [whole] = bench_prefill([config_of()], model=model, lengths=[N], rounds=1, baseline=False, device="cpu")
    stock, row = bench_prefill(
        [config_of()], model=model, lengths=[N], rounds=1, chunk_tokens=CHUNK, device="cpu", show=lines.append
    )
    assert row["tile_density"] == pytest.approx(whole["tile_density"], abs=2e-4) and row["tile_density"] < 0.8
    assert row["sparse_layers"] == whole["sparse_layers"] == 2
    assert stock["cache_bytes"] == row["cache_bytes"] == 4 * 2 * N * 2 * 16 * 4  # layers, k and v, key heads, float32
    assert (stock["chunk_tokens"], row["chunk_tokens"]) == (CHUNK, CHUNK)
    assert 0 < row["plan_bytes"] < 4096 and "plan_bytes" not in stock
    assert "chunk_tokens" not in whole and "cache_bytes" not in whole
    assert len(lines) == 2 and "tile density" in lines[1]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 * 5 and said[-1].startswith("config 0: 1,100 of 1,100 tokens, the last chunk in ")


def test_a_last_chunk_of_one_token_is_decoded_dense() -> None:
    """The handle then still tells of the chunk before, which is not to be counted again."""
    model, told = tiny("llama"), list[LayerReport]()
    with torch.inference_mode(), apply(model, config_of()) as handle:
        _, row = reading.read_in_chunks(
            model, torch.full((1, 513), 5), CHUNK, handle, None, lambda end, ms: told.extend(handle.report().layers)
        )
    assert told[4:8] == told[8:]
    assert row["plan_ms"] == pytest.approx(sum(layer.plan_ms or 0 for layer in told[:8]), abs=1e-4)
    first, second = (sum(layer.tile_density or 0 for layer in told[at : at + 4]) / 4 for at in (0, 4))
    assert row["tile_density"] == pytest.approx((6 * first + 14 * second + 9) / 29, abs=1e-4)  # of 128 x 64 tiles


def test_without_the_untouched_model_nothing_is_faster() -> None:
    given: dict[str, Any] = {"model": tiny("llama"), "lengths": [300], "rounds": 1, "device": "cpu"}
    [row] = bench_prefill([config_of()], baseline=False, **given)
    assert row["config"] == "config 0" and "faster" not in row and row["ms"] > 0


def test_the_cache_is_that_of_the_prompt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), torch.randint(3, 250, (1, N), generator=torch.Generator().manual_seed(0))
    cache = reading.static_cache(model, N)
    monkeypatch.setattr(reading, "static_cache", lambda *given: cache)
    places: list[int] = []
    with torch.inference_mode(), apply(model, config_of()) as handle:
        expected = model(ids, use_cache=True).past_key_values
        reading.read_in_chunks(model, ids, CHUNK, handle, None, lambda end, ms: places.append(end))
    assert places == [256, 512, 768, 1024, 1100]
    for layer, whole in zip(cache.layers, expected.layers, strict=True):
        assert torch.allclose(layer.keys, whole.keys, atol=1e-5)
        assert torch.allclose(layer.values, whole.values, atol=1e-5)


def test_one_cache_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a million tokens two of them, that of warming up and that of the reading, fit no GPU."""
    make, made = reading.static_cache, list[weakref.ref[Any]]()

    def only_one(*given: Any) -> Any:
        assert not any(cache() for cache in made)
        cache = make(*given)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(reading, "static_cache", only_one)
    gc.disable()  # what only a collection frees is still there when the next one is made
    try:
        bench_prefill([config_of()] * 2, model=tiny("llama"), lengths=[N], chunk_tokens=CHUNK, device="cpu")
    finally:
        gc.enable()
    assert len(made) == 9 and not made[-1]()


def test_no_layer_on_the_kernel_asks_for_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have chunk x N elements; the model's own attention has no other way."""

    def refuse(*given: Any) -> None:
        raise AssertionError("a mask of chunk x N")

    monkeypatch.setattr(Call, "_whole_mask", refuse)
    given: dict[str, Any] = {"model": tiny("llama"), "lengths": [N], "rounds": 1, "baseline": False, "device": "cpu"}
    bench_prefill([config_of()], chunk_tokens=CHUNK, **given)
    with pytest.raises(AssertionError, match="chunk x N"):
        bench_prefill([config_of(kernel=False)], chunk_tokens=CHUNK, **given)


def test_a_dynamic_pattern_sees_its_chunk_of_structured_inputs() -> None:
    given: dict[str, Any] = {"lengths": [N], "rounds": 1, "baseline": False, "device": "cpu", "attends": "structured"}
    all_blocks = load({"dense_below_tokens": 0, "default": BLOCKS})
    [row] = bench_prefill([all_blocks], model=tiny("llama"), chunk_tokens=CHUNK, **given)
    made, pattern, visited, dense = structured(N, heads=4, key_heads=2, dim=16), parse_pattern(BLOCKS), 0.0, 0
    for at, end in reading.chunks_of(N, CHUNK):
        geometry = Geometry.of(end - at, N, q_offset=at, prompt_len=N)
        plan = pattern.plan(made.q[:, :, at:end], made.k, geometry, Softmax(scale=0.25))
        visited, dense = visited + plan.totals().visited_tiles(), dense + plan.totals().causal_tiles
    assert row["tile_density"] == pytest.approx(visited / dense, abs=2e-4) and row["tile_density"] < 0.7


# ---- warming up


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of each call: where it begins, its tokens, and where its cache stands then."""
    seen: list[tuple[int, int, int]] = []
    call = reading._call

    def spy(model: Any, ids: torch.Tensor, cache: Any, given: Any, at: int) -> float:
        ms = call(model, ids, cache, given, at)
        seen.append((at, ids.shape[1], int(cache.layers[0].get_seq_length())))
        return ms

    monkeypatch.setattr(reading, "_call", spy)
    return seen


@torch.inference_mode()
def test_warming_up_reads_a_few_tokens_at_the_ends_of_chunks(
    calls: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WARM_TOKENS", 100)
    model, ids = tiny("llama"), torch.full((1, N), 5)
    with apply(model, config_of(below=BLOCKS)) as handle:
        reading.warm_up_chunks(model, ids, CHUNK, handle, None)
        assert all(layer.ran == "sparse" for layer in handle.report().layers)
        ends = [100, 256, 512, 768, 1024, 1100]
        assert calls == [(end - 100, 100, end) for end in ends]
        calls.clear()
        reading.warm_up_chunks(model, ids, 4096, handle, None)
        assert calls == [(0, 100, 100), (1000, 100, 1100)]
        calls.clear()
    reading.warm_up_chunks(model, ids, CHUNK, None, None)
    assert calls == [(0, 100, 100)]


@pytest.mark.parametrize(("tokens", "chunk"), [(1_000_000, 65_536), (524_288, 65_536), (1_000_000, 50_000), (300, 7)])
def test_warming_up_compiles_for_every_chunk(tokens: int, chunk: int) -> None:
    launch = pytest.importorskip("sparsekit.kernels.launch", exc_type=ImportError)

    def compiled(end: int) -> list[tuple[int, int]]:
        blocks = [-(-end // size) for size in (64, 128)]
        return [((count - 1).bit_length(), launch.load_step(count)) for count in blocks]

    ends = reading.kinds_of(tokens, chunk)
    assert ends[-1] == tokens and len(ends) <= 4 * tokens.bit_length()
    for size in (0, 1):
        known = {compiled(end)[size] for end in ends}
        assert {compiled(end)[size] for _, end in reading.chunks_of(tokens, chunk)} == known


@torch.inference_mode()
def test_a_model_with_sliding_layers_reads_all_of_it(calls: list[tuple[int, int, int]]) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    model = tiny("gemma3_text", layer_types=kinds, sliding_window=64)
    config = load({"dense_below_tokens": 0, "default": {"name": "triangle", "window_tokens": 32, "last_tokens": 16}})
    with apply(model, config) as handle:
        reading.warm_up_chunks(model, torch.full((1, 600), 5), CHUNK, handle, None)
        assert calls == [(0, 256, 256), (0, 256, 256), (256, 256, 512), (512, 88, 600)]


def test_the_cache_of_linear_layers_is_their_states() -> None:
    model = tiny("qwen3_next")
    config = load({"dense_below_tokens": 0, "default": {"name": "triangle", "window_tokens": 32, "last_tokens": 16}})
    given: dict[str, Any] = {"model": model, "rounds": 1, "baseline": False, "device": "cpu", "chunk_tokens": 128}
    short, long = bench_prefill([config], lengths=[200, 300], **given)
    arch = model_facts(model)
    kinds = model.config.layer_types
    full = kinds.count("full_attention")
    of_a_token = 2 * full * arch.num_key_heads * arch.head_dim * 4
    assert 0 < full < len(kinds) and long["cache_bytes"] - short["cache_bytes"] == 100 * of_a_token
    assert short["cache_bytes"] > 200 * of_a_token


# ---- the page


def test_the_page_counts_memory_as_it_is() -> None:
    """docs/long.md, of Qwen2.5 7B's shape: a million tokens in chunks of 65,536, and plans over 2^20 keys."""
    page = (Path(__file__).parents[3] / "docs/long.md").read_text()
    shape, tokens, chunk, gib = SHAPES["qwen2.5-7b-1m"], 1_000_000, 65_536, 2**30
    with torch.device("meta"):
        model = tiny(**shape)
    of_a_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * 128 * 2
    of_a_row = (3 * shape["intermediate_size"] + 2 * shape["hidden_size"]) * 2
    held = [2 * sum(w.numel() for w in model.parameters()), of_a_token * tokens, of_a_row * chunk]
    for part in [*held, sum(held), of_a_row * tokens]:
        assert f"| {part / gib:.1f} |" in page, part
    assert f"{of_a_token:,} x N" in page and f"{of_a_row:,} x C" in page
    assert f"{chunk * tokens / gib:.0f} GiB of bools" in page
    assert f"take {chunk * shape['vocab_size'] * 2 / gib:.0f} GiB" in page

    given = {n: (shape["num_attention_heads"] + shape["num_key_value_heads"]) * 128 * 2 * n for n in (tokens, 524_288)}
    assert (
        f"{given[tokens] / gib:.1f} GiB of the first row and {given[524_288] / gib:.1f} GiB of the others are" in page
    )
    weights = 2 * (sum(w.numel() for w in model.parameters()) - 2 * shape["vocab_size"] * shape["hidden_size"])
    of_all = {n: 28 * 4 * 28 * 128 * n**2 / 2 + weights * n for n in given}  # 28 layers of 28 heads
    assert (
        f"take {of_all[524_288] / 6.5e14:.0f} s for 524,288 tokens and {of_all[tokens] / 6.5e14:.0f} s for a million."
        in page
    )

    cpu, heads = torch.device("cpu"), shape["num_attention_heads"]
    geometry = Geometry.of(chunk, 1 << 20, prompt_len=1 << 20, block_kv=128)
    assert f"| {static_plan(Triangle(), geometry, cpu).nbytes / 1e3:.0f} kB |" in page
    fine, coarse = (block_grid(geometry, size, 1, cpu) for size in (64, 128))
    listed = heads * fine.plan.rows * 2 * 101 * 4
    bits = heads * fine.rows * fine.columns // 8
    assert f"{listed / 1e6:.0f} MB, and {bits / 1e6:.0f} MB of bits" in page
    assert f"{coarse.causal_tiles * heads * 4 / 1e9:.2f} GB at most" in page
    slashes = slash_grid(geometry.with_tile(64, 64), 64, VerticalSlash().slash_tokens, cpu)
    assert f"{slashes.room * heads * 4 / 1e9:.2f} GB at most" in page


def test_the_measured_tables_are_of_the_records() -> None:
    docs = Path(__file__).parents[3] / "docs"
    names = {
        "untouched": "untouched",
        "trianglemix-block_topk.yaml": "TriangleMix over `block_topk`",
        "trianglemix.yaml": "TriangleMix, dense below",
    }
    lines: dict[bool, list[str]] = {True: [], False: []}
    for row in map(json.loads, (docs / "results/prefill-long-h200.jsonl").read_text().splitlines()):
        sizes = [f"{row[key] / 2**30:.1f} GiB" for key in ("peak_bytes", "cache_bytes") if key in row]
        plan = row.get("plan_bytes", 0)
        sizes.append(f"{plan / 1e6:.1f} MB" if plan >= 1e6 else f"{plan / 1e3:.0f} kB" if plan else "")
        cells = [f"{row['tokens']:,}", names[row["config"].rsplit("/", 1)[-1]], f"{row['ms'] / 1e3:.1f} s", *sizes]
        lines["chunk_tokens" in row].append(f"| {' | '.join(cells)} |\n".replace("|  |", "| |"))
    for in_chunks, told in lines.items():
        assert f"|{'---|' * (5 + in_chunks)}\n{''.join(told)}\n" in (docs / "long.md").read_text()


# ---- what is refused


def test_faults() -> None:
    for size in (0, 1.5):
        with pytest.raises(SparsekitError, match=f"chunk_tokens = {size}: a whole number from 1, or None"):
            bench_prefill([config_of()], model=tiny("llama"), lengths=[300], chunk_tokens=size, device="cpu")  # type: ignore[arg-type]
    sliding = tiny("gemma3_text", layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=64)
    with pytest.raises(SparsekitError, match="with chunk_tokens = 128: sliding layers of gemma3_text hold a window"):
        bench_prefill([load({})], model=sliding, lengths=[300], chunk_tokens=128, attends="structured", device="cpu")
    options = ["--shape", "tiny", "--tokens", "300", "--device", "cpu", "--chunk-tokens"]
    assert CliRunner().invoke(app, ["bench", "prefill", "nowhere.yaml", *options, "0"]).exit_code == 2


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "blocks.yaml"
    path.write_text(config_of(below=BLOCKS).dump())
    options = ["--shape", "tiny", "--tokens", "300", "--rounds", "1", "--device", "cpu", "--chunk-tokens", "128"]
    result = CliRunner().invoke(app, ["bench", "prefill", str(path), *options, "--no-baseline"])
    assert result.exit_code == 0, result.output
    assert "untouched" not in result.output and str(path) in result.output and " x  " not in result.output
