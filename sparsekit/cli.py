"""The commands. Each is a thin wrapper around a Python function, and imports what it needs when it runs.

Results go to stdout, progress and errors to stderr. An error of ours is one line, `error: ...`, and exit code 1; a
mistyped command or option is exit code 2; `sparsekit --debug COMMAND` shows the traceback.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sparsekit.errors import SparsekitError

if TYPE_CHECKING:
    from rich.console import Console

    from sparsekit.explain import Explanation
    from sparsekit.models import ArchFacts

__all__ = ["app", "describe_patterns", "doctor", "main", "validate"]

# Tables that are piped into a file keep their columns; on a terminal they fit its width.
PIPE_WIDTH = 200

NO_PARAMETER = {"name": "", "default": "", "required": False, "meaning": "", "range": ""}

DEMO_FOLDER = Path("sparsekit-demo")

PACKAGES = ("torch", "triton", "transformers", "pydantic", "matplotlib", "gguf", "accelerate")


class _OneLineErrors(TyperGroup):
    """A group that prints a SparsekitError as one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SparsekitError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="sparsekit",
    cls=_OneLineErrors,
    help="Long prompts made cheap: sparse-attention prefill for Hugging Face language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
plots_app = typer.Typer(help="Draw pictures of a config.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plots_app, name="plots")
bench_app = typer.Typer(help="Time what runs here.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")

convert_app = typer.Typer(
    help="Write a config from another project's file.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(convert_app, name="convert")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A sparsekit YAML file.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", help="Length of the prompt, in tokens.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Check against a model: its folder, config.json, hub id, or `smollm2-135m`."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]


def main() -> None:
    """The `sparsekit` command."""
    app(prog_name="sparsekit")


def _print_version(asked: bool) -> None:
    if asked:
        from sparsekit import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


# ---- the commands


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures and records.")] = DEMO_FOLDER,
    samples: Annotated[int | None, typer.Option(min=1, help="Four-key prompts; default what the time allows.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    also_from: Annotated[
        list[int] | None, typer.Option(min=0, max=29, help="A further row: triangle from here.")
    ] = None,
) -> None:
    """Dense against sparse prefill on a small real model: answers, time, density."""
    from sparsekit.demo import SETTINGS, run_demo, triangle_from

    settings = (*SETTINGS, *map(triangle_from, also_from or ()))
    command = shlex.join(["sparsekit", *sys.argv[1:]])
    run_demo(out, samples=samples, seed=seed, device=device, settings=settings, command=command)


@app.command("patterns")
def _patterns(as_json: Json = False) -> None:
    """List the patterns with their parameters."""
    found = describe_patterns()
    if as_json:
        _print_json(found)
        return
    rows = [
        [
            pattern["name"] if first else "",
            parameter["name"],
            "required" if parameter["required"] else parameter["default"],
            parameter["meaning"],
            parameter["range"],
            pattern["source"] if first else "",
        ]
        for pattern in found
        for first, parameter in _mark_first(pattern["parameters"] or [NO_PARAMETER])
    ]
    _print_table(["pattern", "parameter", "default", "meaning, unit", "range", "source"], rows)


@app.command("explain")
def _explain(config: Config, tokens: Tokens, model: Model = None, as_json: Json = False) -> None:
    """What a config costs at a prompt length, layer by layer. Needs no weights and no GPU."""
    with _busy("explaining"):
        from sparsekit.explain import explain

        found = explain(config, tokens, _facts(model))
    if as_json:
        _print_json(found.to_dict()["layers"])
    else:
        _print_explanation(found)


@app.command("validate")
def _validate(config: Config, model: Model = None) -> None:
    """Check a config, and print what each layer runs."""
    with _busy("validating"):
        lines = validate(config, _facts(model))
    typer.echo("\n".join(lines))


@app.command("doctor")
def _doctor(as_json: Json = False) -> None:
    """Versions, devices, which implementation runs where and why, and what is missing."""
    with _busy("looking around"):
        found = doctor()
    if as_json:
        _print_json(found)
    else:
        _print_doctor(found)


@plots_app.command("mask")
def _plots_mask(
    config: Config,
    tokens: Tokens,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf.")],
    also: Annotated[int | None, typer.Option("--also", help="A second length whose density is written below.")] = None,
) -> None:
    """Draw which query-key pairs each pattern of a config keeps."""
    with _busy("drawing"):
        from sparsekit.plots import draw_masks

        draw_masks(config, tokens, output, also=also)
    typer.echo(str(output))


Yaml = Annotated[Path, typer.Option("--output", "-o", help="Config to write, .yaml.")]


@convert_app.command("minference")
def _convert_minference(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="Patterns of heads, as in minference/configs.")],
    output: Yaml,
) -> None:
    """MInference's JSON file of head patterns."""
    with _busy("converting"):
        from sparsekit.convert import convert_minference

        convert_minference(file, output)
    typer.echo(str(output))


@convert_app.command("xattention")
def _convert_xattention(
    file: Annotated[Path, typer.Argument(metavar="TABLE", help="Thresholds, a row a layer: text, JSON or Python.")],
    output: Yaml,
    table: Annotated[str | None, typer.Option("--table", help="Its name, where the file holds several.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="What it was made for; default by its name.")] = None,
) -> None:
    """XAttention's table of thresholds."""
    with _busy("converting"):
        from sparsekit.convert import convert_xattention

        convert_xattention(file, output, table=table, stride=stride)
    typer.echo(str(output))


# The benches' options are their own: lists without repeating the option, and a door without typer.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@bench_app.command("kernel", context_settings=_PASS_ON)
def _bench_kernel(context: typer.Context) -> None:
    """The CUDA kernels against cuDNN, FlashAttention-2 and FlexAttention; correctness first. `--help` lists options."""
    from sparsekit.bench import kernel

    raise typer.Exit(kernel.main(context.args))


@bench_app.command("dynamic", context_settings=_PASS_ON)
def _bench_dynamic(context: typer.Context) -> None:
    """Dynamic patterns: density, recall, error, cost of estimating and attending. `--help` lists options."""
    from sparsekit.bench import dynamic_command

    raise typer.Exit(dynamic_command.main(context.args))


@bench_app.command("overhead", context_settings=_PASS_ON)
def _bench_overhead(context: typer.Context) -> None:
    """Decoding and short prompts with a config applied, against the untouched model. `--help` lists options."""
    from sparsekit.bench import overhead

    raise typer.Exit(overhead.main(context.args))


@bench_app.command("prefill", context_settings=_PASS_ON)
def _bench_prefill(context: typer.Context) -> None:
    """Time to the first token and peak memory of configs, against the untouched model. `--help` lists options."""
    from sparsekit.bench import prefill

    raise typer.Exit(prefill.main(context.args))


# ---- calibration

calibrate_app = typer.Typer(
    help="Measure which layers of a model bear which pattern, and write a config that passed its gate.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(calibrate_app, name="calibrate")

Weights = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file, or `smollm2-135m`; weights are read.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Default: the checkpoint's; on a CPU bfloat16 or float32, by a measurement."),
]
ExactDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Default: the checkpoint's; on a CPU float32, since bfloat16's rounding hides small KL."
    ),
]
Seeds = Annotated[str, typer.Option("--seeds", help="Of the prompts, parted by commas.")]
Tasks = Annotated[str, typer.Option("--tasks", help="Parted by commas.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Prompts.")]
Lengths = Annotated[str, typer.Option("--tokens", "-n", help="Lengths of the prompts, tokens, parted by commas.")]
RecordFile = Annotated[
    Path | None, typer.Option("--records", help="JSONL file of what was measured; an interrupted run goes on from it.")
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Draw it: .png, .svg or .pdf.")]
JsonFile = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")]
GateTokens = Annotated[str, typer.Option("--gate-tokens", help="Lengths that the gate checks, tokens.")]
GateSamples = Annotated[int, typer.Option("--gate-samples", min=1, help="Prompts for each task and length.")]
Bound = Annotated[float, typer.Option("--bound", help="Share of the answers that the config may lose against dense.")]
GiveBack = Annotated[
    bool, typer.Option("--give-back", help="Where the gate names layers: make them dense, and try once more.")
]
Below = Annotated[int, typer.Option("--dense-below", min=0, help="Shorter prompts run dense, tokens.")]
PatternList = Annotated[
    str,
    typer.Option("--patterns", help="Candidates, parted by commas: names, or `{name: triangle, window_tokens: 256}`."),
]
GATE_TOKENS = "2048,4096"


@calibrate_app.command("probe")
def _calibrate_probe(
    model: Weights,
    samples: Samples = 16,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Length of a prompt with its answer.")] = 1024,
    seeds: Seeds = "0,1,2,3",
    tasks: Tasks = "needle4,passkey",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts a forward.")] = 1,
    sink: Annotated[int, typer.Option("--sink-tokens", help="Of the probe's sections.")] = 64,
    window: Annotated[int, typer.Option("--window-tokens", help="Of the probe's sections.")] = 128,
    last: Annotated[int, typer.Option("--last-tokens", help="Of the probe's sections.")] = 128,
    records: RecordFile = None,
    output: JsonFile = None,
    picture: Picture = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """How much the answer depends on each section of each layer's attention: TriangleMix's gradient probe."""
    from sparsekit.calibrate.probe import Sections, probe

    found = probe(
        *_loaded(model, device, dtype),
        samples=samples,
        tokens=tokens,
        seeds=_numbers(seeds, "--seeds"),
        tasks=_words(tasks),
        sections=Sections(sink, window, last),
        batch=batch,
        records=records,
    )
    said = {**found.to_dict(), "model": model}
    if picture is not None:
        from sparsekit.plots import draw_probe

        draw_probe(said, picture)
    _show(said, found.table(), as_json, output)


@calibrate_app.command("rule")
def _calibrate_rule(
    model: Weights,
    rule: Annotated[str, typer.Option("--rule", help="suffix, lowest_k, list or search.")],
    output: Yaml,
    probe_file: Annotated[Path | None, typer.Option("--probe", help="What `calibrate probe -o` wrote.")] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="What the layers run: a name, or as in YAML.")] = "triangle",
    epsilon: Annotated[float, typer.Option("--epsilon", help="suffix: share of the largest Grad(Middle).")] = 0.2,
    k: Annotated[int | None, typer.Option("--k", help="lowest_k: layers.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="list: `5,7,10-20`.")] = None,
    budget: Annotated[float, typer.Option("--budget", help="search: KL from dense, nats a token.")] = 0.002,
    samples: Annotated[int, typer.Option("--samples", min=1, help="search: prompts.")] = 8,
    tokens: Annotated[str, typer.Option("--tokens", "-n", help="search: their lengths.")] = "2048",
    dense_below: Below = 1024,
    gate_tokens: GateTokens = GATE_TOKENS,
    gate_samples: GateSamples = 16,
    bound: Bound = 0.1,
    give_back: GiveBack = False,
    records: RecordFile = None,
    device: Device = "cpu",
    dtype: ExactDtype = None,
) -> None:
    """Choose layers by a rule, and write the config if it passes the gate."""
    from sparsekit.calibrate.effects import Judge
    from sparsekit.calibrate.probe import read_probe
    from sparsekit.calibrate.prompts import make_prompts
    from sparsekit.calibrate.rules import apply_rule, write_config
    from sparsekit.models import facts
    from sparsekit.patterns import parse_pattern

    found = None if probe_file is None else read_probe(probe_file)
    [chosen] = _patterns_of(pattern) or [{"name": ""}]
    runs = parse_pattern(chosen)
    loaded = _loaded(model, device, dtype, exact=True)
    arch = facts(loaded[0])

    def bears(some: Sequence[int]) -> bool:
        lengths = _numbers(tokens, "--tokens")
        prompts = make_prompts(*loaded, tasks=["needle4"], tokens=lengths, count=samples, seeds=[0])
        effect = Judge(*loaded, prompts, records).effect(dict.fromkeys(some, runs))
        return effect.kl_at_most <= budget and effect.lost <= bound

    numbers, said = apply_rule(
        rule, found, num_layers=arch.num_layers, epsilon=epsilon, k=k, layers=layers, bears=bears
    )
    if not numbers:
        raise SparsekitError(f"rule {rule!r} chose no layer: there is nothing to write.")
    said = {"by": "sparsekit calibrate rule", **said}
    found_config = write_config(arch, dict.fromkeys(numbers, runs), said, dense_below_tokens=dense_below)
    config = _signed(found_config, model)
    _gate_and_write(loaded, config, output, gate_tokens, gate_samples, bound, give_back, records)


@calibrate_app.command("tune")
def _calibrate_tune(
    model: Weights,
    patterns: PatternList,
    output: Yaml,
    budget: Annotated[float, typer.Option("--budget", help="Mean KL from dense, nats an answer token.")] = 0.002,
    lost: Annotated[float, typer.Option("--lost", help="Share of the answers that may be lost.")] = 0.05,
    tokens: Lengths = "2048",
    cost_tokens: Annotated[int | None, typer.Option("--cost-tokens", help="Where costs are counted.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Prompts a single layer.")] = 3,
    verify: Annotated[int, typer.Option("--verify", min=1, help="Prompts a whole mixture.")] = 12,
    layers: Annotated[str | None, typer.Option("--layers", help="That may be sparse: `5,7,10-20`.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts.")] = 0,
    tasks: Tasks = "needle4",
    dense_below: Below = 1024,
    gate_tokens: GateTokens = GATE_TOKENS,
    gate_samples: GateSamples = 16,
    bound: Bound = 0.1,
    give_back: GiveBack = False,
    records: RecordFile = None,
    report: Annotated[Path | None, typer.Option("--report", help="JSON file of every measurement.")] = None,
    device: Device = "cpu",
    dtype: ExactDtype = None,
) -> None:
    """The cheapest mixture of patterns within a budget of divergence from dense, and its config if it passes."""
    from sparsekit.calibrate.tune import summary, tune
    from sparsekit.config import parse_range

    loaded = _loaded(model, device, dtype, exact=True)
    found = tune(
        *loaded,
        _patterns_of(patterns),
        budget=budget,
        lost=lost,
        tokens=_numbers(tokens, "--tokens"),
        cost_tokens=cost_tokens,
        layers=None if layers is None else parse_range(layers),
        samples=samples,
        verify=verify,
        seed=seed,
        tasks=_words(tasks),
        dense_below_tokens=dense_below,
        records=records,
    )
    _show(found.to_dict(), found.table(), False, report)
    typer.echo("\n".join(summary(found)))
    if found.dense:
        raise SparsekitError(f"{str(output)!r} is not written: no mixture is within the budget of {budget}.")
    config = _signed(found.config, model)
    _gate_and_write(loaded, config, output, gate_tokens, gate_samples, bound, give_back, records)


@calibrate_app.command("heads")
def _calibrate_heads(
    model: Weights,
    output: Yaml,
    patterns: Annotated[
        str, typer.Option("--patterns", help="`minference`, `xattention` (a ladder of thresholds), or a list.")
    ] = "minference",
    flops: Annotated[
        float | None, typer.Option("--flops", help="Target, share of dense; default MInference's.")
    ] = None,
    per_head: Annotated[bool, typer.Option("--per-head", help="Hold the target in each head, as MInference.")] = False,
    samples: Samples = 1,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Length of a prompt.")] = 2048,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts.")] = 0,
    dense_below: Below = 1024,
    gate_tokens: GateTokens = GATE_TOKENS,
    gate_samples: GateSamples = 16,
    bound: Bound = 0.1,
    give_back: GiveBack = False,
    records: RecordFile = None,
    report: Annotated[Path | None, typer.Option("--report", help="JSON file of every choice.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """A pattern, or a threshold, for every head by the error of its output, and the config if it passes the gate."""
    from sparsekit.calibrate.heads import MINFERENCE_SPACE, search_heads, threshold_ladder

    loaded = _loaded(model, device, dtype)
    spaces: dict[str, Any] = {"minference": MINFERENCE_SPACE, "xattention": threshold_ladder()}
    found = search_heads(
        *loaded,
        spaces[patterns] if patterns in spaces else _patterns_of(patterns),
        flops=flops,
        per_head=per_head,
        samples=samples,
        tokens=tokens,
        seed=seed,
        dense_below_tokens=dense_below,
        records=records,
    )
    _show(found.to_dict(), found.table(), False, report)
    config = _signed(found.config, model)
    _gate_and_write(loaded, config, output, gate_tokens, gate_samples, bound, give_back, records)


@calibrate_app.command("gate")
def _calibrate_gate(
    model: Weights,
    config: Config,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Config to write where it passes.")] = None,
    gate_tokens: GateTokens = GATE_TOKENS,
    gate_samples: GateSamples = 16,
    bound: Bound = 0.1,
    give_back: GiveBack = False,
    records: RecordFile = None,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Needle checks of a config against dense attention; exit code 1 and the layers to blame where it fails."""
    from sparsekit.config import load

    checked = load(config)
    loaded = _loaded(model, device, dtype)
    _gate_and_write(loaded, checked, output, gate_tokens, gate_samples, bound, give_back, records)


@calibrate_app.command("curve")
def _calibrate_curve(
    model: Weights,
    patterns: PatternList = "triangle,a_shape",
    starts: Annotated[str, typer.Option("--starts", help="First layers that run the pattern, parted by commas.")] = "0",
    samples: Samples = 96,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Length of a prompt with its answer.")] = 2200,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts.")] = 0,
    tasks: Tasks = "needle4",
    records: RecordFile = None,
    output: JsonFile = None,
    device: Device = "cpu",
    dtype: ExactDtype = None,
    as_json: Json = False,
) -> None:
    """Divergence from dense and scores, against the layer from which a pattern runs: to hold a probe against."""
    from sparsekit.calibrate.curve import start_layer_curve

    found = start_layer_curve(
        *_loaded(model, device, dtype, exact=True),
        _patterns_of(patterns),
        _numbers(starts, "--starts"),
        samples=samples,
        tokens=tokens,
        seed=seed,
        tasks=_words(tasks),
        records=records,
    )
    _show({**found.to_dict(), "model": model}, found.table(), as_json, output)


@app.command("inspect")
def _inspect(
    model: Weights,
    config: Annotated[str | None, typer.Option("--config", help="A YAML file: what it drops is measured too.")] = None,
    gradient: Annotated[bool, typer.Option("--gradient", help="Also the gradient that the config drops.")] = False,
    samples: Samples = 4,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Length of a prompt with its answer.")] = 1024,
    seeds: Seeds = "0,1",
    tasks: Tasks = "needle4,passkey",
    epsilon: Annotated[float, typer.Option("--epsilon", help="A sink score above it is a sink.")] = 0.3,
    output: JsonFile = None,
    picture: Picture = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Attention sinks: where, how strong, and how many sink tokens the model needs."""
    from sparsekit.calibrate.sinks import inspect_model

    found = inspect_model(
        *_loaded(model, device, dtype),
        config,
        samples=samples,
        tokens=tokens,
        seeds=_numbers(seeds, "--seeds"),
        tasks=_words(tasks),
        epsilon=epsilon,
        gradient=gradient,
    )
    said = {**found.to_dict(), "model": model}
    if picture is not None:
        from sparsekit.plots import draw_sinks

        draw_sinks(said, picture)
    _show(said, found.table(), as_json, output)
    if not as_json:
        typer.echo("\n".join(found.answer()))


@app.command("eval")
def _eval(
    context: typer.Context,
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="YAML files; `model` is the model as it is.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="A hub id, a folder, a .gguf file, or `smollm2-135m`.")],
    tasks: Tasks = "passkey,needle4",
    lengths: Lengths = "2048",
    samples: Samples = 24,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    corpus: Annotated[str | None, typer.Option(help="Folder of texts, or `pydoc`, for the tasks that read.")] = None,
    harness: Annotated[str | None, typer.Option("--harness", help="`lm-eval`: --tasks are its tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="lm-eval: documents of each task; default all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="lm-eval: examples; default the task's.")] = None,
    include: Annotated[Path | None, typer.Option(help="lm-eval: folder with task YAMLs of one's own.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file to write.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Scores, divergence from dense, time to first token and density of configs on tasks, ours or lm-eval's."""
    from sparsekit.config import load
    from sparsekit.evaluate import evaluate
    from sparsekit.harness import records_kept

    chosen = {name: None if name == "model" else load(Path(name)) for name in configs}
    if len(chosen) < len(configs):
        raise SparsekitError(f"CONFIG {', '.join(configs)}: each one once.")
    _check_harness(context, harness)
    if harness is not None:
        options = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed, "output": output}
        _eval_by_lm_eval(chosen, model, _words(tasks), include, device, dtype, as_json, options)
        return
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(records_kept(output))
    rows = []
    with _busy("answering"):
        records = evaluate(
            *_loaded(model, device, dtype),
            chosen,
            tasks=_words(tasks),
            lengths=_numbers(lengths, "--tokens"),
            samples=samples,
            seed=seed,
            corpus=corpus,
            name=model,
            command=shlex.join(["sparsekit", *sys.argv[1:]]),
        )
        for record in records:
            rows.append(record)
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    if as_json:
        _print_json(rows)
        return
    _print_table(
        ["task", "tokens", "config", "score", "95%", "KL", "first token, s", "density"],
        [
            [
                row["task"], row["tokens"], row["label"], f"{row['score']:.3f}",
                f"{row['score_low']:.2f}-{row['score_high']:.2f}", f"{row['kl']:.4f}" if "kl" in row else "",
                f"{row['ttft_s']:.2f}" if "ttft_s" in row else "", f"{row['density']:.3f}",
            ]
            for row in rows
        ],
        right=frozenset({1, 3, 4, 5, 6, 7}),
    )  # fmt: skip


def _check_harness(context: typer.Context, harness: str | None) -> None:
    """Options that do not go with the kind of tasks are errors, whether or not they would change anything."""
    if harness not in (None, "lm-eval"):
        raise SparsekitError(f"--harness {harness!r}: lm-eval is the one that there is; leave it out for our tasks.")
    given = {name for name in context.params if _typed(context, name)}
    for name in ("lengths", "samples", "corpus") if harness else ("limit", "num_fewshot", "include"):
        if name in given:
            option = {"lengths": "--tokens"}.get(name, f"--{name.replace('_', '-')}")
            raise SparsekitError(
                f"{option} does not go with --harness lm-eval: its tasks have prompts of their own (--limit: fewer)."
                if harness
                else f"{option} goes with --harness lm-eval only; our tasks have --tokens, --samples and --corpus."
            )
    if harness and "tasks" not in given:
        raise SparsekitError("--harness lm-eval needs --tasks: names of its tasks, such as hellaswag,gsm8k.")


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _eval_by_lm_eval(
    configs: dict[str, Any],
    model: str,
    names: list[str],
    include: Path | None,
    device: str,
    dtype: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from sparsekit.harness import LmEvalTasks, ran_dense, run_lm_eval, table

    with _busy("looking for tasks"):
        tasks = LmEvalTasks(names, include)
    command = shlex.join(["sparsekit", *sys.argv[1:]])
    loaded = _loaded(model, device, dtype)
    rows = list(run_lm_eval(*loaded, configs, tasks=tasks, name=model, command=command, **options))
    for remark in ran_dense(rows):
        typer.echo(remark, err=True)
    if as_json:
        _print_json(rows)
    else:
        _print_table(*table(rows), right=frozenset({3, 4, 5, 6, 7}))


@app.command("sweep")
def _sweep(
    file: Annotated[str, typer.Argument(metavar="FILE.yaml", help="A question, its axes, tasks and lengths.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Result file, JSONL; default the name of FILE, here.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Prompts for each run, instead of the file's.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or several: cuda:0,cuda:1")] = "cpu",
    executor: Annotated[str, typer.Option(help="inline, processes or ray: a worker for each device.")] = "inline",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster: auto, ray://...; default one is started.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray's workers, all on --device.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="Of each of Ray's workers: 0.5 puts two on a card.")] = 0.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do runs again that failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and do none.")] = False,
    best_rule: Annotated[
        str | None, typer.Option("--best", help='The fastest config that keeps a rule: "score within 1% of dense".')
    ] = None,
    best_output: Annotated[
        Path | None, typer.Option("--best-output", help="Where its YAML goes; FILE-best.yaml.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Do the runs of a question that are still missing; killed at any point, the same command goes on."""
    from sparsekit.sweep import best, load_question, run_sweep
    from sparsekit.sweep.best import overview

    question, devices = load_question(file), _words(device)
    if dry_run:
        runs = question.runs(device=devices[0], samples=samples)
        _print_table(["model", "task", "tokens", "seed", "config"],
                     [[run.model, run.task, run.tokens, run.seed, run.label] for run in runs])  # fmt: skip
        typer.echo(f"{len(runs)} runs of {samples or question.samples} prompts")
        if question.search is not None:
            typer.echo(f"then {question.search.trials} trials of {len(runs)} runs each")
        return
    found = run_sweep(
        question,
        output or Path(Path(file).stem + ".jsonl"),
        executor=executor,
        devices=devices if executor != "ray" else devices * workers,
        samples=samples,
        retry_failed=retry_failed,
        address=address,
        gpus=gpus,
    )
    records = found.of_runs()
    chosen = best(records, best_rule) if best_rule is not None else None
    if as_json:
        _print_json(records)
    else:
        head, rows = overview(records)
        _print_table(head, rows, right=frozenset(range(1, len(head))))
        typer.echo(f"{found.done} runs done now, {len(found.runs) - found.done} before; records are in {found.path}")
        if question.search is not None:
            _say_found(question.search, found.tried, records)
    if chosen is not None:
        target = best_output or Path(Path(file).stem + "-best.yaml")
        chosen.config().dump(target)
        if not as_json:
            typer.echo(f"{chosen.rule}: {chosen.winner}; its config is {target}")
    if found.failed:
        first = found.failed[0]
        raise SparsekitError(
            f"{len(found.failed)} of {len(found.runs)} runs failed (--retry-failed does them again); the first: "
            f"{first['task']} at {first['tokens']}, {first['label']}: {first['error']}"
        )


def _say_found(plan: Any, tried: int, records: list[dict[str, Any]]) -> None:
    from sparsekit.sweep import front

    few = "" if tried == plan.trials else f" of {plan.trials}: nothing else that fulfils the constraints was suggested"
    typer.echo(f"{tried} configs tried{few}")
    found = front(records, plan)
    typer.echo(f"{'best' if found else 'none'} in {', '.join(plan.objectives)}"
               f"{f' with {plan.subject_to}' if plan.subject_to else ''}{':' if found else ''}")  # fmt: skip
    for one in found:
        typer.echo(f"  {one}")


@app.command("report")
def _report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...", help="JSONL files of `sweep` or `eval`, and JSON files of `calibrate probe -o`."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write, .html.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its heading; default the question.")] = None,
) -> None:
    """One page of results: scores against time and density, depths, layers, gradients, configs, tables, filters."""
    from sparsekit.report import write_report

    with _busy("writing"):
        remarks = write_report(results, output, title=title)
    for remark in remarks:
        typer.echo(remark, err=True)
    typer.echo(str(output))


def _loaded(model: str, device: str, dtype: str | None, *, exact: bool = False) -> tuple[Any, Any]:
    from sparsekit.models import fast_dtype, load

    with _busy(f"loading {model}"):
        chosen: Any = dtype
        if dtype is None and device == "cpu":
            chosen = "float32" if exact else fast_dtype(device)
        return load(model, dtype=chosen, device=device)


def _gate_and_write(
    loaded: tuple[Any, Any],
    config: Any,
    output: Path | None,
    tokens: str,
    samples: int,
    bound: float,
    back: bool,
    records: Path | None,
) -> None:
    from sparsekit.calibrate.gate import gate, give_back, write_gated

    for again in (back, False):
        lengths = _numbers(tokens, "--gate-tokens")
        report = gate(*loaded, config, tokens=lengths, samples=samples, bound=bound, records=records)
        _show(report.to_dict(), report.table(), False, None)
        if not (again and report.give_back and report.regained):
            break
        typer.echo(report.why())
        config = give_back(config, report.give_back)
    if output is not None:
        write_gated(report, output)
        typer.echo(f"passed; written to {output}")
    elif not report.passed:
        raise SparsekitError(report.why())
    else:
        typer.echo("passed")


def _show(found: dict[str, Any], table: tuple[list[str], list[list[str]]], as_json: bool, output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, default=str) + "\n")
    if as_json:
        _print_json(found)
    else:
        head, rows = table
        _print_table(head, rows, right=frozenset(range(1, len(head))))


def _signed(config: Any, model: str) -> Any:
    """The config with the model called as it was asked for, and the command that made it."""
    from sparsekit.config import load

    data = config.to_dict()
    made = {"command": shlex.join(["sparsekit", *sys.argv[1:]]), **data["provenance"]}
    return load({**data, "model": {**data["model"], "name": model}, "provenance": made})


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, option: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise SparsekitError(f"{option} {text!r}: whole numbers parted by commas, such as 1024,2048.")
    return [int(word) for word in words]


def _patterns_of(text: str) -> list[Any]:
    """Names, and mappings as in YAML, parted by commas."""
    import yaml

    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise SparsekitError(
            f"--patterns {text!r}: names, or mappings such as {{name: triangle, window_tokens: 256}}, parted by commas."
        ) from None
    return list(found)


# ---- the same as Python functions (explain, plots, convert and demo have modules of their own)


def describe_patterns() -> list[dict[str, Any]]:
    """Every registered pattern: name, summary, source, and its parameters with default, meaning and range."""
    from sparsekit.patterns import pattern_class, pattern_names

    return [
        {
            "name": name,
            "summary": (pattern_class(name).__doc__ or "").strip().splitlines()[0],
            "source": pattern_class(name).source,
            "parameters": [
                _describe_field(field_name, field)
                for field_name, field in pattern_class(name).model_fields.items()
                if field_name != "name"
            ],
        }
        for name in pattern_names()
    ]


def validate(config: str | Path, model: ArchFacts | None = None) -> tuple[str, ...]:
    """Load and resolve a config, for `model` where it is given; one line for each run of layers that are alike.

    Raises:
        SparsekitError: what is wrong with it.
    """
    from sparsekit.config import format_range, load
    from sparsekit.explain import facts_for

    loaded = load(config)
    resolved = loaded.resolve(facts_for(loaded, model))
    own = resolved.own_layers(model)
    runs: list[tuple[str, list[int]]] = []
    for layer in resolved.layers:
        what = f"its own attention ({own[layer.layer]})" if layer.layer in own else str(layer)
        if not runs or runs[-1][0] != what:
            runs.append((what, []))
        runs[-1][1].append(layer.layer)
    return tuple(f"layer{'s' if len(layers) > 1 else ''} {format_range(layers)}: {what}" for what, layers in runs)


def doctor() -> dict[str, Any]:
    """What is installed, which devices there are, what runs on each and why, and what is missing with its fix."""
    import platform

    from sparsekit import __version__

    return {
        "versions": {
            "sparsekit": __version__,
            "python": platform.python_version(),
            **{p: _version(p) for p in PACKAGES},
        },
        "devices": [_describe_device(device) for device in _devices()],
        "models": _embedded_models(),
        "missing": _missing(),
    }


# ---- pieces


def _facts(model: str | None) -> ArchFacts | None:
    if model is None:
        return None
    from sparsekit.models import facts

    return facts(model)


def _describe_field(name: str, field: Any) -> dict[str, Any]:
    required = field.is_required()
    return {
        "name": name,
        "default": None if required else field.get_default(call_default_factory=True),
        "required": required,
        "meaning": field.description or "",
        "range": _range_of(field.metadata),
    }


def _range_of(metadata: Sequence[Any]) -> str:
    """Bounds as pydantic holds them: `>= 1`, `at least 1 item`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(item, key)}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]
    counts = [f"at least {item.min_length} item" for item in metadata if hasattr(item, "min_length")]
    return ", ".join([*bounds, *counts])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[Any]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _describe_device(device: Any) -> dict[str, Any]:
    """The implementation that runs on a device, and why each other one does or does not."""
    import platform

    import torch

    from sparsekit.kernels import IMPLEMENTATIONS, choose_device

    capability = None
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    chosen, why = choose_device(device)
    implementations = {impl: _can_run(device, impl) for impl in IMPLEMENTATIONS}
    implementations[chosen] = "runs by default"
    return {
        "device": str(device),
        "name": name,
        "compute_capability": capability,
        "implementation": chosen,
        "why": why,
        "implementations": implementations,
    }


def _can_run(device: Any, impl: str) -> str:
    from sparsekit.kernels import choose

    try:
        choose(device, impl)
    except SparsekitError as error:
        return str(error)
    return "can run"


def _embedded_models() -> list[dict[str, Any]]:
    from sparsekit.models import EMBEDDED

    return [
        {"name": name, "installed": find_spec(model.package) is not None, "install": model.install}
        for name, model in EMBEDDED.items()
    ]


def _missing() -> list[dict[str, str]]:
    """Optional parts that are not installed: what for, and the command that brings them."""
    needs = [
        ("matplotlib", "pictures", "pip install 'sparsekit-attention[plots]'"),
        ("plotly", "reports", "pip install 'sparsekit-attention[report]'"),
        ("lm_eval", "tasks of lm-eval", "pip install 'sparsekit-attention[eval]'"),
        ("gguf", "the embedded model", "pip install 'sparsekit-attention[demo]'"),
        ("accelerate", "the embedded model", "pip install 'sparsekit-attention[demo]'"),
    ]
    if sys.platform == "linux":
        needs.append(("triton", "the GPU kernel", "pip install triton"))
    missing = [{"what": name, "for": use, "fix": fix} for name, use, fix in needs if find_spec(name) is None]
    models = [model for model in _embedded_models() if not model["installed"]]
    return missing + [{"what": model["name"], "for": "the demo", "fix": model["install"]} for model in models]


# ---- printing


def _stdout() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """A spinner on stderr while this runs; nothing where stderr is not a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[object]], right: frozenset[int] = frozenset()) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _stdout().print(table)


def _print_explanation(found: Explanation) -> None:
    head, rows = found.table()
    typer.echo(f"{found.model or 'model'}, {found.tokens:,} tokens")
    _print_table(head, rows, right=frozenset(range(2, len(head))))
    typer.echo("\n".join(found.summary()))


def _print_doctor(found: dict[str, Any]) -> None:
    _print_table(["package", "version"], [[name, got or "not installed"] for name, got in found["versions"].items()])
    rows = []
    for device in found["devices"]:
        capability = device["compute_capability"]
        label = f"{device['device']}: {device['name']}" + (f", compute capability {capability}" if capability else "")
        for first, (impl, can) in _mark_first(list(device["implementations"].items())):
            why = f": {device['why']}" if impl == device["implementation"] else ""
            rows.append([label if first else "", impl, can + why])
    _print_table(["device", "implementation", "runs?"], rows)
    for model in found["models"]:
        typer.echo(f"model {model['name']}: {'' if model['installed'] else 'not '}installed")
    for item in found["missing"]:
        typer.echo(f"missing {item['what']}, for {item['for']}: {item['fix']}")


def _mark_first(items: Sequence[Any]) -> Iterator[tuple[bool, Any]]:
    return ((i == 0, item) for i, item in enumerate(items))
