"""The README's Python runs, and says what is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparsekit
from sparsekit import SparsekitError, models
from sparsekit.lab.demo import markdown_table
from sparsekit.patterns import base as registry
from sparsekit.patterns import parse_pattern, pattern_names
from sparsekit.testing import check_pattern

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINE, FIRST, STATIC, DYNAMIC = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _run(code: str, scope: dict[str, Any]) -> None:
    exec(compile(code, "README.md", "exec", dont_inherit=True), scope)


def test_the_ten_lines_run(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As printed, from the repository's root; the model is the session's, in the dtype that is fast here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(models, "load", lambda name: {"smollm2-135m": smollm2}[name])
    with pytest.raises(SparsekitError, match="this config is for a model with num_layers = 32"):
        _run(LINE, {"sparsekit": sparsekit, "model": smollm2[0]})
    _run(FIRST, {})
    out = capsys.readouterr().out
    assert "71432" in out.splitlines()[0]
    assert re.search(r"21\s+sparse .*triangle", out)
    assert re.search(r"20\s+dense", out)
    assert smollm2[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("code", "fields"), [(STATIC, {"name": "window", "tokens": 40}), (DYNAMIC, {"name": "nearest_means", "top_k": 3})]
)
def test_the_patterns_keep_the_contract(code: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pattern_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    _run(code, {})
    check_pattern(parse_pattern(fields))


def test_the_yaml_is_a_config() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    layers = sparsekit.load(text).resolve().layers
    assert [layer.dense for layer in layers] == [i < 16 and i != 3 for i in range(32)]


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_the_demo_table_is_of_the_committed_records(page: str) -> None:
    """`python -m sparsekit.lab.demo docs/results/demo-cpu.jsonl` prints what stands between the marks."""
    text = (ROOT / page).read_text()
    [shown] = re.findall(r"<!-- demo table -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert shown == markdown_table(ROOT / "docs/results/demo-cpu.jsonl")


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"README links to {target}, which is not there"
