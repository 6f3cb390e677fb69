"""What `sparsekit inspect` found: by layer, in sentences and in tables.

`python -m sparsekit.lab.calibrate.inspection FILE` prints the Markdown of what `sparsekit inspect -o FILE` wrote.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean
from typing import Any

from sparsekit.config import format_range
from sparsekit.errors import SparsekitError, read_text

__all__ = ["IDLE_MASS", "INITIAL", "Inspection", "LayerSinks", "read_inspection"]

INITIAL = 64  # columns before this one can be kept as `sink_tokens`
IDLE_MASS = 0.9  # of a head's attention on sinks, above which it does nothing
MASSIVE = (100, 1000)  # magnitude, and times the median, as published (Sun et al., 2402.17762)

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class LayerSinks:
    """One layer, means over the samples. A layer that keeps its own attention has the fields up to `massive` alone.

    Attributes:
        own: why it keeps its own attention, or nothing.
        mitigation: what it has against sinks: `output gate`, `sink logits`, `softmax off by one`, in that order; None
            where it did not call transformers' attention.
        gate: share of attention's output, by absolute value, that the output gate lets through.
        between: what else stands between attention and its output projection.
        massive: the largest channels of the hidden state after this layer, of the sample with the largest ratio:
            channel, position, token, value, and ratio of its magnitude to the median one.
        score: of each head, the sink score of key 0 over the first `score_tokens` tokens.
        rate: share of (sample, head) whose score of key 0 is above epsilon.
        first: of each head, mean attention that key 0 gets from the queries `score_tokens` or more after it.
        learned: of each head, mean attention that a learned sink logit takes; empty where the model has none.
        top: the strongest columns over whole prompts: position, token (of the last sample), mean score over heads,
            the largest head's, and in how many samples the column was among the strongest.
        sinks: position -> share of the samples in which a head's score over the whole prompt was above epsilon.
        sink_mass: of each head, mean attention of the queries from `score_tokens` on to the columns of `sinks`, as each
            sample has them, and to a learned sink logit.
        mass_by_length: the same of the second half of a prompt of that many tokens.
        output: of each head, the norm of what it adds to the hidden state, over that of what all heads add together;
            empty where no output projection was seen.
        value_ratio, key_ratio: norm of the strongest column's value (key) / mean norm of the others.
        dropped_mass: of each head, mean attention mass on pairs that the config drops.
        dropped_gradient: of each head, the gradient of the answer's logit on dropped pairs, row by row, as a share of
            that on all pairs.
    """

    layer: int
    own: str = ""
    mitigation: tuple[str, ...] | None = None
    gate: float | None = None
    between: str = ""
    massive: tuple[dict[str, Any], ...] = ()
    score: tuple[float, ...] = ()
    rate: float | None = None
    first: tuple[float, ...] = ()
    learned: tuple[float, ...] = ()
    top: tuple[dict[str, Any], ...] = ()
    sinks: dict[int, float] = field(default_factory=dict)
    sink_mass: tuple[float, ...] = ()
    mass_by_length: dict[int, tuple[float, ...]] = field(default_factory=dict)
    output: tuple[float, ...] = ()
    value_ratio: float | None = None
    key_ratio: float | None = None
    dropped_mass: tuple[float, ...] = ()
    dropped_gradient: tuple[float, ...] = ()

    @property
    def idle(self) -> list[int]:
        """Heads that do nothing: whose sink mass is above `IDLE_MASS`."""
        return [head for head, mass in enumerate(self.sink_mass) if mass > IDLE_MASS]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found; `answer()` says it in sentences.

    `kept` has a row for each pattern and number of sink tokens: KL of the answer's tokens from dense, in nats a token,
    with half the width of its 95% interval (None of one prompt), in all layers that can run it.
    """

    model: str
    samples: int
    prompts: dict[str, Any]
    epsilon: float
    score_tokens: int
    config: str
    made: dict[str, Any]
    layers: tuple[LayerSinks, ...]
    kept: tuple[dict[str, Any], ...] = ()

    @property
    def sink_tokens(self) -> int | None:
        """First keys that hold every sink column below position 64 that is one in at least half of the samples; None
        where no layer was measured.
        """
        if all(layer.own for layer in self.layers):
            return None
        found = [at for layer in self.layers for at, share in layer.sinks.items() if share >= 0.5 and at < INITIAL]
        return max(found, default=-1) + 1

    @property
    def idle_heads(self) -> list[dict[str, Any]]:
        """The heads that do nothing: layer, head, sink mass, and output where it is known."""
        return [
            {"layer": x.layer, "head": head, "sink_mass": x.sink_mass[head], "output": _at(x.output, head)}
            for x in self.layers
            for head in x.idle
        ]

    def answer(self) -> list[str]:
        """What was found, in sentences; first of all how many sink tokens the model needs, and where they are."""
        if all(layer.own for layer in self.layers):
            return ["No layer was measured, so nothing can be said of sinks."]
        said = [self._places(), self._elsewhere(), self._mitigation(), self._learned(), self._between(), self._idle()]
        said += [self._massive(), self._lengths(), self._dropped()]
        if unmeasured := [layer.layer for layer in self.layers if layer.own]:
            said.append(f"Layers {format_range(unmeasured)} keep their own attention and were not measured.")
        return [line for line in said if line]

    def _places(self) -> str:
        near: dict[int, list[int]] = {}
        for layer in self.layers:
            for at, share in layer.sinks.items():
                if at < INITIAL and share >= 0.5:
                    near.setdefault(at, []).append(layer.layer)
        if not near:
            return (
                f"Needs no sink tokens: none of the first {INITIAL} columns gets more than {self.epsilon} of a head's "
                "attention in half of the prompts."
            )
        names = {column["position"]: f" ({column['token']!r})" for layer in self.layers for column in layer.top}
        places = "; ".join(
            f"position {at}{names.get(at, '')} in layers {format_range(layers)}" for at, layers in sorted(near.items())
        )
        needs = f"Needs sink_tokens = {self.sink_tokens}"
        return f"{needs}: a column gets more than {self.epsilon} of a head's attention at {places}."

    def _elsewhere(self) -> str:
        beyond = {layer.layer: [at for at in layer.sinks if at >= INITIAL] for layer in self.layers}
        some = [(layer, at) for layer, at in beyond.items() if at][:4]
        if not some:
            return ""
        places = "; ".join(f"layer {layer}: {', '.join(map(str, at[:4]))}" for layer, at in some)
        return f"Sinks beyond the first {INITIAL} tokens, which sink_tokens does not keep: {places}."

    def _mitigation(self) -> str:
        by = _layers_by(self.layers, lambda layer: layer.mitigation)
        if not by:
            return ""
        if set(by) == {()}:
            return "Sink mitigation: none; it has no output gate, no sink logits and no softmax off by one."
        words = (f"{' and '.join(kind) or 'none'} in layers {format_range(layers)}" for kind, layers in by.items())
        gates = [layer.gate for layer in self.layers if layer.gate is not None]
        through = f"; the gate lets {mean(gates):.2f} of attention's output through" if gates else ""
        return f"Sink mitigation: {', '.join(words)}{through}."

    def _between(self) -> str:
        by = _layers_by(self.layers, lambda layer: layer.between or None)
        said = [f"{what} (layers {format_range(layers)})" for what, layers in by.items()]
        lost = [
            layer.layer for layer in self.layers if layer.score and layer.mitigation is not None and not layer.output
        ]
        lines = (
            [f"Between attention and its output projection, not counted as a gate: {', '.join(said)}."] if said else []
        )
        if lost:
            lines.append(
                f"No output projection was seen in layers {format_range(lost)}: neither a gate nor a head's output is "
                "known there."
            )
        return " ".join(lines)

    def _learned(self) -> str:
        learned = [(max(layer.learned), layer.layer) for layer in self.layers if layer.learned]
        if not learned:
            return ""
        most, at = max(learned)
        return (
            f"Learned sink logits take up to {most:.2f} of a head's attention (layer {at}); every pattern keeps them, "
            "and they need no column."
        )

    def _idle(self) -> str:
        heads = sum(len(layer.sink_mass) for layer in self.layers)
        idle = self.idle_heads
        if not idle:
            return f"No head gives more than {IDLE_MASS} of its attention to sinks." if heads else ""
        known = [head["output"] for head in idle if head["output"] is not None]
        others = [
            x.output[h] for x in self.layers if x.idle and x.output for h in range(len(x.output)) if h not in x.idle
        ]
        line = f"{len(idle)} of {heads} heads do nothing: they give more than {IDLE_MASS} of their attention to sinks"
        if known:
            line += f", and add {mean(known):.2f} of what their layer's heads add together"
        return line + (f" (the other heads of these layers: {mean(others):.2f})." if others else ".")

    def _massive(self) -> str:
        found: dict[int, list[tuple[dict[str, Any], int]]] = {}
        for layer in self.layers:
            for one in layer.massive:
                if abs(one["value"]) > MASSIVE[0] and one["ratio"] >= MASSIVE[1]:
                    found.setdefault(one["channel"], []).append((one, layer.layer))
        told = f"(over {MASSIVE[0]}, and {MASSIVE[1]:,} times the median)"
        known = [(one, layer.layer) for layer in self.layers for one in layer.massive[:1]]
        if not found:
            most = max(known, key=lambda each: each[0]["ratio"], default=None)
            return f"No massive activation {told}: the largest is {_outlier(*most)}." if most else ""
        said = []
        for channel, each in sorted(found.items(), key=lambda item: -max(one["ratio"] for one, _ in item[1])):
            after = format_range([layer for _, layer in each])
            most = max(each, key=lambda pair: pair[0]["ratio"])
            said.append(f"channel {channel} after layers {after}, the most {_outlier(*most, channel=False)}")
        return f"Massive activations {told}: {'; '.join(said)}."

    def _lengths(self) -> str:
        table = self._by_length()
        if not table:
            return ""
        lengths = list(table)
        return "Sink mass, mean over heads and layers, in the second half of a prompt: " + ", ".join(
            f"{mean(mass for masses in table[n].values() for mass in masses):.2f} of {n:,} tokens" for n in lengths
        ) + "."  # fmt: skip

    def _dropped(self) -> str:
        dropped = [(mean(layer.dropped_mass), layer.layer) for layer in self.layers if layer.dropped_mass]
        if not dropped:
            return ""
        most, at = max(dropped)
        return f"{self.config} drops at most {most:.3f} of a layer's attention (layer {at})."

    def _by_length(self) -> dict[int, dict[int, tuple[float, ...]]]:
        """Length -> layer -> of each head; of the lengths that every measured layer has."""
        measured = [layer for layer in self.layers if not layer.own]
        lengths = [n for n in measured[0].mass_by_length if all(n in layer.mass_by_length for layer in measured)]
        return {n: {layer.layer: layer.mass_by_length[n] for layer in measured} for n in lengths}

    def to_dict(self) -> dict[str, Any]:
        said = {"sink_tokens": self.sink_tokens, "answer": self.answer(), "idle_heads": self.idle_heads}
        return {"kind": "inspection", **said, **asdict(self)}

    def table(self) -> Table:
        """(headings, rows) in words, one row a layer; means over heads, and the largest head's."""
        head = [
            "layer",
            "score",
            "max",
            "rate",
            "first",
            "max",
            "top columns",
            "|v|",
            "|k|",
            "sinks",
            "idle",
            "massive",
        ]
        learned = any(layer.learned for layer in self.layers)
        dropped = any(layer.dropped_mass for layer in self.layers)
        gradient = any(layer.dropped_gradient for layer in self.layers)
        head += ["learned"] * learned + ["dropped"] * dropped + ["gradient"] * gradient
        rows = []
        for x in self.layers:
            if x.own:
                rows.append([str(x.layer), x.own, *[""] * (len(head) - 2)])
                continue
            top = ", ".join(f"{c['position']}: {c['score']:.2f}" for c in x.top[:3])
            row = [str(x.layer), _mean(x.score), f"{max(x.score):.2f}", f"{x.rate:.2f}", _mean(x.first)]
            row += [f"{max(x.first):.2f}", top, f"{x.value_ratio:.2f}", f"{x.key_ratio:.2f}"]
            row += [_mean(x.sink_mass), f"{len(x.idle)} of {len(x.sink_mass)}"]
            row.append("{ratio:,.0f} at {position}, {channel}".format(**x.massive[0]))
            row += [_mean(x.learned)] * learned + [_mean(x.dropped_mass)] * dropped
            rows.append(row + [_mean(x.dropped_gradient)] * gradient)
        return head, rows

    def markdown(self) -> str:
        """The answer as a list, and the tables of heads that do nothing and of KL by sinks kept."""
        made = f"{self.made['device']}, torch {self.made['versions']['torch']}, {self.made['dtype']}"
        lines = [f"{self.samples} prompts of {self.prompts['tokens']:,} tokens ({made}):", ""]
        lines += [f"- {line}" for line in self.answer()]
        for title, (head, rows) in self.more_tables():
            if not title.startswith("Sink mass"):  # a line a layer; its means are in the answer
                lines += ["", f"{title}:", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
                lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join(lines) + "\n"

    def more_tables(self) -> list[tuple[str, Table]]:
        """(title, table) of the heads that do nothing, of sink mass by length, and of KL by sinks kept."""
        found: list[tuple[str, Table]] = []
        idle = [layer for layer in self.layers if layer.idle]
        if idle:
            rows = []
            for x in idle:
                mine = [x.output[h] for h in x.idle if x.output]
                others = [output for h, output in enumerate(x.output) if h not in x.idle]
                mass = _mean([x.sink_mass[h] for h in x.idle])
                rows.append([str(x.layer), format_range(x.idle), mass, _mean(mine), _mean(others)])
            head = ["layer", "heads", "sink mass", "their output", "the others'"]
            found.append((f"Heads that do nothing (sink mass above {IDLE_MASS})", (head, rows)))
        if by_length := self._by_length():
            layers = next(iter(by_length.values()))
            rows = [[str(layer), *(_mean(by_length[n][layer]) for n in by_length)] for layer in layers]
            title = "Sink mass in the second half of a prompt of so many tokens"
            found.append((title, (["layer", *(f"{n:,}" for n in by_length)], rows)))
        if self.kept:
            counts = list(dict.fromkeys(row["sink_tokens"] for row in self.kept))
            rows = []
            for name in dict.fromkeys(row["name"] for row in self.kept):
                each = {row["sink_tokens"]: row for row in self.kept if row["name"] == name}
                rows.append([name, *(_kl(each[n]) for n in counts)])
            one = self.kept[0]
            title = (
                "KL from dense by sink tokens kept, nats a token of the answer; "
                f"window {one['window_tokens']}, triangle's last rows {one['last_tokens']}"
            )
            found.append((title, (["pattern in all layers", *map(str, counts)], rows)))
        return found


def read_inspection(path: str | Path) -> Inspection:
    """The inspection that `sparsekit inspect MODEL -o FILE` wrote."""
    text = read_text(path, "inspection")
    try:
        found = json.loads(text)
        if found["kind"] != "inspection":
            raise ValueError("kind")
        layers = []
        for layer in found["layers"]:
            one: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in layer.items()
            }
            one["sinks"] = {int(at): share for at, share in layer["sinks"].items()}
            one["mass_by_length"] = {int(n): tuple(masses) for n, masses in layer["mass_by_length"].items()}
            for each in layer["massive"]:
                each["ratio"] = math.inf if each["ratio"] is None else each["ratio"]  # JSON has no infinity
            layers.append(LayerSinks(**one))
        given = {one.name: found[one.name] for one in fields(Inspection)}
        return Inspection(**{**given, "layers": tuple(layers), "kept": tuple(found["kept"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SparsekitError(f"inspection {str(path)!r}: not a file of `sparsekit inspect -o` ({error}).") from None


def _layers_by(layers: Iterable[LayerSinks], key: Callable[[LayerSinks], Any]) -> dict[Any, list[int]]:
    """The numbers of the layers that have the same, by what they have; None is left out."""
    found: dict[Any, list[int]] = {}
    for layer in layers:
        if key(layer) is not None:
            found.setdefault(key(layer), []).append(layer.layer)
    return found


def _outlier(one: dict[str, Any], layer: int, *, channel: bool = True) -> str:
    where = f"channel {one['channel']} at " if channel else "at "
    times = f"{one['value']:,.0f}, {one['ratio']:,.0f} times the median"
    return f"{times}, {where}position {one['position']} ({one['token']!r}) after layer {layer}"


def _kl(row: dict[str, Any]) -> str:
    width = row["kl_half_width"]
    return f"{row['kl']:.4f}" + ("" if width is None else f" ± {width:.4f}")


def _at(values: Sequence[float], at: int) -> float | None:
    return values[at] if values else None


def _mean(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" if values else "-"


if __name__ == "__main__":
    print(read_inspection(sys.argv[1]).markdown(), end="")
