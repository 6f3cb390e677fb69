"""Tasks of EleutherAI's lm-evaluation-harness on a model with a config applied; records like those of `evaluate`.

The prompts are lm-eval's. It scores choices by log-likelihoods, in one forward of prompt and choice, so that the rows
that are judged are themselves of a sparse prefill; texts are generated densely after one.

>>> from sparsekit.harness import run_lm_eval
>>> for record in run_lm_eval(model, tokenizer, {"dense": None, "triangle": config}, tasks=["hellaswag"], limit=100):
...     print(record["task"], record["label"], record["metric"], record["score"], record["density"])
"""

from __future__ import annotations

import copy
import json
import logging
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.config import SparseConfig, load
from sparsekit.errors import SparsekitError, nearest
from sparsekit.lab.evaluate import Config, PeakMemory, layers_summary, ran_as
from sparsekit.lab.lm_eval_scores import scores_of
from sparsekit.lab.provenance import (
    content_key,
    content_of_code,
    content_of_files,
    content_of_model,
    measured_on,
    patterns_of,
)
from sparsekit.lab.sweep.results import ResultFile
from sparsekit.lab.sweep.runs import canonical, config_key
from sparsekit.lab.sweep.workers import said
from sparsekit.patch import Handle, LayerReport, apply
from sparsekit.patch.caches import cache_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LM_EVAL", "LmEvalTasks", "ran_dense", "records_kept", "run_lm_eval", "table"]

LM_EVAL = "lm-eval"
INSTALL = "pip install 'sparsekit-attention[eval]'"


class LmEvalTasks:
    """Tasks that lm-eval knows, by name.

    Args:
        names: tasks, groups and tags. A tag stands for its tasks, and so does a group that has no score of its own.
        include: folder with task YAMLs of one's own; they come before lm-eval's of the same name.

    Attributes:
        names: of tasks and groups that have a score, each once.
        manager: lm-eval's TaskManager.

    Raises:
        SparsekitError: lm-eval is not installed, no such folder, or a name that it does not know.
    """

    def __init__(self, names: Sequence[str], include: str | Path | None = None) -> None:
        _import_lm_eval()
        from lm_eval.tasks import TaskManager

        self.include = None if include is None else Path(include).resolve()
        if self.include is not None and not self.include.is_dir():
            raise SparsekitError(f"include {str(include)!r}: no such folder; it holds lm-eval's task files, *.yaml.")
        with redirect_stdout(sys.stderr):
            self.manager: Any = TaskManager(include_path=None if self.include is None else str(self.include))
        self.names = list(dict.fromkeys(leaf for name in names for leaf in self._expanded(name)))
        if not self.names:
            raise SparsekitError("tasks: at least one of lm-eval's, such as hellaswag.")

    def _expanded(self, name: str) -> list[str]:
        entry = self.manager.task_index.get(name)
        if entry is None:
            where = "" if self.include is None else f", nor {str(self.include)!r}"
            raise SparsekitError(f"task {name!r}: lm-eval has none{where}.{nearest(name, self.manager.all_tasks)}")
        if entry.kind.name == "TAG":
            return [leaf for member in sorted(entry.tags) for leaf in self._expanded(member)]
        if entry.kind.name != "GROUP" or entry.cfg.get("aggregate_metric_list"):
            return [name]
        members = entry.cfg["task"]
        if not all(isinstance(member, str) for member in members):
            inner = [member if isinstance(member, str) else member.get("task", "a group") for member in members]
            raise SparsekitError(
                f"task {name!r}: a group without a score of its own, that changes its tasks: name them: "
                f"{', '.join(map(str, inner))}."
            )
        return [leaf for member in members for leaf in self._expanded(member)]

    def definition(self, name: str) -> Any:
        """What a task of one's own says and reads, its members' included; None for lm-eval's."""
        entry = self.manager.task_index.get(name)
        if entry is None or self.include is None or not Path(entry.yaml_path or "/").is_relative_to(self.include):
            return None
        members = entry.cfg.get("task") if entry.kind.name == "GROUP" else []
        code = [file for suffix in (".py", ".yaml", ".yml") for file in self.include.rglob(f"*{suffix}")]
        reads = content_of_files(
            [*code, *_data_files([entry.cfg.get("dataset_path"), entry.cfg.get("dataset_kwargs")])]
        )
        return [entry.cfg, reads, *(self.definition(member) for member in members if isinstance(member, str))]


def _data_files(named: Any) -> Iterator[Path]:
    """The files of this machine that are named, anywhere in text, lists and mappings, and those of named folders."""
    if isinstance(named, Mapping):
        for name, value in named.items():
            if name != "cache_dir":
                yield from _data_files(value)
    elif isinstance(named, (list, tuple)):
        for value in named:
            yield from _data_files(value)
    elif isinstance(named, str) and Path(named).is_file():
        yield Path(named)
    elif isinstance(named, str) and Path(named).is_dir():
        yield from (file for file in Path(named).rglob("*") if file.is_file())


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, Config],
    *,
    tasks: Sequence[str] | LmEvalTasks,
    include: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    output: str | Path | None = None,
    name: str | None = None,
    command: str = "",
) -> Iterator[dict[str, Any]]:
    """A record for each task and config, in that order, as each is done.

    Args:
        configs: label -> config; None is the model as it is, against which the others stand.
        tasks: names of lm-eval's tasks, groups and tags, or `LmEvalTasks`.
        include: folder with task YAMLs of one's own; with names only.
        limit: documents of each task, the first; default all.
        num_fewshot: solved examples before each; default the task's.
        batch_size: 1. lm-eval pads larger batches of log-likelihoods on the right and passes no mask.
        seed: of the examples that are drawn, and of what samples.
        output: JSONL file that records are added to, on the disk before the next one begins. Those that it has
            (same model, config, task, limit, examples, seed, dtype and kind of device) are not done again.
        name: of the model, in records; default its own.
        command: what to type for the same, in records.

    Yields:
        Fields of `Evaluator.run` as far as they exist here: `score` with `score_low`, `score_high`, a 95% interval from
        lm-eval's standard error (None where it gives none); `metric`, the first that the task lists; `metrics`, all of
        them as lm-eval gives them; `scores` of the documents; `texts` of tasks that generate; `density`, `tile_density`
        and `plan_ms` over the prompts that were read; `tokens` of the longest, `prompt_tokens` of each, and
        `sparse_prompts`, the share of them in which a layer was sparse; `num_fewshot`, `limit`, `task_version`; `key`
        and `config_key` as in sweeps. A score grows with quality: of a metric that falls it is the inverse
        (perplexities) or the negative, and `metric` says so.

    Raises:
        SparsekitError: lm-eval is not installed, an unknown task, a task that cannot be run, a wrong option or file.
    """
    ready = {label: None if config is None else load(config) for label, config in configs.items()}
    if not ready:
        raise SparsekitError("0 configs: one at least.")
    if batch_size != 1:
        raise SparsekitError(
            f"batch_size = {batch_size}: must be 1; lm-eval pads larger batches without a mask, and a sparse pattern "
            "takes the padding for the end of the prompt."
        )
    for option, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and (isinstance(value, float) or value < least):
            raise SparsekitError(f"{option} = {value}: a whole number, at least {least}.")
    if isinstance(tasks, LmEvalTasks) and include is not None:
        raise SparsekitError(f"include {str(include)!r}: goes with names; these tasks were looked up already.")
    chosen = tasks if isinstance(tasks, LmEvalTasks) else LmEvalTasks(tasks, include)
    file = None if output is None else ResultFile(output, shared=True)
    harness = _Harness(model, tokenizer, chosen, name)
    with ExitStack() as stack:
        known = {} if file is None else stack.enter_context(file.writing())
        for task in chosen.names:
            for label, config in ready.items():
                asked = {"task": task, "seed": seed, "limit": limit, "num_fewshot": num_fewshot}
                key = harness.key(config, asked)
                if key not in known:
                    found = harness.run(config, task, limit=limit, num_fewshot=num_fewshot, seed=seed)
                    known[key] = {"key": key, "label": label, **found, "command": command}
                    if file is not None:
                        file.append(known[key])
                yield {**known[key], "label": label}


def records_kept(path: Path) -> str:
    """The lines of a result file that are of lm-eval, whole; nothing where there is no file."""

    def ours(line: str) -> bool:
        try:
            return line.endswith("\n") and json.loads(line).get("harness") == LM_EVAL
        except (ValueError, AttributeError):
            return False

    if not path.is_file():
        return ""
    return "".join(line for line in path.read_text(errors="replace").splitlines(keepends=True) if ours(line))


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(heading, rows): a row for each record."""
    rows = [
        [
            record["task"], record["metric"], record["label"], f"{record['score']:.3f}",
            "" if record["score_low"] is None else f"{record['score_low']:.2f} to {record['score_high']:.2f}",
            str(record["samples"]), str(record["tokens"]), f"{record['density']:.3f}",
        ]
        for record in records
    ]  # fmt: skip
    return ["task", "metric", "config", "score", "95%", "documents", "longest", "density"], rows


def ran_dense(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A remark on each record of a sparse config of which no prompt ran sparse: its score is dense attention's."""
    remarks = []
    for record in records:
        if record["config_key"] != "dense" and not record["sparse_prompts"]:
            least = record["config"].get("dense_below_tokens", 0)
            why = (
                f"dense_below_tokens is {least}"
                if least == "auto" or record["tokens"] < least
                else "of which every pair was kept"
            )
            remarks.append(
                f"{record['task']}, {record['label']}: no prompt ran sparse; the longest has {record['tokens']} "
                f"tokens, {why}."
            )
    return remarks


class _Harness:
    """A model as lm-eval sees it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: LmEvalTasks, name: str | None
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        self.model, self.tasks = model, tasks
        self._loaded: set[str] = set()
        self.name = name or model.config._name_or_path or type(model).__name__
        self._content = content_of_model(model, tokenizer)
        with _silent("lm_eval.models"):  # it warns that a model that is loaded takes no options of loading
            self.lm: Any = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1)

    def key(self, config: SparseConfig | None, asked: Mapping[str, Any]) -> str:
        """Of all that the result depends on; of data sets on the hub by their names."""
        what = {
            "harness": [LM_EVAL, version("lm_eval"), content_of_code(patterns_of(config))],
            "model": [self.name, self._content],
            "config": canonical(config),
            **asked,
            "definition": self.tasks.definition(asked["task"]),
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
        }
        return content_key(what)

    def run(
        self, config: SparseConfig | None, task: str, *, limit: int | None, num_fewshot: int | None, seed: int
    ) -> dict[str, Any]:
        start = time.perf_counter()
        with apply(self.model, config) if config is not None else nullcontext() as handle:
            with PeakMemory(self.model.device) as peak, _Prompts(self.model, handle) as read:
                results = self._results(task, limit, num_fewshot, seed)
            ran = ran_as(handle)
        measured = measured_on(self.model)
        if not read.tokens:
            raise SparsekitError(f"task {task!r}: lm-eval asked the model nothing.")
        return {
            "config_key": config_key(config),
            "status": "ok",
            "harness": LM_EVAL,
            "model": self.name,
            "task": task,
            "task_version": str(results["versions"].get(task)),
            "tokens": max(read.tokens),
            "seed": seed,
            "limit": limit,
            "num_fewshot": results["n-shot"].get(task),
            **scores_of(results, task),
            **layers_summary(read.layers),
            "sparse_prompts": read.sparse / len(read.tokens),
            "prompt_tokens": read.tokens,
            "peak_memory_bytes": peak.bytes,
            "peak_memory_of": peak.of,
            "config": None if config is None else config.to_dict(),
            **ran,
            **measured,
            "versions": {**measured["versions"], "lm_eval": version("lm_eval")},
            "run_s": time.perf_counter() - start,
        }

    def _results(self, task: str, limit: int | None, num_fewshot: int | None, seed: int) -> dict[str, Any]:
        """What lm-eval says. As `lm_eval.simple_evaluate`, which asks git, the hub and the system as well."""
        from lm_eval.evaluator import evaluate

        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the generator that lm-eval's tasks use)
        torch.manual_seed(seed)
        try:
            with redirect_stdout(sys.stderr):  # tasks print
                with _silent("lm_eval") if task in self._loaded else nullcontext():
                    loaded = self.tasks.manager.load([task])  # anew: what draws examples has a state
                self._loaded.add(task)
                for one in loaded["tasks"].values():
                    own = one.get_config("num_fewshot")
                    if num_fewshot is not None and own != 0:  # lm-eval: a task that says 0 keeps it
                        one.set_config(key="num_fewshot", value=num_fewshot)
                    elif own is None:
                        one.set_config(key="num_fewshot", value=0)
                    one.set_fewshot_seed(seed=seed)
                return dict(evaluate(self.lm, loaded, limit=limit))
        except SparsekitError:
            raise
        except Exception as error:
            raise SparsekitError(f"task {task!r}, by lm-eval: {said(error)}") from error


class _Prompts:
    """What a model reads within the block: the length of every prompt, and what the layers did with it."""

    def __init__(self, model: PreTrainedModel, handle: Handle | None) -> None:
        self.tokens: list[int] = []
        self.sparse = 0
        self.layers: list[tuple[LayerReport, ...]] = []
        self._model, self._handle = model, handle
        self._begins = False

    def __enter__(self) -> _Prompts:
        self._hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        cache = cache_in(kwargs)
        self._begins = cache is None or not cache.get_seq_length()
        if self._begins:
            self.tokens.append(ids.shape[1])

    def _after(self, *_: object) -> None:
        if self._begins and self._handle is not None:
            self.layers.append(self._handle.report().layers)
            self.sparse += any(layer.sparse for layer in self.layers[-1])


# ---- lm-eval


def _import_lm_eval() -> None:
    """An error that says what to install where lm-eval, or what its HFLM needs, is missing."""
    if find_spec("lm_eval") is None:
        raise SparsekitError(f"lm-eval is not installed: {INSTALL}")
    try:
        import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise SparsekitError(f"lm-eval cannot be used ({said(error)}): {INSTALL}") from error


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """No warnings of a logger."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
