"""What is wrong is refused: one line that names the field, the value and the fix, exit code not 0, nothing changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from soon import soon
from transformers import PreTrainedModel
from typer.testing import CliRunner

import sparsekit
from sparsekit import SparsekitError, models
from sparsekit.cli import app
from sparsekit.lab.options import numbers_of, patterns_of

MODEL = "model: {num_layers: 30, num_heads: 9}\n"


class Bad(NamedTuple):
    """A config, and the words that its error must hold."""

    label: str
    text: str
    says: tuple[str, ...]


CONFIGS = [
    Bad("unknown pattern", "default: bogus\n", ("default", "'bogus'", "a_shape, block_topk, dense")),
    Bad(
        "misspelt pattern",
        'layers: {"0-3": trianlge}\n',
        ("layers.'0-3'", "'trianlge'", "Did you mean 'triangle'?"),
    ),
    Bad(
        "last_n for last_tokens",
        "default: {name: triangle, last_n: 128}\n",
        ("default", "'last_n' = 128", "sink_tokens, window_tokens, last_tokens", "Did you mean 'last_tokens'?"),
    ),
    Bad("layer 40 of 30", 'layers: {"40": triangle}\n', ("layers.'40'", "layer 40", "30 layers", "0-29")),
    Bad("range past the end", 'layers: {"21-30": triangle}\n', ("layers.'21-30'", "layer 30", "0-29")),
    Bad("overlapping ranges", 'layers: {"0-5": dense, "5-8": triangle}\n', ("layers", "'5-8'", "'0-5'", "at 5")),
    Bad("range backwards", 'layers: {"5-3": dense}\n', ("layers", "'5-3'", "ends before it starts")),
    Bad("range of words", "layers: {last: triangle}\n", ("layers", "'last'", '"0-15"')),
    Bad("head 12 of 9", 'heads: {"3": {"12": triangle}}\n', ("heads.'3'.'12'", "head 12", "9 heads", "0-8")),
    Bad("overlapping heads", 'heads: {"3": {"0-4": dense, 4: triangle}}\n', ("heads: '3'", "4 and '0-4' overlap at 4")),
    Bad("negative window", "default: {name: triangle, window_tokens: -512}\n", ("window_tokens = -512", "equal to 1")),
    Bad("no last rows", "default: {name: triangle, last_tokens: 0}\n", ("last_tokens = 0", "equal to 1")),
    Bad("wrong type", 'default: {name: triangle, window_tokens: "512"}\n', ("window_tokens = '512'", "valid integer")),
    Bad(
        "wrong type of a field",
        "dense_below_tokens: many\n",
        ("dense_below_tokens = 'many'", "a whole number", "or 'auto'"),
    ),
    Bad("layers as a list", "layers: [triangle]\n", ("layers = ['triangle']", "dictionary")),
    Bad("pattern as a number", "default: 7\n", ("default", "7 is not a pattern", "a name, or a mapping")),
    Bad("pattern without name", "default: {window_tokens: 3}\n", ("default", "needs a `name`", "triangle")),
    Bad("unknown field", 'layerz: {"0": dense}\n', ("'layerz'", "Did you mean 'layers'?")),
    Bad("misspelt budget", "budjet: {kl: 0.1}\n", ("'budjet'", "Did you mean 'budget'?")),
    Bad("unknown field of a budget", "budget: {kld: 0.1}\n", ("budget", "'kld' = 0.1", "kl, prompts", "mean 'kl'?")),
    Bad("a budget of nothing", "budget: {kl: 0}\n", ("budget.kl = 0", "greater than 0")),
    Bad("no number", "budget: {kl: .nan}\n", ("budget.kl = nan", "finite")),
    Bad("a budget without its bound", "budget: {}\n", ("budget.kl is missing", "nats a token")),
    Bad("a budget as a number", "budget: 0.005\n", ("budget = 0.005", "dictionary")),
    Bad(
        "misspelt field of its prompts",
        "budget: {kl: 0.1, prompts: {source: a, cuont: 3, tokens: [5, 6]}}\n",
        ("budget.prompts", "'cuont' = 3", "source, count, tokens, next_tokens", "mean 'count'?"),
    ),
    Bad(
        "lengths the wrong way round",
        "budget: {kl: 0.1, prompts: {source: a, count: 3, tokens: [6, 5]}}\n",
        ("budget.prompts.tokens", "[6, 5]", "the shortest prompt comes first"),
    ),
    Bad(
        "no prompts",
        "budget: {kl: 0.1, prompts: {source: a, count: 0, tokens: [5, 6]}}\n",
        ("budget.prompts.count = 0", "equal to 1"),
    ),
    Bad("unknown model fact", "model: {num_layer: 30}\n", ("'num_layer' = 30", "Did you mean 'num_layers'?")),
    Bad("unknown version", "version: 2\n", ("version = 2", "should be 1")),
    Bad("a version that is true", "version: true\n", ("version = True", "whole number 1")),
    Bad("a version with a point", "version: 1.0\n", ("version = 1.0", "whole number 1")),
    Bad("misspelt choice", "dense_impl: kernal\n", ("dense_impl = 'kernal'", "'model' or 'kernel'")),
    Bad("misspelt precision", "precision: pf8\n", ("precision = 'pf8'", "'model' or 'fp8'", "Did you mean 'fp8'?")),
    Bad(
        "precision of a dense layer",
        'precision: {"2": fp8}\n',
        ("precision.'2' = 'fp8'", "layer 2 is dense", "dense_impl: kernel"),
    ),
    Bad("min_queries too small", "min_queries: 1\n", ("min_queries = 1", "equal to 2")),
    Bad("empty union", "default: {name: union, of: []}\n", ("union: of", "at least 1 item")),
    Bad("union of nothing known", "default: {name: union, of: [nope]}\n", ("of[0]", "'nope'", "triangle")),
    Bad("key written twice", 'layers: {"0": dense, "0": triangle}\n', ("line 1", "'0' is written twice")),
    Bad("empty file", "", ("empty", "version: 1")),
    Bad("only comments", "# nothing\n", ("empty", "version: 1")),
    Bad("a list", "- triangle\n- dense\n", ("mapping is needed", "this is a list")),
    Bad("not YAML", "default: [dense\n", ("not YAML", "line 2")),
]

run = CliRunner()


def _one_line(stderr: str) -> str:
    """The error, after checking that it is one line without a traceback."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in stderr
    return lines[0]


def _write(tmp_path: Path, text: str) -> Path:
    """The config in a file, with the facts of a model of 30 layers unless it is about those."""
    path = tmp_path / "c.yaml"
    complete = bool(text.strip()) and ":" in text and "model:" not in text and not text.startswith(("#", "-"))
    path.write_text(text + MODEL if complete else text)
    return path


@pytest.mark.parametrize("command", [["validate"], ["explain", "--tokens", "8192"]], ids=["validate", "explain"])
@pytest.mark.parametrize("bad", CONFIGS, ids=[bad.label for bad in CONFIGS])
def test_commands_refuse_a_bad_config(bad: Bad, command: list[str], tmp_path: Path) -> None:
    path = _write(tmp_path, bad.text)
    before = path.read_bytes()
    result = run.invoke(app, [*command, str(path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    error = _one_line(result.stderr)
    for words in bad.says:
        assert words in error
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return models.tiny("llama")


@pytest.mark.parametrize("bad", CONFIGS, ids=[bad.label for bad in CONFIGS])
def test_apply_refuses_a_bad_config_and_leaves_the_model(bad: Bad, tmp_path: Path, tiny: PreTrainedModel) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(bad.text)
    before = (tiny.config.to_json_string(), tiny.config._attn_implementation)
    with pytest.raises(SparsekitError) as caught:
        sparsekit.apply(tiny, path)
    assert "\n" not in str(caught.value)
    assert (tiny.config.to_json_string(), tiny.config._attn_implementation) == before


def test_a_model_that_runs_another_config_keeps_it() -> None:
    model = models.tiny("llama")
    with sparsekit.apply(model, {"default": "triangle"}) as handle, torch.inference_mode():
        ids = torch.arange(200)[None]
        before = model(ids).logits
        with pytest.raises(SparsekitError):
            sparsekit.apply(model, {"layers": {"40": "triangle"}})
        assert handle.active
        assert torch.equal(model(ids).logits, before)


def test_a_config_for_another_model() -> None:
    config = str(Path(__file__).parents[2] / "configs/qwen2.5-7b/trianglemix.yaml")
    for command in (["validate", config], ["explain", config, "--tokens", "8192"]):
        result = run.invoke(app, [*command, "--model", "smollm2-135m"])
        assert result.exit_code == 1
        error = _one_line(result.stderr)
        for words in ("model.num_layers", "28", "Qwen/Qwen2.5-7B-Instruct", "30", "use that model's config"):
            assert words in error


def test_facts_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("default: triangle\n")
    result = run.invoke(app, ["validate", str(path)])
    assert result.exit_code == 1
    assert "num_layers and num_heads are needed" in _one_line(result.stderr)


def _missing(tmp_path: Path) -> list[str]:
    (tmp_path / "trianglemix.yaml").write_text(MODEL)
    return ["validate", str(tmp_path / "trianglemx.yaml")]


def _folder(tmp_path: Path) -> list[str]:
    return ["validate", str(tmp_path)]


def _binary(tmp_path: Path) -> list[str]:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    return ["validate", str(tmp_path / "b.yaml")]


def _unknown_model(tmp_path: Path) -> list[str]:
    (tmp_path / "c.yaml").write_text(MODEL)
    return ["validate", str(tmp_path / "c.yaml"), "--model", "smollm2-135"]


def _no_tokens(tmp_path: Path) -> list[str]:
    (tmp_path / "c.yaml").write_text(MODEL)
    return ["explain", str(tmp_path / "c.yaml"), "--tokens", "0"]


def _bad_picture(tmp_path: Path) -> list[str]:
    (tmp_path / "c.yaml").write_text(MODEL)
    return ["plots", "mask", str(tmp_path / "c.yaml"), "--tokens", "300", "-o", str(tmp_path / "mask.bmp")]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (_missing, ("trianglemx.yaml", "no such file", "Did you mean", "trianglemix.yaml")),
        (_folder, ("is a folder",)),
        (_binary, ("b.yaml", "cannot be read as text")),
        (_unknown_model, ("'smollm2-135'", "Did you mean 'smollm2-135m'?")),
        (_no_tokens, ("tokens = 0", "from 1 to")),
        (_bad_picture, ("mask.bmp", ".png, .svg, .pdf")),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_commands_refuse_bad_arguments(
    args: Callable[[Path], list[str]], says: tuple[str, ...], tmp_path: Path
) -> None:
    given = args(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run.invoke(app, given)
    assert result.exit_code == 1
    error = _one_line(result.stderr)
    for words in says:
        assert words in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("impl", "says"),
    [
        ("triton", ("impl='triton'", "cpu", "TRITON_INTERPRET=1")),
        ("hopper", ("impl='hopper'", "cpu")),
        ("tritn", ("impl='tritn'", "torch, reference", "Did you mean 'triton'?")),
    ],
)
def test_an_implementation_that_cannot_run_here(
    impl: str, says: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 2, 100, 16)
    with pytest.raises(SparsekitError) as caught:
        sparsekit.attention(q, q, q, "triangle", impl=impl)
    assert "\n" not in str(caught.value)
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("redirect", "says"),
    [(">/dev/full", "error: stdout: No space left on device."), (">&-", "error: stdout is closed;")],
    ids=["full", "closed"],
)
@pytest.mark.parametrize("command", ["validate c.yaml", "patterns --json", "--help", "explain c.yaml -n 4096"])
def test_a_full_or_closed_stdout_is_one_line(command: str, redirect: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(MODEL)
    code = f"{sys.executable} -m sparsekit {command} {redirect}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(says) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "patterns", ["{name: triangle, sink_tokens: 1, sink_tokens: 2}", "{", "!!int 3", "[" * 5000, "a: 010: b"]
)
def test_patterns_in_options_are_read_as_strictly_as_configs(patterns: str, tmp_path: Path) -> None:
    args = ["calibrate", "rule", "nowhere", "--rule", "list", "--layers", "1", "-o", str(tmp_path / "c.yaml")]
    result = run.invoke(app, [*args, "--pattern", patterns])
    assert result.exit_code == 1 and "--pattern" in _one_line(result.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("numbers", ["9" * 5000, "3000000000", "1,2,x", "²", ",", "1," * 2000])
def test_numbers_in_options_are_bounded(numbers: str) -> None:
    with pytest.raises(SparsekitError, match="--seeds") as caught:
        numbers_of(numbers, "--seeds")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["dense ]# , anything", "dense, #triangle", "dense]", "dense], [triangle"])
def test_nothing_of_a_list_of_patterns_is_hidden(text: str) -> None:
    with pytest.raises(SparsekitError, match=r"^--patterns .*want names, or mappings") as error:
        patterns_of(text)
    assert "\n" not in str(error.value)


def test_a_mapping_that_holds_too_much_is_refused_at_once() -> None:
    bomb: Any = "a_shape"
    for _ in range(18):
        bomb = {"name": "union", "of": [bomb, bomb, "a_shape"]}
    long = {"name": "xattention", "threshold": [0.9] * 4097}
    for pattern, says in ((bomb, "more than 100,000 values"), (long, "a list of 4,097 values")):

        def refused(pattern: Any = pattern, says: str = says) -> None:
            with pytest.raises(SparsekitError, match=says):
                sparsekit.load({"default": pattern})

        soon(refused, 2)
    assert sparsekit.load({"provenance": {"curve": [0.5] * 5000}}).provenance["curve"][0] == 0.5
