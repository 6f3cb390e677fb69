"""`sparsekit calibrate ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparsekit.cli.options import (
    GATE,
    Below,
    Config,
    Corpus,
    Dtype,
    ExactDtype,
    Gate,
    Json,
    JsonFile,
    Length,
    PatternList,
    Picture,
    RecordFile,
    Samples,
    Scores,
    Seed,
    Seeds,
    Tasks,
    Weights,
    Yaml,
    command_line,
    gated,
    load_weights,
    ruled,
)
from sparsekit.cli.printing import show
from sparsekit.errors import SparsekitError, shown
from sparsekit.lab.options import Device, Lengths, numbers_of, patterns_of, tasks_of, words_of


class _Calibrate(TyperGroup):
    """`rule` has an option for each field of a rule: rules, which import torch, are read when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys([*super().list_commands(ctx), "rule"]))

    def get_command(self, ctx: Any, name: str) -> Any:
        if name == "rule" and name not in self.commands:
            from sparsekit.lab.calibrate.rules import RULES

            app = typer.Typer(rich_markup_mode=None, add_completion=False)
            app.command(name, epilog=f"Rules: {', '.join(RULES)}.")(ruled(_calibrate_rule))
            self.commands[name] = typer.main.get_command(app)
        return super().get_command(ctx, name)


calibrate_app = typer.Typer(
    cls=_Calibrate,
    help="Measure which layers of a model bear which pattern, and write a config that passed its gate.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@calibrate_app.command("probe")
def _calibrate_probe(
    model: Weights,
    samples: Samples = 16,
    tokens: Length = 1024,
    seeds: Seeds = "0,1,2,3",
    tasks: Tasks = "needle4,passkey",
    corpus: Corpus = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts per forward pass.")] = 1,
    sink: Annotated[int, typer.Option("--sink-tokens", help="Sink tokens of the probe's sections.")] = 64,
    window: Annotated[int, typer.Option("--window-tokens", help="Window tokens of the probe's sections.")] = 128,
    last: Annotated[int, typer.Option("--last-tokens", help="Last rows of the probe's sections.")] = 128,
    records: RecordFile = None,
    output: JsonFile = None,
    picture: Picture = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure how much the answer depends on each section of each layer's attention (TriangleMix's gradient probe)."""
    from sparsekit.lab.calibrate.probe import Sections, probe
    from sparsekit.lab.plots import draw_probe

    found = probe(
        *load_weights(model, device, dtype),
        samples=samples,
        tokens=tokens,
        seeds=numbers_of(seeds, "--seeds"),
        tasks=tasks_of(tasks, corpus),
        sections=Sections(sink, window, last),
        batch=batch,
        records=records,
    )
    said = {**found.to_dict(), "model": model}
    if picture is not None:
        draw_probe(said, picture)
    show(said, found.table(), as_json, output)


@gated
def _calibrate_rule(
    model: Weights,
    rule: Annotated[str, typer.Option("--rule", help="How layers or heads are chosen; rules are listed below.")],
    output: Yaml,
    probe_file: Annotated[Path | None, typer.Option("--probe", help="JSON file of `calibrate probe -o`.")] = None,
    scores: Scores = None,
    pattern: Annotated[str, typer.Option("--pattern", help="Pattern of the chosen heads, as in YAML.")] = "triangle",
    rest: Annotated[str, typer.Option("--rest", help="Pattern of all other heads, as in YAML.")] = "dense",
    dense_below: Below = 1024,
    gate: Gate = GATE,
    device: Device = "auto",
    dtype: ExactDtype = None,
    **constants: Any,
) -> None:
    """Choose layers or heads by a rule, and write the config if it passes the gate."""
    from sparsekit.lab.calibrate.effects import judges
    from sparsekit.lab.calibrate.mixture import Chosen, write_heads
    from sparsekit.lab.calibrate.probe import read_probe
    from sparsekit.lab.calibrate.ranking import read_scores
    from sparsekit.lab.calibrate.rules import Given, apply_rule, parse_rule
    from sparsekit.models import facts

    if scores is not None and constants.get("rank") != "scores":
        raise SparsekitError(f"--scores {str(scores)!r}: read by --rank scores alone.")
    asked: Any = parse_rule(rule, {name: value for name, value in constants.items() if value is not None})
    found = None if probe_file is None else read_probe(probe_file)
    runs, others = pattern_of(pattern, "--pattern"), pattern_of(rest, "--rest")
    loaded = load_weights(model, device, dtype, exact=True)
    arch, judged = facts(loaded[0]), {}
    if asked.measured:
        kinds, lengths = tasks_of(asked.tasks, asked.corpus), numbers_of(asked.tokens, "--tokens")
        judged = judges(*loaded, kinds, tokens=lengths, samples=asked.samples, records=gate.records)

    def write(chosen: Chosen, said: dict[str, Any]) -> Any:
        return write_heads(arch, chosen, runs, said, rest=others, dense_below_tokens=dense_below)

    def measure(chosen: Chosen, rule: Any) -> dict[str, Any]:
        return {task: judge.effect(write(chosen, {})) for task, judge in judged.items()}

    table = None if scores is None else read_scores(scores, loaded[0])
    chosen, said = apply_rule(asked, Given(arch, found, measure, table))
    if not chosen:
        raise SparsekitError(f"rule {rule!r} chose no layer: there is nothing to write.")
    config = _signed(write(chosen, {"by": "sparsekit calibrate rule", **said}), model)
    _gate_and_write(loaded, config, output, gate)


def pattern_of(text: str, option: str) -> Any:
    """The one pattern that an option says."""
    from sparsekit.patterns import parse_pattern

    given = patterns_of(text, option)
    if len(given) != 1:
        raise SparsekitError(f"{option} {shown(text)}: want one pattern for all chosen layers; got {len(given)}.")
    return parse_pattern(given[0])


@calibrate_app.command("tune")
@gated
def _calibrate_tune(
    model: Weights,
    patterns: PatternList,
    output: Yaml,
    budget: Annotated[float, typer.Option("--budget", help="Mean KL from dense, in nats per answer token.")] = 0.002,
    lost: Annotated[float, typer.Option("--lost", help="Share of the answers that may be lost.")] = 0.05,
    tokens: Lengths = "2048",
    cost_tokens: Annotated[
        int | None, typer.Option("--cost-tokens", help="Prompt length at which costs count.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Prompts for a single layer.")] = 3,
    verify: Annotated[int, typer.Option("--verify", min=2, help="Prompts for a whole mixture, at least 2.")] = 12,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers that may be sparse, such as `5,7,10-20`.")
    ] = None,
    seed: Seed = 0,
    tasks: Tasks = "needle4",
    dense_below: Below = 1024,
    gate: Gate = GATE,
    report: Annotated[Path | None, typer.Option("--report", help="JSON file of every measurement.")] = None,
    device: Device = "auto",
    dtype: ExactDtype = None,
) -> None:
    """Find the cheapest mixture of patterns within a budget of divergence from dense; write its config if it passes."""
    from sparsekit.config import parse_range
    from sparsekit.lab.calibrate.tune import summary, tune

    loaded = load_weights(model, device, dtype, exact=True)
    found = tune(
        *loaded,
        patterns_of(patterns),
        budget=budget,
        lost=lost,
        tokens=numbers_of(tokens, "--tokens"),
        cost_tokens=cost_tokens,
        layers=None if layers is None else parse_range(layers),
        samples=samples,
        verify=verify,
        seed=seed,
        tasks=words_of(tasks),
        dense_below_tokens=dense_below,
        records=gate.records,
    )
    show(found.to_dict(), found.table(), False, report)
    typer.echo("\n".join(summary(found)))
    if found.dense:
        raise SparsekitError(f"{str(output)!r} is not written: no mixture is within the budget of {budget}.")
    config = _signed(found.config, model)
    _gate_and_write(loaded, config, output, gate)


@calibrate_app.command("heads")
@gated
def _calibrate_heads(
    model: Weights,
    output: Yaml,
    patterns: Annotated[
        str, typer.Option("--patterns", help="`minference`, `xattention` (thresholds), or a comma-separated list.")
    ] = "minference",
    flops: Annotated[
        float | None, typer.Option("--flops", help="Target, as a share of dense (default: MInference's).")
    ] = None,
    per_head: Annotated[bool, typer.Option("--per-head", help="Meet the target in each head, as MInference.")] = False,
    samples: Samples = 1,
    tokens: Length = 2048,
    seed: Seed = 0,
    dense_below: Below = 1024,
    gate: Gate = GATE,
    report: Annotated[Path | None, typer.Option("--report", help="JSON file of every choice.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Choose a pattern or threshold for each head by its output error; write the config if it passes the gate."""
    from sparsekit.lab.calibrate.heads import MINFERENCE_SPACE, search_heads, threshold_ladder

    loaded = load_weights(model, device, dtype)
    spaces: dict[str, Any] = {"minference": MINFERENCE_SPACE, "xattention": threshold_ladder()}
    found = search_heads(
        *loaded,
        spaces[patterns] if patterns in spaces else patterns_of(patterns),
        flops=flops,
        per_head=per_head,
        samples=samples,
        tokens=tokens,
        seed=seed,
        dense_below_tokens=dense_below,
        records=gate.records,
    )
    show(found.to_dict(), found.table(), False, report)
    config = _signed(found.config, model)
    _gate_and_write(loaded, config, output, gate)


@calibrate_app.command("reuse")
@gated
def _calibrate_reuse(
    model: Weights,
    output: Yaml,
    pattern: Annotated[str, typer.Option("--pattern", help="Dynamic pattern of all these layers.")] = "block_topk",
    anchors: Annotated[
        int | None, typer.Option("--anchors", min=1, help="How many layers choose (default: a quarter).")
    ] = None,
    recall: Annotated[
        float | None, typer.Option("--recall", help="Or: as few as keep this share of each layer's own choice.")
    ] = None,
    run: Annotated[
        int | None, typer.Option("--run", min=1, help="Layers in a row that one plan serves, at most.")
    ] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Layers that run it, such as `5,7,10-20`.")] = None,
    samples: Samples = 8,
    tokens: Length = 2048,
    seed: Seed = 0,
    tasks: Tasks = "needle4,passkey",
    corpus: Corpus = None,
    dense_below: Below = 1024,
    gate: Gate = GATE,
    report: Annotated[Path | None, typer.Option("--report", help="JSON file of every layer's choice.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Choose which layers reuse whose plan, head by head (Kascade); write the config if it passes the gate."""
    from sparsekit.config import parse_range
    from sparsekit.lab.calibrate.reuse import choose_reuse

    loaded = load_weights(model, device, dtype)
    found = choose_reuse(
        *loaded,
        pattern_of(pattern, "--pattern"),
        anchors=anchors,
        recall=recall,
        run=run,
        layers=None if layers is None else parse_range(layers),
        samples=samples,
        tokens=tokens,
        seed=seed,
        tasks=tasks_of(tasks, corpus),
        dense_below_tokens=dense_below,
        records=gate.records,
    )
    show(found.to_dict(), found.table(), False, report)
    _gate_and_write(loaded, _signed(found.config, model), output, gate)


@calibrate_app.command("gate")
@gated
def _calibrate_gate(
    model: Weights,
    config: Config,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Config to write if it passes.")] = None,
    gate: Gate = GATE,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Check a config against dense attention on needle prompts; if it fails, exit with 1 and name the layers."""
    from sparsekit.config import load

    checked = load(config)
    loaded = load_weights(model, device, dtype)
    _gate_and_write(loaded, checked, output, gate)


@calibrate_app.command("curve")
def _calibrate_curve(
    model: Weights,
    patterns: PatternList = "triangle,a_shape",
    starts: Annotated[str, typer.Option("--starts", help="First layers that run the pattern, comma-separated.")] = "0",
    samples: Samples = 96,
    tokens: Length = 2200,
    seed: Seed = 0,
    tasks: Tasks = "needle4",
    records: RecordFile = None,
    output: JsonFile = None,
    device: Device = "auto",
    dtype: ExactDtype = None,
    as_json: Json = False,
) -> None:
    """Measure divergence from dense and scores against the first layer that runs a pattern."""
    from sparsekit.lab.calibrate.curve import start_layer_curve

    found = start_layer_curve(
        *load_weights(model, device, dtype, exact=True),
        patterns_of(patterns),
        numbers_of(starts, "--starts"),
        samples=samples,
        tokens=tokens,
        seed=seed,
        tasks=words_of(tasks),
        records=records,
    )
    show({**found.to_dict(), "model": model}, found.table(), as_json, output)


@calibrate_app.command("layers")
def _calibrate_layers(
    model: Weights,
    probe_file: Annotated[Path, typer.Option("--probe", help="JSON file of `calibrate probe -o`.")],
    pattern: Annotated[str, typer.Option("--pattern", help="Pattern of the one layer, as in YAML.")] = "triangle",
    samples: Samples = 96,
    tokens: Length = 2200,
    seed: Seed = 0,
    tasks: Tasks = "needle4",
    records: RecordFile = None,
    output: JsonFile = None,
    device: Device = "auto",
    dtype: ExactDtype = None,
    as_json: Json = False,
) -> None:
    """Measure divergence with a pattern in one layer at a time, and how well the probe's gradient predicts it."""
    from sparsekit.lab.calibrate.probe import read_probe
    from sparsekit.lab.calibrate.single_layers import single_layers

    found = single_layers(
        *load_weights(model, device, dtype, exact=True),
        read_probe(probe_file),
        pattern_of(pattern, "--pattern"),
        samples=samples,
        tokens=tokens,
        seed=seed,
        tasks=words_of(tasks),
        records=records,
    )
    show({**found.to_dict(), "model": model}, found.table(), as_json, output)
    if not as_json:
        typer.echo(found.summary())


def _gate_and_write(loaded: tuple[Any, Any], config: Any, output: Path | None, options: Gate) -> None:
    from sparsekit.config import give_back
    from sparsekit.lab.calibrate.gate import gate, write_gated
    from sparsekit.models import facts

    lengths = numbers_of(options.gate_tokens, "--gate-tokens")
    for again in (options.give_back, False):
        report = gate(
            *loaded,
            config,
            tokens=lengths,
            samples=options.gate_samples,
            bound=options.bound,
            records=options.records,
        )
        show(report.to_dict(), report.table(), False, None)
        if not (again and report.give_back and report.regained):
            break
        typer.echo(report.why())
        config = give_back(config, report.give_back, report.give_back_heads, facts=facts(loaded[0]))
    if report.passed:
        _tell_what_is_hardly_sparse(loaded[0], config, max(lengths))
    if output is not None:
        write_gated(report, output)
        typer.echo(f"passed; written to {output}")
    elif not report.passed:
        raise SparsekitError(report.why())
    else:
        typer.echo("passed")


def _tell_what_is_hardly_sparse(model: Any, config: Any, tokens: int) -> None:
    from sparsekit.config.costs import explain
    from sparsekit.models import facts

    found = [row.density for row in explain(config, tokens, facts(model)).layers]
    sparse = [share for share in found if share is not None and share < 1]
    if sparse and (mean := sum(sparse) / len(sparse)) > 0.8:
        typer.echo(
            f"at {tokens:,} tokens the sparse layers keep {mean:.0%} of the pairs, so the gate has seen little of the "
            "pattern; --gate-tokens takes longer prompts",
            err=True,
        )


def _signed(config: Any, model: str) -> Any:
    """The config with the model called as it was asked for, a path by its last name, and the command that made it."""
    from sparsekit.config import load
    from sparsekit.models.names import label

    data = config.to_dict()
    made = {"command": command_line(), **data["provenance"]}
    return load({**data, "model": {**data["model"], "name": label(model)}, "provenance": made})
