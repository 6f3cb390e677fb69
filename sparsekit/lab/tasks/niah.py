"""RULER's needles in a haystack (arXiv 2404.06654): eight tasks that differ in haystack, keys and values.

    >>> from random import Random
    >>> from sparsekit.lab.tasks import task
    >>> sample = task("niah_multikey_2").build(Random(0), units=3)
    >>> print(sample.prompt)
    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the \
number afterwards.
    One of the special magic numbers for steady-walnut is: 4261363.
    One of the special magic numbers for ancient-meadow is: 8067332.
    One of the special magic numbers for simple-pepper is: 1679215.
    One of the special magic numbers for noble-mountain is: 2642077.
    What is the special magic number for simple-pepper mentioned in the provided text?
    >>> sample.answers, sample.answer_prefix
    (('1679215',), 'The special magic number for simple-pepper mentioned in the provided text is')
    >>> task("niah_multikey_2").score(" 1679215.", sample)
    1.0

Three need no text: niah_single_1 (noise), niah_multikey_2 and niah_multikey_3 (other needles). The five over essays
read a corpus of the user's: RULER's own, essays by Paul Graham, are not ours to ship, and scores over another text are
not comparable with published ones. Keys are pairs of our own adjectives and nouns; RULER takes them from wonderwords.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from random import Random
from typing import Literal
from uuid import UUID

from sparsekit.lab.tasks.base import Sample, Task, register
from sparsekit.lab.tasks.corpus import need_corpus
from sparsekit.lab.tasks.needle import ADJECTIVES, DEPTHS, NOISE, NOUNS

__all__ = ["Niah"]

Kind = Literal["words", "numbers", "uuids"]

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Niah(Task):
    """Needles "One of the special magic numbers for KEY is: VALUE." in a haystack; some of the keys are asked for.

    Attributes:
        haystack: "noise" (a unit is RULER's five sentences), "needle" (a unit is one more needle, with a key of its
            own), or "essay" (a unit is a word of the corpus, from its beginning).
        key, value: what keys and values are.
        keys, values, queries: needles' keys, values under each, keys asked for.
        corpus: of essays.
        sentences: noise before the haystack, where one unit more would go beyond the budget and one less leaves over
            1% of it.
    """

    haystack: Literal["noise", "needle", "essay"] = "noise"
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    corpus: str | None = None
    sentences: int = 0

    def over(self, corpus: str | None) -> Niah:
        return replace(self, corpus=corpus) if self.haystack == "essay" and corpus is not None else self

    def filled(self, sentences: int) -> Niah | None:
        return None if self.haystack == "essay" else replace(self, sentences=sentences)

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt with `units` noise lines, further needles, or words of the corpus."""
        keys = _different(_MAKE[self.key], rng, self.keys)
        values = _different(_MAKE[self.value], rng, self.keys * self.values)
        of_key = {key: values[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}
        needles = [NEEDLE.format(kind=self.value, key=key, value=v) for key in keys for v in of_key[key]]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.queries)
        depths = rng.sample(DEPTHS, len(needles)) if self.haystack == "essay" else [rng.random() for _ in needles]
        places = sorted(depths)
        text = self._hide(needles, places, units, Random(rng.getrandbits(64)), avoid={*keys, *values})
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        answers = tuple(v for key in asked for v in of_key[key])
        alone = len(answers) == 1
        kind = self.value.removesuffix("s") if alone else self.value
        some, are, all_are = ("A", "is", "is") if alone else ("Some", "are", "are all")
        depth = places[next(i for i, needle in enumerate(needles) if answers[0] in needle)] if alone else None
        return Sample(
            prompt=(
                f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {kind} afterwards.\n{text}\n"
                f"What {all_are} the special magic {kind} for {query} mentioned in the provided text?"
            ),
            answers=answers,
            answer_prefix=f"The special magic {kind} for {query} mentioned in the provided text {are}",
            depth=depth,
            meta={"keys": tuple(asked)},
        )

    def _hide(self, needles: list[str], places: list[float], units: int, rng: Random, avoid: set[str]) -> str:
        """The haystack with needle i behind the share `places[i]` of it; `rng` makes the haystack and nothing else."""
        if self.haystack == "essay":
            text = need_corpus(self.name, self.corpus).text(units)
            parts, gap = _SENTENCE_END.split(text) if text else [], " "
        elif self.haystack == "noise":
            parts, gap = [" ".join(NOISE)] * units, "\n"
        else:
            parts, gap = [self._other_needle(rng, avoid) for _ in range(units)], "\n"
        at = [int(place * len(parts)) for place in places]
        for place, needle in reversed(list(zip(at, needles, strict=True))):
            parts.insert(place, needle)
        if self.sentences:
            parts.insert(0, " ".join(islice(cycle(NOISE), self.sentences)))
        return gap.join(parts)

    def _other_needle(self, rng: Random, avoid: set[str]) -> str:
        key, value = _MAKE[self.key](rng), _MAKE[self.value](rng)
        while key in avoid or value in avoid:
            key, value = _MAKE[self.key](rng), _MAKE[self.value](rng)
        return NEEDLE.format(kind=self.value, key=key, value=value)


def _different(make: Callable[[Random], str], rng: Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


_MAKE: dict[str, Callable[[Random], str]] = {
    "words": lambda rng: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
    "numbers": lambda rng: str(rng.randrange(1_000_000, 10_000_000)),
    "uuids": lambda rng: str(UUID(int=rng.getrandbits(128), version=4)),
}

# scripts/synthetic.yaml of the RULER repository.
for _new in (
    Niah("niah_single_1", 128),
    Niah("niah_single_2", 128, "essay"),
    Niah("niah_single_3", 128, "essay", value="uuids"),
    Niah("niah_multikey_1", 128, "essay", keys=4),
    Niah("niah_multikey_2", 128, "needle"),
    Niah("niah_multikey_3", 128, "needle", key="uuids", value="uuids"),
    Niah("niah_multivalue", 128, "essay", values=4),
    Niah("niah_multiquery", 128, "essay", keys=4, queries=4),
):
    register(_new)
