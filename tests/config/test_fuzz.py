"""Thousands of bad inputs, always the same ones: one line or a clean result, soon and in little memory.

Mutations of good files (bytes, lines, values, keys), random structures, odd scalars and keys, cut files, deep nesting,
huge numbers, Unicode, keys twice. Each goes through whatever reads it: `load`, `resolve`, `validate` and `explain`, the
patterns of options, `convert`, questions of sweeps and their runs, and the commands.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import warnings
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from soon import seconds_of
from typer.testing import CliRunner

from sparsekit import SparsekitError, explain, load
from sparsekit.cli import app, validate
from sparsekit.config import parse_range
from sparsekit.config.angelslim import convert_angelslim
from sparsekit.config.convert import convert_minference, convert_xattention
from sparsekit.config.kascade import convert_kascade
from sparsekit.config.model_optimizer import read_model_optimizer
from sparsekit.config.vllm_ascend import convert_vllm_ascend
from sparsekit.lab.options import numbers_of, patterns_of
from sparsekit.lab.sweep import load_question
from sparsekit.patterns import parse_pattern

SECONDS = 2.0
MEGABYTES = 500

CONFIG = """
version: 1
model: {name: some/model, num_layers: 6, num_heads: 4, num_key_heads: 2, head_dim: 16, hidden_size: 64}
dense_below_tokens: 1024
min_queries: 64
dense_impl: model
precision: {"1-2": fp8, 3: model}
default: dense
layers:
  "0-2": {name: triangle, sink_tokens: 8, window_tokens: 512, last_tokens: 128}
  3: &a {name: union, of: [a_shape, {name: vertical_slash, vertical_tokens: 30, slash_tokens: 800}]}
  "4": {name: xattention, threshold: [0.9, 0.8, 0.5, 1.0e-3]}
  "5": {reuse: 4, heads: [3, 0, 0, 1]}
heads:
  "5": {"0-1": a_shape, 3: {name: block_topk, top_k: 100}}
budget: {kl: 5e-3, prompts: {source: p.jsonl, count: 3, tokens: [469, 477], next_tokens: 8, kl: 1.0e-3}}
provenance: {by: hand, date: 2026-11-28, scores: [0.5, 1]}
"""
QUESTION = """
question: How wide?
model: smollm2-135m
base: {default: a_shape, layers: {"2-3": triangle}}
tasks: [passkey, needle4]
lengths: [512, 1024]
samples: 2
seeds: [0, 1]
axes:
  layers.2-3.window_tokens: [64, 128]
  start: {path: ranges.2-3, values: ["0-3", "2-3", null]}
constraints: ["window_tokens * 4 <= tokens or tokens > 100", "not (task == 'passkey' and seed in [1])"]
"""
SEARCH = QUESTION.replace("[64, 128]", "{low: 8, high: 512, log: true}") + (
    "search: {objectives: [score, density], subject_to: score within 1% of dense, trials: 20, batch: 2}\n"
)
MINFERENCE = json.dumps(
    [{str(h): ["vertical_and_slash", 30, 800, 0.5] for h in range(3)} | {"3": ["stream_llm", 4, 64, 1]}] * 3
)
TABLE = "import torch\nllama_8 = torch.tensor([[0.9, 0.5, 0.0], [0.8, 0.8, 0.7], [0.2, 0.93, 0.96]])\n"
ANGELSLIM = """
global: {save_path: ./output}
model: {name: Qwen, model_path: Qwen/Qwen3-8B}
compression:
  name: Sparsity
  sparsity: {name: tri_shape, allow_pseudo_sparse: false, attn_kwargs: {n_init: 128, n_local: 3968, n_last: 100}}
"""
VLLM_ASCEND = 'additional_config: {trianglemix: {enabled: true, layers: "5,7,15-35", min_seq_len: 0, strict: false}}'
MODEL_OPTIMIZER = """
sparse_cfg:
  calibration: {target_sparse_ratio: {prefill: 0.5}, samples: 64}
  "*attn*": {method: flash_skip_softmax, thresholds: {prefill: [1.0e-3]}, br: 128, enable: true}
  default: {enable: false}
"""
FOREIGN = [ANGELSLIM, VLLM_ASCEND, MODEL_OPTIMIZER]
LARGE = "model: {num_layers: 1024, num_heads: 1024}\n"
PATTERNS = "triangle, {name: a_shape, window_tokens: 64}, {name: union, of: [dense, s2o]}"

SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 63, 64, 1023, 4096, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400,
    0.5, 1.0,
    -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), "", " ", "0", "00", "0-0", "1-0",
    "0-300000000", "-1",
    "0,0", "1,,2", "0 1", "²", "٣", "dense", "triangle", "trianlge", "union", "s2o", "name", "of", "\n", "\t", "\x00",
    "\ud800", "\u2028", "é" * 50, "🜁", "x" * 5000, "9" * 5000, "a.b.c", "../..", "/", "/dev/null", "nan", "~",
    "<<", "*a",
    [], [[]], {}, [1, 2], {"name": "triangle"}, {"a": {"b": {}}}, [0] * 300, (), {1: 2, "1": 2}, {None: 1},
    {0.5: "dense"},
    "1e-3", "010", "0x10", "1_000", "2026-11-28", "yes", "!!int 3", "&a", "- x", "{", "]", "#", "%", "tokens > 1",
    "ranges",
]  # fmt: skip
CONSTRAINTS = [
    "'a' * 999999999", "9**9**9**9", "not " * 60 + "1", "-" * 400 + "1", "[1] * 10**9", "'%9999999999d' % 1", "1 is 1",
]  # fmt: skip
NAMES = [
    "version", "model", "default", "layers", "heads", "name", "of", "num_layers", "num_heads", "window_tokens",
    "threshold",
    "axes", "tasks", "lengths", "seeds", "question", "base", "constraints", "search", "path", "values", "low",
    "high", "log",
    "budget", "kl", "prompts", "count",
    "objectives", "trials", "layerz", "top_k", "dense_below_tokens", "provenance", "samples", "dtype", "corpus",
]  # fmt: skip
TOKENS = [
    "{", "}", "[", "]", ":", ",", "-", "&a ", "*a", "!!binary ", "!x ", "|", ">", "'", '"', "\\", "%", "#",
    "<<: *a", "\n", "\t",
    "\r", "\x00", "\ufeff", "\x85", "\ud800", "0", "9" * 40, "1e999", ".inf", "---", "...", "? ", "@", "`", "~",
    "10" * 9,
    "lambda: 0", "()", "**", "open(", "for", "=", "torch.tensor(", "# ", "[" * 200, "{a: " * 100, "- " * 100,
    "(" * 200, "-" * 300,
]  # fmt: skip


def _structure(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 5 or kind < 0.45:
        return rng.choice(SCALARS)
    if kind < 0.6:
        return [_structure(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [rng.choice(NAMES) if rng.random() < 0.8 else rng.choice(SCALARS) for _ in range(rng.randrange(5))]
    return {key: _structure(rng, depth + 1) for key in keys if isinstance(key, str | int | float | type(None))}


def _changed(rng: random.Random, value: Any) -> Any:
    """The same, with one place changed: taken out, put twice, renamed, or another value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        out, key = dict(value), rng.choice(list(value))
        kind = rng.random()
        if kind < 0.6:
            out[key] = _changed(rng, out[key])
        elif kind < 0.7:
            del out[key]
        elif kind < 0.85:
            new = rng.choice(SCALARS)
            out[new if isinstance(new, str | int | float | type(None)) else "x"] = out.pop(key)
        else:
            out[rng.choice(NAMES)] = _structure(rng, 3)
        return out
    if isinstance(value, list) and value and rng.random() < 0.9:
        at, kind = rng.randrange(len(value)), rng.random()
        if kind < 0.6:
            return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
        return value[:at] + value[at + 1 :] if kind < 0.8 else value + [value[at]] * rng.choice([1, 2, 50])
    return _structure(rng, 3)


def _damaged(rng: random.Random, text: str) -> str:
    """The text with a few pieces cut, doubled, moved or put in."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + rng.choice([0, 1, 3, 30]))
        kind = rng.random()
        if kind < 0.15:
            text = text[:a]
        elif kind < 0.3:
            text = text[:a] + text[b:]
        elif kind < 0.45:
            text = text[:b] + text[a:b] * rng.choice([1, 2, 40]) + text[b:]
        else:
            text = text[:a] + rng.choice(TOKENS) + text[b:]
    return text


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None)


def _deep(rng: random.Random) -> str:
    """Small texts that ask for much."""
    n = rng.choice([50, 1000, 9000])
    laughs = "".join(f"{c}: &{c} [{', '.join(['*' + chr(ord(c) - 1)] * 9)}]\n  " for c in "bcdefghij")
    return rng.choice(
        [
            "[" * n, "{a: " * n, "default: " + "{name: union, of: [" * n, "- " * n, "(" * n, "-" * n + "1",
            "[" * n + "]" * n,
            f"layers: {{'0-{'9' * rng.choice([4, 9, 4000])}': triangle}}", f"layers: {{'{'0,' * n}': triangle}}",
            f"provenance:\n  a: &a [x, x, x]\n  {laughs}", "a: &a [*a]", f"default: {'x' * n * 20}",
            "layers: {" + "0: dense, " * n,
            f"model: {{num_layers: {'9' * rng.choice([5, 30, 3000, 5000])}, num_heads: 4}}\ndefault: dense",
            f"default: {{name: triangle, window_tokens: {'9' * rng.choice([5, 30, 3000, 5000])}}}",
            f"{LARGE}default: {{name: xattention, threshold: [{'0.5, ' * min(n, 3000)}]}}",
            LARGE + "heads: {'0-1023': {'0-1022': triangle}}", '{"a":' * n,
            "[[" + "0," * n + "]]",
            QUESTION.replace("[64, 128]", str(list(range(1, 900)))).replace("[0, 1]", str(list(range(700)))),
            QUESTION.replace("[0, 1]", str(list(range(min(n, 3000))))),
            "0.5 " * n, "0.5\n" * n, '[{"0": ["stream_llm", ' + "9" * n + ", 1]}]",
            QUESTION.replace("tokens > 100", rng.choice(CONSTRAINTS)),
        ]
    )  # fmt: skip


@cache
def inputs() -> tuple[str, ...]:
    """2,390 texts."""
    return tuple(_inputs())


def _inputs() -> Iterator[str]:
    rng, parsed = random.Random(20261128), cache(yaml.safe_load)
    good = [CONFIG, QUESTION, SEARCH, MINFERENCE, TABLE, PATTERNS]
    for _ in range(700):
        yield _damaged(rng, rng.choice(good))
    for _ in range(700):
        yield _yaml(_changed(rng, parsed(rng.choice([CONFIG, CONFIG, QUESTION, SEARCH]))))
    for _ in range(200):
        yield json.dumps(_changed(rng, json.loads(MINFERENCE)), default=str)
    for _ in range(220):
        yield _yaml(_structure(rng))
    for _ in range(240):
        yield _yaml(_changed(rng, parsed(rng.choice(FOREIGN))))
    for _ in range(120):
        yield _damaged(rng, rng.choice(FOREIGN))
    for _ in range(80):
        yield str(rng.choice(SCALARS))
    for _ in range(130):
        yield _deep(rng)


def _loads(text: str, path: Path) -> None:
    config = load(path)
    assert load(config.dump()) == config
    validate(path)
    explain(config, 2048)


def _asks(text: str, path: Path) -> None:
    question = load_question(path)
    question.runs()


READERS: dict[str, Callable[[str, Path], Any]] = {
    "load": _loads,
    "load text": lambda text, path: load(text) if len(text) < 300 else None,
    "question": _asks,
    "minference": lambda text, path: convert_minference(path, path.with_name("out.yaml")),
    "xattention": lambda text, path: convert_xattention(path, path.with_name("out.yaml")),
    "kascade": lambda text, path: convert_kascade(path, path.with_name("out.yaml"), anchors=[0], group=2),
    "angelslim": lambda text, path: convert_angelslim(path, path.with_name("out.yaml"), nearest=True),
    "vllm-ascend": lambda text, path: convert_vllm_ascend(path, path.with_name("out.yaml")),
    "model-optimizer": lambda text, path: read_model_optimizer(path),
    "patterns": lambda text, path: [parse_pattern(one) for one in patterns_of(text)],
    "numbers": lambda text, path: numbers_of(text, "--tokens"),
    "range": lambda text, path: parse_range(text),
}


@pytest.fixture
def parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that many readers get is parsed for the first of them: it says the same to all."""
    load = yaml.load

    @lru_cache(maxsize=64)
    def parsed(text: str, loader: Any) -> tuple[bytes, Exception | None]:
        try:
            return pickle.dumps(load(text, loader)), None
        except Exception as error:
            return b"", error

    def again(text: str, loader: Any) -> Any:
        said, error = parsed(text, loader)
        if error is not None:
            raise error
        return pickle.loads(said)

    monkeypatch.setattr(yaml, "load", again)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@pytest.mark.usefixtures("parsed_once")
def test_any_text_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, out = tmp_path / "input", tmp_path / "out.yaml"
    count, slow = 0, []
    read, refused = dict.fromkeys(READERS, 0), dict.fromkeys(READERS, 0)
    _loads(CONFIG, _written(path, CONFIG))  # what is imported and compiled once
    _asks(QUESTION, _written(path, QUESTION))
    before = _peak_mb()
    for text in inputs():
        _write(path, text)
        given = path.read_bytes()
        count += 1
        for name, reader in READERS.items():

            def one(name: str = name, reader: Any = reader, text: str = text) -> bool:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("error")
                        reader(text, path)
                    return True
                except SparsekitError as error:
                    message = str(error)
                    assert "\n" not in message and len(message) < 2000, (name, text[:300], message[:300])
                    assert not out.exists(), (name, text[:300])
                    return False
                except Exception as error:
                    says = f"{name} of {text[:600]!r}: {type(error).__name__}: {str(error)[:300]}"
                    raise AssertionError(says) from error
                finally:
                    out.unlink(missing_ok=True)

            taken, took = seconds_of(one, SECONDS)
            (read if taken else refused)[name] += 1
            if took > SECONDS:
                slow.append((name, round(took, 1), text[:200]))
        assert path.read_bytes() == given
    assert not slow
    assert _peak_mb() - before < MEGABYTES
    assert count >= 2000 and min(refused.values()) > 50, (count, refused)
    taking = ("load", "question", "minference", "xattention", "angelslim", "vllm-ascend", "model-optimizer", "patterns")
    assert all(read[name] > 5 for name in taking), read


def _written(path: Path, text: str) -> Path:
    _write(path, text)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["validate", "FILE"],
        ["explain", "FILE", "-n", "2048", "--json"],
        ["convert", "minference", "FILE", "-o", "out.yaml"],
        ["convert", "xattention", "FILE", "-o", "out.yaml"],
        ["convert", "angelslim", "FILE", "-o", "out.yaml", "--nearest"],
        ["convert", "vllm-ascend", "FILE", "-o", "out.yaml"],
        ["convert", "model-optimizer", "FILE"],
        ["sweep", "FILE", "--dry-run"],
        ["calibrate", "rule", "nowhere", "--rule", "list", "--layers", "TEXT", "--pattern", "TEXT", "-o", "out.yaml"],
        ["report", "FILE", "-o", "out.md"],
        ["TEXT"],
        ["explain", "TEXT", "-n", "TEXT"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_commands_end_with_one_line(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fiftieth input: exit code 0, or 1 or 2 with one error on stderr and nothing written."""
    monkeypatch.chdir(tmp_path)
    path, run = Path("input"), CliRunner()
    for text in inputs()[::50]:
        _write(path, text)
        given = [str(path) if word == "FILE" else text[:3000] if word == "TEXT" else word for word in command]

        def one(given: list[str] = given) -> Result:
            for made in set(tmp_path.iterdir()) - {tmp_path / "input"}:
                made.unlink()
            return run.invoke(app, given)

        result, took = seconds_of(one, SECONDS)
        assert took <= SECONDS, text[:300]
        assert result.exit_code in (0, 1, 2), (text[:300], result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit), (text[:300], result.exception)
        if result.exit_code == 1:
            assert result.stdout == "" and result.stderr.startswith("error: "), result.output[:500]
            assert result.stderr.count("\n") == 1 and len(result.stderr) < 3000, result.stderr[:500]
        if result.exit_code:
            assert {one.name for one in tmp_path.iterdir()} == {"input"}, text[:300]
        for made in set(tmp_path.iterdir()) - {tmp_path / "input"}:
            made.unlink()
