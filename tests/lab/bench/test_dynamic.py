"""bench dynamic: what is measured is what its name says, on a CPU, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor
from typer.testing import CliRunner

import sparsekit.patterns.base as registry
from sparsekit import SparsekitError, models
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.cli import app
from sparsekit.kernels import attend, geometry_for
from sparsekit.lab.bench import bench_dynamic, captured, dynamic, dynamic_rows, output_error, quality, structured
from sparsekit.lab.bench.inputs import Inputs, load_inputs, save_inputs
from sparsekit.lab.bench.peers import load_peers
from sparsekit.patch.capture import capture_attention
from sparsekit.patterns import Pattern
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, dense_plan, plan_from_block_mask

SMALL: dict[str, Any] = {"heads": 4, "key_heads": 2, "dim": 32, "device": "cpu", "repeat_ms": 0}
run = CliRunner()


@pytest.fixture
def loudest(monkeypatch: pytest.MonkeyPatch) -> type[DynamicPattern]:
    """A dynamic pattern of a few lines: the key tiles whose keys are longest, the first and the diagonal's."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Loudest(DynamicPattern):
        """Longest keys."""

        name: Literal["loudest"] = "loudest"
        source: ClassVar[str] = "test"
        bench_points = ({"top_k": 3},)
        sweep_points = tuple({"top_k": n} for n in (1, 2, 4))
        top_k: int = Field(2, ge=1, description="tiles")
        broken: bool = Field(False, description="leaves the diagonal out")

        def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
            bk, rows = geometry.block_kv, geometry.rows
            length = torch.nn.functional.pad(k.float().norm(dim=-1), (0, -k.shape[2] % bk)).unflatten(-1, (-1, bk))
            score = length.mean(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
            top = score.topk(min(self.top_k, score.shape[-1]), -1).indices
            mask = torch.zeros_like(score, dtype=torch.bool).scatter(-1, top, True)[:, :, None].repeat(1, 1, rows, 1)
            mask[..., 0] = True
            start = torch.arange(rows)[:, None] * geometry.block_q
            tile = torch.arange(mask.shape[-1]) * bk
            near = (tile + bk > start) & (tile < start + geometry.block_q)
            return plan_from_block_mask(mask & ~near if self.broken else mask | near, geometry)

    return Loudest


# ---- the numbers, against brute force


def test_recall_is_the_share_of_the_softmax_on_kept_pairs() -> None:
    x = structured(333, heads=4, key_heads=2, dim=32)
    g = torch.Generator().manual_seed(1)
    geometry = geometry_for(x.q, x.k)
    mask = torch.rand(1, 4, geometry.rows, 6, generator=g) < 0.4
    mask[..., 0] = True
    mask |= torch.eye(geometry.rows).repeat_interleave(2, 1).bool()[None, None]
    plan = plan_from_block_mask(mask, geometry)
    rows = quality.sampled_rows(333, 50)
    assert rows[0] == 0 and rows[-1] == 332 and len(rows) == 50 and bool((rows.diff() > 0).all())
    _, lse = attend(x.q, x.k, x.v, plan, return_lse=True)
    found = quality.recall(lse[:, :, rows], quality.dense_lse(x.q, x.k, rows, 32**-0.5))
    key = x.k.repeat_interleave(2, 1)
    scores = (x.q @ key.transpose(2, 3)) * 32**-0.5
    weights = scores.masked_fill(~torch.ones(333, 333, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    expected = (weights * plan.to_mask()).sum(-1)[:, :, rows].double()
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(expected.min()) < 0.9 < float(expected.max())


def test_output_error_is_l1_and_l2_of_everything() -> None:
    dense, off = torch.randn(1, 3, 40, 8), torch.randn(1, 3, 40, 8)
    l1, l2 = output_error(dense + off, dense)
    assert l1 == pytest.approx(float(off.abs().sum() / dense.abs().sum()), rel=1e-5)
    assert l2 == pytest.approx(float(off.norm() / dense.norm()), rel=1e-5)
    assert output_error(dense, dense) == (0, 0)


# ---- inputs


def test_structured_heads_have_a_sink_heavy_columns_and_a_local_peak() -> None:
    x = structured(1024, heads=4, key_heads=2, dim=64, columns=16, seed=3)
    assert x.q.shape == (1, 4, 1024, 64) and x.q.stride() == (4 * 1024 * 64, 64, 4 * 64, 1)
    again = structured(1024, heads=4, key_heads=2, dim=64, columns=16, seed=3)
    assert torch.equal(x.k, again.k) and not torch.equal(x.k, structured(1024, heads=4, key_heads=2, dim=64).k)
    scores = (x.q[0, 0, 512:] @ x.k[0, 0].T) * 64**-0.5
    weights = scores.masked_fill(torch.arange(1024) > torch.arange(512, 1024)[:, None], float("-inf")).softmax(-1)
    mass = weights.mean(0)
    heavy = mass[1:512].topk(16).values
    assert mass[0] > heavy[-1] and heavy[-1] > 2 * mass[1:512].median()
    near = torch.stack([weights[i, 512 + i - 3 : 513 + i].sum() for i in range(512)]).mean()
    far = torch.stack([weights[i, 512 + i - 203 : 512 + i - 199].sum() for i in range(512)]).mean()
    assert near > 2 * far


def test_captured_inputs_are_what_the_layers_attend_to(tmp_path: Path) -> None:
    """Attention over what is captured gives what the model's own attention gave."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, ids = models.tiny("llama"), torch.arange(1, 81)[None]
    before, outputs = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), []
    hook = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    found = capture_attention(model, ids, [2, 1])
    assert sorted(found) == [1, 2] and ALL_ATTENTION_FUNCTIONS._local_mapping == before
    q, k, v = found[2]
    assert q.shape == (1, 4, 80, 16) and k.shape == v.shape == (1, 2, 80, 16)
    own = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(own.transpose(1, 2).flatten(2), outputs[0], atol=1e-6)
    assert sorted(capture_attention(model, ids)) == [0, 1, 2, 3]
    for layers in ([4], []):
        with pytest.raises(SparsekitError, match="at least one, out of"):
            capture_attention(model, ids, layers)


@pytest.mark.slow
def test_a_real_model_is_captured_measured_and_its_inputs_kept(tmp_path: Path, loudest: type[DynamicPattern]) -> None:
    file = tmp_path / "x.safetensors"
    options = ["--inputs", "smollm2-135m", "--tokens", "400", "--layers", "0,1", "--save-inputs", str(file)]
    assert run.invoke(app, ["bench", "dynamic", *options, "--device", "cpu"]).exit_code == 0
    rows = bench_dynamic(methods=["loudest"], inputs=[str(file)], device="cpu", repeat_ms=0)
    mine = [row for row in rows if row["case"] == "dynamic"]
    assert [(row["input"], row["layer"], row["heads"], row["dim"]) for row in mine] == [
        ("smollm2-135m", 0, 9, 64),
        ("smollm2-135m", 1, 9, 64),
    ]
    assert all(370 < row["tokens"] <= 400 and 0 < row["recall"] < 1 for row in mine)
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    with pytest.raises(SparsekitError, match="fewer than 400"):
        captured("smollm2-135m", 400, layers=[0], prompt=text)
    with pytest.raises(SparsekitError, match="tokens = 9000: the model has 8192 positions"):
        captured("smollm2-135m", 9000, layers=[0])


def test_saved_inputs_come_back(tmp_path: Path) -> None:
    x = structured(50, heads=4, key_heads=2, dim=16, dtype=torch.bfloat16)
    save_inputs(tmp_path / "x.safetensors", [x])
    [back] = load_inputs(tmp_path / "x.safetensors")
    assert (back.name, back.layer, back.prompt) == ("structured", None, None)
    assert torch.equal(back.q, x.q) and back.q.stride() == x.q.stride() and torch.equal(back.v, x.v)


# ---- rows


def test_rows_are_complete_and_written(tmp_path: Path, loudest: type[DynamicPattern]) -> None:
    out, shown = tmp_path / "rows" / "x.jsonl", []
    rows = bench_dynamic(
        methods=["loudest", {"name": "loudest", "top_k": 100}], lengths=[300, 600], out=out, show=shown.append,
        **{**SMALL, "repeat_ms": 5},
    )  # fmt: skip
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert [row for part in shown for row in part] == rows
    cases = [row["case"] for row in rows]
    assert cases == ["correctness"] * 2 + ["dense", "dense", "dynamic", "dynamic"] * 2
    for row in rows:
        assert row["device"] and row["torch"] == torch.__version__ and row["date"] and "command" in row
        assert row["dtype"] == "float32"
    for row in rows[:2]:
        assert row["error"] <= max(1.5 * row["sdpa_error"], 1e-5) and row["recall_error"] < 1e-3
    some, everything = (row for row in rows if row["case"] == "dynamic" and row["tokens"] == 600)
    assert some["label"] == "loudest (top_k 3)" and some["parameters"] == {
        "dense_below_tokens": None, "top_k": 3, "broken": False
    }  # fmt: skip
    assert 0 < some["pair_density"] < some["recall"] < 1 and some["recall_worst_head"] <= some["recall"]
    assert some["error_l2"] > 0 and some["error_l1"] > 0 and some["plan_bytes"] > 0 and some["impl"] == "torch"
    for name in ("index_ms", "attend_ms", "ms"):
        assert 0 < some[f"{name}_p20"] <= some[name] <= some[f"{name}_p80"]
    assert some["times_dense"] == pytest.approx(rows[6]["ms"] / some["ms"], rel=1e-2, abs=5e-4)
    assert everything["pair_density"] == 1 and everything["tile_density"] == 1
    assert everything["recall"] == pytest.approx(1, abs=1e-4) and everything["error_l2"] < 1e-5


def test_the_row_is_its_plan(loudest: type[DynamicPattern]) -> None:
    [row] = [r for r in bench_dynamic(methods=["loudest"], lengths=[500], **SMALL) if r["case"] == "dynamic"]
    assert "ms" not in row
    x = structured(500, heads=4, key_heads=2, dim=32)
    plan = loudest(top_k=3).select(x.q, x.k, geometry_for(x.q, x.k), Softmax(32**-0.5))
    mask = plan.to_mask()
    assert row["pair_density"] == int(mask.sum()) / (4 * 500 * 501 // 2)
    assert row["tile_density"] == plan.tile_density()
    dense = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)
    sparse = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=mask, enable_gqa=True)
    assert row["error_l2"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-3)


def test_a_wrong_plan_is_not_measured(loudest: type[DynamicPattern]) -> None:
    rows = bench_dynamic(methods=[{"name": "loudest", "broken": True}, "triangle"], lengths=[300], **SMALL)
    assert [row["case"] for row in rows] == ["failed", "correctness", "dense", "dense", "dynamic"]
    assert "does not keep itself" in rows[0]["why"] and rows[0]["method"] == "loudest"
    assert rows[-1]["method"] == "triangle"


def test_an_estimator_that_fails_leaves_the_others_alone(
    loudest: type[DynamicPattern], monkeypatch: pytest.MonkeyPatch
) -> None:
    select = loudest.select

    def fails(self: Pattern, q: Tensor, *args: Any) -> BlockPlan:
        if q.shape[2] == 400:
            raise RuntimeError("out of luck\nat some line")
        return select(self, q, *args)

    monkeypatch.setattr(loudest, "select", fails)
    rows = bench_dynamic(methods=["loudest", "triangle"], lengths=[400, 300], **SMALL)
    assert [row["case"] for row in rows[2:]] == [
        "dense",
        "dense",
        "failed",
        "dynamic",
        "dense",
        "dense",
        *["dynamic"] * 2,
    ]
    assert rows[4]["why"] == "RuntimeError: out of luck" and rows[4]["tokens"] == 400


def test_a_wrong_kernel_is_found(loudest: type[DynamicPattern], monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*given: Any, **options: Any) -> Any:
        found = attend(*given, **options)
        return (found[0] * 1.001, found[1]) if isinstance(found, tuple) else found * 1.001

    monkeypatch.setattr(dynamic_rows, "attend", off)
    rows = bench_dynamic(methods=["loudest"], lengths=[300], **SMALL)
    assert rows[0]["case"] == "failed" and "against float32" in rows[0]["why"]


def test_a_wrong_sum_is_found(loudest: type[DynamicPattern], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall is read off a kernel's sum of exponentials, so that is checked too."""

    def off(*given: Any, **options: Any) -> Any:
        found = attend(*given, **options)
        return (found[0], found[1] + 0.01) if isinstance(found, tuple) else found

    monkeypatch.setattr(dynamic_rows, "attend", off)
    rows = bench_dynamic(methods=["loudest"], lengths=[300], **SMALL)
    assert rows[0]["case"] == "failed" and "off the share of the mask" in rows[0]["why"]


def test_logits_of_ten_thousand_are_no_pair_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first layer of Qwen2.5-Coder-1.5B has them: a kernel sums in float32, which has steps of 0.001 there."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 32, generator=g) for heads in (2, 1, 1))
    q[..., 0], k[..., 0] = 260 + 0.1 * q[..., 0], 261 + 0.01 * k[..., 0]
    save_inputs(tmp_path / "large.safetensors", [Inputs("large", q, k, v)])

    def rows() -> list[dict[str, Any]]:
        return bench_dynamic(methods=["triangle"], inputs=[str(tmp_path / "large.safetensors")], **SMALL)

    *_, row = rows()
    assert row["pair_density"] == 1 and row["recall"] == pytest.approx(1, abs=0.01), row
    at = quality.sampled_rows(300)
    dense = quality.dense_lse(q, k, at, 32**-0.5)
    scores = q[0, 0].double() @ k[0, 0].double().T * 32**-0.5
    exact = scores.masked_fill(~torch.ones(300, 300, dtype=torch.bool).tril(), float("-inf")).logsumexp(-1)[at]
    assert float(exact.min()) > 11_000
    assert torch.allclose(dense[0, 0], exact, rtol=1e-12)
    _, lse = attend(q, k, v, dense_plan(geometry_for(q, k)), return_lse=True)
    off = (quality.recall(lse[:, :, at], dense) - 1).abs()
    assert float(off.max()) > quality.RECALL_SLACK  # so one for logits of all sizes is too small
    real = dynamic_rows._attend_lse

    def doubled(*given: Any) -> tuple[Tensor, Tensor]:
        out, lse = real(*given)
        return out, lse + 0.02 * (lse > 1000)

    monkeypatch.setattr(dynamic_rows, "_attend_lse", doubled)
    *_, row = rows()
    assert row["case"] == "failed" and "a pair is counted twice" in row["why"]


def test_a_sweep_turns_the_main_knob(loudest: type[DynamicPattern]) -> None:
    rows = bench_dynamic(methods=["loudest"], lengths=[600], sweep=True, **SMALL)
    found = [row for row in rows if row["case"] == "dynamic"]
    assert [row["parameters"]["top_k"] for row in found] == [1, 2, 4]
    density = [row["pair_density"] for row in found]
    assert density == sorted(density) and density[0] < density[-1]
    recalled = [row["recall"] for row in found]
    assert recalled == sorted(recalled)


def test_plan_only_runs_no_attention(loudest: type[DynamicPattern], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_rows, "_dense", lambda x: pytest.fail("dense attention ran"))
    rows = bench_dynamic(methods=["loudest"], lengths=[700], plan_only=True, **{**SMALL, "repeat_ms": 3})
    assert [row["case"] for row in rows] == ["correctness", "plan"]
    assert rows[1]["tokens"] == 700 and rows[1]["index_ms"] > 0 and 0 < rows[1]["tile_density"] < 1
    assert "recall" not in rows[1] and "ms" not in rows[1]


def test_what_is_published_is_measured() -> None:
    """Every bench point and every sweep point is one that its pattern takes, and none is there twice."""
    for name in registry.pattern_names(DynamicPattern):
        cls = registry.pattern_class(name)
        assert len(dynamic._patterns([name], sweep=False)) == len(cls.bench_points)
        assert len(dynamic._patterns([name], sweep=True)) == len(cls.sweep_points)
    assert {pattern.name for pattern in dynamic._patterns(None, False)} == set(registry.pattern_names(DynamicPattern))


# ---- peers


PEERS_FILE = """
def doubled(q, k, v):
    import torch
    def total():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) * 2
    return {"total": total, "index": lambda: None, "method": "loudest", "parameters": {"top_k": 3},
            "source": "somebody/somewhere@1", "tile_density": lambda: 0.5}

def only_index(q, k, v):
    return {"index": lambda: None}

def absent(q, k, v):
    raise ImportError("no module named x\\nmore")

def misspelt(q, k, v):
    return {"totl": None}

PEERS = {"doubled": doubled, "only index": only_index, "absent": absent, "misspelt": misspelt}
"""


def test_peers_are_timed_beside(tmp_path: Path, loudest: type[DynamicPattern]) -> None:
    (tmp_path / "peers.py").write_text(PEERS_FILE)
    rows = bench_dynamic(
        methods=["loudest", {"name": "loudest", "top_k": 1}], lengths=[300], peers=tmp_path, **{**SMALL, "repeat_ms": 3}
    )
    doubled, index, absent, misspelt = (row for row in rows if row["case"] == "peer")
    assert doubled["error_l1"] == pytest.approx(1) and doubled["error_l2"] == pytest.approx(1)
    assert doubled["ms"] > 0 and doubled["index_ms"] > 0 and doubled["times_dense"] > 0
    assert doubled["tile_density"] == 0.5 and doubled["parameters"] == {"top_k": 3} and doubled["tokens"] == 300
    same, other = (row for row in rows if row["case"] == "dynamic")
    assert same["times_peer"] == pytest.approx(doubled["ms"] / same["ms"], rel=1e-2, abs=5e-4)
    assert "times_peer" not in other
    assert same["times_peer_index"] < 1
    assert "ms" not in index and "error_l1" not in index and index["index_ms"] > 0
    assert absent["missing"] == "ImportError: no module named x"
    assert "Did you mean 'total'?" in misspelt["missing"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not there"),
        ("PEERS = {}", "wants PEERS"),
        ("PEERS = {'a': 1}", "wants PEERS"),
        ("import nothing_of_that_name", "ModuleNotFoundError in peers.py: No module named"),
    ],
)
def test_a_folder_without_peers_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "peers.py").write_text(text)
    with pytest.raises(SparsekitError, match=says):
        load_peers(tmp_path)


# ---- the command


def test_the_command_prints_tables_and_fails_when_a_method_does(tmp_path: Path, loudest: type[DynamicPattern]) -> None:
    size = [
        "--tokens",
        "300",
        "--heads",
        "4",
        "--key-heads",
        "2",
        "--dim",
        "32",
        "--device",
        "cpu",
        "--repeat-ms",
        "2",
    ]
    good = run.invoke(app, ["bench", "dynamic", "--patterns", "loudest,{name: loudest, top_k: 1}", *size])
    assert good.exit_code == 0, good.output
    for word in ("correctness", "structured, 300 tokens", "loudest (top_k 1)", "dense (sdpa)", "recall", "index ms"):
        assert word in good.stdout
    bad = run.invoke(app, ["bench", "dynamic", "--patterns", "{name: loudest, broken: true}", *size])
    assert bad.exit_code == 1 and "failed: loudest (broken True): " in bad.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--patterns", "loudes"], "Did you mean 'loudest'?"),
        (["--patterns", "{name: loudest, top_k: 0}"], "top_k = 0"),
        (["--patterns", "{name: [}"], "comma-separated"),
        (["--patterns", "3"], "3 is not a pattern"),
        (["--tokens", "0"], "each at least 1 token"),
        (["--inputs", "structurd"], "Did you mean 'structured'?"),
        (["--inputs", "/nowhere/x.safetensors"], "cannot be read"),
        (["--dtype", "bfloat"], "Did you mean 'bfloat16'?"),
        (["--impl", "trton"], "Did you mean 'triton'?"),
        (["--peers", "/nowhere"], "peers.py is not there"),
        (["--heads", "5", "--tokens", "100"], "heads a multiple of key_heads"),
        (["--repeat-ms", "-1"], "0 (no times) or more"),
        (["--save-inputs", "x"], "captures from one model"),
    ],
)
def test_bad_input_is_one_line(loudest: type[DynamicPattern], options: list[str], says: str) -> None:
    base = [] if "--patterns" in options else ["--patterns", "loudest"]
    result = run.invoke(app, ["bench", "dynamic", *base, "--device", "cpu", *options])
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    assert says in result.stderr


def test_a_device_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SparsekitError, match="there is no CUDA device"):
            bench_dynamic(device="cuda")


# ---- on a card


@pytest.mark.gpu
def test_memory_and_waits_are_seen() -> None:
    setting = dynamic_rows.Setting(torch.device("cuda"), None, 0)

    def index() -> BlockPlan:
        torch.empty(1 << 20, dtype=torch.int32, device="cuda")
        return dense_plan(Geometry.of(128))

    cost = dynamic_rows._cost(index, setting)
    assert 4 << 20 <= cost["select_peak_bytes"] < 8 << 20 and cost["index_host_ms"] > 0 and not cost["host_sync"]
    assert dynamic_rows._waits(lambda: torch.ones(1, device="cuda").item())
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
def test_rows_of_a_card() -> None:
    options = {"heads": 8, "key_heads": 2, "dim": 64, "repeat_ms": 5}
    rows = bench_dynamic(methods=["triangle"], lengths=[1024, 2048], device="cuda", **options)
    assert [row["case"] for row in rows] == ["correctness", *["dense", "dense", "dynamic"] * 2]
    assert rows[1]["impl"] == "sdpa-cudnn" and rows[2]["error_l2"] < 1e-2
    assert rows[3]["device"] == torch.cuda.get_device_name() and rows[3]["ms"] > 0


@pytest.mark.parametrize("repeat_ms", [-1, float("inf"), float("nan")])
def test_times_that_nobody_waits_for_are_refused(repeat_ms: float) -> None:
    with pytest.raises(SparsekitError, match=r"^repeat_ms=.*: 0 \(no times\) or more, and finite\.$"):
        bench_dynamic(methods=["triangle"], lengths=[256], **{**SMALL, "repeat_ms": repeat_ms})


@pytest.mark.parametrize("size", ["heads", "key_heads", "dim"])
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(size: str) -> None:
    for value in (0, 10**9):
        with pytest.raises(SparsekitError, match=f"^{size}={value}: it should be from 1 to 1,024"):
            bench_dynamic(methods=["xattention"], lengths=[256], device="cpu", repeat_ms=0, **{size: value})


def test_a_kernel_of_8_bits_is_refused() -> None:
    """Its rounding would fail every method's check against float32."""
    for impl in ("hopper_fp8", "triton_fp8", "fp8"):
        with pytest.raises(SparsekitError, match=f"impl='{impl}': it rounds to 8 bits"):
            bench_dynamic(methods=["block_topk"], lengths=[256], device="cpu", impl=impl)
