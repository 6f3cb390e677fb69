"""RULER's variable tracking (arXiv 2404.06654, `vt`): which variables were assigned one value, over four hops.

    >>> from random import Random
    >>> from sparsekit.lab.tasks import task
    >>> sample = task("vt").build(Random(0), units=4)
    >>> print(sample.prompt.rpartition("following text.\\n\\n")[2])
    VAR SPDCB = 65125
    VAR WIOJI = VAR SPDCB
    VAR QFOLN = VAR WIOJI
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
    VAR BXXCV = VAR QFOLN
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
    VAR SUQPV = VAR BXXCV
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
    Question: Find all variables that are assigned the value 65125 in the text above.
    >>> sample.answers
    ('SPDCB', 'WIOJI', 'QFOLN', 'BXXCV', 'SUQPV')
    >>> task("vt").score(" SPDCB WIOJI", sample)
    0.4

One solved example stands before the question, as published, of variables with three letters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice
from random import Random
from string import ascii_uppercase

from sparsekit.lab.tasks.base import Sample, Task, register
from sparsekit.lab.tasks.needle import NOISE

__all__ = ["VariableTracking"]

EXAMPLE_LINES = 14  # of noise; the example then has at most 500 tokens, which is RULER's bound


@dataclass(frozen=True)
class VariableTracking(Task):
    """One chain of `hops` + 1 variables, its assignments in order between lines of noise. A unit is a line of noise.

    RULER's answer prefix ends with a space, which tokenizers would make a token of its own; it is left out.

    Attributes:
        hops: assignments from a variable.
        sentences: noise sentences before the text that fill what a whole line would go beyond.
    """

    hops: int = 4
    sentences: int = 0

    def filled(self, sentences: int) -> VariableTracking:
        return replace(self, sentences=sentences)

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt with `units` lines of noise after the example."""
        example_value, value = rng.sample(range(10_000, 100_000), 2)
        example = self._chain(rng, letters=3)
        variables = self._chain(rng, letters=5)
        shown, shown_prefix = self._ask(example, example_value, EXAMPLE_LINES, self._places(rng), 0)
        asked, prefix = self._ask(variables, value, units, self._places(rng), self.sentences)
        return Sample(
            prompt=f"{shown} {shown_prefix} {' '.join(example)}\n\n{asked}",
            answers=tuple(variables),
            answer_prefix=prefix,
            meta={"value": value},
        )

    def _places(self, rng: Random) -> list[float]:
        return sorted(rng.random() for _ in range(self.hops + 1))

    def _chain(self, rng: Random, letters: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) <= self.hops:
            found["".join(rng.choices(ascii_uppercase, k=letters))] = None
        return list(found)

    def _ask(
        self, variables: list[str], value: int, lines: int, places: list[float], sentences: int
    ) -> tuple[str, str]:
        """(the prompt, the answer's first words)."""
        sources = [str(value), *(f"VAR {name}" for name in variables)]
        text = [" ".join(NOISE)] * lines
        for i in reversed(range(len(variables))):
            text.insert(int(places[i] * lines), f"VAR {variables[i]} = {sources[i]}")
        if sentences:
            text.insert(0, " ".join(islice(cycle(NOISE), sentences)))
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(text)
            + f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(variables)} variables are assigned the value {value}, they are:",
        )


register(VariableTracking("vt", max_new_tokens=30))
