"""A folder of configs as a repository: what its page says, what is uploaded, what is refused before anything is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard, constants
from tiny import TRIANGLE, ids, logits
from transformers import PreTrainedModel

import sparsekit
from sparsekit import SparseConfig, SparsekitError, explain, load, models
from sparsekit.config.card import card
from sparsekit.config.publish import pack, push

SMOL = Path(__file__).parents[2] / "configs" / "smollm2-135m"
MODEL: dict[str, Any] = {"name": "some/model", "num_layers": 4, "num_heads": 4, "num_key_heads": 2}
GATE = {
    "passed": False,
    "bound_lost_answers": 0.1,
    "checks": [{"task": "needle4", "tokens": 2048, "samples": 16, "dense": 0.9, "sparse": 0.5, "verdict": "lost"}],
    "device": "cpu",
}
BUDGET = {
    "kl": 0.005,
    "prompts": {"source": "mine.jsonl", "count": 12, "tokens": [4000, 9000], "kl": 0.0012, "half_width": 0.0003},
}


def config(**more: Any) -> SparseConfig:
    return load({"model": MODEL, "layers": {"1-3": TRIANGLE}, **more})


def folder_of(at: Path, **files: SparseConfig | str) -> Path:
    at.mkdir(exist_ok=True)
    for name, value in files.items():
        (at / f"{name}.yaml").write_text(value if isinstance(value, str) else value.dump())
    return at


# ---- the card


def test_a_card_says_nothing_of_the_machine_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topk = {"name": "block_topk", "top_k": 4}
    rules = {"1-3": TRIANGLE, "0": {"name": "union", "of": [{**topk, "dense_below_tokens": "auto"}, "triangle"]}}
    page = card("me/one", {"c.yaml": config(layers=rules, dense_below_tokens="auto")})
    plain = config(layers={**rules, "0": {"name": "union", "of": [topk, "triangle"]}})
    assert f"```\n{explain(plain, 32768)}\n```" in page
    assert "Shorter prompts than `sparsekit bench crossover` measured to gain" in page
    (tmp_path / "table.jsonl").write_text("no table\n")
    monkeypatch.setenv("SPARSEKIT_CROSSOVER", str(tmp_path / "table.jsonl"))
    assert card("me/one", {"c.yaml": config(layers=rules, dense_below_tokens="auto")}) == page


def test_the_card_tells_the_model_the_patterns_the_promise_and_the_gate() -> None:
    made = config(budget=BUDGET, provenance={"by": "calibrate", "gate": GATE}, dense_below_tokens=1024)
    page = card("me/one", {"c.yaml": made}, tokens=4096, license="apache-2.0")
    front = ModelCard(page).data.to_dict()
    assert front == {
        "library_name": "sparsekit", "license": "apache-2.0", "base_model": "some/model",
        "tags": ["sparse-attention", "long-context"],
    }  # fmt: skip
    assert f"```\n{explain(made, 4096)}\n```" in page
    assert (
        "| `num_key_heads` | 2 |" in page
        and "| `name` | some/model |" in page
        and "head_dim" not in page.split("##")[2]
    )
    assert (
        "at most 0.005 nats a token. Held on 12 prompts of 4,000 to 9,000 tokens (`mine.jsonl`), 0.0012 found ± 0.0003"
        in page
    )
    assert "**Gate.** Not passed; at most 10% of dense attention's answers may be lost (cpu)." in page
    assert "| task | tokens | samples | dense | sparse | verdict |" in page
    assert "| needle4 | 2048 | 16 | 0.9 | 0.5 | lost |" in page
    assert "```yaml\n{by: calibrate}\n```" in page
    assert "fewer than 1,024 tokens" in page
    assert page.endswith(f"This page was written by sparsekit {sparsekit.__version__}.\n")


def test_the_card_of_a_config_that_promises_nothing_says_so() -> None:
    page = card("me/one", {"c.yaml": config()})
    assert "**Budget.** The file promises none." in page and "**Gate.** The file has no result of one." in page
    assert "Provenance" not in page and "license" not in page


def test_the_lines_of_the_card_load_what_it_is_for(hub: FakeHub) -> None:
    for files in ({"c.yaml": config()}, {"a.yaml": config(), "b.yaml": config(default="a_shape")}):
        repo = f"me/{len(files)}"
        page = card(repo, files)
        hub.add(repo, {name: one.dump() for name, one in files.items()})
        [transformers] = re.findall(r'sparsekit\.apply\(model, "(.*?)"\)', page)
        [vllm] = re.findall(r"`vllm serve some/model --additional-config '(.*?)'`", page)
        assert load(transformers) == load(json.loads(vllm)["sparsekit"]) == next(iter(files.values()))


def test_the_card_links_a_model_only_by_its_repository() -> None:
    label = {"model": {**MODEL, "name": "smollm2-135m"}}
    page = card("me/one", {"c.yaml": config(**label)})
    assert "base_model" not in page and "vllm serve MODEL" in page
    page = card("me/one", {"c.yaml": config(**label)}, base_model="owner/smol")
    assert ModelCard(page).data.base_model == "owner/smol" and "vllm serve owner/smol" in page


@pytest.mark.parametrize(
    "gate",
    [True, [1], {}, {"passed": [1]}, {"passed": True, "checks": "all"}, {"checks": [1, {"task": "a|b\n# c"}, {}]}],
)
def test_a_gate_of_any_form_is_told_as_far_as_it_goes(gate: Any) -> None:
    page = card("me/one", {"c.yaml": config(provenance={"gate": gate})})
    assert page.count("**Gate.**") == 1
    assert "\n# c" not in page and (gate != {"checks": [1, {"task": "a|b\n# c"}, {}]} or r"| a\|b # c |" in page)


def test_nothing_in_a_config_breaks_out_of_the_page() -> None:
    evil = "x`\n```\n---\nlicense: mit\n# title"
    budget = {"kl": 1.0, "prompts": {"source": "a`b``c", "count": 1, "tokens": [1, 2]}}
    page = card("me/one", {"c.yaml": config(provenance={"note": evil}, budget=budget)})
    assert ModelCard(page).data.to_dict()["base_model"] == "some/model"
    assert "````yaml\n" in page and "``` a`b``c ```" in page
    outside = re.sub(r"(`{3,})(yaml)?\n.*?\n\1\n", "", page, flags=re.DOTALL)
    assert "# title" not in outside and "license: mit" not in outside


# ---- packing


def test_configs_are_packed_as_they_are_and_nothing_else(tmp_path: Path) -> None:
    text = "# a comment that stays\n" + config().dump()
    folder = folder_of(tmp_path / "f", b=text, a=config(default="a_shape"))
    (folder / "README.md").write_text("mine")
    (folder / ".env").write_text("SECRET=1")
    (folder / "probe.json").write_text("{}")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "c.yaml").write_text("no config")
    parcel = pack(folder, "me/one")
    assert list(parcel.files) == ["a.yaml", "b.yaml", "README.md"]
    assert parcel.files["b.yaml"] == text
    assert parcel.left == (".env", "README.md", "deeper", "probe.json")
    assert (
        parcel.card == parcel.files["README.md"] == card("me/one", {n: load(folder / n) for n in ("a.yaml", "b.yaml")})
    )


@pytest.mark.parametrize(
    ("files", "repo", "says"),
    [
        ({}, "me/one", "holds no .yaml file"),
        ({"c": "default: triangel\n"}, "me/one", "c.yaml: default: unknown pattern 'triangel'"),
        ({"c": "- 1\n"}, "me/one", "c.yaml: a mapping is needed"),
        (
            {"c": "default: triangle\n"},
            "me/one",
            "c.yaml: model.name, model.num_layers, model.num_heads, model.num_key_heads are missing",
        ),
        ({"c": config(model={**MODEL, "num_layers": 2})}, "me/one", "c.yaml: layers.'1-3': layer 3 of a model with 2"),
        (
            {"c": config(model={**MODEL, "layer_types": ["linear_attention"] * 4})},
            "me/one",
            "c.yaml: layer 1: triangle(sink_tokens=8, window_tokens=40, last_tokens=20) cannot replace a linear",
        ),
        (
            {"a": config(), "b": config(model={**MODEL, "name": "other/model"})},
            "me/one",
            "b.yaml: model.name = 'other/model', but a.yaml has 'some/model'; a repository is for one model",
        ),
        (
            {"a": config(), "b": config(model={**MODEL, "num_key_heads": 4})},
            "me/one",
            "b.yaml: model.num_key_heads = 4, but a.yaml has 2",
        ),
        ({"c d,": config()}, "me/one", "'c d,.yaml' names no config of a repository"),
        ({"c": config()}, "one", "want hub:owner/name"),
        ({"c": config()}, "me/one@v1", "repository 'me/one@v1': want owner/name"),
        ({"c": config()}, "me/one/c.yaml", "repository 'me/one/c.yaml': want owner/name"),
    ],
)
def test_what_is_not_valid_is_not_packed(
    tmp_path: Path, files: dict[str, SparseConfig | str], repo: str, says: str
) -> None:
    with pytest.raises(SparsekitError) as error:
        pack(folder_of(tmp_path / "f", **files), repo)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_there_is_not(tmp_path: Path) -> None:
    for path in (tmp_path / "no", Path(__file__)):
        with pytest.raises(SparsekitError, match="there is no such folder"):
            pack(path, "me/one")


def test_the_model_itself_is_asked_where_it_is_given(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    folder = folder_of(tmp_path / "f", c=config(model={**MODEL, "head_dim": 128}))
    assert pack(folder, "me/one").files
    with pytest.raises(
        SparsekitError, match=r"c\.yaml: model\.head_dim: this config is for a model with head_dim = 128"
    ):
        pack(folder, "me/one", model=models.facts(tiny_llama))
    with pytest.raises(SparsekitError, match="base_model = 'smol': want the model's repository, owner/name"):
        pack(folder, "me/one", base_model="smol")


# ---- pushing


def test_there_and_back(hub: FakeHub, tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    folder = folder_of(tmp_path / "f", c=config(heads={2: {0: "dense"}}))
    done = push(pack(folder, "me/one"))
    commit = hub.repos["me/one"].refs["main"]
    assert done.url == f"{hub.endpoint}/me/one/commit/{commit}" and done.older == ()
    files = hub.repos["me/one"].files("main")
    assert sorted(files) == [".gitattributes", "README.md", "c.yaml"]
    assert files["c.yaml"] == (folder / "c.yaml").read_bytes()
    assert not hub.repos["me/one"].private
    for source in ("hub:me/one", f"hub:me/one@{commit}/c.yaml"):
        assert load(source) == load(folder / "c.yaml")
        with sparsekit.apply(tiny_llama, source) as handle:
            got, there = logits(tiny_llama, ids()), handle.report()
        with sparsekit.apply(tiny_llama, folder / "c.yaml") as handle:
            assert torch.equal(logits(tiny_llama, ids()), got)
            assert [str(row.pattern) for row in handle.report().layers] == [str(row.pattern) for row in there.layers]


def test_pushing_again_is_a_new_commit_and_tells_what_is_left_there(hub: FakeHub, tmp_path: Path) -> None:
    push(pack(folder_of(tmp_path / "f", c=config()), "me/one"))
    (tmp_path / "f" / "c.yaml").rename(tmp_path / "f" / "d.yaml")
    done = push(pack(folder_of(tmp_path / "f"), "me/one"))
    assert done.older == ("c.yaml",) and len(hub.repos["me/one"].commits) == 3
    with pytest.raises(SparsekitError, match=r"several configs, c\.yaml, d\.yaml"):
        load("hub:me/one")


def test_private_is_private(hub: FakeHub, tmp_path: Path) -> None:
    parcel = pack(folder_of(tmp_path / "f", c=config()), "me/mine")
    push(parcel, private=True)
    assert hub.repos["me/mine"].private
    push(parcel, private=True)
    hub.add("me/open", {"a.txt": "b"})
    parcel = pack(tmp_path / "f", "me/open")
    with pytest.raises(SparsekitError, match=r"^push to me/open: --private, but it is there already, and public\.$"):
        push(parcel, private=True)
    assert list(hub.repos["me/open"].files("main")) == ["a.txt"]


@pytest.mark.parametrize("how", ["token", "owner", "license", "offline", "down", "503"])
def test_what_the_hub_refuses_is_told_in_a_line(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    repo = "others/one" if how == "owner" else "me/one"
    parcel = pack(folder_of(tmp_path / "f", c=config()), repo, license="no-such" if how == "license" else None)
    if how == "token":
        monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "down":
        hub.stop()
    elif how == "503":
        hub.broken = 503
    with pytest.raises(SparsekitError) as error:
        push(parcel)
    says = {
        "token": "answered 401: 'Invalid username or password.'; log in (`hf auth login`)",
        "owner": 'answered 403: "You don\'t have the rights to create a model under others"',
        "license": '"license" is bad',
        "offline": "HF_HUB_OFFLINE is set",
        "down": "cannot be reached (ConnectError",
        "503": "answered 503: 'Out of order'",
    }[how]
    assert str(error.value).startswith(f"push to {repo}: ") and says in str(error.value)
    assert "\n" not in str(error.value)
    assert not any("c.yaml" in repo.files("main") for repo in hub.repos.values())


@pytest.mark.parametrize(
    "folder", sorted(path for path in SMOL.parent.iterdir() if path.name != "sweeps"), ids=lambda p: p.name
)
def test_one_models_shipped_configs_of_one_name_can_be_packed(folder: Path, tmp_path: Path) -> None:
    by_name: dict[Any, list[Path]] = {}
    for file in folder.glob("*.yaml"):
        by_name.setdefault(load(file).model.name, []).append(file)
    for number, files in enumerate(by_name.values()):
        texts: dict[str, SparseConfig | str] = {file.stem: file.read_text() for file in files}
        assert len(pack(folder_of(tmp_path / str(number), **texts), "me/one").files) == len(files) + 1
