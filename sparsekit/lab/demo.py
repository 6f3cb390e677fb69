"""The demo: facts hidden in long prompts, a small real model, and four ways to read them, side by side.

Dense attention; TriangleMix (triangle from layer 21); triangle in every layer; streaming (sinks and a window) in every
layer. Every prompt is prefilled by all four and answered from that prefill, so one forward gives a time and a score.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from sparsekit.config import SparseConfig, load
from sparsekit.errors import SparsekitError
from sparsekit.lab.answers import Answer, answer, kl_divergence
from sparsekit.lab.evaluate import layers_summary
from sparsekit.lab.journal import Journal, replacing
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import measured_on
from sparsekit.lab.stats import mean_interval, share_interval
from sparsekit.lab.tasks import Sample, Task, task
from sparsekit.patch import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SETTINGS", "Outcome", "Setting", "markdown_table", "read_outcomes", "run_demo", "triangle_from"]

MODEL = "smollm2-135m"
TIMED_TOKENS = (2048, 8192)
PASSKEY_TOKENS = (1024, 4096)
NEEDLE_TOKENS = 2200
LEAST_NEEDLES = 2


@dataclass(frozen=True)
class Setting:
    """One row of the table: a label, and a config (None: the model as it is)."""

    label: str
    config: SparseConfig | None


def triangle_from(layer: int) -> Setting:
    """TriangleMix with that first triangle layer, of the demo model's 30."""
    mix = load({"layers": {f"{layer}-29": "triangle"}})
    return Setting(f"TriangleMix (from layer {layer})", mix)


SETTINGS = (
    Setting("dense", None),
    triangle_from(21),
    Setting("triangle (every layer)", load({"default": "triangle"})),
    Setting("streaming (every layer)", load({"default": "a_shape"})),
)


@dataclass
class Outcome:
    """What one setting did over all prompts; one value a prompt in each list."""

    setting: Setting
    passkey: list[float] = field(default_factory=list)
    needle: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    ttft_s: dict[int, list[float]] = field(default_factory=dict)
    density: float = 1.0  # mean over the layers, at the longest prompt
    longest: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one record of `results.jsonl` in."""
        if row["task"] == "passkey":
            self.passkey.append(row["score"])
        else:
            self.needle.append(row["score"])
            self.kl.append(row["kl_nats_per_token"])
        self.ttft_s.setdefault(row["tokens"], []).append(row["ttft_s"])
        if row["tokens"] > self.longest:
            self.longest, self.density = row["tokens"], row["density"]


def read_outcomes(path: Path | str) -> list[Outcome]:
    """The outcomes that a `results.jsonl` holds, in the order of its settings; an unfinished last line is left out."""
    journal = _journal(path)
    rows, _ = journal.read()
    if not rows:
        raise SparsekitError(f"{journal}: no record in there.")
    outcomes: dict[str, Outcome] = {}
    for row in rows:
        config = None if row["config"] is None else load(row["config"])
        outcomes.setdefault(row["setting"], Outcome(Setting(row["setting"], config))).add(row)
    return list(outcomes.values())


def _journal(path: Path | str) -> Journal:
    return Journal(path, "results", "`sparsekit demo`", _lacking)


def _lacking(row: Any) -> str:
    names = ("setting", "config", "task", "tokens", "score", "kl_nats_per_token", "ttft_s", "density")
    missing = [name for name in names if not isinstance(row, dict) or name not in row]
    return f"without {', '.join(missing)}" if missing else ""


def run_demo(
    out: Path | str = "sparsekit-demo",
    *,
    samples: int | None = None,
    budget_s: float = 190.0,
    seed: int = 0,
    device: str = "cpu",
    settings: Sequence[Setting] = SETTINGS,
    console: Console | None = None,
    command: str = "sparsekit demo",
) -> list[Outcome]:
    """Run it, print the table, write `results.jsonl` and the mask of each pattern into `out`.

    Args:
        samples: four-key prompts; default as many as fit the budget, at most 96.
        budget_s: seconds after which no further prompt is begun when `samples` is not given.
        seed: of the prompts.
        device: where the model runs.
        settings: the rows; the first is what the others are compared with.
    """
    import transformers

    from sparsekit.models import fast_dtype
    from sparsekit.models import load as load_model

    transformers.utils.logging.disable_progress_bar()  # ours is enough
    console = console or Console()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    console.print(f"[bold]sparsekit demo[/]: {MODEL}-instruct, a real model of 30 layers, on this machine's {device}.")
    with console.status("loading the model (the first time it is unpacked, which takes half a minute)"):
        dtype = fast_dtype(device)
        model, tokenizer = load_model(MODEL, dtype=dtype, device=device)
    console.print(f"{torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')} (the faster one here).")

    outcomes = [Outcome(setting) for setting in settings]
    made = {"model": MODEL, "seed": seed, "cpu": torch.backends.cpu.get_cpu_capability(), "command": command}
    with replacing(_journal(folder / "results.jsonl")) as add, progress("prompts", None, console=console) as step:
        run = _Run(model, tokenizer, outcomes, lambda row: add({**row, **made, **measured_on(model)}))
        for kind, sample, tokens, needed in _prompts(tokenizer, samples, seed):
            if not needed and time.monotonic() - start > budget_s:
                break
            step.shows(f"{kind.name}, {tokens} tokens")
            run.prompt(kind, sample, tokens)
            step(1)
    _draw_masks(settings, folder, console)
    console.print(_table(outcomes))
    console.print(_question(run.example))
    console.print(f"{time.monotonic() - start:.0f} s in all; records and pictures are in {folder}/. {_next_steps()}")
    return outcomes


class _Run:
    """The model, and what has been seen of it; `add` keeps a row."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        outcomes: list[Outcome],
        add: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.model, self.tokenizer, self.outcomes, self.add = model, tokenizer, outcomes, add
        self.example: tuple[Sample, list[str]] | None = None
        with torch.inference_mode():
            for tokens in (512, 1024):  # first calls are slow
                self.model(torch.arange(1, tokens + 1, device=model.device)[None])

    def prompt(self, kind: Task, sample: Sample, tokens: int) -> None:
        """Answer one prompt in every setting; the first setting is what the others are compared with."""
        answers: list[Answer] = []
        for outcome in self.outcomes:
            cfg = outcome.setting.config
            with apply(self.model, cfg) if cfg is not None else nullcontext() as handle:
                answers.append(answer(self.model, self.tokenizer, kind, sample, handle=handle))
            density = layers_summary([answers[-1].layers])["density"]
            self._record(outcome, kind, sample, tokens, answers, density)
        if self.example is None and kind.name == "needle4":
            self.example = sample, [got.text for got in answers]

    def _record(
        self, outcome: Outcome, kind: Task, sample: Sample, tokens: int, answers: list[Answer], density: float
    ) -> None:
        got = answers[-1]
        row = {
            "setting": outcome.setting.label,
            "config": None if outcome.setting.config is None else outcome.setting.config.to_dict(),
            "task": kind.name,
            "tokens": tokens,
            "prompt_tokens": got.tokens,
            "depth": sample.depth,
            "answer": sample.answers[0],
            "text": got.text,
            "score": got.score,
            "kl_nats_per_token": kl_divergence(answers[0], got),
            "ttft_s": got.ttft_s,
            "density": density,
        }
        outcome.add(row)
        self.add(row)


def _prompts(
    tokenizer: PreTrainedTokenizerBase, samples: int | None, seed: int
) -> Iterator[tuple[Task, Sample, int, bool]]:
    """(task, sample, token budget, needed whatever the time): what the table cannot do without comes first.

    Then passkeys of other lengths, and four-key prompts with a passkey after every sixth.
    """

    def prompt(name: str, tokens: int, number: int) -> tuple[Task, Sample, int]:
        kind = task(name)
        return kind, kind.samples(tokenizer, tokens=tokens, count=1, seed=seed + number)[0], tokens

    count, asked = (96, False) if samples is None else (samples, True)
    least = min(count, LEAST_NEEDLES)
    passkeys = enumerate(chain(TIMED_TOKENS, PASSKEY_TOKENS, cycle((*PASSKEY_TOKENS, TIMED_TOKENS[0]))))
    for number, tokens in islice(passkeys, len(TIMED_TOKENS)):
        yield *prompt("passkey", tokens, number), True
    for number in range(least):
        yield *prompt("needle4", NEEDLE_TOKENS, number), True
    for number, tokens in islice(passkeys, len(PASSKEY_TOKENS)):
        yield *prompt("passkey", tokens, number), asked
    for number in range(least, count):
        yield *prompt("needle4", NEEDLE_TOKENS, number), asked
        if number % 6 == 5:
            length_number, tokens = next(passkeys)
            yield *prompt("passkey", tokens, length_number), asked


def _title(dense: Outcome) -> str:
    return f"{len(dense.passkey)} passkey prompts of 1K to 8K tokens, {len(dense.needle)} four-key prompts of 2.2K"


def _cells(outcomes: Sequence[Outcome]) -> Iterator[list[str]]:
    """The header, then a row for each outcome; a line break parts a value from its interval, or its ratio to dense."""
    dense = outcomes[0]
    timed = [tokens for tokens in TIMED_TOKENS if tokens in dense.ttft_s]
    times = [f"TTFT\nat {n // 1024}K" for n in timed]
    yield ["prefill", "passkey", "four-key", "KL", *times, f"density\nat {dense.longest // 1024}K"]
    for outcome in outcomes:
        times = []
        for n in timed:
            mine, base = median(outcome.ttft_s[n]), median(dense.ttft_s[n])
            times.append(f"{mine:.2f} s" + ("" if outcome is dense else f"\nx{mine / base:.2f}"))
        kl, width = mean_interval(outcome.kl)
        yield [
            outcome.setting.label.replace(" (", "\n("),
            f"{sum(outcome.passkey):.0f}/{len(outcome.passkey)}",
            "{:.2f}\n({:.2f}-{:.2f})".format(*share_interval(outcome.needle)),
            "-" if outcome is dense else f"{kl:.4f}\n± {width:.4f}",
            *times,
            f"{outcome.density:.3f}",
        ]


CAPTION = (
    "KL of the answer's tokens from dense, nats a token; TTFT: time to first token.\n"
    "Below the values: 95% intervals; time against dense."
)


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(
        title=_title(outcomes[0]), title_justify="left", caption=CAPTION, caption_justify="left", show_lines=True
    )
    head, *rows = _cells(outcomes)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(path: Path | str) -> str:
    """The demo's table of a `results.jsonl`, as Markdown; for pages that show it."""
    outcomes = read_outcomes(path)
    head, *rows = ([cell.replace("\n", " ") for cell in row] for row in _cells(outcomes))
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    caption = CAPTION.replace("\n", " ").replace("Below the values", "Beside the values")
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{_title(outcomes[0])}. {caption}\n"


def _question(example: tuple[Sample, list[str]] | None) -> str:
    if example is None:
        return ""
    sample, texts = example
    said = f"One of the prompts asked: {sample.prompt.splitlines()[-1]} Answer: {sample.answers[0]}. "
    return said + f"Dense said {texts[0].strip()!r}, TriangleMix said {texts[1].strip()!r}."


def _next_steps() -> str:
    return (
        "Next: `sparsekit patterns`; `sparsekit configs copy llama-3.1-8b/trianglemix`, and what it saves, "
        "`sparsekit explain trianglemix.yaml --tokens 131072`."
    )


def _draw_masks(settings: Sequence[Setting], folder: Path, console: Console) -> None:
    from sparsekit.lab.plots import draw_masks

    for setting in settings:
        if setting.config is not None:
            name = "".join(c if c.isalnum() else "-" for c in setting.label.lower()).strip("-").replace("--", "-")
            draw_masks(setting.config, tokens=2048, out=folder / f"mask-{name}.png")


if __name__ == "__main__":  # python -m sparsekit.lab.demo results.jsonl: the table as Markdown
    print(markdown_table(sys.argv[1]), end="")
