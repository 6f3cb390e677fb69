"""`sparsekit eval`, `sweep` and `report`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli.options import Dtype, Json, Samples, Seed, Tasks, command_line, load_weights
from sparsekit.cli.printing import busy, print_json, print_table
from sparsekit.errors import SparsekitError, shown
from sparsekit.lab.options import Device, Lengths, device_of, numbers_of, words_of


def eval_(
    context: typer.Context,
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG...", help="YAML files, or hub:owner/name; `model` stands for the unchanged model."
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="A hub id, a folder, a .gguf file, or `smollm2-135m`.")],
    tasks: Tasks = "passkey,needle4",
    lengths: Lengths = "2048",
    samples: Samples = 24,
    seed: Seed = 0,
    corpus: Annotated[str | None, typer.Option(help="For the tasks that read: a folder of texts, or `pydoc`.")] = None,
    harness: Annotated[str | None, typer.Option("--harness", help="`lm-eval`: --tasks names its tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="lm-eval: documents per task (default: all).")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="lm-eval: examples (default: the task's).")] = None,
    include: Annotated[Path | None, typer.Option(help="lm-eval: folder with your own task YAMLs.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file to write.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure scores, divergence from dense, time to first token and density of configs on tasks."""
    from sparsekit.config import load
    from sparsekit.lab.evaluate import evaluate
    from sparsekit.lab.lm_eval import records_kept
    from sparsekit.lab.progress import progress
    from sparsekit.lab.sweep.results import replacing

    chosen = {name: None if name == "model" else load(Path(name)) for name in configs}
    if len(chosen) < len(configs):
        raise SparsekitError(f"CONFIG {shown(configs)}: a config is listed twice.")
    _check_harness(context, harness)
    if harness is not None:
        options = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed, "output": output}
        _eval_by_lm_eval(chosen, model, words_of(tasks), include, device, dtype, as_json, options)
        return
    rows = []
    with ExitStack() as stack:
        add = None if output is None else stack.enter_context(replacing(output, records_kept(output)))
        loaded = load_weights(model, device, dtype)
        asked, counts = words_of(tasks), numbers_of(lengths, "--tokens")
        with progress("configs", len(asked) * len(counts) * len(chosen)) as bar:
            records = evaluate(
                *loaded,
                chosen,
                tasks=asked,
                lengths=counts,
                samples=samples,
                seed=seed,
                corpus=corpus,
                name=model,
                command=command_line(),
            )
            for record in records:
                rows.append(record)
                if add is not None:
                    add(record)
                bar(1)
                bar.says(f"{record['task']} at {record['tokens']}, {record['label']}: score {record['score']:.3f}")
    if as_json:
        print_json(rows)
        return
    print_table(
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
        raise SparsekitError(f"--harness {shown(harness)}: want lm-eval, or nothing for sparsekit's own tasks.")
    given = {name for name in context.params if _typed(context, name)}
    for name in ("lengths", "samples", "corpus") if harness else ("limit", "num_fewshot", "include"):
        if name in given:
            option = {"lengths": "--tokens"}.get(name, f"--{name.replace('_', '-')}")
            raise SparsekitError(
                f"{option} does not go with --harness lm-eval: its tasks have prompts of their own (--limit: fewer)."
                if harness
                else f"{option} needs --harness lm-eval; sparsekit's own tasks have --tokens, --samples and --corpus."
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
    from sparsekit.lab.lm_eval import LmEvalTasks, ran_dense, run_lm_eval, table

    with busy("looking for tasks"):
        tasks = LmEvalTasks(names, include)
    command = command_line()
    loaded = load_weights(model, device, dtype)
    rows = list(run_lm_eval(*loaded, configs, tasks=tasks, name=model, command=command, **options))
    for remark in ran_dense(rows):
        typer.echo(remark, err=True)
    if as_json:
        print_json(rows)
    else:
        print_table(*table(rows), right=frozenset({3, 4, 5, 6, 7}))


def sweep(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE.yaml", help="Question, axes, tasks and lengths.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Result file, .jsonl (default: FILE.jsonl here)."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Prompts per run, instead of the file's.")] = None,
    where: Annotated[
        str | None, typer.Option(help='Do a part of the runs: a constraint, such as "tokens <= 8192 and seed == 0".')
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="As elsewhere, or several: cuda:0,cuda:1."),
    ] = "auto",
    executor: Annotated[str, typer.Option(help="inline, processes or ray: one worker per device.")] = "inline",
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster: auto, ray://... (default: start one).")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of Ray workers, all on --device.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per Ray worker; 0.5 puts two on a GPU.")] = 0.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Repeat runs that failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs without doing any.")] = False,
    best_rule: Annotated[
        str | None,
        typer.Option("--best", help='Rule for the fastest config: "score within 1% of dense".'),
    ] = None,
    best_output: Annotated[
        Path | None, typer.Option("--best-output", help="Config to write for --best (default: FILE-best.yaml).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run what is still missing of a sweep; after an interruption the same command resumes it."""
    from sparsekit.lab.sweep import best, load_question, run_sweep
    from sparsekit.lab.sweep.best import overview, parse_rule

    _check_sweep_options(context, executor)
    question = load_question(Path(file))
    devices = [device_of(name, elsewhere=True) for name in words_of(device)]
    if not devices:
        raise SparsekitError(f"--device {shown(device)}: at least one is needed, such as cpu, cuda or cuda:0,cuda:1.")
    if best_rule is not None:
        parse_rule(best_rule)
    if dry_run:
        runs = question.runs(device=devices[0], samples=samples, where=where)
        print_table(["model", "task", "tokens", "seed", "config"],
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
        where=where,
        retry_failed=retry_failed,
        address=address,
        gpus=gpus,
    )
    records = found.of_runs()
    if as_json:
        print_json(records)
    else:
        head, rows = overview(records)
        print_table(head, rows, right=frozenset(range(1, len(head))))
        typer.echo(f"{found.done} runs done now, {len(found.runs) - found.done} before; records are in {found.path}")
        if question.search is not None:
            _say_found(question.search, found.tried, records)
    failure = _failure(found)
    if best_rule is not None:
        try:
            chosen = best(records, best_rule)
        except SparsekitError as error:
            raise SparsekitError(" ".join(filter(None, (str(error), failure)))) from None
        target = best_output or Path(Path(file).stem + "-best.yaml")
        chosen.config().dump(target)
        if not as_json:
            typer.echo(f"{chosen.rule}: {chosen.winner}; its config is {target}")
    if failure:
        raise SparsekitError(failure)


def _failure(found: Any) -> str:
    """What failed in a sweep, in a sentence; nothing where nothing did."""
    if not found.failed:
        return ""
    first = found.failed[0]
    return (
        f"{len(found.failed)} of {len(found.runs)} runs failed (--retry-failed does them again); the first: "
        f"{first['task']} at {first['tokens']}, {first['label']}: {first['error']}"
    )


def _check_sweep_options(context: typer.Context, executor: str) -> None:
    """Options that would change nothing are errors."""
    for name in ("address", "workers", "gpus"):
        if executor != "ray" and _typed(context, name):
            raise SparsekitError(f"--{name} needs --executor ray; the executor is {executor}.")
    if _typed(context, "best_output") and not _typed(context, "best_rule"):
        raise SparsekitError("--best-output needs --best.")


def _say_found(plan: Any, tried: int, records: list[dict[str, Any]]) -> None:
    from sparsekit.lab.sweep import front

    few = "" if tried == plan.trials else f" of {plan.trials}: nothing else that fulfils the constraints was suggested"
    typer.echo(f"{tried} configs tried{few}")
    found = front(records, plan)
    typer.echo(f"{'best' if found else 'none'} in {', '.join(plan.objectives)}"
               f"{f' with {plan.subject_to}' if plan.subject_to else ''}{':' if found else ''}")  # fmt: skip
    for one in found:
        typer.echo(f"  {one}")


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...", help="JSONL files of `sweep` or `eval`, and JSON files of `calibrate probe -o`."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write, .html or .md (its table).")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option(help="Page heading (default: the question).")] = None,
    average: Annotated[
        bool, typer.Option("--average", help="Print the mean over tasks at each length against dense, and no page.")
    ] = False,
) -> None:
    """Write a page of results: scores against time and density, depths, layers, gradients, configs and tables."""
    from sparsekit.lab.report import write_report

    if average:
        from sparsekit.lab.averages import average_table
        from sparsekit.lab.sweep import read_results

        records, remarks = read_results(results)
        typer.echo(average_table(records), nl=False)
        for remark in remarks:
            typer.echo(remark, err=True)
        return
    with busy("writing"):
        remarks = write_report(results, output, title=title)
    for remark in remarks:
        typer.echo(remark, err=True)
    typer.echo(str(output))
