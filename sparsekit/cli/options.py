"""Arguments and options that several commands take, and what their words mean."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli.printing import busy
from sparsekit.lab.options import LARGEST, device_of

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A sparsekit YAML file, or hub:owner/name.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", help="Prompt length in tokens.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Check against a model: its folder, config.json, hub id, or a name of `sparsekit models`."
    ),
]
Yaml = Annotated[Path, typer.Option("--output", "-o", help="Config to write, .yaml.")]
Group = Annotated[int | None, typer.Option("--group", min=1, help="Query heads of a key head, without --model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Weights = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub id, a folder, a .gguf file, or a name of `sparsekit models`; weights are read."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Dtype of the weights (default: the checkpoint's; on a CPU the faster of bfloat16 and "
                                 "float32, measured)."),
]  # fmt: skip
ExactDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Dtype of the weights (default: the checkpoint's; on a CPU float32, because rounding "
                                 "to bfloat16 hides a small KL)."),
]  # fmt: skip
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST, help="Seed of the prompts.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds of the prompts, comma-separated.")]
Tasks = Annotated[str, typer.Option("--tasks", help="Tasks, comma-separated.")]
Corpus = Annotated[
    str | None, typer.Option("--corpus", help="Text of tasks that read one: a folder, or `pydoc` for Python's manual.")
]
Samples = Annotated[int, typer.Option("--samples", min=1, max=LARGEST, help="Number of prompts.")]
Length = Annotated[int, typer.Option("--tokens", "-n", min=1, max=LARGEST, help="Prompt length in tokens.")]
RecordFile = Annotated[
    Path | None, typer.Option("--records", help="JSONL file of measurements; an interrupted run resumes from it.")
]
Scores = Annotated[
    Path | None, typer.Option("--scores", help="Scores of key heads, .tsv, as `calibrate duo-attention -o` writes.")
]
STREAMING = "{name: a_shape, sink_tokens: 128, window_tokens: 256}"  # of DuoAttention's published scores
Picture = Annotated[Path | None, typer.Option("--picture", help="Picture to write: .png, .svg or .pdf.")]
JsonFile = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")]
Below = Annotated[int, typer.Option("--dense-below", min=0, help="Prompts shorter than this run dense, in tokens.")]
PatternList = Annotated[
    str,
    typer.Option(
        "--patterns",
        help="Candidates, comma-separated: names, or mappings such as `{name: triangle, window_tokens: 256}`.",
    ),
]


@dataclass(frozen=True)
class Gate:
    """What the commands that write a config through the gate take: their parameter `gate` becomes these options."""

    gate_tokens: Annotated[
        str, typer.Option("--gate-tokens", help="Prompt lengths that the gate checks, in tokens, comma-separated.")
    ] = "2048,4096"
    gate_samples: Annotated[
        int, typer.Option("--gate-samples", min=1, help="Prompts of the gate for each task and length.")
    ] = 16
    bound: Annotated[
        float, typer.Option("--bound", help="Share of dense attention's right answers that the config may lose.")
    ] = 0.1
    give_back: Annotated[
        bool, typer.Option("--give-back", help="If the gate names layers, make them dense and try once more.")
    ] = False
    records: RecordFile = None


GATE = Gate()


def gated(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `gate` is typed as the options of `Gate`."""
    run = _spelled_out(command, "gate", inspect.signature(Gate, eval_str=True).parameters.values())

    @wraps(run)
    def with_gate(**given: Any) -> None:
        gate = Gate(**{field.name: given.pop(field.name) for field in fields(Gate)})
        command(**given, gate=gate)

    return with_gate


def ruled(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose `**constants` are typed as the fields of all rules of calibration; not given: None."""
    from sparsekit.lab.calibrate.rules import RULES

    takers: dict[str, list[str]] = {}
    defaults: dict[str, dict[str, list[str]]] = {}
    options = {}
    for rule, cls in RULES.items():
        for name, field in cls.model_fields.items():
            if name != "name":
                takers.setdefault(name, []).append(rule)
                if not field.is_required():
                    defaults.setdefault(name, {}).setdefault(str(field.default), []).append(rule)
                default = _said_default(defaults.get(name, {}))
                says = f"{', '.join(takers[name])}: {field.description}{default}."
                kind: Any = Annotated[field.annotation | None, typer.Option(f"--{name.replace('_', '-')}", help=says)]  # type: ignore[operator]
                options[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
    return _spelled_out(command, "constants", options.values())


def _said_default(defaults: Mapping[str, Sequence[str]]) -> str:
    """One default of all rules, or each with the rules that have it."""
    said = [value if len(defaults) == 1 else f"{value} of {', '.join(rules)}" for value, rules in defaults.items()]
    return f" (default: {'; '.join(said)})" if said else ""


def _spelled_out(command: Callable[..., None], name: str, options: Iterable[inspect.Parameter]) -> Callable[..., None]:
    """The command with `options` in its signature where the parameter of that name is."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [one for own in signature.parameters.values() for one in (options if own.name == name else (own,))]

    @wraps(command)
    def run(**given: Any) -> None:
        command(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def command_line() -> str:
    """What was typed, for records and provenance."""
    return shlex.join(["sparsekit", *sys.argv[1:]])


def load_weights(model: str, device: str, dtype: str | None, *, exact: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer); `exact`: in float32 on a CPU where no dtype was asked for."""
    from sparsekit.models import fast_dtype, load

    device = device_of(device)
    with busy(f"loading {model}"):
        chosen: Any = dtype
        if dtype is None and device == "cpu":
            chosen = "float32" if exact else fast_dtype(device)
        return load(model, dtype=chosen, device=device)


def facts_of(model: str | None) -> Any:
    """What is known of a model without its weights; nothing of none."""
    if model is None:
        return None
    from sparsekit.models import facts

    return facts(model)
