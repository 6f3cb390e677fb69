"""Configs of the hub: which file is read, what is refused in one line, what works without the hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import constants
from tiny import TRIANGLE, ids, logits
from transformers import PreTrainedModel

import sparsekit
from sparsekit import SparsekitError, load, models
from sparsekit.cli import validate
from sparsekit.config import ModelFacts
from sparsekit.config.hub import HubConfig
from sparsekit.errors import MOST_BYTES
from sparsekit.lab.sweep import load_question
from sparsekit.serve.vllm.settings import settings_of

DOCS = Path(__file__).parents[2] / "docs"
SHAPE = {"num_layers": 4, "num_heads": 4, "num_key_heads": 2}
TEXT = "model: {name: some/model, num_layers: 4, num_heads: 4, num_key_heads: 2}\ndefault: triangle\n"
OTHER = TEXT.replace("triangle", "a_shape")


def refusal(source: str | Path) -> str:
    with pytest.raises(SparsekitError) as error:
        load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """No answer from now on."""
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "down":
        hub.stop()
    else:
        hub.broken = int(how)


# ---- which file


def test_a_repositorys_only_config(hub: FakeHub) -> None:
    hub.add("me/one", {"README.md": "a page", "deep/er/c.yaml": TEXT, ".github/ci.yaml": "no: config", "w.bin": b"\0"})
    assert load("hub:me/one") == load(TEXT)
    assert load(Path("hub:me/one/deep/er/c.yaml")) == load(TEXT)
    assert not [line for line in hub.asked if line.startswith("GET") and re.search(r"README|w\.bin|ci\.yaml", line)]


def test_one_of_several(hub: FakeHub) -> None:
    hub.add("me/two", {"a.yaml": TEXT, "b.yml": OTHER})
    assert load("hub:me/two/a.yaml") == load(TEXT)
    assert load("hub:me/two/b.yml") == load(OTHER)
    said = refusal("hub:me/two")
    assert said == "config hub:me/two: it holds several configs, a.yaml, b.yml; name one, such as hub:me/two/a.yaml."
    assert refusal("hub:me/two/aa.yaml").endswith("no file 'aa.yaml' there, but a.yaml, b.yml. Did you mean 'a.yaml'?")


def test_a_revision(hub: FakeHub) -> None:
    first = hub.add("me/one", {"c.yaml": TEXT})
    hub.add("me/one", {"c.yaml": OTHER})
    hub.repos["me/one"].refs |= {"v1": first, "refs/pr/3": first}
    for revision in ("v1", "refs/pr/3", first):
        for file in ("", "/c.yaml"):
            assert load(f"hub:me/one@{revision}{file}") == load(TEXT)
    assert load("hub:me/one") == load("hub:me/one@main") == load(OTHER)
    assert refusal("hub:me/one@v2") == f"config hub:me/one@v2: {hub.endpoint}/me/one has no such revision."


def test_a_commit_that_is_there_is_read_without_asking(hub: FakeHub) -> None:
    commit = hub.add("me/one", {"c.yaml": TEXT})
    source = f"hub:me/one@{commit}/c.yaml"
    load(source)
    asked = len(hub.asked)
    assert load(source) == load(TEXT)
    assert len(hub.asked) == asked


def test_a_newer_commit_is_read_at_once(hub: FakeHub) -> None:
    for text in (TEXT, OTHER, TEXT):
        hub.add("me/one", {"c.yaml": text})
        assert load("hub:me/one") == load(text)


# ---- what is refused


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hub:me/none", "config hub:me/none: there is no ENDPOINT/me/none, or it is private and needs a login"),
        (
            "hub:me/gated",
            "config hub:me/gated: access to ENDPOINT/me/gated is restricted; ask for it there, then log in",
        ),
        ("hub:me/text", "config hub:me/text: me/text holds no config: no .yaml file"),
        ("hub:me/bad", "hub:me/bad: layers: 2 and '0-3' overlap at 2"),
        ("hub:me/bare", "hub:me/bare: model.num_key_heads is missing; a config of the hub says for which model it is"),
        ("hub:me/tag", "hub:me/tag: line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed"),
        ("hub:me/binary", "cannot be read as text"),
        ("hub:me/large", f"'c.yaml' has {MOST_BYTES + 1:,} bytes; a file of at most {MOST_BYTES:,} is read"),
        ("hub:me", "config 'hub:me': want hub:owner/name, hub:owner/name@revision, or either with /FILE.yaml"),
        ("hub:me/one@", "want hub:owner/name, hub:owner/name@revision"),
        ("hub:me/one@a b", "want hub:owner/name, hub:owner/name@revision"),
        ("hub:me/one@../../v1", "want hub:owner/name, hub:owner/name@revision"),
        ("hub:../one", "want hub:owner/name"),
        ("hub:me/a--b", "want hub:owner/name"),
        ("hub:me/" + "a" * 95, "want hub:owner/name"),
        ("hub:me/one/c.txt", "'c.txt' names no config of a repository; want the path of a .yaml file there"),
        ("hub:me/one/../c.yaml", "'../c.yaml' names no config"),
        ("hub:me/one//etc/c.yaml", "'/etc/c.yaml' names no config"),
        ("hub:me/one/a\\..\\c.yaml", "names no config"),
        ("hub:me/one/C:c.yaml", "names no config"),
    ],
)
def test_refused_in_a_line(hub: FakeHub, source: str, says: str) -> None:
    hub.add("me/gated", {"c.yaml": TEXT}, gated=True)
    hub.add("me/one", {"c.yaml": TEXT})
    hub.add("me/text", {"c.txt": TEXT})
    hub.add("me/bad", {"c.yaml": TEXT + 'layers: {"0-3": dense, 2: triangle}\n'})
    hub.add("me/bare", {"c.yaml": "model: {name: a, num_layers: 4, num_heads: 4}\ndefault: triangle\n"})
    hub.add("me/tag", {"c.yaml": "default: !!python/object/apply:os.system [id]\n"})
    hub.add("me/binary", {"c.yaml": b"\xff\xfe\x00"})
    hub.add("me/large", {"c.yaml": TEXT})
    hub.listed = {"c.yaml": MOST_BYTES + 1} if source == "hub:me/large" else {}
    assert says.replace("ENDPOINT", hub.endpoint) in refusal(source)
    if source == "hub:me/large":
        assert not any("resolve" in line for line in hub.asked)  # it is not downloaded


@pytest.mark.parametrize(
    "name", ["../../../c.yaml", "a/../../../../c.yaml", "/c.yaml", "..\\c.yaml", "C:\\c.yaml", ".c.yaml"]
)
def test_a_hostile_name_writes_nothing(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.add("me/evil", {name: TEXT})
    assert "me/evil holds no config" in refusal("hub:me/evil")
    assert not list(tmp_path.rglob("*c.yaml"))


def test_names_are_shown_without_what_a_terminal_obeys(hub: FakeHub) -> None:
    hub.add("me/evil", {"\x1b[2Ja.yaml": TEXT, "b.yaml": TEXT, "c.yaml": TEXT})
    for source in ("hub:me/evil", "hub:me/evil@\x1b[2J", "hub:me/evil/\x1b[2Ja.yaml"):
        assert "\x1b" not in refusal(source)


def test_another_model_is_refused(hub: FakeHub, tiny_llama: PreTrainedModel) -> None:
    facts = models.facts(tiny_llama).model_dump(exclude_none=True)
    hub.add("me/theta", {"c.yaml": load({"model": {**facts, "rope_theta": 5e5}, "default": "triangle"}).dump()})
    hub.add("me/keys", {"c.yaml": load({"model": {**facts, "num_key_heads": 4}, "default": "triangle"}).dump()})
    before = logits(tiny_llama, ids())
    for repo, field, said, has in (("theta", "rope_theta", "500000.0", "10000.0"), ("keys", "num_key_heads", "4", "2")):
        with pytest.raises(SparsekitError) as error:
            sparsekit.apply(tiny_llama, f"hub:me/{repo}")
        words = f"model.{field}: this config is for a model with {field} = {said} "
        assert str(error.value).startswith(words) and f"but the model has {has}" in str(error.value)
    assert torch.equal(logits(tiny_llama, ids()), before)


def test_errors_are_quoted_word_by_word(hub: FakeHub) -> None:
    hub.add("owner/gated", {"c.yaml": TEXT}, gated=True)
    hub.add("owner/two", {"a.yaml": TEXT, "b.yaml": TEXT})
    hub.add("owner/bare", {"c.yaml": "default: triangle\n"})
    facts = models.facts("smollm2-135m").model_dump(exclude_none=True)
    other = load({"model": {**facts, "name": "some/model", "rope_theta": 5e5}, "default": "triangle"})
    hub.add("owner/theta", {"c.yaml": other.dump()})
    [quoted] = re.findall(r"```\n(error:.*?)```", (DOCS / "hub.md").read_text(), re.DOTALL)
    said = [refusal(f"hub:owner/{name}") for name in ("none", "gated", "two", "two/b.yml", "bare")]
    with pytest.raises(SparsekitError) as error:
        validate("hub:owner/theta", models.facts("smollm2-135m"))
    lines = [f"error: {line}\n".replace(hub.endpoint, "https://huggingface.co") for line in (*said, str(error.value))]
    assert "".join(lines) == quoted


def test_the_page_says_how_much_is_read() -> None:
    assert f"at most {MOST_BYTES:,} bytes" in (DOCS / "hub.md").read_text()


# ---- without the hub


@pytest.mark.parametrize("how", ["offline", "down", "503", "429"])
def test_what_was_downloaded_is_read_without_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    hub.add("me/one", {"c.yaml": TEXT})
    hub.add("me/two", {"a.yaml": TEXT, "b.yaml": OTHER})
    for source in ("hub:me/one", "hub:me/two/a.yaml"):
        load(source)
    cut(hub, monkeypatch, how)
    why = "HF_HUB_OFFLINE is set" if how == "offline" else re.escape(hub.endpoint)
    with pytest.warns(UserWarning, match=f"config hub:me/one: {why}.*; c.yaml is read, the only config in the cache"):
        assert load("hub:me/one") == load(TEXT)
    if how == "offline":  # asked for, and named: nothing to tell
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load("hub:me/two/a.yaml") == load(TEXT)
    else:
        with pytest.warns(UserWarning, match=f"{why}.*; it is read from the cache"):
            assert load("hub:me/two/a.yaml") == load(TEXT)
    for source in ("hub:me/two/b.yaml", "hub:me/one@v1", "hub:me/never"):
        said = refusal(source)
        assert re.match(f"config {source}: {why}", said) and "not in the cache" in said
        assert said.endswith("load it once with the hub in reach, or give the path of a file.")


# ---- everywhere a config is named


def test_apply_runs_the_same_plan_as_the_file(hub: FakeHub, tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    path = tmp_path / "c.yaml"
    load({"model": {"name": "tiny", **SHAPE}, "layers": {"1-3": TRIANGLE}, "heads": {2: {0: "dense"}}}).dump(path)
    hub.add("me/one", {"c.yaml": path.read_bytes()})
    with sparsekit.apply(tiny_llama, path) as handle:
        expected, told = logits(tiny_llama, ids()), handle.report()
    with sparsekit.apply(tiny_llama, "hub:me/one") as handle:
        got, also = logits(tiny_llama, ids()), handle.report()
    assert torch.equal(got, expected) and not torch.equal(got, logits(tiny_llama, ids()))
    rows = [[(row.layer, row.ran, row.pattern, row.density) for row in report.layers] for report in (told, also)]
    assert rows[0] == rows[1] and [row.ran for row in also.layers] == ["dense", "sparse", "sparse", "sparse"]


def test_explain_validate_sweeps_and_vllm_take_it(hub: FakeHub) -> None:
    hub.add("me/one", {"c.yaml": TEXT})
    assert sparsekit.explain("hub:me/one", 4096) == sparsekit.explain(TEXT, 4096)
    assert validate("hub:me/one") == ("layers 0-3: triangle(sink_tokens=8, window_tokens=512, last_tokens=128)",)
    asked: Any = {"question": "?", "model": "m", "tasks": "passkey", "lengths": 512, "samples": 1, "seeds": 0,
                  "axes": {"default.window_tokens": [64, 128]}}  # fmt: skip
    assert load_question({**asked, "base": "hub:me/one"}).base == load(TEXT)
    facts = ModelFacts(name="m", **SHAPE)
    served = settings_of({"configs": {"a": "hub:me/one", "b": OTHER}, "default": "a"}, facts)
    assert served.configs["a"].config == load(TEXT)
    with pytest.raises(SparsekitError, match=r"^sparsekit\.configs\.a: config hub:me/no: there is no http"):
        settings_of({"configs": {"a": "hub:me/no"}, "default": "a"}, facts)


def test_spelling() -> None:
    for text in ("hub:a/b", "hub:a/b@v1.0", "hub:a/b/c d.yaml", "hub:a/b@refs/pr/7/c/d.yml", "hub:A.1/b_2@main/x.YAML"):
        assert str(HubConfig.parse(text)) == text
    assert HubConfig.parse("hub:a/b@refs/pr/7/c.yaml") == HubConfig("a/b", "refs/pr/7", "c.yaml")
    assert HubConfig.parse("hub:a/b@v1/refs/c.yaml") == HubConfig("a/b", "v1", "refs/c.yaml")


@pytest.mark.slow
def test_the_variables_of_huggingface_hub_are_minded(tmp_path: Path) -> None:
    """In processes of their own, since these are read when it is imported."""
    home = tmp_path / "home"

    def explain(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sparsekit", "explain", "hub:me/one", "-n", "4096"],
            env={**os.environ, **hub.environment(home), **more}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    with FakeHub() as hub:
        hub.add("me/one", {"c.yaml": TEXT})
        offline = explain(HF_HUB_OFFLINE="1")
        assert offline.returncode == 1 and offline.stdout == ""
        assert offline.stderr.startswith("error: config hub:me/one: HF_HUB_OFFLINE is set, and it is not in the cache")
        assert offline.stderr.count("\n") == 1
        online = explain()
        assert online.returncode == 0 and re.search(r"0-3 +triangle\(", online.stdout)
    assert list(home.rglob("c.yaml"))
    again = explain(HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == online.stdout
    assert again.stderr.startswith("warning: config hub:me/one: HF_HUB_OFFLINE is set; c.yaml is read")
