"""`sparsekit calibrate head-curve`, `agreement` and `duo-attention`: orders of heads, and what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli.calibrate import pattern_of
from sparsekit.cli.options import (
    STREAMING,
    Corpus,
    Dtype,
    ExactDtype,
    Json,
    JsonFile,
    Picture,
    RecordFile,
    Samples,
    Scores,
    Seed,
    Seeds,
    Tasks,
    Weights,
    command_line,
    load_weights,
)
from sparsekit.cli.printing import show
from sparsekit.errors import SparsekitError, shown, writing
from sparsekit.lab.options import LARGEST, Device, Lengths, numbers_of, shares_of, tasks_of, words_of


def head_curve(
    model: Weights,
    probe_file: Annotated[Path, typer.Option("--probe", help="JSON file of `calibrate probe -o`.")],
    shares: Annotated[str, typer.Option("--shares", help="Shares of the heads, comma-separated.")] = "0.5,0.65,0.75",
    ranks: Annotated[str, typer.Option("--ranks", help="Orders of the heads, comma-separated.")] = "gradient",
    scores: Scores = None,
    pattern: Annotated[str, typer.Option("--pattern", help="Pattern of the chosen heads, as in YAML.")] = "triangle",
    whole_groups: Annotated[bool, typer.Option("--whole-groups", help="All heads of a key head, or none.")] = False,
    rank_tasks: Annotated[str, typer.Option("--rank-tasks", help="Tasks of orders that are measured.")] = "needle4",
    rank_samples: Annotated[int, typer.Option("--rank-samples", min=2, help="Prompts of measured orders.")] = 4,
    samples: Samples = 96,
    tokens: Lengths = "2200",
    seed: Seed = 0,
    tasks: Tasks = "needle4",
    corpus: Corpus = None,
    records: RecordFile = None,
    output: JsonFile = None,
    picture: Picture = None,
    device: Device = "auto",
    dtype: ExactDtype = None,
    as_json: Json = False,
) -> None:
    """Measure divergence from dense and scores by share of sparse heads, chosen by head and by layer."""
    from sparsekit.lab.calibrate.head_curve import head_curve as measure
    from sparsekit.lab.calibrate.probe import read_probe
    from sparsekit.lab.calibrate.ranking import read_scores
    from sparsekit.lab.curve_plot import draw_head_curve

    lengths, found_before = numbers_of(tokens, "--tokens"), read_probe(probe_file)
    loaded = load_weights(model, device, dtype, exact=True)
    table = None if scores is None else read_scores(scores, loaded[0])
    found = measure(
        *loaded,
        found_before,
        shares_of(shares, "--shares"),
        ranks=list(dict.fromkeys([*words_of(ranks), *([] if table is None else ["scores"])])),
        scores=table,
        pattern=pattern_of(pattern, "--pattern"),
        whole_groups=whole_groups,
        rank_prompts={"tasks": rank_tasks, "samples": rank_samples, "tokens": str(min(lengths))},
        samples=samples,
        tokens=lengths,
        seed=seed,
        tasks=tasks_of(tasks, corpus),
        records=records,
    )
    if picture is not None:
        draw_head_curve(found.rows, model, picture)
    said = {"scores": None if scores is None else str(scores)}
    show({**found.to_dict(), "model": model, **said}, found.table(), as_json, output)


def agreement(
    model: Weights,
    samples: Samples = 4,
    tokens: Lengths = "1024,2048",
    seeds: Seeds = "0,1",
    tasks: Tasks = "needle4,vt",
    corpus: Corpus = None,
    share: Annotated[float, typer.Option("--share", help="Share of the heads that would run sparse.")] = 0.75,
    rank: Annotated[str, typer.Option("--rank", help="gradient, signed or gradient_mass.")] = "gradient",
    records: RecordFile = None,
    output: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure whether probes of other tasks, lengths and seeds rank the heads alike."""
    from sparsekit.lab.calibrate.agreement import agreement as compare

    found = compare(
        *load_weights(model, device, dtype),
        tasks=tasks_of(tasks, corpus),
        tokens=numbers_of(tokens, "--tokens"),
        seeds=numbers_of(seeds, "--seeds"),
        samples=samples,
        share=share,
        rank=rank,
        records=records,
    )
    show({**found.to_dict(), "model": model}, found.table(), as_json, output)


def duo_attention(
    model: Weights,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Gates to write, .tsv; a .json of that name says how.")
    ],
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=LARGEST, help="Steps, each on a prompt of its own.")
    ] = 150,
    tokens: Lengths = "4096",
    tasks: Tasks = "passkeys10",
    corpus: Corpus = None,
    pattern: Annotated[
        str, typer.Option("--pattern", help="What a gate of 0 runs: a static pattern, as in YAML.")
    ] = STREAMING,
    full: Annotated[
        str,
        typer.Option("--full", help="Full attention mixed in: of the dense model, or of the gated one's q, k and v."),
    ] = "dense",
    rate: Annotated[float, typer.Option("--lr", help="Learning rate of the gates.")] = 0.02,
    reg: Annotated[float, typer.Option("--reg", help="Weight of the mean gate in the loss.")] = 0.05,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Train a gate for each key head between dense attention and a pattern, as DuoAttention finds retrieval heads."""
    from sparsekit.lab.calibrate.duo_attention import train_gates

    if output.suffix != ".tsv":
        raise SparsekitError(f"output {shown(str(output))}: must end in .tsv.")
    found = train_gates(
        *load_weights(model, device, dtype),
        pattern_of(pattern, "--pattern"),
        steps=steps,
        tasks=tasks_of(tasks, corpus),
        tokens=numbers_of(tokens, "--tokens"),
        full=full,
        learning_rate=rate,
        regularisation=reg,
        seed=seed,
    )
    with writing(output, folders=True) as part:
        part.write_text(found.to_tsv(), encoding="utf-8")
    said = {**found.to_dict(), "model": model, "corpus": corpus, "command": command_line()}
    show(said, found.table(), as_json, output.with_suffix(".json"))
    if not as_json:
        typer.echo(found.summary())
