"""`sparsekit bench overhead`: what an applied config costs where it must cost nothing, against the untouched model.

Two calls never run sparse: decoding, and prompts under `dense_below_tokens`. Both run the model's own attention through
sparsekit's door; here they are timed through it and without it, in one run. A host may scatter from second to second by
ten times what there is to see, so the two take turns as short as can be, one prompt or one token each. And a copy of a
model may be a percent slower than the model for where its objects lie, so each of the two has the config in half of the
turns.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.lab.bench.shapes import model_or_shape
from sparsekit.lab.bench.timing import Record, spread, synchronize
from sparsekit.lab.options import Device, Dtype, Model, Rows, Shape, device_of
from sparsekit.lab.provenance import place
from sparsekit.models import can_shorten
from sparsekit.patch import apply
from sparsekit.patch.caches import cache_argument, cache_of
from sparsekit.patch.state import applied_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bench_overhead", "command"]

STOCK_RUNS = 4


@torch.inference_mode()
def bench_overhead(
    *,
    model: PreTrainedModel | str | None = None,
    shape: str | None = None,
    prompt_tokens: int = 2048,
    decode_tokens: int = 32,
    rounds: int = 21,
    dtype: str | None = None,
    device: str | None = None,
    out: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows `prompt` and `decode`: the model with sparsekit applied, over the same model without it.

    Args:
        model: loaded, or what `sparsekit.models.load` takes; default: random weights of `shape`. Beside it runs a copy
            that shares its weights.
        shape: one of `sparsekit.lab.bench.shapes.SHAPES`; default llama-3.2-1b on a CUDA device, else smollm2-135m.
        prompt_tokens: of the prompt, which is under `dense_below_tokens`; decoding starts at its end.
        decode_tokens: decoded one by one in each round.
        rounds: of each of the two copies with the config: both read the prompt once, and decode the tokens once.
        dtype, device: default bfloat16 and the GPU, or float32 and the CPU.
        out: JSONL file for the rows.
        show: called with each row's line.

    Returns:
        For each case `ms` and `stock_ms` (a prompt, or one decoded token; median, p20, p80), and `ratio`, of the two
        times of a turn: 1.02 is 2% slower; the median of `turns` turns, p20, p80, and the median's 95% confidence
        interval, `ratio_low` to `ratio_high`. For decoding also `tokens_per_second` and `stock_tokens_per_second`.

    Raises:
        SparsekitError: an unknown shape, a model that sparsekit is applied to, or logits that are not the untouched
        model's.
    """
    if min(prompt_tokens, decode_tokens, rounds) < 1:
        raise SparsekitError(
            f"prompt_tokens = {prompt_tokens}, decode_tokens = {decode_tokens}, rounds = {rounds}: at least 1 of each."
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, found = model_or_shape(model, shape, dtype, where)
    if applied_to(found):
        raise SparsekitError(
            f"{name} has sparsekit applied, and the untouched model is timed beside it: remove it first."
        )
    vocab = found.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (1, prompt_tokens + decode_tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(where)
    prompt, following = ids[:, :prompt_tokens], ids[:, prompt_tokens:].split(1, 1)
    cache = cache_of(found(prompt, use_cache=True, logits_to_keep=1))
    if not can_shorten(cache):
        raise SparsekitError(
            f"{name}: its cache, of windows or recurrent layers, cannot be cut back from round to round; take one "
            "of full attention."
        )
    facts = {"model": name, "dtype": str(found.dtype).removeprefix("torch."), "prompt_tokens": prompt_tokens}
    config = {"default": "triangle", "dense_below_tokens": prompt_tokens + 1}
    twin = _twin(found)
    with Record(out, place(where)) as record:
        for case, steps in (("prompt", (prompt,)), ("decode", following)):
            sides = [_Side(twin), _Side(found)]
            if (
                case == "decode"
            ):  # both behind the same keys and values: a GPU may read a prompt to other last bits again
                sides = [_Side(twin, copy.deepcopy(cache)), _Side(found, cache)]
                facts |= {"decode_tokens": decode_tokens}
            times: list[tuple[float, float]] = []
            errors: list[tuple[float, float]] = []
            for ours, stock in (sides, sides[::-1]):
                with apply(ours.model, config) as handle:
                    errors.append(_same(ours, stock, steps))
                    times += _in_turns(ours, stock, steps, rounds, where)
                    if "sparse" in {row.ran for row in handle.report().layers}:
                        raise SparsekitError("a layer ran sparse where every layer should run dense.")
            row: dict[str, Any] = {"case": case, **facts, "rounds": rounds, "turns": len(times)}
            row["error"], row["stock_error"] = map(max, zip(*errors, strict=True))
            row |= _compared(times)
            if case == "decode":
                row["tokens_per_second"] = round(1e3 / row["ms"], 2)
                row["stock_tokens_per_second"] = round(1e3 / row["stock_ms"], 2)
            record.add(row)
            if show is not None:
                show(_line(row))
    return record.rows


class _Side:
    """One of the two models: it reads a prompt, or decodes behind one that it has read.

    Attributes:
        model: the model.
        cache: what was read before; None for reading a prompt.
    """

    def __init__(self, model: PreTrainedModel, cache: Any = None) -> None:
        self.model, self.cache = model, cache

    def step(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            ids, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1
        ).logits
        return logits

    def back(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        if self.cache is not None:
            self.cache.crop(-tokens)

    def run(self, steps: Sequence[Tensor]) -> Tensor:
        """Logits of the last step."""
        for ids in steps:
            logits = self.step(ids)
        self.back(len(steps))
        return logits


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with the same weights, not copies of them."""
    shared = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _same(ours: _Side, stock: _Side, steps: Sequence[Tensor]) -> tuple[float, float]:
    """Largest differences of logits from the untouched model's: with sparsekit, and of further runs without it.

    A GPU may decode the same tokens to other last bits each time, the untouched model too; those are `stock_error`.

    Raises:
        SparsekitError: the first is more than twice the second.
    """
    wanted = stock.run(steps)
    noise = max(float((stock.run(steps) - wanted).abs().max()) for _ in range(STOCK_RUNS))
    error = float((ours.run(steps) - wanted).abs().max())
    if error > 2 * noise:
        raise SparsekitError(
            f"logits differ from the untouched model's by {error:.2g}, and {STOCK_RUNS} of its own by {noise:.2g}."
        )
    return error, noise


def _in_turns(
    ours: _Side, stock: _Side, steps: Sequence[Tensor], rounds: int, device: torch.device
) -> list[tuple[float, float]]:
    """Milliseconds of each step with and without sparsekit, by the host's clock: what sparsekit costs is the host's
    time. Which of the two comes first changes from step to step; a round before them warms up.
    """
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        for ids in steps:
            if len(times) % 2:
                without, patched = _milliseconds(stock, ids, device), _milliseconds(ours, ids, device)
            else:
                patched, without = _milliseconds(ours, ids, device), _milliseconds(stock, ids, device)
            times.append((patched, without))
        ours.back(len(steps))
        stock.back(len(steps))
    return times[len(steps) :]


def _milliseconds(side: _Side, ids: Tensor, device: torch.device) -> float:
    start = time.perf_counter()
    side.step(ids)
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _compared(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Both medians and that of the turns' ratios, each with its spread; and how well the latter is known.

    Its bounds are order statistics, whatever the distribution: of n turns those of rank n / 2 -+ 0.98 sqrt(n), between
    which the true median lies with 95% (the binomial distribution's normal approximation; the extremes for few turns).
    """
    ours, stock = zip(*times, strict=True)
    ratios = sorted(a / b for a, b in times)
    margin = 0.98 * math.sqrt(len(ratios))
    low, high = math.floor(len(ratios) / 2 - margin), math.ceil(len(ratios) / 2 + margin) - 1
    return {
        **spread(ours),
        **spread(stock, "stock_ms"),
        **spread(ratios, "ratio"),
        "ratio_low": round(ratios[max(low, 0)], 4),
        "ratio_high": round(ratios[min(high, len(ratios) - 1)], 4),
    }


def _line(row: Mapping[str, Any]) -> str:
    times = f"{row['ms']:.2f} ms, untouched {row['stock_ms']:.2f} ms"
    if row["case"] == "decode":
        times = f"{row['tokens_per_second']:.1f} tokens/s, untouched {row['stock_tokens_per_second']:.1f} tokens/s"
    return f"{row['case']:7} {times}; time {row['ratio']:.4f} ({row['ratio_low']:.4f} to {row['ratio_high']:.4f})"


def command(
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 2048,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Decoded one by one in each round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Of each of the two copies.")] = 21,
    model: Model = None,
    shape: Shape = None,
    dtype: Dtype = None,
    device: Device = "auto",
    output: Rows = None,
) -> None:
    """Decoding and short prompts with a config applied, against the untouched model, in one run."""
    bench_overhead(
        prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, rounds=rounds, model=model, shape=shape, dtype=dtype,
        device=device_of(device), out=output, show=typer.echo,
    )  # fmt: skip
