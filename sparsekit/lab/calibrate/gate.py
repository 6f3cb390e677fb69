"""The gate: a config must find needles about as well as dense attention does, at several lengths, or it is not written.

Dense answers the same prompts first. Where dense itself is mostly wrong nothing can be learnt, and the gate says so
instead of passing. Where the config loses too many answers, layers are given back to dense attention one at a time,
each time the one that brings back most, until the lost answers are found again: those are the ones to leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparsekit.config import SparseConfig, format_range, give_back, load
from sparsekit.config.settle import settle
from sparsekit.errors import SparsekitError
from sparsekit.lab.answers import Answer, answer, kl_divergence
from sparsekit.lab.calibrate.probe import own_layers
from sparsekit.lab.calibrate.prompts import TASKS, Prompt, make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import content_of_code, content_of_model, made_on, patterns_of, tables_of
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patch import Handle, apply
from sparsekit.patch.giving_back import give_back_until
from sparsekit.patch.model import machine_of
from sparsekit.patterns.fields import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Check", "GateReport", "gate", "write_gated"]

BLAMED_PROMPTS = 4  # lost answers that layers are blamed by


@dataclass(frozen=True)
class Check:
    """One task at one length. `verdict`: held, lost (too many answers), or "dense wrong" (nothing can be learnt)."""

    task: str
    tokens: int
    samples: int
    dense: float
    sparse: float
    same: float  # share of prompts with the very same text as dense
    kl: float
    verdict: str


@dataclass(frozen=True)
class GateReport:
    """What the gate found. `give_back` names the layers that lose the answers, where they are lost.

    Of a config with `heads`, `give_back_heads` names for such a layer the heads that lose them; a layer that is not in
    it is to be given back whole.
    """

    config: SparseConfig
    bound: float
    checks: tuple[Check, ...]
    give_back: tuple[int, ...]
    regained: bool  # whether giving these layers back brought every looked-at answer back
    made: dict[str, Any]
    give_back_heads: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.why()

    def why(self) -> str:
        """Why it did not pass, in a sentence; nothing where it did."""
        if not self.checks:
            return "nothing was checked."
        lost = [c for c in self.checks if c.verdict == "lost"]
        if lost:
            worst = max(lost, key=lambda c: c.dense - c.sparse)
            at = f"{worst.task} at {worst.tokens} tokens: {worst.sparse:.2f}, dense {worst.dense:.2f}"
            fix = "no single set of layers was found to blame"
            if self.give_back:
                layers = self._blamed()
                fix = f"give {layers} back to dense attention" if self.regained else f"{layers} lose most"
            return f"answers are lost beyond the bound of {self.bound}: {at}; {fix}."
        blind = [n for n in {c.tokens: 0 for c in self.checks} if not self._tells(n)]
        if blind:
            worst = max((c for c in self.checks if c.tokens in blind), key=lambda c: c.dense)
            return (
                f"dense attention itself is wrong at {', '.join(map(str, blind))} tokens (at best {worst.task}: "
                f"{worst.dense:.2f}), so nothing can be told there; use shorter prompts or an easier task."
            )
        return ""

    def _blamed(self) -> str:
        """`layers 3,5` or, of heads, `layer 3 head 2, layer 5 heads 0,4`."""
        whole = [layer for layer in self.give_back if layer not in self.give_back_heads]
        parts = [f"layers {format_range(whole)}"] if whole else []
        for layer, heads in sorted(self.give_back_heads.items()):
            parts.append(f"layer {layer} head{'s' if len(heads) > 1 else ''} {format_range(list(heads))}")
        return ", ".join(parts)

    def _tells(self, tokens: int) -> bool:
        return any(c.verdict != "dense wrong" for c in self.checks if c.tokens == tokens)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "gate",
            "passed": self.passed,
            "why": self.why(),
            "bound": self.bound,
            "checks": [asdict(check) for check in self.checks],
            "give_back": list(self.give_back),
            "give_back_heads": {str(layer): list(heads) for layer, heads in self.give_back_heads.items()},
            "regained": self.regained,
            "config": self.config.to_dict(),
            **self.made,
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        head = ["task", "tokens", "samples", "dense", "sparse", "same text", "KL", "verdict"]
        rows = []
        for c in self.checks:
            shares = [f"{share:.2f}" for share in (c.dense, c.sparse, c.same)]
            rows.append([c.task, str(c.tokens), str(c.samples), *shares, f"{c.kl:.5f}", c.verdict])
        return head, rows


def gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SparseConfig | Mapping[str, Any] | str | Path,
    *,
    tokens: Sequence[int] = (2048, 4096),
    samples: int = 16,
    seed: int = 1000,
    tasks: Sequence[str | Task] = TASKS,
    bound: float = 0.1,
    dense_at_least: float = 0.5,
    records: str | Path | None = None,
    quiet: bool = False,
) -> GateReport:
    """Needle checks of a config against dense attention; greedy answers, as in use.

    Args:
        tokens: lengths; the config's `dense_below_tokens` must lie below all of them, or nothing is checked.
        samples: prompts for each task and length.
        seed: of the prompts; not one that the config was made with.
        bound: share of the answers that may be lost against dense, for each task and length.
        dense_at_least: dense scores below this say nothing.
        records: a JSONL file of the answers; an interrupted gate goes on from it.
    """
    loaded = load(config)
    known, own = facts(model), own_layers(model, some=True)
    resolved = settle(loaded.resolve(known), known, lambda: machine_of(model))
    if loaded.dense_below_tokens == AUTO:  # with layers given back it is another config, of which no table is
        loaded = loaded.model_copy(update={"dense_below_tokens": resolved.config.dense_below})
    if not 0 <= bound < 1 or not 0 < dense_at_least <= 1:
        raise SparsekitError(f"bound = {bound}, dense_at_least = {dense_at_least}: shares, of 0 to 1.")
    shortest = max(resolved.config.dense_below, loaded.min_queries)
    if min(tokens, default=0) <= shortest:
        raise SparsekitError(
            f"tokens = {min(tokens, default=0)}: prompts of up to {shortest} "
            "tokens run dense under this config (dense_below_tokens), so the gate checks nothing; "
            "give longer ones (--gate-tokens), or lower it (`calibrate rule --dense-below`)."
        )
    if not tasks:
        raise SparsekitError("tasks: at least one.")
    prompts = [
        prompt
        for length in tokens
        for kind in tasks
        for prompt in make_prompts(model, tokenizer, tasks=[kind], tokens=[length], count=samples, seeds=[seed])
    ]
    if all(layer.exact or layer.layer in own for layer in resolved.layers):
        raise SparsekitError("the config runs no layer of this model sparse or in FP8, so there is nothing to check.")
    run = _Gate(model, tokenizer, Records(records))
    with progress("gate", len(prompts), quiet=quiet) as step:
        rows = []
        for prompt in prompts:
            rows.append(run.row(loaded, prompt))
            step(1)
            step.says(f"gate: {len(rows)} of {len(prompts)} prompts")
    checks = []
    for length in tokens:
        for name in dict.fromkeys(p.task.name for p in prompts):
            mine = [r for r, p in zip(rows, prompts, strict=True) if (p.tokens, p.task.name) == (length, name)]
            checks.append(_check(name, length, mine, bound, dense_at_least))
    lost = {(c.task, c.tokens) for c in checks if c.verdict == "lost"}
    worst = [
        prompt
        for row, prompt in zip(rows, prompts, strict=True)
        if (prompt.task.name, prompt.tokens) in lost and row["sparse"] < row["dense"]
    ]
    lost_prompts = worst[:BLAMED_PROMPTS]
    blamed, regained = run.blame(loaded, lost_prompts, quiet) if worst else ([], False)
    heads = run.blame_heads(loaded, lost_prompts, blamed, quiet) if regained and loaded.heads else {}
    return GateReport(loaded, bound, tuple(checks), tuple(blamed), regained, made_on(model), heads)


def _check(name: str, tokens: int, rows: Sequence[Mapping[str, Any]], bound: float, dense_at_least: float) -> Check:
    dense, sparse = mean(row["dense"] for row in rows), mean(row["sparse"] for row in rows)
    verdict = "lost" if dense - sparse > bound else "held"
    if dense < dense_at_least:
        verdict = "dense wrong"
    same, kl = mean(row["same"] for row in rows), mean(row["kl"] for row in rows)
    return Check(name, tokens, len(rows), dense, sparse, same, kl, verdict)


class _Gate:
    """Answers of configs, from the records or measured now."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Records) -> None:
        self.model, self.tokenizer, self.records = model, tokenizer, records
        self._content = content_of_model(model, tokenizer)

    def row(self, config: SparseConfig, prompt: Prompt) -> dict[str, Any]:
        meaning = {name: value for name, value in config.to_dict().items() if name not in ("provenance", "model")}
        place = {"kind": "gate", "model": self._content, "device": self.model.device.type}
        code = content_of_code([prompt.task, *patterns_of(config)])
        key = {**place, "code": code, "prompt": prompt.key, "config": meaning, **tables_of(config)}
        found: dict[str, Any] | None = self.records.get(key)
        return found if found is not None else self.records.add(key, self._measure(config, prompt))

    def _measure(self, config: SparseConfig, prompt: Prompt) -> dict[str, Any]:
        dense = self._answer(prompt)
        with apply(self.model, config) as handle:
            sparse = self._answer(prompt, handle)
        ran = [row.why for row in sparse.layers if row.ran != "own" and row.pattern != "dense"]
        if ran and all(ran):
            raise SparsekitError(f"the gate's prompts do not run the config ({ran[0]}), so they check nothing.")
        return {
            "dense": dense.score,
            "sparse": sparse.score,
            "same": float(dense.text == sparse.text),
            "kl": kl_divergence(dense, sparse),
        }

    def _answer(self, prompt: Prompt, handle: Handle | None = None) -> Answer:
        return answer(self.model, self.tokenizer, prompt.task, prompt.sample, handle=handle)

    def blame(self, config: SparseConfig, lost: Sequence[Prompt], quiet: bool) -> tuple[list[int], bool]:
        """(layers whose return to dense brings the lost answers back, whether it brings all back)."""
        resolved = config.resolve(facts(self.model))
        own = resolved.own_layers(facts(self.model))
        sparse = [layer.layer for layer in resolved.layers if not layer.exact and layer.layer not in own]

        def worth(back: list[int]) -> tuple[bool, float, float]:
            return self._worth(give_back(config, back, facts=facts(self.model)), lost)

        with progress("layers to blame", len(sparse), quiet=quiet) as step:
            return give_back_until(sparse, worth, step=step)

    def _worth(self, config: SparseConfig, lost: Sequence[Prompt]) -> tuple[bool, float, float]:
        """(whether a config brings all lost answers back, what it gains, - KL)."""
        rows = [self.row(config, prompt) for prompt in lost]
        gained = mean(row["sparse"] - row["dense"] for row in rows)
        return gained >= 0, gained, -mean(row["kl"] for row in rows)

    def blame_heads(
        self, config: SparseConfig, lost: Sequence[Prompt], layers: Sequence[int], quiet: bool
    ) -> dict[int, tuple[int, ...]]:
        """Of blamed layers, the fewest heads by the same search whose return brings the lost answers back too."""
        resolved = config.resolve(facts(self.model))
        heads: dict[int, tuple[int, ...]] = {}
        for layer in layers:
            groups = resolved.layers[layer].groups()
            sparse = [head for pattern, some in groups if pattern.name != "dense" for head in some]
            others = [other for other in layers if other != layer and other not in heads]

            def worth(back: list[int], layer: int = layer, others: list[int] = others) -> tuple[bool, float, float]:
                some = {**heads, layer: back}
                return self._worth(give_back(config, others, some, facts=facts(self.model)), lost)

            with progress(f"heads of layer {layer} to blame", len(sparse), quiet=quiet) as step:
                back, regained = give_back_until(sparse, worth, most=len(sparse) - 1, step=step)
            if regained:
                heads[layer] = tuple(back)
        return heads


def write_gated(report: GateReport, path: str | Path) -> SparseConfig:
    """Write the config that passed, with the gate's results in its provenance, and return it.

    Raises:
        SparsekitError: it did not pass; nothing is written. The error says why, and which layers to give back.
    """
    if not report.passed:
        raise SparsekitError(f"{str(path)!r} is not written: {report.why()}")
    said = {
        "passed": True,
        "bound_lost_answers": report.bound,
        "checks": [
            {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(c).items()} for c in report.checks
        ],
        **report.made,
    }
    gated = load({**report.config.to_dict(), "provenance": {**report.config.provenance, "gate": said}})
    gated.dump(path, folders=True)
    return gated
