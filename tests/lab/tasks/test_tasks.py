"""The needle tasks: sized by the tokenizer, seeded, scored."""

from __future__ import annotations

import doctest
from random import Random

import pytest

from sparsekit.errors import SparsekitError
from sparsekit.lab.tasks import Needle, Sample, base, needle, prompt_ids, prompt_text, register, task, task_names

TASKS = ("passkey", "needle4")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [256, 1000, 2200, 8192])
def test_prompt_and_answer_fill_the_budget_to_one_noise_sentence(tokenizer, name, tokens):
    longest = max(len(tokenizer(f" {sentence}")["input_ids"]) for sentence in needle.NOISE)
    for sample in task(name).samples(tokenizer, tokens=tokens, count=3, seed=0):
        used = prompt_ids(tokenizer, sample).shape[1] + task(name).max_new_tokens
        assert tokens - longest <= used <= tokens


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_seed_and_index_alone(tokenizer, name):
    five = task(name).samples(tokenizer, tokens=512, count=5, seed=3)
    assert task(name).samples(tokenizer, tokens=512, count=2, seed=3) == five[:2]
    assert len({sample.prompt for sample in five}) == 5
    assert task(name).samples(tokenizer, tokens=512, count=1, seed=4) != five[:1]
    longer = task(name).samples(tokenizer, tokens=1024, count=5, seed=3)
    assert [(s.answers, s.depth) for s in longer] == [(s.answers, s.depth) for s in five]


def test_the_draw_is_the_same_in_every_process():
    """Pinned: a change of these makes results of different versions incomparable."""
    assert task("passkey").build(Random("passkey 0 0"), 10).answers == ("31062",)
    assert task("needle4").build(Random("needle4 0 0"), 10).answers == ("3481680",)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("units", [0, 1, 7, 500])
def test_the_answer_stands_in_the_prompt_at_its_depth(name, units):
    sample = task(name).build(Random(0), units)
    [answer] = sample.answers
    assert answer not in sample.answer_prefix
    if units == 500:
        assert sample.prompt.index(answer) / len(sample.prompt) == pytest.approx(sample.depth, abs=0.03)


def test_needle4_has_rulers_wording():
    sample = task("needle4").build(Random(1), 100)
    key = sample.meta["key"]
    assert sample.prompt.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    assert sample.prompt.count("One of the special magic numbers for ") == 4
    assert f"One of the special magic numbers for {key} is: {sample.answers[0]}." in sample.prompt
    assert sample.prompt.endswith(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
    assert sample.answer_prefix == f"The special magic number for {key} mentioned in the provided text is"
    assert len({*sample.answers, *sample.meta["others"]}) == 4


def test_noise_is_whole_sentences_with_nothing_lost():
    prompt = task("passkey").build(Random(2), 500).prompt
    assert sum(prompt.count(sentence) for sentence in needle.NOISE) == 500


def test_the_words_are_different_words():
    assert len(set(needle.ADJECTIVES)) == len(needle.ADJECTIVES)
    assert len(set(needle.NOUNS)) == len(needle.NOUNS)


def test_the_score_is_the_share_of_answers_found():
    sample = Sample(prompt="", answers=("Blue", "12"))
    assert task("passkey").score("it is blue and 123", sample) == 1.0
    assert task("passkey").score("it is BLUE", sample) == 0.5
    assert task("passkey").score("", sample) == 0.0


def test_the_prompt_goes_through_the_chat_template(tokenizer):
    sample = task("passkey").build(Random(0), 3)
    text = prompt_text(tokenizer, sample)
    assert text.endswith(f"provided text?<|im_end|>\n<|im_start|>assistant\n{sample.answer_prefix}")
    assert tokenizer.decode(prompt_ids(tokenizer, sample)[0]) == text


def test_without_a_chat_template_the_prefix_follows_the_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert prompt_text(tokenizer, Sample(prompt="Q?", answers=("a",), answer_prefix="It is")) == "Q? It is"
    assert prompt_text(tokenizer, Sample(prompt="Q?", answers=("a",))) == "Q?"


@pytest.mark.parametrize("cost", [1, 3, 7])
@pytest.mark.parametrize("guess", [0, 1, 20, 33, 34, 90, 1000])
def test_the_largest_fit_is_found_from_any_guess(cost, guess):
    assert base._largest_fit(lambda n: 10 + cost * n, budget=110, guess=guess) == 100 // cost


def test_every_task_is_registered_once():
    assert set(TASKS) < set(task_names())
    assert len(set(task_names())) == len(task_names())


def test_bad_input_is_a_one_line_error(tokenizer):
    with pytest.raises(SparsekitError, match=r"unknown task 'needle': .* Did you mean 'needle4'\?"):
        task("needle")
    with pytest.raises(SparsekitError, match="tokens = 50 is too small; the shortest prompt needs"):
        task("needle4").samples(tokenizer, tokens=50, count=1, seed=0)
    with pytest.raises(SparsekitError, match="count = -1"):
        task("needle4").samples(tokenizer, tokens=500, count=-1, seed=0)
    with pytest.raises(SparsekitError, match="'needle4' is taken"):
        register(Needle("needle4", max_new_tokens=1))


@pytest.mark.parametrize("module", [base, needle])
def test_the_examples_in_the_docstrings_run(module, tokenizer):
    assert doctest.testmod(module, extraglobs={"tokenizer": tokenizer}).failed == 0


@pytest.mark.parametrize("corpus", [None, "pydoc"])
def test_passkeys10_asks_for_every_sequence_in_the_texts_order(tokenizer, corpus):
    [sample] = task("passkeys10", corpus).samples(tokenizer, tokens=3000, count=1, seed=0)
    assert 2900 < prompt_ids(tokenizer, sample).shape[1] + task("passkeys10").max_new_tokens <= 3000
    places = [sample.prompt.index(f"the {word} pass key: {key}\n") for word, key in zip(
        "first second third fourth fifth sixth seventh eighth ninth tenth".split(), sample.answers, strict=True
    )]  # fmt: skip
    assert places == sorted(places) and len(set(sample.answers)) == 10
    assert places[0] < 0.4 * len(sample.prompt) and places[-1] > 0.6 * len(sample.prompt)
    assert ("grass is green" in sample.prompt) == (corpus is None)
    answer = tokenizer(f" {', '.join(sample.answers)}", add_special_tokens=False)["input_ids"]
    assert len(answer) <= task("passkeys10").max_new_tokens
    assert task("passkeys10").score(", ".join(sample.answers[1:]), sample) == pytest.approx(0.9)
    assert task("passkeys10").build(Random(0), 9).answers == task("passkeys10").build(Random(0), 0).answers
