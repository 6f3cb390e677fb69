"""Several devices: device_map, offloaded weights, the meta device; and tensor parallelism in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny import TRIANGLE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsekit
from sparsekit import SparsekitError
from sparsekit.models import tiny

TOKENS = 200
SPARSE = {"layers": {"1-3": TRIANGLE}}


def _ids() -> Tensor:
    return torch.randint(3, 250, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _logits(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    return model(_ids(), **kwargs).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected() -> Tensor:
    model = tiny("llama")
    with sparsekit.apply(model, SPARSE):
        return _logits(model)


def _parts(layers: list[str]) -> dict[str, str]:
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    return dict.fromkeys(names, "cpu") | {f"model.layers.{n}": place for n, place in enumerate(layers)}


@pytest.mark.parametrize(
    "device_map",
    [{"": "cpu"}, "auto", _parts(["cpu", "disk", "disk", "cpu"]), _parts(["disk"] * 4)],
    ids=["cpu", "auto", "half on disk", "layers on disk"],
)
def test_device_map(device_map: Any, folder: Path, expected: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    assert any(weight.is_meta for weight in model.parameters()) == on_disk
    before = _logits(model)
    with sparsekit.apply(model, SPARSE) as handle:
        assert torch.equal(_logits(model), expected)
        assert [row.ran for row in handle.report().layers] == ["dense"] + ["sparse"] * 3
        tokens = model.generate(_ids(), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, TOKENS + 3)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("first", ["apply", "offload"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_by_hooks(place: str, first: str, expected: Tensor, tmp_path: Path) -> None:
    """accelerate's hooks bring each weight when its module runs; they may come before or after apply."""
    model = tiny("llama")

    def offload() -> None:
        if place == "cpu":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, tmp_path, execution_device="cpu")

    if first == "offload":
        offload()
    with sparsekit.apply(model, SPARSE):
        if first == "apply":
            offload()
        assert all(weight.is_meta for weight in model.parameters())
        assert torch.equal(_logits(model), expected)


@pytest.mark.gpu
def test_a_plan_is_reused_by_an_offloaded_layer(folder: Path) -> None:
    """Its weights rest on the CPU; accelerate brings them to the GPU, where the plan is."""
    places = _parts(["cpu", "cuda:0", "cuda:0", "cpu"])
    places = {name: 0 if place == "cuda:0" else place for name, place in places.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places)
    single = tiny("llama")
    rule = {"name": "block_topk", "top_k": 1, "force_sink": False, "dense_below_tokens": 0}
    config = {"layers": {"1": rule, "2-3": {"reuse": 1, "heads": [1, 0, 3, 3]}}}
    with sparsekit.apply(single, config), sparsekit.apply(model, config) as handle:
        assert float((_logits(model).cpu() - _logits(single)).abs().max()) < 1e-2  # tf32 on the card
        rows = handle.report().layers
    assert [row.ran for row in rows] == ["dense"] + ["sparse"] * 3
    assert rows[3].impl == rows[2].impl
    assert rows[3].density == rows[2].density


@pytest.mark.gpu
def test_layers_on_the_cpu_and_on_a_gpu(folder: Path, expected: Tensor) -> None:
    """The mask function is called once, on the embeddings' device; each layer runs on its own."""
    places = _parts(["cpu", "cuda:0", "cuda:0", "cpu"])
    places = {name: 0 if place == "cuda:0" else place for name, place in places.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places)
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, :50] = 0
    single = tiny("llama")
    with sparsekit.apply(single, SPARSE), sparsekit.apply(model, SPARSE):
        assert float((_logits(model).cpu() - expected).abs().max()) < 1e-2  # tf32 on the card
        padded = _logits(model, attention_mask=mask).cpu() - _logits(single, attention_mask=mask)
        assert float(padded[:, 50:].abs().max()) < 1e-2


def test_the_meta_device_has_shapes_alone() -> None:
    """Nothing there can be planned or computed: the model's own attention gives the shapes, and the report says so."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama").config)
    with sparsekit.apply(model, SPARSE) as handle, torch.inference_mode():
        logits = model(_ids().to("meta")).logits
        assert logits.is_meta and logits.shape == (1, TOKENS, 256)
        assert {row.why for row in handle.report().layers} == {"the meta device holds no data"}


# ---- tensor parallelism

HEADS = {
    "heads": {
        "0": {"0": TRIANGLE, "1": "dense", "2": {"name": "a_shape", "window_tokens": 9}, "3": TRIANGLE},
        "1": {"3": {"name": "block_topk", "top_k": 1, "block_tokens": 64}},
        "2": {"0-3": TRIANGLE},
        "3": {"0-3": {"name": "xattention", "threshold": [0.9, 0.2, 0.5, 0.1]}},
    }
}
SHARDED = textwrap.dedent(
    """
    import json, sys, warnings
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    import sparsekit

    folder, configs = sys.argv[1], json.loads(sys.argv[2])
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    ids, seen, found = torch.load(f"{folder}/ids.pt"), [], {}
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    for name, config in configs.items():
        torch._dynamo.reset()
        with torch.inference_mode(), sparsekit.apply(model, config) as handle:
            try:
                logits = model(ids).logits
            except sparsekit.SparsekitError as error:
                found[name] = {"error": str(error)}
                continue
            first = handle.report().layers
            tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
            compiled = torch.compile(model, backend="eager")(ids).logits
        found[name] = {
            "logits": logits, "tokens": tokens, "compiled": compiled, "width": seen[0],
            "patterns": [row.pattern for row in first], "ran": [row.ran for row in first],
        }
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    """
)


TOPK = {"name": "block_topk", "top_k": 1, "force_sink": False}
REUSED = {"layers": {"0": TOPK, "1": {"reuse": 0}, "2": {"reuse": 0, "heads": [1, 0, 3, 3]}}}
CROSSED = {"layers": {"0": TOPK, "1": {"reuse": 0}, "2": {"reuse": 0, "heads": [2, 1, 0, 3]}}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of two gloo processes got, by config: transformers' own tp_plan, two of four query heads and one of two
    key heads in each."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny("llama").save_pretrained(folder)
    torch.save(_ids(), folder / "ids.pt")
    script = folder / "sharded.py"
    script.write_text(SHARDED)
    configs = json.dumps({"heads": HEADS, "reused": REUSED, "crossed": CROSSED})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, str(script), str(folder), configs], capture_output=True, text=True, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_tensor_parallel_heads_keep_their_patterns(ranks: list[dict[str, dict[str, Any]]]) -> None:
    model = tiny("llama")
    dense = _logits(model)
    with sparsekit.apply(model, HEADS):
        expected, tokens = _logits(model), model.generate(_ids(), max_new_tokens=4, do_sample=False)
    assert float((expected - dense).abs().max()) > 1e-2
    one, two = (rank["heads"] for rank in ranks)
    for rank in (one, two):
        assert rank["width"] == 2 * 16
        assert float((rank["logits"] - expected).abs().max()) < 1e-5
        assert float((rank["compiled"] - expected).abs().max()) < 1e-5
        assert torch.equal(rank["tokens"], tokens)
    # The model's head numbers; a process whose heads are all dense runs the model's own attention.
    assert one["patterns"][0].startswith("heads 0: triangle(")
    assert "heads 2: a_shape(" in two["patterns"][0]
    assert "heads 3: triangle(" in two["patterns"][0]
    assert one["patterns"][1] == "dense"
    assert "heads 3: block_topk(" in two["patterns"][1]
    assert "threshold=0.9 | 0.2," in one["patterns"][3] and "threshold=0.5 | 0.1," in two["patterns"][3]
    assert one["ran"] == ["sparse", "dense", "sparse", "sparse"]
    assert two["ran"] == ["sparse", "sparse", "sparse", "sparse"]


def test_tensor_parallel_heads_reuse_plans_of_their_process(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """A head map that keeps to the heads of a process; one that does not is refused in every process."""
    model = tiny("llama")
    with sparsekit.apply(model, REUSED):
        expected = _logits(model)
    for rank, other in zip(ranks, (2, 0), strict=True):
        got = rank["reused"]
        assert float((got["logits"] - expected).abs().max()) < 1e-5
        assert float((got["compiled"] - expected).abs().max()) < 1e-5
        assert got["ran"] == ["sparse"] * 3 + ["dense"]
        assert f"run the plan of head {other}, which another process has" in rank["crossed"]["error"]


def _halve(model: PreTrainedModel, rank: int) -> None:
    """One process' weights of two, cut out by hand, which tells nobody which part they are."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name).weight = nn.Parameter(getattr(attention, name).weight.chunk(2, 0)[rank])
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.chunk(2, 1)[rank])


def test_heads_that_cannot_be_told_are_refused() -> None:
    """Layers whose heads are alike run; where they differ, guessing would be silently wrong."""
    model = tiny("llama")
    _halve(model, 1)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        _logits(model)
        assert {row.ran for row in handle.report().layers} == {"sparse"}
    with (
        sparsekit.apply(model, HEADS),
        pytest.raises(SparsekitError, match=r"layer 0 has 4 query heads .* 2 of them came here"),
    ):
        _logits(model)
