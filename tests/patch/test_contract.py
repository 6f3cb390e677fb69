"""The accuracy contract: KL from dense on one's own prompts, the layers that exceed a budget, and what is refused."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparsekit
from sparsekit import SparsekitError, models
from sparsekit.patch import CheckReport, Divergence
from sparsekit.patch.contract import _Measured
from sparsekit.patch.giving_back import give_back_until
from sparsekit.patch.user_prompts import prompts_of, read_prompts

STREAMING = {"name": "a_shape", "sink_tokens": 0, "window_tokens": 16}
PROMPTS = [list(range(5, 205)), torch.arange(20, 250), torch.arange(100, 200)[None]]
TIGHT, WIDE = {"kl": 1e-4}, {"kl": 0.5}


@pytest.fixture
def model(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    return tiny_llama


def _config(budget: dict[str, float] | None = None, layers: str = "0-3") -> dict[str, Any]:
    said = {} if budget is None else {"budget": budget}
    return {"layers": {layers: STREAMING}, **said}


@torch.inference_mode()
def _by_definition(model: PreTrainedModel, config: dict[str, Any], ids: Sequence[int], count: int) -> float:
    """In float64: dense attention's greedy tokens; then dense decoding after either prefill, token by token."""
    prompt = torch.tensor([list(ids)])
    tokens = model.generate(prompt, max_new_tokens=count, do_sample=False)[0, prompt.shape[1] :]

    def distributions(sparse: bool) -> list[torch.Tensor]:
        if sparse:
            with sparsekit.apply(model, config):
                out = model(prompt, use_cache=True)
        else:
            out = model(prompt, use_cache=True)
        rows = [out.logits[0, -1]]
        for token in tokens[:-1]:
            out = model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
        return [row.double().log_softmax(-1) for row in rows]

    terms = [float((p.exp() * (p - q)).sum()) for p, q in zip(distributions(False), distributions(True), strict=True)]
    return sum(terms) / len(terms)


def test_what_is_measured_is_its_definition(model: PreTrainedModel) -> None:
    found = sparsekit.check(model, _config(), PROMPTS[:1], next_tokens=6)
    assert found.before.kl[0] == pytest.approx(_by_definition(model, _config(), PROMPTS[0], 6), rel=1e-3)
    assert found.before.kl[0] > 1e-4 and found.before is found.after
    assert found.budget is None and found.held is None and found.kept and found.given_back == () and not found.alone
    assert "no budget in the config: nothing is run dense" in found.lines()[1]


def test_recurrent_layers_go_on_from_the_prompt() -> None:
    """Jamba's start anew where they read several tokens at once."""
    jamba, config = small("jamba"), _config(layers="1,3")
    found = sparsekit.check(jamba, config, PROMPTS[:1], next_tokens=6)
    assert found.before.kl[0] == pytest.approx(_by_definition(jamba, config, PROMPTS[0], 6), rel=1e-3)
    assert found.before.kl[0] > 1e-4


def test_models_without_logits_or_a_cache_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(SparsekitError, match="LlamaModel returns no logits: give the model with its language head"):
        sparsekit.check(model.model, _config(), PROMPTS)
    assert model.config._attn_implementation == "sdpa"
    griffin = small("recurrent_gemma")  # layer 2 slides
    with pytest.raises(SparsekitError, match="RecurrentGemmaForCausalLM returns no cache"):
        sparsekit.check(griffin, _config(layers="2"), PROMPTS)


def test_the_interval_is_that_of_the_mean() -> None:
    found = Divergence((0.1, 0.3))
    assert found.mean == pytest.approx(0.2) and found.half_width == pytest.approx(1.959964 * 0.1)
    assert Divergence((0.1,)).half_width is None and "no interval" in str(Divergence((0.1,)))


def test_a_budget_that_holds_runs_nothing_dense(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = sparsekit.apply(model, _config(WIDE), check=PROMPTS)
    assert handle.check is not None and handle.check.held and handle.check.given_back == ()
    with torch.inference_mode():
        model(torch.arange(5, 205)[None])
    assert [row.ran for row in handle.report().layers] == ["sparse"] * 4
    assert "the budget of 0.5 is held" in str(handle.report())


def test_layers_that_exceed_it_run_dense_by_name(model: PreTrainedModel) -> None:
    with pytest.warns(RuntimeWarning, match=r"exceeds the budget of 0\.0001: layers [\d,-]+ diverge most; with them"):
        handle = sparsekit.apply(model, _config(TIGHT), check=PROMPTS)
    found = handle.check
    assert found is not None and found.held is False and found.kept
    assert found.before.mean > 1e-4 >= found.after.mean
    ranked = sorted(found.alone, key=lambda layer: -found.alone[layer])
    assert 0 < len(found.given_back) < 4 and set(found.given_back) == set(ranked[: len(found.given_back)])
    with torch.inference_mode():
        model(torch.arange(5, 205)[None])
    for row in handle.report().layers:
        back = row.layer in found.given_back
        assert row.ran == ("dense" if back else "sparse")
        assert row.why == (f"given back by the check: KL {found.alone[row.layer]:.3g} alone, budget 0.0001" * back)
    assert found.verdict() in str(handle.report())
    again = sparsekit.check(model, handle.config, PROMPTS)
    assert again.held and again.before == found.after
    assert handle.config.provenance["given_back_to_dense"]
    said = handle.config.budget
    assert said is not None and said.prompts is not None
    assert (said.prompts.count, said.prompts.tokens, said.prompts.source) == (3, (100, 230), "Python")
    assert said.prompts.kl == pytest.approx(found.after.mean, rel=1e-3)
    assert sparsekit.load(handle.config.dump()) == handle.config


def test_one_layer_too_many_is_the_fewest_by_its_own_share(model: PreTrainedModel) -> None:
    """What a layer alone does is measured with all others dense; a budget between it and the whole needs one layer."""
    whole = sparsekit.check(model, _config(), PROMPTS)
    alone = {i: sparsekit.check(model, _config(layers=str(i)), PROMPTS).before.mean for i in range(4)}
    worst = max(alone, key=lambda i: alone[i])
    others = sparsekit.check(model, _config(layers=",".join(str(i) for i in range(4) if i != worst)), PROMPTS)
    budget = (whole.before.mean + others.before.mean) / 2
    assert others.before.mean < budget
    found = sparsekit.check(model, _config({"kl": budget}), PROMPTS)
    assert found.given_back == (worst,) and found.after == others.before
    assert found.alone == pytest.approx(alone)


def test_a_kernel_whose_rounding_is_the_divergence_is_said(model: PreTrainedModel) -> None:
    """Dense layers that sparsekit's kernel runs differ by rounding: a budget below that cannot be held."""
    config = {**_config({"kl": 1e-300}), "dense_impl": "kernel"}
    model.bfloat16().set_attn_implementation("eager")
    found = sparsekit.check(model, config, PROMPTS[:1])
    assert found.given_back == (0, 1, 2, 3) and not found.kept and 0 < found.after.mean < 1e-3
    with pytest.raises(SparsekitError, match=r"still does with every sparse layer dense.*dense_impl: kernel"):
        sparsekit.apply(model, config, check=PROMPTS[:1])
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_then_as_it_was(model: PreTrainedModel, fails: bool) -> None:
    """And what was applied to it still is, by the same handle."""
    ids = torch.arange(5, 205)[None]
    with sparsekit.apply(model, {"layers": {"1": STREAMING}}) as handle, torch.inference_mode():
        before = model(ids).logits
        if fails:
            hook = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sparsekit.apply(model, _config(TIGHT), check=PROMPTS)
            hook.remove()
        else:
            assert sparsekit.check(model, _config(TIGHT), PROMPTS).given_back
        assert handle.active and torch.equal(model(ids).logits, before)
        assert [row.ran for row in handle.report().layers] == ["dense", "sparse", "dense", "dense"]
        handle.remove()
        assert not torch.equal(model(ids).logits, before) and model.config._attn_implementation == "sdpa"


def test_heads_and_own_layers(model: PreTrainedModel) -> None:
    """A layer is given back whole, its heads with it; sliding layers that keep their own attention are left out."""
    config = {"heads": {"0-2": {"0-2": STREAMING}}, "budget": {"kl": 1e-6}}
    found = sparsekit.check(model, config, PROMPTS)
    assert set(found.alone) == {0, 1, 2} and found.kept and found.given_back
    layers = found.config.resolve(models.facts(model)).layers
    assert [layer.layer for layer in layers if layer.dense] == sorted({*found.given_back, 3})
    sliding = models.tiny("gemma3_text", sliding_window=32, layer_types=["sliding_attention", "full_attention"] * 2)
    only = sparsekit.check(sliding, {"default": STREAMING, "budget": {"kl": 1e-9}}, PROMPTS)
    assert set(only.alone) <= {1, 3} and set(only.given_back) <= {1, 3}


def test_the_report_as_data(model: PreTrainedModel) -> None:
    steps: list[tuple[int, str]] = []
    found = sparsekit.check(model, _config(TIGHT), PROMPTS, step=lambda n, what: steps.append((n, what)))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["kind"] == "check" and data["held"] is False and data["given_back"] == list(found.given_back)
    assert data["before"]["kl"] == list(found.before.kl) and len(data["alone"]) == 4
    for head, rows in (found.table(), found.layers_table()):
        assert rows and all(len(row) == len(head) for row in rows)
    assert steps[0] == (1, "dense: prompt 0") and any("1 layers dense" in what for _, what in steps)
    # dense and whole of 3 prompts, 4 layers alone on these; and fewer than all of each try, since one prompt may tell
    assert 6 + 12 < len(steps) < 6 + 12 + 3 * len(found.given_back)


def test_a_wide_interval_is_said() -> None:
    config = sparsekit.load({"budget": {"kl": 0.1}})
    few = Divergence((0.0, 0.16))
    found = CheckReport(config, ("a", "b"), (100, 100), 16, few, few, {})
    assert found.held and "by the mean; its 95% interval reaches 0.24" in found.verdict()
    one = CheckReport(config, ("a",), (100,), 16, Divergence((0.0,)), Divergence((0.0,)), {})
    assert one.held and "one prompt, which does not show" in one.verdict()


# ---- the search


def test_the_search_gives_back_the_best_until_it_is_enough() -> None:
    gains, tried = {0: 1.0, 1: 5.0, 2: 3.0, 3: 2.0}, []

    def worth(back: list[int]) -> tuple[bool, float]:
        tried.append(list(back))
        total = sum(gains[one] for one in back)
        return total >= 8, total

    assert give_back_until(range(4), worth) == ([1, 2], True) and len(tried) == 4 + 3
    tried.clear()
    assert give_back_until([3, 1, 2, 0], worth, few=1) == ([1, 2, 3], True) and tried == [[3], [3, 1], [3, 1, 2]]
    assert give_back_until(range(4), worth, most=1) == ([1], False)
    assert give_back_until([], worth) == ([], False)


def test_the_search_and_the_report_take_the_same_mean() -> None:
    """A budget that is the mean itself holds, whatever the rounding of a sum."""
    measured = object.__new__(_Measured)
    draw = random.Random(0)
    for _ in range(200):
        kl = sorted((draw.random() * 1e-3 for _ in range(3)), reverse=True)
        measured.kl = lambda back, i, kl=kl: kl[i]  # type: ignore[method-assign, misc]
        found = Divergence(tuple(kl)).mean
        assert measured._holds([], range(3), found)
        assert not measured._holds([], range(3), math.nextafter(found, 0))


# ---- prompts


class Words:
    """Letters as tokens."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 200 for c in text]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert add_generation_prompt and not tokenize
        if messages[0]["role"] == "wizard":
            raise ValueError("only user\nand assistant")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_texts_chats_and_files(tmp_path: Path) -> None:
    words: Any = Words()
    chat = [{"role": "user", "content": "hi"}]
    made = prompts_of(["ab", chat, [7, 8]], words, 256)
    assert made[0].ids == (1, 97, 98) and made[2].ids == (7, 8)
    assert made[1].ids == tuple(ord(c) % 200 for c in "<user>hi<assistant>")
    file = tmp_path / "p.jsonl"
    lines = ["ab", chat, [7, 8], {"prompt": "ab", "id": 3}, {"messages": chat}, {"ids": [7, 8]}]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    read = prompts_of(read_prompts(file), words, 256)
    assert [one.ids for one in read] == [one.ids for one in made] * 2
    assert read[3].name == "p.jsonl line 7" and read[3].source == "p.jsonl"
    (tmp_path / "P.JSONL").write_text(json.dumps("ab") + "\n[7, 8]\n")
    assert [one.ids for one in prompts_of(read_prompts(tmp_path / "P.JSONL"), words, 256)] == [(1, 97, 98), (7, 8)]
    (tmp_path / "t.txt").write_text("a\nb\n")
    [one] = prompts_of(read_prompts(tmp_path / "t.txt"), words, 256)
    assert one.ids == (1, 97, 10, 98, 10) and one.name == "t.txt"


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("a text", r"prompts = 'a text': a list of prompts is needed"),
        ([], "at least one is needed"),
        ([5], r"prompt 0 = 5: want a text, a list of token ids"),
        (torch.tensor(5), r"prompts = tensor\(5\): a list of prompts is needed"),
        (torch.arange(5, 205), r"prompt 0 = tensor\(5\): want a text, a list of token ids"),
        ([[1.5] * 80], "prompt 0 = .*want a text"),
        ([b"bytes" * 20], "prompt 0 = b'bytes.*want a text"),
        ([PROMPTS[0], [300] * 80], r"prompt 1: token id 300; the model's are 0 to 255"),
        (["text"], "prompt 0 is a text, and there is no tokenizer to read it: give tokenizer="),
        ([PROMPTS[0], [1, 2], [3] * 70], r"short to run sparse: prompt 1 \(2 tokens\), prompt 2 \(70 tokens\); .* at "
         r"least 72 tokens \(dense_below_tokens\)"),
        ([[5] * 4090], "prompt 0: 4090 tokens and the 16 that follow: the model has 4096 positions"),
    ],
)  # fmt: skip
def test_prompts_are_refused_by_name(model: PreTrainedModel, prompts: Any, says: str) -> None:
    with pytest.raises(SparsekitError, match=says) as error:
        sparsekit.apply(model, {**_config(), "dense_below_tokens": 72}, check=prompts)
    assert "\n" not in str(error.value) and model.config._attn_implementation == "sdpa"


def test_other_refusals(model: PreTrainedModel) -> None:
    for config, says in (
        ({}, "runs no layer of this model sparse"),
        ({"default": "triangle"}, r"prompt 0 \(200 tokens\) is too short to run sparse: triangle.*kept every pair"),
        (
            {"default": {"name": "block_topk", "dense_below_tokens": 300}},
            r"prompt 0 \(200 tokens\).* at least 300 tokens \(block_topk runs dense below that on cpu\)",
        ),
    ):
        with pytest.raises(SparsekitError, match=says):
            sparsekit.check(model, config, PROMPTS)
    with pytest.raises(SparsekitError, match="next_tokens = 0"):
        sparsekit.check(model, _config(), PROMPTS, next_tokens=0)
    with pytest.raises(SparsekitError, match="training mode"):
        sparsekit.check(model.train(), _config(), PROMPTS)
    assert not math.isnan(sparsekit.check(model.eval(), _config(), PROMPTS).before.mean)


def test_logits_that_are_not_finite_are_refused(model: PreTrainedModel) -> None:
    def broken(module: object, args: object, out: torch.Tensor) -> torch.Tensor:
        return out.index_fill(-1, torch.tensor([7]), -math.inf)

    model.lm_head.register_forward_hook(broken)
    with pytest.raises(SparsekitError, match="prompt 0: KL from dense is nan: the model's logits are not finite"):
        sparsekit.check(model, _config(TIGHT), PROMPTS)


def test_ids_of_a_tokenizer_that_is_another_models(model: PreTrainedModel) -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [300] * 80}

    with pytest.raises(SparsekitError, match="prompt 0: the tokenizer gives token id 300; the model's are 0 to 255"):
        sparsekit.check(model, _config(), ["text"], tokenizer=tokenizer)  # type: ignore[arg-type]


def test_texts_and_chats_that_cannot_be_read() -> None:
    words: Any = Words()
    for half in ("a\ud800", [{"role": "user", "content": "\ud800"}]):
        with pytest.raises(SparsekitError, match=r"prompt 0: its text cannot be encoded at character .*surrogates"):
            prompts_of([half], words, 256)
    for prompt, says in (
        ([{"role": "user", "contents": "x"}], "message 0 has no 'content'; it has 'role', 'contents'. Did you mean"),
        ([{"role": "wizard", "content": "x"}], "chat template refuses it: only user and assistant"),
    ):
        with pytest.raises(SparsekitError, match=says):
            prompts_of([prompt], words, 256)
    words.chat_template = None
    with pytest.raises(SparsekitError, match="no chat template: give its text"):
        prompts_of([[{"role": "user", "content": "x"}]], words, 256)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.jsonl", "", "the file holds no prompt"),
        ("p.jsonl", '"a"\n{oops}\n', r"p\.jsonl line 2 is no JSON: "),
        ("p.jsonl", '{"promt": "a"}', r"line 1: an object needs one of prompt, messages, ids; it has 'promt'\. Did you "
         "mean 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "ids": [1]}', "it has prompt and ids"),
        ("p.json", "[]", r"want a \.jsonl file"),
        ("p.txt", " \n", "the file is empty"),
    ],
)  # fmt: skip
def test_files_are_refused_by_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SparsekitError, match=says):
        read_prompts(tmp_path / name)


# ---- a real model


def test_check_names_the_layers_that_break_smollm2(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """Streaming without sinks in layers 3 and 5 of a config whose other sparse layers are harmless."""
    model, tokenizer = smollm2
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 16
    chat = [{"role": "user", "content": f"The pass key is 71432. {text} What is the pass key?"}]
    config = {
        "layers": {
            "3,5": {"name": "a_shape", "sink_tokens": 0, "window_tokens": 32},
            "26-29": {"name": "triangle", "sink_tokens": 8, "window_tokens": 64, "last_tokens": 64},
        },
        "budget": {"kl": 0.01},
    }
    found = sparsekit.check(model, config, [chat], tokenizer=tokenizer, next_tokens=8)
    assert 300 < found.tokens[0] < 450
    assert found.given_back == (3, 5) and found.before.mean > 0.01 >= found.after.mean
    assert min(found.alone[3], found.alone[5]) > 4 * max(found.alone[i] for i in range(26, 30))
