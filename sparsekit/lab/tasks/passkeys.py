"""Ten sequences of words hidden in a text, all of them asked for: what DuoAttention's gates are trained on.

    >>> from random import Random
    >>> from sparsekit.lab.tasks import task
    >>> sample = task("passkeys10").build(Random(0), units=1000)
    >>> len(sample.answers), len(sample.answers[0].split())
    (10, 32)
    >>> task("passkeys10").score(", ".join(sample.answers[:5]), sample)
    0.5

After arXiv 2410.10819, section 2.3: ten random sequences of 32 words at random places of a long text. The wording is
ours, and the text is a corpus of the user's, or noise; there it is a book.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from random import Random

from sparsekit.lab.tasks.base import Sample, Task, register
from sparsekit.lab.tasks.corpus import read_corpus
from sparsekit.lab.tasks.needle import NOISE

__all__ = ["Passkeys"]

SPELLING = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


@dataclass(frozen=True)
class Passkeys(Task):
    """As many pass keys as `ORDINALS`, each a sequence of `words` words of the spelling alphabet, at random depths.

    Attributes:
        words: of a pass key.
        corpus: whose words the keys are hidden among; None: noise sentences.
    """

    words: int = 32
    corpus: str | None = None

    def over(self, corpus: str | None) -> Passkeys:
        return self if corpus is None else replace(self, corpus=corpus)

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt with `units` words of the corpus, or noise sentences."""
        keys = [" ".join(rng.choices(SPELLING, k=self.words)) for _ in ORDINALS]
        depths = sorted(rng.uniform(0.05, 0.95) for _ in keys)
        if self.corpus is None:
            parts = list(islice(cycle(NOISE), units))
        else:
            parts = read_corpus(self.corpus).text(units).split() if units else []
        for ordinal, key, depth in reversed(list(zip(ORDINALS, keys, depths, strict=True))):
            parts.insert(
                round(depth * units), f"\n\nRemember this sequence of words, the {ordinal} pass key: {key}\n\n"
            )
        return Sample(
            prompt=(
                "Ten pass keys are hidden within the following text. Make sure to memorize them. "
                f"I will quiz you about the pass keys afterwards.\n{' '.join(parts)}\n"
                "What are the ten pass keys mentioned in the provided text, from the first to the tenth?"
            ),
            answers=tuple(keys),
            answer_prefix="The ten pass keys mentioned in the provided text are:",
        )


register(Passkeys("passkeys10", max_new_tokens=704))
