"""`sparsekit bench overhead`: what an applied config costs where it must cost nothing, against the untouched model.

Two calls never run sparse: decoding, and prompts under `dense_below_tokens`. Both run the model's own attention through
sparsekit's door; here they are timed through it and without it, in turns, in one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.bench.command import add_model_arguments, finished
from sparsekit.bench.shapes import model_or_shape
from sparsekit.bench.timing import Record, place, spread, synchronize
from sparsekit.errors import SparsekitError
from sparsekit.models import can_shorten
from sparsekit.patch import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bench_overhead", "main"]

STOCK_RUNS = 4


@torch.inference_mode()
def bench_overhead(
    *,
    model: PreTrainedModel | str | None = None,
    shape: str | None = None,
    prompt_tokens: int = 2048,
    decode_tokens: int = 64,
    rounds: int = 21,
    dtype: str | None = None,
    device: str | None = None,
    out: str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows `decode` and `prompt`: the model with sparsekit applied, over the same model without it.

    Args:
        model: loaded, or what `sparsekit.models.load` takes; default: random weights of `shape`.
        shape: one of `sparsekit.bench.shapes.SHAPES`; default llama-3.2-1b on a CUDA device, else smollm2-135m.
        prompt_tokens: of the prompt, which is under `dense_below_tokens`; decoding starts at its end.
        decode_tokens: decoded one by one in each round.
        rounds: each has one run with and one without, in changing order, so that a drift of the clock hits both.
        dtype, device: default bfloat16 and the card, or float32 and the CPU.
        out: JSONL file for the rows.
        show: called with each row's line.

    Returns:
        For each case `ms` and `stock_ms` (a prompt, or all decoded tokens; median, p20, p80), and `ratio` (of the two
        runs of a round: median, p20, p80; 1.02 is 2% slower); for decoding also `tokens_per_second` and
        `stock_tokens_per_second`.

    Raises:
        SparsekitError: an unknown shape, or logits that are not the untouched model's.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, found = model_or_shape(model, shape, dtype, where)
    record = Record(out, place(where))
    vocab = found.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (1, prompt_tokens + decode_tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(where)
    prompt, following = ids[:, :prompt_tokens], ids[:, prompt_tokens:].split(1, 1)
    config = {"default": "triangle", "dense_below_tokens": prompt_tokens + 1}
    cache = found(prompt, use_cache=True, logits_to_keep=1).past_key_values
    if not can_shorten(cache):
        raise SparsekitError(
            f"{name}: its cache, of windows or recurrent layers, cannot be cut back from round to round; take one "
            "of full attention."
        )

    def read() -> Tensor:
        logits: Tensor = found(prompt, use_cache=True, logits_to_keep=1).logits
        return logits

    def decode() -> Tensor:
        for token in following:
            logits: Tensor = found(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-decode_tokens)
        return logits

    facts = {"model": name, "dtype": str(found.dtype).removeprefix("torch."), "prompt_tokens": prompt_tokens}
    for case, run, tokens in (("prompt", read, 0), ("decode", decode, decode_tokens)):
        facts |= {"decode_tokens": tokens} if tokens else {}
        checked = _same(found, config, run)
        ours, stock, ratios = _in_turns(found, config, run, rounds, where)
        row: dict[str, Any] = {
            "case": case,
            **facts,
            "rounds": rounds,
            **checked,
            **spread(ours),
            **spread(stock, "stock_ms"),
        }
        row |= spread(ratios, "ratio")
        if tokens:
            row["tokens_per_second"] = round(tokens / row["ms"] * 1e3, 2)
            row["stock_tokens_per_second"] = round(tokens / row["stock_ms"] * 1e3, 2)
        record.add(row)
        if show is not None:
            show(_line(row))
    return record.rows


def _same(model: PreTrainedModel, config: Mapping[str, Any], run: Callable[[], Tensor]) -> dict[str, float]:
    """Largest differences of logits from the untouched model's: with sparsekit, and of further runs without it.

    A card may decode the same tokens to other last bits each time, the untouched model too; those are `stock_error`.

    Raises:
        SparsekitError: the first is more than twice the second, or a layer ran sparse.
    """
    stock = run()
    noise = max(float((run() - stock).abs().max()) for _ in range(STOCK_RUNS))
    with apply(model, config) as handle:
        error = float((run() - stock).abs().max())
        ran = {row.ran for row in handle.report().layers}
    if error > 2 * noise or "sparse" in ran:
        raise SparsekitError(
            f"logits differ from the untouched model's by {error:.2g}, and {STOCK_RUNS} of its own by {noise:.2g}."
        )
    return {"error": error, "stock_error": noise}


def _in_turns(
    model: PreTrainedModel, config: Mapping[str, Any], run: Callable[[], Tensor], rounds: int, device: torch.device
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds with and without sparsekit, and their ratio, of each round; a round before them warms up."""
    ours: list[float] = []
    stock: list[float] = []
    for n in range(rounds + 1):
        for patched in (n % 2 == 0, n % 2 == 1):
            if not patched:
                stock.append(_milliseconds(run, device))
                continue
            with apply(model, config):
                ours.append(_milliseconds(run, device))
    ours, stock = ours[1:], stock[1:]
    return ours, stock, [a / b for a, b in zip(ours, stock, strict=True)]


def _milliseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """By the host's clock: what sparsekit costs in decoding is the host's time. A run before it is not timed, so that
    applying the config, or taking it off, is not in it.
    """
    run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _line(row: Mapping[str, Any]) -> str:
    times = f"{row['ms']:.2f} ms, untouched {row['stock_ms']:.2f} ms"
    if row["case"] == "decode":
        times = f"{row['tokens_per_second']:.1f} tokens/s, untouched {row['stock_tokens_per_second']:.1f} tokens/s"
    return f"{row['case']:7} {times}; time {row['ratio']:.4f} (p20 {row['ratio_p20']:.4f}, p80 {row['ratio_p80']:.4f})"


def main(argv: Sequence[str] | None = None) -> int:
    """`sparsekit bench overhead`."""
    parser = argparse.ArgumentParser(
        prog="sparsekit bench overhead",
        description="Decoding and short prompts with a config applied, against the untouched model, in one run.",
    )
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    add_model_arguments(parser)
    given = vars(parser.parse_args(argv))
    return finished(lambda: bench_overhead(**given, show=lambda line: print(line, flush=True)))
