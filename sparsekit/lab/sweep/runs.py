"""One run of a sweep, known by its content: equal work has an equal key, however it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsekit.config import SparseConfig, parse_range
from sparsekit.config.precision import asked_precision
from sparsekit.lab.provenance import content_key, patterns_of, tables_of
from sparsekit.patterns import Pattern

__all__ = ["Run", "canonical", "config_key", "groups"]


@dataclass(frozen=True)
class Run:
    """One config on one task, length and seed of one model: what a record is of.

    Attributes:
        axes: axis name -> value, as in the YAML; empty for dense.
        config: None is the model as it is.
        corpus: of the tasks that read one, and its digest.
        device: its kind, "cpu" or "cuda"; another kind is another run.
        source: digest of the model's files, where there are any.
        code: digest of the code that computes.
    """

    model: str
    label: str
    axes: Mapping[str, Any] = field(hash=False)
    config: SparseConfig | None = field(hash=False)
    task: str
    tokens: int
    seed: int
    samples: int
    corpus: str | None = None
    corpus_digest: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    source: str | None = None
    code: str = ""

    @property
    def key(self) -> str:
        """Of all that the result depends on, not of how it is called: equal for equal work."""
        return content_key([self.asked, self.source, self.code])

    @property
    def asked(self) -> str:
        """Of what is asked, of a model by its name: the same when the model's weights or the code have changed."""
        said = {
            "model": self.model,
            "config": canonical(self.config),
            "task": self.task,
            "tokens": self.tokens,
            "seed": self.seed,
            "samples": self.samples,
            "corpus": self.corpus_digest,
            "dtype": self.dtype,
            "device": self.device,
        }
        return content_key(said)

    def identity(self) -> dict[str, Any]:
        """What every record says of its run, failed or not."""
        return {
            "key": self.key,
            "asked": self.asked,
            "label": self.label,
            "axes": dict(self.axes),
            "config_key": config_key(self.config),
            "model": self.model,
            "task": self.task,
            "tokens": self.tokens,
            "seed": self.seed,
            "samples": self.samples,
        }

    def __str__(self) -> str:
        return f"{self.task} at {self.tokens}, {self.label}"


def canonical(config: SparseConfig | None) -> Any:
    """What a config makes a model do, as JSON: layer by layer as written, with every parameter; None for dense."""
    if config is None:
        return None
    if config.dense_impl == "model" and all(pattern.name == "dense" for pattern in patterns_of(config)):
        return None

    def dumped(pattern: Pattern) -> Any:
        return pattern.model_dump(mode="json")

    def by_number(rules: Mapping[str, Any], value: Callable[[Any], Any]) -> list[Any]:
        return sorted(
            ([sorted(parse_range(key)), value(rule)] for key, rule in rules.items()), key=lambda pair: pair[0]
        )

    precision = asked_precision(config.precision)
    return {
        "default": dumped(config.default),
        "layers": by_number(config.layers, dumped),
        "heads": by_number(config.heads, lambda rule: by_number(rule, dumped)),
        "dense_below_tokens": config.dense_below_tokens,
        "min_queries": config.min_queries,
        "dense_impl": config.dense_impl,
        **({} if precision is None else {"precision": precision}),
        **tables_of(config),
    }


def config_key(config: SparseConfig | None) -> str:
    """Equal for configs that do the same."""
    return "dense" if canonical(config) is None else content_key(canonical(config))


def groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that share prompts, in order: they go to one worker, which keeps what dense attention says."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault((run.model, run.task, run.tokens, run.seed, run.samples), []).append(run)
    yield from found.values()
