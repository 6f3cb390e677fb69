"""`sparsekit check` through the door that a shell uses, on a tiny model whose prompts are token ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsekit import load, models
from sparsekit.cli import app

run = CliRunner()
CONFIG = 'layers: {"0-3": {name: a_shape, sink_tokens: 0, window_tokens: 16}}\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama")
    monkeypatch.setattr(models, "load", lambda *_, **__: (model, None))
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    Path("p.jsonl").write_text("".join(json.dumps(list(range(n, n + 200))) + "\n" for n in (5, 20, 40)))


def said(*options: str, config: str = "c.yaml", prompts: str = "p.jsonl", code: int = 0) -> tuple[str, str]:
    """(stdout, stderr); an error is one line."""
    result = run.invoke(app, ["check", "m", config, "--prompts", prompts, *options])
    assert result.exit_code == code, result.output
    assert code == 0 or result.stderr.splitlines()[-1].startswith("error: ")
    return result.stdout, result.stderr


def test_without_a_budget_it_reports() -> None:
    out, err = said()
    assert "p.jsonl line 3" in out and "no budget in the config: nothing is run dense" in out
    assert "error" not in err and "KL alone" not in out


def test_a_budget_that_is_exceeded_is_an_error_that_names_the_layers() -> None:
    out, err = said("--budget", "5e-4", code=1)
    assert "KL alone" in out and "given" not in out
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (
        "exceeds the budget of 0.0005: layers " in line and "--output FILE writes the config with them dense." in line
    )


def test_what_holds_is_written_with_what_it_was_held_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsekit", "check", "m"])
    out, err = said("--budget", "5e-4", "-o", "held.yaml", "--next-tokens", "4")
    assert "written to held.yaml" in out and "warning: KL from dense" in err
    held = load("held.yaml")
    assert held.budget is not None and held.budget.prompts is not None
    assert held.budget.prompts.source == "p.jsonl" and held.budget.prompts.next_tokens == 4
    assert held.provenance["given_back_to_dense"] and held.provenance["check"]["command"] == "sparsekit check m"
    out, _ = said("--next-tokens", "4", config="held.yaml")  # its own budget
    assert "the budget of 0.0005 is held" in out
    found = json.loads(said("--json", "--next-tokens", "4", config="held.yaml")[0])
    assert found["held"] is True and found["given_back"] == [] and found["model"] == "m"
    assert found["before"]["mean"] == pytest.approx(held.budget.prompts.kl, rel=1e-3)


def test_a_budget_that_only_dense_attention_holds_writes_nothing() -> None:
    _, err = said("--budget", "1e-12", "-o", "held.yaml", code=1)
    assert "holds only with every sparse layer dense: 0-3; nothing is written." in err
    assert not Path("held.yaml").exists()


@pytest.mark.parametrize(
    ("options", "prompts", "says"),
    [
        (["-o", "o.yaml"], "p.jsonl", "--output needs a budget that the config is to hold"),
        (["--budget", "-1"], "p.jsonl", "budget.kl = -1.0: it should be greater than 0"),
        ([], "q.jsonl", "prompts 'q.jsonl': no such file. Did you mean 'p.jsonl'?"),
        ([], "short.jsonl", "too short to run sparse: short.jsonl line 2 (3 tokens); this config needs at least 64"),
        ([], "text.txt", "text.txt is a text, and there is no tokenizer"),
    ],
)
def test_bad_input_is_one_line(options: list[str], prompts: str, says: str) -> None:
    Path("short.jsonl").write_text(f"{list(range(100))}\n[1, 2, 3]\n")
    Path("text.txt").write_text("a text")
    assert says in said(*options, prompts=prompts, code=1)[1]
    assert not Path("o.yaml").exists()
