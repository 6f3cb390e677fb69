"""evaluate: a record for each task, length and config, in which a config is held against the model's own attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import crossovers
import pytest
import small_models
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from sparsekit import SparsekitError, apply, load, models
from sparsekit.cli import app
from sparsekit.config.settle import fingerprint
from sparsekit.lab import evaluate as evaluate_module
from sparsekit.lab import report
from sparsekit.lab.answers import _EachRow, read_on
from sparsekit.lab.evaluate import answer, answer_together, evaluate
from sparsekit.lab.sweep.results import ResultFile
from sparsekit.lab.tasks import prompt_ids, task

TRIANGLE = {"version": 1, "layers": {"2-3": {"name": "triangle", "window_tokens": 32, "last_tokens": 16}}}
DENSE = {"version": 1}


@pytest.fixture(scope="module")
def small(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Random weights under the real tokenizer: what is recorded does not depend on what the model knows."""
    return models.tiny("llama", vocab_size=49152, max_position_embeddings=1024), smollm2[1]


def test_records(small: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    configs = {"model": None, "dense": DENSE, "triangle": TRIANGLE}
    rows = list(evaluate(*small, configs, tasks=["passkey", "kv_retrieval"], lengths=[400], samples=3, command="x"))
    assert [(row["task"], row["label"]) for row in rows] == [
        (t, c) for t in ("passkey", "kv_retrieval") for c in configs
    ]
    for own, dense, triangle in (rows[:3], rows[3:]):
        assert own["kl"] == dense["kl"] == 0 and dense["texts"] == own["texts"]
        assert triangle["kl"] > 0
        assert own["density"] == dense["density"] == 1 > triangle["density"] > 0
        assert triangle["layer_density"][:2] == [1, 1] and max(triangle["layer_density"][2:]) < 0.5
        assert [layer["layers"] for layer in triangle["resolved"]] == ["0-1", "2-3"]
        for row in (own, dense, triangle):
            assert row["score_low"] <= row["score"] <= row["score_high"]
            assert len(row["scores"]) == len(row["ttft_s_each"]) == len(row["prompt_tokens"]) == 3
            assert max(row["prompt_tokens"]) <= 400 and row["peak_memory_bytes"] > 0


def test_a_record_says_what_auto_was(
    small: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {**TRIANGLE, "dense_below_tokens": "auto"}
    known = models.facts(small[0])
    crossovers.own(tmp_path, monkeypatch, crossovers.row(fingerprint(load(auto).resolve(known), known), False, True))
    found, plain = evaluate(*small, {"auto": auto, "plain": TRIANGLE}, tasks=["passkey"], lengths=[400], samples=1)
    assert found["config"]["dense_below_tokens"] == "auto" and found["kl"] == plain["kl"]
    assert found["settled"][0].startswith("dense_below_tokens auto is 200 (measured on") and "settled" not in plain
    assert report._text(found).endswith(found["settled"][0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_recipe_has_a_warm_up_of_its_own_on_a_card(device: str) -> None:
    files = sorted(Path(__file__).parents[2].glob("configs/smollm2-135m/*.yaml"))
    kinds = {evaluate_module._kind_of_prefill(load(str(file)), torch.device(device)) for file in files}
    assert len(files) > 5 and len(kinds) == (len(files) if device == "cuda" else 1)


@pytest.mark.parametrize("name", ["passkey", "needle4", "niah_multikey_2"])
def test_a_draft_of_the_true_answer_changes_nothing(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], name: str
) -> None:
    """Found or not: the text begins alike, and score and log-probabilities are those of plain decoding."""
    kind = replace(task(name), max_new_tokens=16)
    for sample in kind.samples(smollm2[1], tokens=400, count=2, seed=1):
        plain, drafted = answer(*smollm2, kind, sample), answer(*smollm2, kind, sample, stop_when_found=True)
        assert drafted.score == plain.score
        assert plain.text.startswith(drafted.text) and (drafted.score == 1 or drafted.text == plain.text)
        torch.testing.assert_close(drafted.logprobs, plain.logprobs, rtol=0, atol=1e-6)
    wrong = replace(sample, answers=(plain.text.split()[0][:2] + "999",))  # a draft that is left after some tokens
    assert answer(*smollm2, kind, wrong, stop_when_found=True).text == plain.text


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen3_next", "minimax"])
@pytest.mark.parametrize("drafted", [False, True])
def test_caches_that_cannot_be_shortened(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], family: str, drafted: bool
) -> None:
    """Windows and recurrent layers: the answer's log-probabilities are those of one whole forward."""
    limits = {} if family in ("qwen3_next", "minimax") else {"sliding_window": 64}
    model = models.tiny(family, vocab_size=49152, max_position_embeddings=1024, **limits)
    kind = replace(task("needle4"), max_new_tokens=4)
    [sample] = kind.samples(smollm2[1], tokens=400, count=1, seed=0)
    got = answer(model, smollm2[1], kind, sample, stop_when_found=drafted)
    prompt = prompt_ids(smollm2[1], sample)
    truth = smollm2[1](f" {sample.answers[0]}", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        whole = model(torch.cat([prompt, truth], 1)).logits[0, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(got.logprobs, whole.double().log_softmax(-1), rtol=0, atol=1e-4)
    assert got.text


@pytest.mark.parametrize("read", [answer, read_on, lambda *args: answer_together(*args[:-1], [args[-1]])])
def test_a_model_that_returns_no_cache_is_named(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], read: Callable[..., object]
) -> None:
    model = small_models.small("recurrent_gemma", vocab_size=49152)
    kind = task("needle4")
    [sample] = kind.samples(smollm2[1], tokens=300, count=1, seed=0)
    with pytest.raises(SparsekitError, match="RecurrentGemmaForCausalLM returns no cache; the tokens that follow"):
        read(model, smollm2[1], kind, sample)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [("passkey", None), ("needle4", {"layers": {"15-29": {"name": "triangle", "window_tokens": 64}}})],
)
def test_prompts_decoded_together_are_answered_as_alone(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    config: dict[str, object] | None,
) -> None:
    """Of different lengths, in groups that memory allows: texts, scores, log-probabilities and layers, in order."""
    model, tokenizer = smollm2
    kind = replace(task(name), max_new_tokens=12)
    samples = [
        kind.samples(tokenizer, tokens=tokens, count=n + 1, seed=1)[n] for n, tokens in enumerate((300, 450, 350))
    ]
    longest = 2 * 30 * 3 * 64 * 225 * model.dtype.itemsize
    monkeypatch.setattr("sparsekit.lab.answers.TOGETHER_BYTES", 2 * longest)
    with apply(model, config) if config is not None else nullcontext() as handle:
        alone = [answer(model, tokenizer, kind, one, handle=handle, stop_when_found=True) for one in samples]
        together = answer_together(model, tokenizer, kind, samples, handle=handle)
    for one, other in zip(alone, together, strict=True):
        assert (other.text, other.score, other.tokens) == (one.text, one.score, one.tokens)
        assert torch.equal(other.logprobs, one.logprobs)
        assert [layer.ran for layer in other.layers] == [layer.ran for layer in one.layers]
    assert len({one.text for one in alone}) == 3


@pytest.mark.parametrize("config", [None, {"default": {"name": "triangle", "window_tokens": 32, "last_tokens": 16}}])
def test_prompts_decoded_together_attend_each_its_own_keys(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, object] | None,
) -> None:
    """Without padding and mask, for which PyTorch on a GPU has kernels that read grouped keys once."""
    model, kind = models.tiny("llama", vocab_size=49152), replace(task("needle4"), max_new_tokens=6)
    samples = [kind.samples(smollm2[1], tokens=200 + 50 * n, count=1, seed=0)[0] for n in range(3)]
    sdpa, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if q.shape[2] == 1:
            seen.append((len(q), k.shape[2], mask))
        return sdpa(module, q, k, v, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
    with apply(model, config) if config is not None else nullcontext() as handle:
        found = answer_together(model, smollm2[1], kind, samples, handle=handle)
    layers, steps = model.config.num_hidden_layers, kind.max_new_tokens - 1
    assert {(rows, mask) for rows, _, mask in seen} == {(1, None)}
    wanted = [one.tokens + n + 1 for n in range(steps) for _ in range(layers) for one in found]
    assert [keys for _, keys, _ in seen] == wanted


def test_rows_that_are_done_leave_the_others(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whose answers are found early and one that ends are not read on, and all say what they say alone."""
    model, kind = models.tiny("llama", vocab_size=49152), replace(task("needle4"), max_new_tokens=8)
    samples = [kind.samples(smollm2[1], tokens=200 + 50 * n, count=1, seed=0)[0] for n in range(4)]
    steps: list[list[int]] = []
    forward = model.forward

    def kept(ids: Tensor, **kwargs: Any) -> Any:
        if ids.shape[1] == 1:
            steps.append(ids[:, 0].tolist())
        return forward(ids, **kwargs)

    monkeypatch.setattr(model, "forward", kept)
    whole = [one.text for one in answer_together(model, smollm2[1], kind, samples)]
    assert len(set(whole)) == 4
    for n, share in ((0, 0.3), (3, 0.5)):
        samples[n] = replace(samples[n], answers=(whole[n][: int(len(whole[n]) * share)].strip(),))
    end = steps[5][2]
    assert sum(step.count(end) for step in steps) == 1 and model.generation_config is not None
    model.generation_config.eos_token_id = end
    steps.clear()
    together = answer_together(model, smollm2[1], kind, samples)
    rows = [len(step) for step in steps]
    assert set(rows) == {4, 3, 2, 1} and rows == sorted(rows, reverse=True)
    alone = [answer(model, smollm2[1], kind, one, stop_when_found=True) for one in samples]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.score for one in together] == [1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_keys_that_a_mask_hides_are_masked_in_each_row(dtype: torch.dtype) -> None:
    """Beside the padding, in one row of the second mask: as attention of all rows under that mask."""
    torch.manual_seed(0)
    padding, sdpa, module = [3, 0, 1], ALL_ATTENTION_FUNCTIONS["sdpa"], torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    q, (k, v) = torch.randn(3, 4, 1, 16), torch.randn(2, 3, 2, 8, 16)
    attend = _EachRow(padding)
    for hidden in (0, 2):
        mask = torch.arange(8) >= torch.tensor(padding)[:, None, None, None]
        mask[1, ..., :hidden] = False
        if dtype != torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        expected, _ = sdpa(module, q, k, v, mask)
        torch.testing.assert_close(attend(sdpa, module, q, k, v, mask)[0], expected)


def test_masks_that_are_no_tensors_are_left_alone() -> None:
    """FlexAttention's are not."""
    q, mask = torch.randn(2, 4, 1, 16), object()
    out, _ = _EachRow([3, 0])(lambda module, q, k, v, mask: ((q, mask), None), None, q, q, q, mask)
    assert out[0] is q and out[1] is mask


def test_a_cache_that_cannot_be_shortened_is_decoded_alone(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model = models.tiny("mistral", vocab_size=49152, max_position_embeddings=1024, sliding_window=64)
    kind = replace(task("passkey"), max_new_tokens=3)
    samples = kind.samples(smollm2[1], tokens=300, count=2, seed=0)
    alone = [answer(model, smollm2[1], kind, one, stop_when_found=True) for one in samples]
    together = answer_together(model, smollm2[1], kind, samples)
    assert [one.text for one in together] == [one.text for one in alone]


def test_answers_keep_the_order_of_their_samples(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt longer than a window has a cache that cannot be shortened, and a shorter one before it can be."""
    model, kind = models.tiny("llama", vocab_size=49152), replace(task("passkey"), max_new_tokens=2)
    samples = [
        kind.samples(smollm2[1], tokens=tokens, count=n + 1, seed=1)[n] for n, tokens in enumerate((200, 260, 230))
    ]
    monkeypatch.setattr("sparsekit.lab.answers.can_shorten", lambda cache: not 245 < cache.get_seq_length() < 270)
    together = answer_together(model, smollm2[1], kind, samples)
    lengths = [answer(model, smollm2[1], kind, one).tokens for one in samples]
    assert [one.tokens for one in together] == lengths
    assert 245 < lengths[1] < 270 and max(lengths[0], lengths[2]) <= 245


def test_layers_with_a_window_of_their_own_have_no_density(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = models.tiny(
        "gemma3_text", vocab_size=49152, max_position_embeddings=1024, sliding_window=64, layer_types=kinds
    )
    config = {"default": {"name": "triangle", "window_tokens": 32, "last_tokens": 16}}
    [row] = evaluate(model, smollm2[1], {"t": config}, tasks=["passkey"], lengths=[400], samples=2)
    told = [share for share in row["layer_density"] if share is not None]
    assert [share is None for share in row["layer_density"]] == [True, False] * 2
    assert row["density"] == pytest.approx(sum(told) / len(told), abs=1e-6) and row["density"] < 0.5


def test_only_the_prompt_is_sparse_however_few_queries_are_enough(
    small: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """An answer longer than min_queries is read by the model's own attention, and the record tells of the prompt."""
    few, many = ({**TRIANGLE, "min_queries": queries} for queries in (2, 64))
    configs = {"few": few, "many": many}
    for name in ("kv_retrieval", "needle4"):
        a, b = evaluate(*small, configs, tasks=[name], lengths=[400], samples=2)
        assert (a["kl"], a["texts"], a["layer_density"]) == (b["kl"], b["texts"], b["layer_density"])


def test_perplexity_of_what_follows(small: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The sun rose over a town that nobody had drawn on any map. " * 200)
    rows = list(
        evaluate(
            *small, {"model": None, "triangle": TRIANGLE}, tasks=["perplexity"], lengths=[500], samples=2,
            corpus=str(tmp_path),
        )
    )  # fmt: skip
    own, triangle = rows
    assert own["perplexity"] > 1 and own["nll"] > 0
    assert own["nll"] != triangle["nll"] and abs(own["nll"] - triangle["nll"]) < 1
    assert own["nll_last_rows"] > 0 and triangle["density"] < 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": [4096]}, "tokens = 4096: .* has 1024 positions"),
        ({"samples": 0}, "samples = 0: at least one"),
        ({"lengths": []}, "0 lengths: one of each at least"),
        ({"tasks": ["paskey"]}, "passkey"),
    ],
)
def test_what_cannot_be_asked(
    small: tuple[PreTrainedModel, PreTrainedTokenizerBase], change: dict[str, object], says: str
) -> None:
    asked: dict[str, object] = {"tasks": ["passkey"], "lengths": [400], "samples": 1, **change}
    with pytest.raises(SparsekitError, match=says):
        list(evaluate(*small, {"model": None}, **asked))  # type: ignore[arg-type]


def test_the_command(
    small: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: small)
    (tmp_path / "triangle.yaml").write_text(json.dumps(TRIANGLE))
    given = ["model", str(tmp_path / "triangle.yaml"), "--model", "smollm2-135m", "--dtype", "float32"]
    options = ["--tasks", "passkey", "--tokens", "300,400", "--samples", "2", "-o", str(tmp_path / "out.jsonl")]
    ran = CliRunner().invoke(app, ["eval", *given, *options, "--json"])
    assert ran.exit_code == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == json.loads(ran.stdout)
    assert [(row["tokens"], row["label"] == "model") for row in rows] == [
        (300, True), (300, False), (400, True), (400, False)
    ]  # fmt: skip
    assert rows[0]["model"] == "smollm2-135m" and rows[1]["config"]["layers"]

    before = (tmp_path / "out.jsonl").read_text()
    wrong = CliRunner().invoke(app, ["eval", *given, *options, "--tasks", "passkeyy"])
    assert wrong.exit_code == 1 and "Did you mean 'passkey'" in wrong.stderr
    late = CliRunner().invoke(app, ["eval", *given, *options, "--tokens", "300,4096"])
    assert late.exit_code == 1 and "has 1024 positions" in late.stderr
    assert (tmp_path / "out.jsonl").read_text() == before
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 2
    with ResultFile(tmp_path / "out.jsonl", shared=True).writing():
        held = CliRunner().invoke(app, ["eval", *given, *options])
    assert held.exit_code == 1 and "being written by another process" in held.stderr
    (tmp_path / "sweep.jsonl").write_text(json.dumps({"key": "a", **rows[0]}) + "\n")
    for file, says in (("sweep.jsonl", "are of `sparsekit sweep`"), ("triangle.yaml", "no record"), (".", "a file")):
        refused = CliRunner().invoke(app, ["eval", *given, *options, "-o", str(tmp_path / file)])
        assert refused.exit_code == 1 and says in refused.stderr, refused.stderr
    assert json.loads((tmp_path / "triangle.yaml").read_text()) == TRIANGLE

    table = CliRunner().invoke(app, ["eval", *given, *options])
    assert table.exit_code == 0 and "passkey" in table.stdout
