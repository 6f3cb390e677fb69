"""Settings of AngelSlim, vllm-ascend and Model-Optimizer: what is the same selection converts, the rest says why not.

Field names are of Tencent/AngelSlim main at 67394ce (7 August 2026; its release 0.5.0 has no such YAML yet), of
vllm-ascend 0.23.0.post1 with `trianglemix` as in ackerm0n/Sparse-attention-op-for-Ascend-NPU- at d671901 (vllm-ascend
pull request 13331), and of nvidia-modelopt 0.47.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sparsekit import SparsekitError, load
from sparsekit.cli import app
from sparsekit.config import ModelFacts, angelslim, vllm_ascend
from sparsekit.config import model_optimizer as modelopt
from sparsekit.config.costs import explain
from sparsekit.config.foreign import Method, method_rows
from sparsekit.patterns import AShape, FlashPrefill, FlexPrefill, Pattern, Triangle, VerticalSlash, XAttention

FACTS = ModelFacts(num_layers=36, num_heads=32, num_key_heads=8)
SINKS = {"n_init": 128, "n_local": 3968}
run = CliRunner()


def _write(folder: Path, data: Any, name: str = "file.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(data) if name.endswith("json") else yaml.safe_dump(data, sort_keys=False))
    return path


# ---- AngelSlim


def _angelslim(name: Any, options: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "global": {"save_path": "./output"},
        "model": {"name": "Qwen", "model_path": "Qwen/Qwen3-8B", "attn_implementation": "flash_attention_2"},
        "compression": {
            "name": "Sparsity",
            "sparsity": {"name": name, "allow_pseudo_sparse": False, "attn_kwargs": options, **more},
        },
    }


@pytest.mark.parametrize(
    ("name", "options", "pattern"),
    [
        ("a_shape", SINKS, AShape(sink_tokens=128, window_tokens=3968)),
        ("a_shape", None, AShape(sink_tokens=128, window_tokens=3968)),
        ("a_shape", {"n_init": 0, "n_local": 16}, AShape(sink_tokens=0, window_tokens=16)),
        ("tri_shape", {**SINKS, "n_last": 64}, Triangle(sink_tokens=128, window_tokens=3968, last_tokens=64)),
        ("tri_shape", {"n_local": 512}, Triangle(sink_tokens=128, window_tokens=512, last_tokens=100)),
    ],
)
def test_static_methods_of_angelslim_convert(name: str, options: Any, pattern: Pattern, tmp_path: Path) -> None:
    path, out = _write(tmp_path, _angelslim(name, options)), tmp_path / "out.yaml"
    config = angelslim.convert_angelslim(path, out, model=FACTS)
    assert load(out) == config and config.default == pattern
    assert {layer.patterns for layer in config.resolve().layers} == {(pattern,)}
    assert explain(config, 8192).layers
    assert config.provenance == {
        "converted_from": "file.yaml",
        "format": "angelslim",
        "method": name,
        "left_out": ["global", "model", "compression.sparsity.allow_pseudo_sparse"],
    }
    unbound = angelslim.convert_angelslim(path)
    assert (unbound.model.name, unbound.model.num_layers) == ("Qwen/Qwen3-8B", None)


NEAREST: list[tuple[str, dict[str, Any] | None, Pattern]] = [
    ("minference", None, VerticalSlash(vertical_tokens=1000, slash_tokens=6096, dense_below_tokens=0)),
    (
        "xattention",
        {"stride": 8, "norm": 1, "threshold": 0.8, "block_size": 128, "chunk_size": 2048},
        XAttention(threshold=0.8, stride=8, dense_below_tokens=0),
    ),
    (
        "flexprefill",
        {"gamma": 0.95, "tau": 0, "block_size": 128},
        FlexPrefill(gamma=0.95, tau=0, min_budget_tokens=1, dense_below_tokens=0),
    ),
    (
        "flexprefill",
        {"min_budget": 1024, "max_budget": 4096},
        FlexPrefill(gamma=0.9, tau=0.1, min_budget_tokens=1024, max_budget_tokens=4096, dense_below_tokens=0),
    ),
    (
        "flashprefill",
        {"alpha": 0.2, "block_size": 128, "sink": 200, "window": 64, "last_n_block_full": 2},
        FlashPrefill(alpha=0.2, sink_blocks=1, window_blocks=1, last_blocks=2, dense_below_tokens=0),
    ),
    ("flashprefill", {}, FlashPrefill(alpha=0.2, sink_blocks=2, window_blocks=4, last_blocks=2, dense_below_tokens=0)),
]


@pytest.mark.parametrize(("name", "options", "pattern"), NEAREST)
def test_methods_that_select_otherwise_are_written_only_where_that_is_asked_for(
    name: str, options: Any, pattern: Pattern, tmp_path: Path
) -> None:
    path, out = _write(tmp_path, _angelslim(name, options)), tmp_path / "out.yaml"
    with pytest.raises(SparsekitError) as refused:
        angelslim.convert_angelslim(path, out)
    assert f"compression.sparsity: {name} {angelslim.METHODS[name].differs}" in str(refused.value)
    assert not out.exists()
    # What the error says to write is what the option writes.
    quoted = str(refused.value).partition("Nearest: ")[2].partition("; --nearest")[0]
    config = angelslim.convert_angelslim(path, out, nearest=True, model=FACTS)
    assert config.default.to_yaml() == yaml.safe_load(quoted)
    assert load(out) == config and {layer.patterns for layer in config.resolve().layers} == {(pattern,)}
    assert config.provenance["differs"] == f"AngelSlim {angelslim.METHODS[name].differs}"
    assert explain(config, 8192).layers


@pytest.mark.parametrize("name", [name for name, method in angelslim.METHODS.items() if not method.pattern])
def test_methods_that_are_no_pattern_name_the_nearest(name: str, tmp_path: Path) -> None:
    path = _write(tmp_path, _angelslim(name, {"block_size": 128}))
    for nearest in (False, True):
        with pytest.raises(
            SparsekitError, match=rf"sparsity: {name} .*, which no pattern of sparsekit does; nearest: "
        ):
            angelslim.convert_angelslim(path, tmp_path / "out.yaml", nearest=nearest)
    assert not (tmp_path / "out.yaml").exists()


def _changed(data: dict[str, Any], at: str, value: Any) -> dict[str, Any]:
    keys = at.split(".")
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return data


SPARSITY = "compression.sparsity"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([1], r"\[1\]: want a mapping with global, model, compression"),
        ({}, "compression.name = None: only 'Sparsity' says which pairs are kept"),
        (_changed(_angelslim("a_shape"), "compression.name", "PTQ"), "compression.name = 'PTQ': only 'Sparsity'"),
        (
            _changed(_angelslim("a_shape"), "compresion", {}),
            r"unknown field 'compresion' = \{\}.*Did you mean 'compres",
        ),
        (_changed(_angelslim("a_shape"), "compression.quantization", {}), "compression: unknown field 'quantization'"),
        (_angelslim("a_shape", atn_kwargs={}), "unknown field 'atn_kwargs'.*Did you mean 'attn_kwargs'"),
        (_angelslim("a-shape"), "unknown method 'a-shape'; one of a_shape, .*Did you mean 'a_shape'"),
        (_angelslim(None), "unknown method None"),
        (_angelslim("a_shape", [3]), r"a_shape: \[3\]: want a mapping with n_init, n_local, n_last"),
        (_angelslim("a_shape", {"n_locl": 4}), "a_shape: unknown field 'n_locl' = 4.*Did you mean 'n_local'"),
        (_angelslim("a_shape", {"n_init": "128"}), "a_shape: n_init = '128': it should be a number"),
        (_angelslim("a_shape", {"n_init": True}), "a_shape: n_init = True: it should be a number"),
        (_angelslim("a_shape", {"n_init": float("nan")}), "a_shape: n_init = nan: it should be a number"),
        (
            _angelslim("a_shape", {"n_local": 0}),
            "a_shape: a_shape: window_tokens = 0: it should be greater than or equal",
        ),
        (_angelslim("tri_shape", {"n_last": 0}), "tri_shape: triangle: last_tokens = 0"),
        (_angelslim("minference", {"pattern_path": "q.json"}), "pattern_path = 'q.json': budgets of single heads"),
        (_angelslim("xattention", {"norm": 2}), "xattention: norm = 2: sparsekit divides the logits by nothing more"),
        (_angelslim("xattention", {"norm": True}), "xattention: norm = True: "),
        (_angelslim("xattention", {"stride": 32}), "xattention: stride = 32: it should be 4, 8 or 16"),
        (_angelslim("xattention", {"threshold": [0.9]}), r"xattention: threshold = \[0.9\]: it should be a number"),
        (_angelslim("flexprefill", {"block_size": 64}), "block_size = 64: sparsekit's blocks have 128 tokens"),
        (_angelslim("flashprefill", {"sink": float("inf")}), "flashprefill: sink = inf: it should be a number"),
        (
            _angelslim("flashprefill", {"alpha": 0}),
            "flashprefill: flashprefill: alpha = 0: it should be greater than 0",
        ),
    ],
)
def test_files_of_angelslim_that_do_not_fit(data: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(SparsekitError, match=says):
        angelslim.convert_angelslim(_write(tmp_path, data), tmp_path / "out.yaml", nearest=True)
    assert not (tmp_path / "out.yaml").exists()


# ---- vllm-ascend

TRIANGLEMIX = {"enabled": True, "layers": "5,7,10,15-35", "strict": False, "stats_log_interval": 100}


@pytest.mark.parametrize("layers", ["5,7,10,15-35", [5, 7, "10", "15-20", "20-35"], " 7, 5,10-10, 15-35,"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_trianglemix_of_vllm_ascend(layers: Any, wrapped: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trianglemix": {**TRIANGLEMIX, "layers": layers}, "enable_cpu_binding": True}
    path = _write(tmp_path, {"additional_config": settings} if wrapped else settings, "file.json")
    out = tmp_path / "out.yaml"
    config = vllm_ascend.convert_vllm_ascend(path, out, model=FACTS)
    assert load(out) == config
    # Its window is the query and 512 keys before it; sparsekit's counts the query.
    assert config.layers == {"5,7,10,15-35": Triangle(sink_tokens=8, window_tokens=513, last_tokens=128)}
    assert config.provenance["left_out"] == [
        "enable_cpu_binding",
        "trianglemix.strict",
        "trianglemix.stats_log_interval",
    ]
    assert [layer.dense for layer in config.resolve().layers].count(False) == 24
    assert explain(config, 8192).layers


@pytest.mark.parametrize("tokens", [2600, 4096])
def test_the_window_of_trianglemix_is_what_its_operator_skips(tokens: int) -> None:
    """Row q of those from 521 to the last 128 skips q - 520 keys, as its plan counts them."""
    skipped = sum(q - 520 for q in range(521, tokens - 128))
    pattern = Triangle(sink_tokens=8, window_tokens=513, last_tokens=128)
    config = load({"version": 1, "model": {"num_layers": 1, "num_heads": 1}, "default": pattern.to_yaml()})
    assert explain(config, tokens).layers[0].density * tokens * (tokens + 1) / 2 == pytest.approx(
        tokens * (tokens + 1) // 2 - skipped, abs=0.5
    )


@pytest.mark.parametrize(
    ("gates", "shortest"),
    [
        # 1,612 rows drop 1,612 * 1,613 / 2 = 1,300,078 pairs; one row fewer drops 1,298,466.
        ({}, 649 + 1612),
        ({"min_seq_len": 8192}, 8192),
        ({"min_saved_qk": 0, "split_min_saved_qk": 0}, 649 + 192),
        ({"min_saved_qk": 0, "split_min_saved_qk": 0, "split_min_sparse_rows": 0}, 649 + 128),
        (dict.fromkeys(vllm_ascend.GATES, 0), 650),
    ],
)
def test_shorter_prompts_are_dense_as_its_gates_say(gates: dict[str, int], shortest: int, tmp_path: Path) -> None:
    path = _write(tmp_path, {"trianglemix": {"enabled": True, "layers": "3", **gates}})
    assert vllm_ascend.convert_vllm_ascend(path).dense_below_tokens == shortest


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, r"trianglemix: enabled = None: without true no layer runs it\."),
        ({"trianglemix": {**TRIANGLEMIX, "enabled": False}}, "trianglemix: enabled = False: without true"),
        ({"trianglemix": {"enabled": True}}, r"trianglemix: layers = None: want the layers.*\"5,7,15-35\""),
        ({"trianglemix": {"enabled": True, "layers": ""}}, "trianglemix: layers = '': want the layers"),
        ({"trianglemix": {"enabled": True, "layers": True}}, "trianglemix.layers: 'True' is not a range"),
        ({"trianglemix": {"enabled": True, "layers": "5-3"}}, "trianglemix.layers: '5-3': '5-3' ends before it starts"),
        ({"trianglemix": {**TRIANGLEMIX, "layer": "3"}}, "trianglemix: unknown field 'layer'.*Did you mean 'layers'"),
        (
            {"trianglemix": {**TRIANGLEMIX, "local_window": 1024}},
            "local_window = 1024: its operator has 8, 512 and 128",
        ),
        ({"trianglemix": {**TRIANGLEMIX, "sink_tokens": 4}}, "sink_tokens = 4: its operator"),
        ({"trianglemix": {**TRIANGLEMIX, "min_seq_len": -1}}, "min_seq_len = -1: it should be a whole number from 0"),
        ({"trianglemix": {**TRIANGLEMIX, "min_seq_len": 0.5}}, "min_seq_len = 0.5: it should be a whole number"),
        ({"trianglemix": [1]}, r"trianglemix: \[1\]: want a mapping"),
        ({"triangle_mix": {}}, "unknown field 'triangle_mix'.*Did you mean 'trianglemix'"),
        (
            {"hamming_sparse": {"enabled": True, "sparse_json_location": "x"}},
            "hamming_sparse chooses keys for decoding",
        ),
        ({"ucm_sparse_config": {"GSAOnDevice": {}}}, "ucm_sparse_config chooses keys for decoding"),
        (
            {"trianglemix": TRIANGLEMIX, "enable_sparse_sfa_c8": True},
            "enable_sparse_sfa_c8 belongs to sparse attention",
        ),
        ({"additional_config": {}, "model": "x"}, "unknown field 'model' = 'x'; allowed: additional_config"),
    ],
)
def test_settings_of_vllm_ascend_that_do_not_fit(data: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(SparsekitError, match=says):
        vllm_ascend.convert_vllm_ascend(_write(tmp_path, data), tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


def test_settings_that_are_off_are_left_out_and_layers_must_be_there(tmp_path: Path) -> None:
    off = {"hamming_sparse": {"enabled": False, "sparse_json_location": ""}, "enable_sparse_li_c8": False}
    path = _write(tmp_path, {"trianglemix": {"enabled": True, "layers": "15-35"}, **off})
    assert vllm_ascend.convert_vllm_ascend(path).provenance["left_out"] == [*off]
    with pytest.raises(SparsekitError, match=r"layers\.'15-35': layer 35 of a model with 28"):
        vllm_ascend.convert_vllm_ascend(path, model=ModelFacts(num_layers=28, num_heads=28))


# ---- Model-Optimizer

CALIBRATED = {
    "sparse_cfg": {
        "calibration": {"target_sparse_ratio": {"prefill": 0.5, "decode": 0.5}, "samples": 64, "max_seqlen": 16384},
        "*attn*": {
            "method": "flash_skip_softmax",
            "thresholds": {"prefill": [1e-3], "decode": [1e-4]},
            "br": 128,
            "bc": 128,
            "backend": "pytorch",
            "collect_stats": True,
            "enable": True,
        },
        "default": {"enable": False},
    },
    "export_format": None,
}
EXPORTED = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["LlamaAttention"],
            "ignore": ["model.layers.0.self_attn"],
            "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 7.9, "b": 8.6}},
            "target_sparsity": {"prefill": 0.5},
        },
        "group_1": {"algorithm": "sparse_softmax", "sparsity_n": 2, "sparsity_m": 4, "dense_sink_tokens": 4},
    },
    "producer": {"name": "modelopt", "version": "0.47.0"},
}
CHECKPOINT = {"model_type": "llama", "num_hidden_layers": 32, "sparse_attention_config": EXPORTED}


@pytest.mark.parametrize(
    ("data", "fields", "first"),
    [
        (CALIBRATED, 12, r"\*attn\*: flash_skip_softmax skips a tile of keys .* at run time, which no pattern"),
        (EXPORTED, 10, "group_0: skip_softmax skips a tile of keys"),
        (CHECKPOINT, 10, "group_0: skip_softmax skips a tile of keys"),
        ({"sparse_cfg": {"*": {"method": "vsa", "video_shape": [4, 8, 8]}}}, 2, r"\*: vsa chooses cubes of a video"),
        ({"sparse_cfg": {"*": {"br": 64}}}, 1, r"\*: flash_skip_softmax skips"),
        ({"sparse_softmax": {"sparsity_n": 2}}, 1, "sparse_softmax: sparse_softmax keeps the N of every M"),
        (
            {"sparse_cfg": {"default": {"enable": False}}},
            1,
            "no method is enabled in it; `default: dense` says the same",
        ),
    ],
)
def test_model_optimizer_is_read_field_by_field(data: Any, fields: int, first: str, tmp_path: Path) -> None:
    path = _write(tmp_path, data, "config.json")
    rows, reason = modelopt.read_model_optimizer(path)
    assert len(rows) == len({row.field for row in rows}) == fields
    assert all(row.meaning for row in rows)
    done = run.invoke(app, ["convert", "model-optimizer", str(path)])
    assert done.exit_code == 0 and done.stdout.endswith(f"{reason}\n")
    assert all(row.field[:30] in done.stdout for row in rows)
    with pytest.raises(SparsekitError, match=first):
        raise SparsekitError(reason)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([1], r"\[1\]: want a mapping with sparse_cfg or sparse_attention_config"),
        ({"model_type": "llama"}, "neither sparse_cfg nor sparse_attention_config: nothing of it is sparse"),
        ({"sparse_cfg": None}, "sparse_cfg = None: want a mapping"),
        (
            {"sparse_cfg": {}, "sparse_config": 1},
            "unknown field 'sparse_config' = 1; allowed: sparse_cfg, export_format",
        ),
        ({"sparse_cfg": {"*attn*": {"treshold": 1}}}, r"\*attn\*: unknown field 'treshold'.*Did you mean 'threshold'"),
        ({"sparse_cfg": {"*attn*": {"method": "skip"}}}, r"\*attn\*: unknown method 'skip'; one of flash_skip_softmax"),
        ({"sparse_cfg": {"*attn*": 3}}, r"\*attn\*: 3: want a mapping"),
        (
            {"sparse_attention_config": {"config_group": {}}},
            "unknown field 'config_group'.*Did you mean 'config_groups'",
        ),
    ],
)
def test_settings_of_model_optimizer_that_do_not_fit(data: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(SparsekitError, match=says):
        modelopt.read_model_optimizer(_write(tmp_path, data))


# ---- all of them


def test_the_commands_say_what_is_not_in_the_config(tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    path = _write(tmp_path, _angelslim("xattention", {"chunk_size": 2048}))
    refused = run.invoke(app, ["convert", "angelslim", str(path), "-o", str(out)])
    assert refused.exit_code == 1 and "--nearest writes it" in refused.stderr and not out.exists()
    done = run.invoke(app, ["convert", "angelslim", str(path), "-o", str(out), "--nearest"])
    assert done.exit_code == 0 and done.stdout == f"{out}\n"
    assert "another selection: AngelSlim keeps a key block more" in done.stderr
    assert "compression.sparsity.attn_kwargs.chunk_size" in done.stderr
    assert run.invoke(app, ["validate", str(out), "--model", "smollm2-135m"]).exit_code == 0
    path = _write(tmp_path, {"trianglemix": {"enabled": True, "layers": "15-35"}})
    done = run.invoke(app, ["convert", "vllm-ascend", str(path), "-o", str(out), "--model", "smollm2-135m"])
    assert done.exit_code == 1 and "layer 35 of a model with 30 layers" in done.stderr
    done = run.invoke(app, ["convert", "vllm-ascend", str(path), "-o", str(out)])
    assert done.exit_code == 0 and done.stderr == "" and done.stdout == f"{out}\n"


@pytest.mark.parametrize("module", [angelslim, vllm_ascend, modelopt], ids=lambda module: module.__name__[17:])
def test_the_page_has_the_table_of_methods(module: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    methods: dict[str, Method] = module.METHODS
    table = "\n".join(f"| {' | '.join(row)} |" for row in method_rows(methods))
    assert table in page, f"docs/convert.md has another table; the methods' is\n{table}"


if __name__ == "__main__":  # the tables of docs/convert.md
    for methods in (angelslim.METHODS, vllm_ascend.METHODS, modelopt.METHODS):
        print("\n".join(f"| {' | '.join(row)} |" for row in method_rows(methods)), end="\n\n")
