"""How a model answers prompts of known answer: score, time to first token, density, and what decoding sees.

`answer` reads one prompt; `evaluate` reads many, under several configs, and gives a record for each config, task and
length.

>>> from sparsekit.lab.evaluate import evaluate
>>> for record in evaluate(model, tokenizer, {"dense": None}, tasks=["passkey"], lengths=[256], samples=2):
...     print(record["task"], record["tokens"], record["samples"], record["density"])
passkey 256 2 1.0
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.config import LayerPatterns, SparseConfig, format_range, load
from sparsekit.config.precision import MODEL
from sparsekit.errors import SparsekitError
from sparsekit.lab.answers import Answer, Reading, answer, answer_together, kl_divergence, read_on
from sparsekit.lab.provenance import content_of_model, measured_on
from sparsekit.lab.stats import mean_interval, mean_of_known, quantile, share_interval
from sparsekit.lab.tasks import Sample, Task, prompt_ids, read_corpus, task
from sparsekit.patch import Handle, LayerReport, apply
from sparsekit.patch.model import check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Answer",
    "Evaluator",
    "Reading",
    "answer",
    "answer_together",
    "evaluate",
    "kl_divergence",
    "read_on",
]

QUANTILES = (0.2, 0.8)


Config = SparseConfig | Mapping[str, Any] | str | Path | None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, Config],
    *,
    tasks: Sequence[str | Task],
    lengths: Sequence[int],
    samples: int = 24,
    seed: int = 0,
    corpus: str | None = None,
    name: str | None = None,
    command: str = "",
) -> Iterator[dict[str, Any]]:
    """A record for each task, length and config, in that order, as each is done. See `Evaluator.run`.

    Args:
        configs: label -> config; None is the model as it is.
        tasks: names, or tasks.
        lengths: tokens of prompt and answer together.
        samples: prompts for each record.
        corpus: of the tasks that read one.
        name: of the model, in records; default its own.
        command: what to type for the same, in records.
    """
    ready = {label: None if config is None else load(config) for label, config in configs.items()}
    kinds = [task(kind, corpus) if isinstance(kind, str) else kind for kind in tasks]
    if not ready or not kinds or not lengths:
        raise SparsekitError(f"{len(ready)} configs, {len(kinds)} tasks, {len(lengths)} lengths: one of each at least.")
    evaluator = Evaluator(model, tokenizer, name=name)
    for kind in kinds:
        for tokens in lengths:
            for label, config in ready.items():
                found = evaluator.run(config, kind, tokens, samples=samples, seed=seed)
                yield {"label": label, **found, "command": command}


class Evaluator:
    """A model that answers the same prompts under many configs; what dense attention says to them is kept.

    The prompts and dense answers of one task, length and seed are kept at a time, while weights and texts stay the
    same: ask for all configs of these before going on.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = name or model.config._name_or_path or type(model).__name__
        self._key: tuple[Any, ...] | None = None
        self._samples: list[Sample] = []
        self._dense: list[Answer] = []
        self._warm: set[tuple[int, str]] = set()

    def run(self, config: SparseConfig | None, kind: Task, tokens: int, *, samples: int, seed: int) -> dict[str, Any]:
        """Answer `samples` prompts under `config` (None: the model as it is), and say how it went: a JSON object.

        Fields: `score` with its 95% interval `score_low`, `score_high`; `ttft_s` with `_p20`, `_p80`; `kl`, of the
        answer's tokens from dense attention, with half the width of its interval, `kl_width`; `density` and
        `tile_density`, means over layers and prompts, and `layer_density`; `plan_ms`, planning of all layers, median
        over prompts; `peak_memory_bytes` of the device, or of the process on a CPU; `resolved`, the config spelled out,
        and `settled`, what each `dense_below_tokens: auto` was; what was run where. For every prompt: `scores`,
        `depths`, `texts`, `ttft_s_each`. Of perplexity instead of texts and times: `nll`, `nll_last_rows`,
        `nll_earlier_rows`, `perplexity`.

        Raises:
            SparsekitError: a length that the model or the task does not have, or a config of another model.
        """
        self._prepare(kind, tokens, samples, seed)
        with apply(self.model, config) if config is not None else nullcontext() as handle:
            self._warm_up(config, tokens)
            with PeakMemory(self.model.device) as peak:
                measured = self._answers(kind, handle) if kind.metric != "nll" else self._readings(kind, handle)
            ran = ran_as(handle)
        return {
            "model": self.name,
            "task": kind.name,
            "tokens": tokens,
            "samples": samples,
            "seed": seed,
            "metric": kind.metric,
            **measured,
            "depths": [sample.depth for sample in self._samples],
            "peak_memory_bytes": peak.bytes,
            "peak_memory_of": peak.of,
            "config": None if config is None else config.to_dict(),
            **ran,
            **({"corpus": dict(self._samples[0].meta)["corpus_digest"]} if kind.metric == "nll" else {}),
            **measured_on(self.model),
        }

    def _prepare(self, kind: Task, tokens: int, samples: int, seed: int) -> None:
        if samples < 1:
            raise SparsekitError(f"samples = {samples}: at least one.")
        check_positions(self.model, tokens)
        corpus = getattr(kind, "corpus", None)
        text = None if corpus is None else read_corpus(corpus).digest
        key = (kind, text, tokens, samples, seed, content_of_model(self.model, self.tokenizer))
        if key != self._key:
            self._samples = kind.samples(self.tokenizer, tokens=tokens, count=samples, seed=seed)
            self._key, self._dense = key, []

    def _warm_up(self, config: SparseConfig | None, tokens: int) -> None:
        """One prefill that nobody times: the first of its kind compiles kernels, and makes static plans."""
        known = (tokens, _kind_of_prefill(config, self.model.device))
        if known not in self._warm:
            self._warm.add(known)
            ids = prompt_ids(self.tokenizer, self._samples[0]).to(self.model.device)
            with torch.inference_mode():
                self.model(ids, use_cache=True, logits_to_keep=1)

    def _answers(self, kind: Task, handle: Handle | None) -> dict[str, Any]:
        """Every prompt answered, and held against what dense attention says."""
        if handle is not None and not self._dense:
            with handle.pause():
                self._dense = self._answered(kind)
        found = self._answered(kind, handle)
        if handle is None:
            self._dense = found
        scores, times = [a.score for a in found], [a.ttft_s for a in found]
        kls = [kl_divergence(dense, other) for dense, other in zip(self._dense, found, strict=True)]
        score, low, high = share_interval(scores)
        kl, width = mean_interval(kls)
        return {
            "score": score,
            "score_low": low,
            "score_high": high,
            "kl": kl,
            "kl_width": width if math.isfinite(width) else None,
            "same_text": mean(float(a.text == b.text) for a, b in zip(self._dense, found, strict=True)),
            "ttft_s": median(times),
            "ttft_s_p20": quantile(times, QUANTILES[0]),
            "ttft_s_p80": quantile(times, QUANTILES[1]),
            **layers_summary([a.layers for a in found]),
            "scores": scores,
            "texts": [a.text for a in found],
            "ttft_s_each": times,
            "prompt_tokens": [a.tokens for a in found],
        }

    def _answered(self, kind: Task, handle: Handle | None = None) -> list[Answer]:
        """On a GPU decoded together, a step of all costing what one costs; on a CPU each alone, which is exact."""
        model, tokenizer = self.model, self.tokenizer
        if model.device.type == "cuda":
            return answer_together(model, tokenizer, kind, self._samples, handle=handle)
        return [answer(model, tokenizer, kind, one, handle=handle, stop_when_found=True) for one in self._samples]

    def _readings(self, kind: Task, handle: Handle | None) -> dict[str, Any]:
        found = [read_on(self.model, self.tokenizer, kind, sample, handle=handle) for sample in self._samples]
        nll, width = mean_interval([reading.nll for reading in found])
        earlier = [reading.earlier_rows for reading in found if reading.earlier_rows is not None]
        return {
            "score": math.exp(-nll),
            "score_low": math.exp(-nll - width),
            "score_high": math.exp(-nll + width) if math.isfinite(width) else 1.0,
            "nll": nll,
            "perplexity": math.exp(nll),
            "nll_last_rows": mean(reading.last_rows for reading in found),
            "nll_earlier_rows": mean(earlier) if earlier else None,
            **layers_summary([reading.layers for reading in found]),
            "scores": [math.exp(-reading.nll) for reading in found],
            "prompt_tokens": [reading.tokens for reading in found],
        }


def _kind_of_prefill(config: SparseConfig | None, device: torch.device) -> str:
    """Prefills of one kind share what a first one pays for: on a GPU each config has kernels of its own."""
    return json.dumps(config.to_dict()) if config is not None and device.type == "cuda" else ""


def ran_as(handle: Handle | None) -> dict[str, Any]:
    """`resolved`, the config spelled out; of one that says `auto` also `settled`: the numbers, and from where."""
    if handle is None:
        return {"resolved": None}
    settled = list(handle.resolved.settled)
    return {"resolved": spelled_out(handle.resolved.layers), **({"settled": settled} if settled else {})}


def layers_summary(prompts: Sequence[Sequence[LayerReport]]) -> dict[str, Any]:
    """What the layers did, over prompts: `density` and `tile_density`, `layer_density`, and `plan_ms` of a prompt.

    Layers that kept their own attention have no density, and are not in the means. Without a handle there are no
    layers, and all is dense.

    Raises:
        SparsekitError: every layer kept its own attention, so that there is no density.
    """
    if not any(prompts):
        return {"density": 1.0, "tile_density": 1.0, "layer_density": None, "plan_ms": 0.0}
    by_layer = [mean_of_known(layer.density for layer in column) for column in zip(*prompts, strict=True)]
    tiles = mean_of_known(layer.tile_density for layers in prompts for layer in layers)
    density = mean_of_known(by_layer)
    if density is None or tiles is None:
        raise SparsekitError("every layer kept its own attention: the config changes nothing, and has no density.")
    return {
        "density": density,
        "tile_density": tiles,
        "layer_density": [None if share is None else round(share, 6) for share in by_layer],
        "plan_ms": median(sum(layer.plan_ms or 0.0 for layer in layers) for layers in prompts),
    }


class PeakMemory:
    """Most bytes in use within the block: of the device, or of the whole process on a CPU (None where not told)."""

    _RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self.of = "device" if device.type == "cuda" else "process"

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif platform.system() == "Linux":
            try:
                self._RESET.write_text("5")
            except OSError:
                self.of = "process, since its start"
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._STATUS.exists():
            lines = self._STATUS.read_text().splitlines()
            self.bytes = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def spelled_out(layers: Sequence[LayerPatterns]) -> list[dict[str, Any]]:
    """The patterns of every layer and head with all their parameters, layers alike in one object."""
    runs: dict[tuple[Any, ...], list[int]] = {}
    for layer in layers:
        runs.setdefault((layer.precision, *layer.groups()), []).append(layer.layer)
    return [
        {
            "layers": format_range(numbers),
            **({} if precision == MODEL else {"precision": precision}),
            "patterns": [{**pattern.model_dump(mode="json"), "heads": format_range(heads)} for pattern, heads in run],
        }
        for (precision, *run), numbers in runs.items()
    ]
