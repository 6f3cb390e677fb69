"""Perplexity of what is decoded after a sparse prefill, over a corpus of the user's or the manual inside Python.

    >>> from random import Random
    >>> from sparsekit.lab.tasks import task
    >>> reading = task("perplexity", corpus="pydoc")
    >>> sample = reading.build(Random(0), units=1000)
    >>> len(sample.prompt.split()), len(sample.answers[0].split())
    (1000, 128)
    >>> longer = reading.build(Random(0), units=2000)
    >>> longer.answers == sample.answers, longer.prompt.endswith(sample.prompt)
    (True, True)

A prompt ends at a drawn word of the corpus; what follows is the continuation, and longer prompts begin earlier, so that
lengths are compared on the same tokens. Decoding is dense, so the continuation judges the keys and values that the
prefill left. The prompt's own rows are judged apart, since patterns such as Triangle give up the middle rows' own
predictions by design: see `sparsekit.lab.evaluate.read_on`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from sparsekit.lab.tasks.base import Sample, Task, register
from sparsekit.lab.tasks.corpus import need_corpus

__all__ = ["Perplexity"]


@dataclass(frozen=True)
class Perplexity(Task):
    """A piece of a corpus and its continuation, of which the first `max_new_tokens` tokens are read. A unit is a word.

    The score is exp(-nll) = 1 / perplexity, so that more is better, as everywhere.
    """

    corpus: str | None = None
    metric: ClassVar[str] = "nll"

    def over(self, corpus: str | None) -> Perplexity:
        return replace(self, corpus=corpus) if corpus is not None else self

    def build(self, rng: Random, units: int) -> Sample:
        """The `units` words before a drawn place, and as many words after it as tokens are read."""
        corpus = need_corpus(self.name, self.corpus)
        at = rng.randrange(len(corpus.words))
        return Sample(
            prompt=corpus.text(units, at - units),
            answers=(corpus.text(self.max_new_tokens, at),),
            meta={"corpus": corpus.name, "corpus_digest": corpus.digest, "word": at},
            raw=True,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        """1 / perplexity of a mean negative log-likelihood, in nats a token, written as text."""
        return math.exp(-float(prediction))


register(Perplexity("perplexity", max_new_tokens=128))
