"""`sparsekit configs`, through the door that a shell uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_hub import FakeHub
from typer.testing import CliRunner

import sparsekit
from sparsekit import load
from sparsekit.cli import app
from sparsekit.cli.configs import shipped_configs

ROOT = Path(__file__).parents[2]
run = CliRunner()


def out(*args: str) -> str:
    result = run.invoke(app, ["configs", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def error(*args: str) -> str:
    result = run.invoke(app, ["configs", *args])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_list_has_every_config_that_is_shipped() -> None:
    files = [path for path in (ROOT / "configs").rglob("*.yaml") if "sweeps" not in path.parts]
    rows = json.loads(out("list", "--json"))
    assert sorted(ROOT / "configs" / f"{row['name']}.yaml" for row in rows) == sorted(files)
    tuned = next(row for row in rows if row["name"] == "smollm2-135m/tuned")
    assert tuned == {
        "name": "smollm2-135m/tuned", "model": "smollm2-135m", "layers": 30, "heads": 9,
        "patterns": "dense, triangle", "dense_below_tokens": 1024, "gate": "passed",
    }  # fmt: skip
    table = out("list")
    assert all(row["name"] in table and row["model"] in table for row in rows)


def test_copy_is_the_file_and_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert out("copy", "smollm2-135m/tuned") == "tuned.yaml\n"
    assert Path("tuned.yaml").read_bytes() == shipped_configs()["smollm2-135m/tuned"].read_bytes()
    assert "output 'tuned.yaml' is there already; give another name with --output" in error(
        "copy", "smollm2-135m/tuned"
    )
    out("copy", "smollm2-135m/tuned", "-o", "my/own.yaml")
    assert load("my/own.yaml") == load("tuned.yaml")
    said = error("copy", "smollm2-135m/tune")
    assert "no config 'smollm2-135m/tune' comes with sparsekit" in said and "Did you mean 'smollm2-135m/tuned'?" in said


def test_a_dry_run_prints_the_card_that_a_push_uploads(hub: FakeHub, tmp_path: Path) -> None:
    out("copy", "smollm2-135m/tuned", "-o", str(tmp_path / "f" / "c.yaml"))
    (tmp_path / "f" / "notes.txt").write_text("mine")
    args = ["push", str(tmp_path / "f"), "me/smol", "--model", "smollm2-135m", "-n", "8192", "--license", "mit"]
    result = run.invoke(app, ["configs", *args, "--dry-run"])
    assert result.exit_code == 0 and hub.asked == []
    assert result.stderr.splitlines() == [
        "stays here: 'notes.txt'",
        "the card links no model, since model.name is no repository; --base-model gives it",
        "to upload to me/smol: c.yaml, README.md",
    ]
    assert result.stdout.startswith("---\nlibrary_name: sparsekit\nlicense: mit\n")
    url = out(*args)
    commit = hub.repos["me/smol"].refs["main"]
    assert url == f"{hub.endpoint}/me/smol/commit/{commit}\n"
    assert hub.repos["me/smol"].files("main")["README.md"].decode() == result.stdout
    args += ["--base-model", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    (tmp_path / "f" / "c.yaml").rename(tmp_path / "f" / "d.yaml")
    result = run.invoke(app, ["configs", *args])
    assert f"warning: me/smol also holds 'c.yaml', which is not in {tmp_path / 'f'}" in result.stderr
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in hub.repos["me/smol"].files("main")["README.md"].decode()


def test_a_wrong_config_or_model_is_pushed_nowhere(hub: FakeHub, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {name: a, num_layers: 3, num_heads: 9, num_key_heads: 3}\ndefault: {name: triangle, x: 1}\n"
    )
    assert "c.yaml: default: triangle: unknown field 'x' = 1" in error("push", str(tmp_path), "me/one")
    config.write_text("model: {name: a, num_layers: 3, num_heads: 9, num_key_heads: 3}\ndefault: triangle\n")
    assert "c.yaml: model.num_layers: this config is for a model with num_layers = 3 (a)" in error(
        "push", str(tmp_path), "me/one", "--model", "smollm2-135m"
    )
    assert hub.asked == []


def test_other_commands_read_what_was_pushed(hub: FakeHub, tmp_path: Path) -> None:
    out("copy", "smollm2-135m/tuned", "-o", str(tmp_path / "f" / "c.yaml"))
    out("push", str(tmp_path / "f"), "me/smol")
    for command in ("validate", "explain"):
        more = ["-n", "4096"] if command == "explain" else []
        local = run.invoke(app, [command, str(tmp_path / "f" / "c.yaml"), *more])
        result = run.invoke(app, [command, "hub:me/smol", "--model", "smollm2-135m", *more])
        assert result.exit_code == 0 and result.stdout == local.stdout


def test_a_wheel_has_them_below_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsekit, "__file__", str(tmp_path / "sparsekit" / "__init__.py"))
    here = tmp_path / "sparsekit" / "configs" / "some-model"
    here.mkdir(parents=True)
    (here / "c.yaml").write_text("default: dense\n")
    assert shipped_configs() == {"some-model/c": here / "c.yaml"}
