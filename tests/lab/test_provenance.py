"""What is found again by content: another key for other weights, data, tokenizer or code, wherever they differ."""

from __future__ import annotations

import importlib
import json
import linecache
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossovers import own, row
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparsekit
from sparsekit import load, models
from sparsekit.lab import provenance
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.evaluate import Evaluator
from sparsekit.lab.provenance import content_of_code, content_of_files, content_of_model, content_of_source, patterns_of
from sparsekit.lab.sweep import load_question
from sparsekit.lab.sweep.runs import config_key
from sparsekit.lab.tasks import read_corpus, task
from sparsekit.patterns import pattern_class


def _edit(name: str) -> Callable[[PreTrainedModel], None]:
    return lambda model: EDITS[name](model.model.layers[1].self_attn.o_proj.weight.data.view(-1), model)


def _swap(flat: torch.Tensor, a: int, b: int) -> None:
    flat[a], flat[b] = flat[b].clone(), flat[a].clone()


def _rename(model: Any) -> None:
    inner = model.model.layers[1].mlp
    inner.gate_proj, inner.up_proj = inner.up_proj, inner.gate_proj


EDITS: dict[str, Callable[[torch.Tensor, Any], Any]] = {
    "one value in the middle": lambda flat, model: flat[2000].add_(1e-3),
    "the last bit of one value": lambda flat, model: flat.view(torch.int32)[1234].bitwise_xor_(1),
    "the sign of a zero": lambda flat, model: (flat[7].zero_(), flat[7].neg_()),
    "two neighbours swapped": lambda flat, model: _swap(flat, 100, 101),
    "two far ones swapped": lambda flat, model: _swap(flat, 100, 3000),
    "two rows of sums swapped": lambda flat, model: _swap(model.lm_head.weight.data.view(-1), 5, 5 + (1 << 14)),
    "the same weights under other names": lambda flat, model: _rename(model),
    "a norm": lambda flat, model: model.model.norm.weight.data[3].mul_(2),
    "a buffer": lambda flat, model: model.model.rotary_emb.inv_freq[3].mul_(2),
    "the scale of an attention": lambda flat, model: setattr(model.model.layers[1].self_attn, "scaling", 0.3),
    "the epsilon of a norm": lambda flat, model: setattr(model.model.norm, "variance_epsilon", 0.1),
    "another dtype": lambda flat, model: model.half(),
    "another shape": lambda flat, model: setattr(
        model.model.layers[1].self_attn.o_proj, "weight", torch.nn.Parameter(flat.view(32, 128))
    ),
    "the config": lambda flat, model: setattr(model.config, "rms_norm_eps", 0.5),
    "what ends an answer": lambda flat, model: setattr(model.generation_config, "eos_token_id", 17),
    "the attention that it runs": lambda flat, model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_of_a_model_is_another_model(name: str) -> None:
    make = lambda: models.tiny("llama", vocab_size=1000)  # noqa: E731
    model = make()
    before = content_of_model(model)
    assert content_of_model(make()) == before, "equal models, equal keys"
    _edit(name)(model)
    assert content_of_model(model) != before
    model.config._name_or_path = "elsewhere"
    assert content_of_model(model) == content_of_model(model)


def test_the_path_of_a_model_is_no_part_of_it(tmp_path: Path) -> None:
    models.tiny("llama").save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    from transformers import AutoModelForCausalLM

    assert len({content_of_model(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in "ab"}) == 1
    assert content_of_source(str(tmp_path / "a")) == content_of_source(str(tmp_path / "b"))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.complex64, torch.bfloat16]
)
@pytest.mark.parametrize("size", [0, 1, 3, 1 << 14, (1 << 16) + 5])
def test_sums_of_any_tensor(dtype: torch.dtype, size: int) -> None:
    values = torch.zeros(size, dtype=dtype)
    seen = {provenance._sums(values)}
    for at in sorted({0, size // 2, size - 1}) if size else []:
        other = values.clone()
        other[at] = 1
        seen.add(provenance._sums(other))
        assert provenance._sums(other[None].expand(1, -1)) == provenance._sums(other)
    assert len(seen) == 1 + len({0, size // 2, size - 1} if size else ())
    odd = torch.zeros(size + 1, dtype=dtype)[1:]  # begins between two words
    assert provenance._sums(odd) in seen


def test_weights_that_cannot_be_read_are_no_model_that_was_measured() -> None:
    with torch.device("meta"):
        model = models.tiny("llama")
    assert content_of_model(model) != content_of_model(model)


def test_a_model_with_hooks_of_ones_own_is_no_model_that_was_measured() -> None:
    model = models.tiny("llama")
    before = content_of_model(model)
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output)
    assert len({before, content_of_model(model), content_of_model(model)}) == 3
    hook.remove()
    assert content_of_model(model) == before
    with model.model.layers[0].self_attn.register_forward_hook(torch.nn.functional.relu):
        assert content_of_model(model) == content_of_model(model) != before


def test_a_tokenizer_is_part_of_it(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    model, tokenizer = models.tiny("llama"), smollm2[1]
    seen = {content_of_model(model), content_of_model(model, tokenizer)}
    tokenizer.save_pretrained(tmp_path)
    other = type(tokenizer).from_pretrained(tmp_path)
    assert content_of_model(model, other) in seen
    other.chat_template = "{{ messages[0].content }}"
    seen.add(content_of_model(model, other))
    other = type(tokenizer).from_pretrained(tmp_path)
    other.add_tokens(["<new>"])
    seen.add(content_of_model(model, other))
    assert len(seen) == 4


def test_a_prompt_is_what_the_model_reads(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    """Another text under the same task, length, seed and index."""
    model, tokenizer = models.tiny("llama", vocab_size=49152), smollm2[1]
    options: dict[str, Any] = {"tokens": [300], "count": 1, "seeds": [0]}
    keys = []
    for word in ("sun", "moon"):
        (tmp_path / "text.txt").write_text(f"The {word} rose over a town. " * 300)
        [prompt] = make_prompts(model, tokenizer, tasks=[task("niah_single_2", str(tmp_path))], **options)
        keys.append(prompt.key)
    assert keys[0] != keys[1] and {**keys[0], "content": ""} == {**keys[1], "content": ""}


def test_a_corpus_is_read_again_when_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two")
    first = read_corpus(str(tmp_path))
    assert read_corpus(str(tmp_path)) is first
    (tmp_path / "text.txt").write_text("one too")
    assert read_corpus(str(tmp_path)).digest != first.digest
    (tmp_path / "more.md").write_text("three")
    assert len(read_corpus(str(tmp_path)).words) == 3


def test_an_evaluator_forgets_what_other_weights_said(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model = models.tiny("llama", vocab_size=49152)
    evaluator = Evaluator(model, smollm2[1])
    ask: dict[str, Any] = {"kind": task("passkey"), "tokens": 300, "samples": 1, "seed": 0}
    config = sparsekit.load({"default": "dense", "layers": {"0": "dense"}})
    assert evaluator.run(config, **ask)["kl"] == 0
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[5, 5] += 10
    assert evaluator.run(config, **ask)["kl"] == 0, "held against dense answers of the weights before"


def test_a_sweep_over_a_folder_sees_its_weights(tmp_path: Path) -> None:
    models.tiny("llama").save_pretrained(tmp_path / "m")
    asked = {
        "question": "q", "model": str(tmp_path / "m"), "tasks": "passkey", "lengths": 512,
        "axes": {"layers": [{"0-1": "triangle"}]},
    }  # fmt: skip
    runs = load_question(asked).runs
    first = [run.key for run in runs()]
    assert [run.key for run in runs()] == first
    weights = tmp_path / "m" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1  # the size stays
    weights.write_bytes(data)
    second = [run.key for run in runs()]
    assert not set(first) & set(second)
    assert [run.asked for run in runs()] == [run.asked for run in load_question(asked).runs()]
    (tmp_path / "m" / "README.md").write_text("nothing that a model is loaded from")
    assert [run.key for run in runs()] == second
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    assert not set(second) & {run.key for run in runs()}


def test_other_code_computes_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "question": "q", "model": "m", "tasks": "passkey", "lengths": 512, "axes": {"layers": [{"0-1": "triangle"}]},
    }  # fmt: skip
    before, key = content_of_code(), load_question(asked).runs()[0].key
    monkeypatch.setattr(sparsekit, "__version__", "9.9")
    provenance._own_code.cache_clear()
    try:
        assert content_of_code() != before
        assert load_question(asked).runs()[0].key != key
    finally:
        monkeypatch.undo()
        provenance._own_code.cache_clear()
    assert content_of_code() == before
    real = Path.read_text

    def edited(self: Path, *args: Any, **options: Any) -> str:
        return real(self, *args, **options) + ("#" if self.name == name else "")

    for name, counts in (("softmax.py", True), ("needle.py", True), ("plots.py", False), ("journal.py", False)):
        monkeypatch.setattr(Path, "read_text", edited)
        provenance._own_code.cache_clear()
        try:
            assert (content_of_code() != before) == counts, name
        finally:
            monkeypatch.undo()
            provenance._own_code.cache_clear()


@pytest.mark.parametrize(
    "auto",
    [
        {"dense_below_tokens": "auto", "default": "triangle"},
        {"layers": {"0": {"name": "block_topk", "dense_below_tokens": "auto"}}},
        {"default": {"name": "union", "of": ["triangle", {"name": "block_topk", "dense_below_tokens": "auto"}]}},
    ],
)
def test_what_is_auto_is_another_config_by_another_table(
    auto: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = set()
    for rows in ((), (row("triangle", True),), (row("triangle", False),)):
        own(tmp_path, monkeypatch, *rows)
        keys |= {config_key(load(auto))}
        keys |= {config_key(load({"default": "triangle"}))}
    assert len(keys) == 3 + 1


def test_a_pattern_of_ones_own_counts_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pattern_class("triangle")(), type("Mine", (), {"__module__": __name__})()
    assert content_of_code([ours]) == content_of_code() != content_of_code([theirs])
    before = content_of_code([theirs])
    monkeypatch.setattr(provenance.inspect, "getsource", lambda module: "other")
    assert content_of_code([theirs]) != before
    union = sparsekit.load(
        {"default": {"name": "union", "of": ["a_shape", "triangle"]}, "heads": {"0": {"1": "triangle"}}}
    )
    assert [pattern.name for pattern in patterns_of(union)] == ["union", "triangle", "a_shape", "triangle"]


def test_files(tmp_path: Path) -> None:
    assert content_of_files([]) is None
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    seen = {content_of_files([tmp_path / "a", tmp_path / "b"]), content_of_files([tmp_path / "a"])}
    assert content_of_files([tmp_path / "b", tmp_path / "a"]) in seen
    (tmp_path / "a").rename(tmp_path / "c")
    seen.add(content_of_files([tmp_path / "c", tmp_path / "b"]))
    assert len(seen) == 3


def test_weights_in_folders_below_that_the_index_names_are_digested(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a/1.safetensors"}}')
    (tmp_path / "a" / "1.safetensors").write_bytes(b"one")
    before = content_of_source(str(tmp_path))
    (tmp_path / "a" / "1.safetensors").write_bytes(b"two")
    assert content_of_source(str(tmp_path)) != before
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert content_of_source(str(tmp_path)) is not None


def test_the_merges_of_a_slow_tokenizer_count(tmp_path: Path) -> None:
    from transformers import CTRLTokenizer

    (tmp_path / "v.json").write_text(json.dumps({"a@@": 0, "b": 1, "ab</w>": 2, "ab": 3, "<unk>": 4}))
    keys = []
    for merges in ("a b</w>", "b a</w>", "a b</w>"):
        (tmp_path / "m.txt").write_text(f"#version: 0.2\n{merges}\n\n")
        tokenizer = CTRLTokenizer(str(tmp_path / "v.json"), str(tmp_path / "m.txt"))
        keys.append(provenance.content_of_tokenizer(tokenizer))
    assert keys[0] == keys[2] != keys[1]


def test_all_loaded_modules_of_a_package_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "others_pack").mkdir()
    (tmp_path / "others_base.py").write_text("class Base: pass\n")
    for name, text in {
        "__init__.py": "",
        "a.py": "from others_base import Base\nfrom others_pack import b\n\nclass Own(Base): pass\n",
        "b.py": "x = 1\n",
    }.items():
        (tmp_path / "others_pack" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        own = importlib.import_module("others_pack.a").Own()
        keys = [content_of_code([own])]
        for file, text in (("others_pack/b.py", "x = 22\n"), ("others_base.py", "class Base: y = 1\n")):
            (tmp_path / file).write_text(text)
            linecache.checkcache()
            keys.append(content_of_code([own]))
    finally:
        for name in ("others_pack", "others_pack.a", "others_pack.b", "others_base"):
            sys.modules.pop(name, None)
    assert len(set(keys)) == 3


def test_a_model_with_a_config_applied_is_not_taken_for_dense(tiny_llama: PreTrainedModel) -> None:
    """Whatever measures from dense attention names its model first: probe, gate, curves, tune, evaluation."""
    plain = content_of_model(tiny_llama)
    with (
        sparsekit.apply(tiny_llama, "version: 1\ndefault: a_shape"),
        pytest.raises(sparsekit.SparsekitError, match="is applied to this model"),
    ):
        content_of_model(tiny_llama)
    assert content_of_model(tiny_llama) == plain
