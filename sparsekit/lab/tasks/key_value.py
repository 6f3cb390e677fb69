"""Key-value retrieval (arXiv 2307.03172; InfiniteBench's kv_retrieval): one pair of UUIDs out of a JSON object.

    >>> from random import Random
    >>> from sparsekit.lab.tasks import task
    >>> sample = task("kv_retrieval").build(Random(0), units=2)
    >>> print(sample.prompt)
    Extract the value corresponding to the specified key in the JSON object below.
    <BLANKLINE>
    JSON data:
    {"33a8a2de-a7d0-46ab-8be5-801354ddf282": "45acb962-bd2d-49ff-8bd3-7e07a93c3535",
     "e3e70682-c209-4cac-a29f-6fbed82c07cd": "f728b4fa-4248-4e3a-8a5d-2f346baa9455",
     "bf162ed2-cfd5-4cb4-a67f-f0e90360463a": "3f36915a-5ad8-4f19-96cd-57819aad9c73"}
    <BLANKLINE>
    Key: "e3e70682-c209-4cac-a29f-6fbed82c07cd"
    >>> task("kv_retrieval").score(f' "{sample.answers[0]}".', sample)
    1.0

A unit is a pair, some 75 tokens: short prompts stay that much below their budget.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import ClassVar
from uuid import UUID

from sparsekit.lab.tasks.base import Sample, Task, register

__all__ = ["KeyValue"]

_MARKS = re.compile(r"""[\n:"'.,?!{}]""")


@dataclass(frozen=True)
class KeyValue(Task):
    """`units` pairs beside the one asked for, which stands anywhere among them."""

    metric: ClassVar[str] = "word"

    def build(self, rng: Random, units: int) -> Sample:
        """A prompt with `units` + 1 pairs."""
        key, value, place = _uuid(rng), _uuid(rng), rng.random()
        others = Random(rng.getrandbits(64))
        pairs = [(_uuid(others), _uuid(others)) for _ in range(units)]
        pairs.insert(int(place * (units + 1)), (key, value))
        data = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs)
        return Sample(
            prompt=(
                "Extract the value corresponding to the specified key in the JSON object below.\n\n"
                f'JSON data:\n{{{data}}}\n\nKey: "{key}"'
            ),
            answers=(value,),
            answer_prefix="The value associated with the specified key is:",
            depth=place,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        """1 where the value is a word of the prediction, marks aside, as InfiniteBench counts; else 0."""
        return float(sample.answers[0] in _MARKS.sub(" ", prediction).split())


def _uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


register(KeyValue("kv_retrieval", max_new_tokens=50))
