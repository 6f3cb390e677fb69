"""Facts hidden in noise: `passkey`, one number, and `needle4`, four numbers under four keys of which one is asked for.

    >>> from random import Random
    >>> from sparsekit.lab.tasks import task
    >>> sample = task("needle4").build(Random(0), units=1000)
    >>> sample.answer_prefix
    'The special magic number for bright-parrot mentioned in the provided text is'
    >>> task("needle4").score(f" {sample.answers[0]}.", sample)
    1.0

`needle4` has RULER's wording (arXiv 2404.06654, niah_multikey_1) over RULER's noise in place of its essays, which no
licence lets us ship: its scores compare with each other, not with published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from random import Random

from sparsekit.lab.tasks.base import Sample, Task, register

__all__ = ["Needle", "Passkey"]

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

DEPTHS = tuple(step / 39 for step in range(40))  # RULER's linspace(0, 100, 40), as shares

ADJECTIVES = (
    "amber ancient autumn bold brave bright calm careful clever cosmic crimson curious daring distant eager early "
    "electric emerald faithful fearless gentle golden grand happy hidden hollow humble jolly lively lucky mellow "
    "merry misty modest narrow nimble noble patient playful polite proud quiet rapid royal rustic scarlet secret "
    "silent silver simple sleepy solid spare steady sturdy sunny swift tender tidy velvet vivid wandering warm "
    "wild winter wise"
).split()

NOUNS = (
    "anchor apple arrow badger basket beacon bottle bridge button candle canyon castle cello cherry circle clover "
    "comet copper corner cottage crane desert dragon eagle engine feather fiddle forest fountain garden glacier "
    "hammer harbor hazel island jacket kettle ladder lantern lemon lizard magnet maple marble meadow mirror "
    "mountain needle ocean otter paddle parrot pebble pepper planet pocket puzzle rabbit ribbon river saddle "
    "sparrow spoon summit temple thunder tiger tunnel turtle valley violin walnut whistle willow window"
).split()


@dataclass(frozen=True)
class Passkey(Task):
    """A number of five digits somewhere in the noise (after arXiv 2305.16300).

    The published prefix, "The pass key is", lets SmolLM2-135M define the word in place of naming the number. Answering
    with "mentioned in the provided text" and "the number" keeps it to the text.
    """

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt with `units` noise sentences."""
        number, depth = str(rng.randrange(10_000, 100_000)), rng.choice(DEPTHS)
        fact = f"The pass key is the number {number}. Remember it. The number {number} is the pass key."
        return Sample(
            prompt=(
                "A pass key is hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the pass key afterwards.\n{_hide({fact: depth}, units)}\n"
                "What is the pass key mentioned in the provided text?"
            ),
            answers=(number,),
            answer_prefix="The pass key mentioned in the provided text is the number",
            depth=depth,
        )


@dataclass(frozen=True)
class Needle(Task):
    """`keys` numbers of seven digits, each under its own key, at different depths of the noise; one is asked for."""

    keys: int = 4

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt with `units` noise sentences."""
        names = _keys(rng, self.keys)
        numbers = [str(rng.randrange(1_000_000, 10_000_000)) for _ in names]
        depths = rng.sample(DEPTHS, self.keys)
        asked = rng.randrange(self.keys)
        query, facts = names[asked], zip(names, numbers, depths, strict=True)
        text = _hide({f"One of the special magic numbers for {key} is: {n}.": depth for key, n, depth in facts}, units)
        return Sample(
            prompt=(
                "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the numbers afterwards.\n{text}\n"
                f"What is the special magic number for {query} mentioned in the provided text?"
            ),
            answers=(numbers[asked],),
            answer_prefix=f"The special magic number for {query} mentioned in the provided text is",
            depth=depths[asked],
            meta={"key": query, "others": tuple(n for n in numbers if n != numbers[asked])},
        )


def _keys(rng: Random, count: int) -> list[str]:
    """Different adjective-noun pairs; no word is in two of them."""
    pairs = zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count), strict=True)
    return [f"{adjective}-{noun}" for adjective, noun in pairs]


def _hide(needles: dict[str, float], units: int) -> str:
    """`units` noise sentences with each needle after the share of them that is its depth."""
    sentences = list(islice(cycle(NOISE), units))
    for needle, depth in sorted(needles.items(), key=lambda item: item[1], reverse=True):
        sentences.insert(round(depth * units), needle)
    return " ".join(sentences)


register(Passkey("passkey", max_new_tokens=10))
register(Needle("needle4", max_new_tokens=14))
