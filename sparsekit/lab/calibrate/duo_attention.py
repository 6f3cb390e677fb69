"""DuoAttention's gates (2410.10819, sections 2.2 and 2.3): which key heads need more than sinks and a window, trained.

A gate alpha from 0 to 1 for each key head of each layer mixes the outputs of two attentions, and nothing else is
trained:

    out = alpha * full + (1 - alpha) * sparse
    loss = mean (h_full - h)^2 + regularisation * mean alpha

h and h_full are the last hidden states of this model and of the dense one, at the answer's tokens. Both terms are
means, as in DuoAttention's code (mit-han-lab/duo-attention, duo_attn/train.py); the paper has sums. Gates begin at 1;
AdamW without decay trains them; its rate rises over the first fifth of the steps and falls over the last, to a tenth;
after each step gates are cut to 0 and 1. Each step reads a prompt that no step before it read.

Code and formula differ in `full`. In the code it is what that layer put out in the dense model: no gradient goes
through it, and a gate of 1 also mends what layers before it lost. In the paper's formula both attentions read the same
q, k and v, those of the gated model. Both can be had, as `full="dense"` and `full="gated"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsekit.call.geometry import Span
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError, nearest, shown
from sparsekit.lab.calibrate.blocks import row_blocks, times, wide
from sparsekit.lab.calibrate.probe import frozen, own_layers
from sparsekit.lab.calibrate.prompts import Prompt, make_prompts
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import made_on
from sparsekit.lab.tasks import Task, prompt_ids
from sparsekit.models import facts
from sparsekit.patch.call import softmax_of
from sparsekit.patch.capture import wrap_attention
from sparsekit.patterns import Pattern, StaticPattern, parse_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FULL", "Gates", "Step", "gated_states", "train_gates"]

FULL = ("dense", "gated")  # whose full attention is mixed in

# Rows [a, b) of queries, the keys (n,) that any of them keeps, and which of these each keeps, (b - a, n).
Block = tuple[int, int, Tensor, Tensor]


@dataclass(frozen=True)
class Step:
    """One step: the prompt's tokens, the first term of the loss, and the mean gate, both before the step."""

    tokens: int
    distance: float
    mean_gate: float


@dataclass(frozen=True)
class Gates:
    """What `train_gates` found: of each layer the gate of each key head, 1 in layers that keep their own attention."""

    model: str
    pattern: str | dict[str, Any]
    full: str
    learning_rate: float
    regularisation: float
    prompts: dict[str, Any]
    made: dict[str, Any]
    steps: tuple[Step, ...]
    gates: tuple[tuple[float, ...], ...]

    def loss(self, first: bool) -> float:
        """Mean loss of the first, or of the last, ten steps, or of as many as there are."""
        some = self.steps[:10] if first else self.steps[-10:]
        return mean(step.distance + self.regularisation * step.mean_gate for step in some)

    def to_tsv(self) -> str:
        """A row for each layer, a column for each key head: the file that `sparsekit convert duo-attention` reads."""
        return "".join("\t".join(f"{gate:.6f}" for gate in layer) + "\n" for layer in self.gates)

    def to_dict(self) -> dict[str, Any]:
        loss = {"first": self.loss(True), "last": self.loss(False)}
        return {"kind": "duo-attention", **asdict(self), "loss": loss}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words."""
        rows = [
            [str(i), f"{mean(row):.3f}", " ".join(f"{gate:.2f}" for gate in row)] for i, row in enumerate(self.gates)
        ]
        return ["layer", "mean", "gates of its key heads"], rows

    def summary(self) -> str:
        return f"{len(self.steps)} steps: loss {self.loss(True):.4f} at first, {self.loss(False):.4f} at last"


# ---- one prompt


def kept_blocks(pattern: StaticPattern, q: Tensor, prompt_tokens: int) -> list[Block]:
    """The pairs that a pattern keeps of a text as long as q (B, H, N, D), whose prompt ends earlier."""
    tokens, out = q.shape[2], []
    span = Span(0, tokens, tokens, prompt_tokens)
    for a, b in row_blocks(q):
        rows, keys = torch.arange(a, b, device=q.device)[:, None], torch.arange(b, device=q.device)
        keep = pattern.keep(rows, keys[None], span) & (keys <= rows)
        at = keep.any(0).nonzero()[:, 0]
        out.append((a, b, at, keep[:, at]))
    return out


def kept_attention(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, blocks: Sequence[Block]) -> Tensor:
    """Attention (B, H, N, D) of q (B, H, N, D) to the kept pairs of k and v (B, G, N, D), with gradients."""
    out = []
    for a, b, at, keep in blocks:
        logits = softmax.logits(times(q[:, :, a:b].to(wide(q)), k[:, :, at].mT)).masked_fill(~keep, -math.inf)
        weights = torch.exp(logits - softmax.join(logits.logsumexp(-1))[..., None])
        out.append(times(weights, v[:, :, at]).to(q.dtype))
    return torch.cat(out, 2)


def gated_states(
    model: PreTrainedModel, ids: Tensor, prompt_tokens: int, gates: Tensor, pattern: StaticPattern, full: str = "dense"
) -> tuple[Tensor, Tensor]:
    """Last hidden states (A, hidden size) of the dense and of the gated model: what the logits are made of.

    They are those of the prompt's last token and of all that follow. Gradients reach `gates` alone. A prompt takes
    memory for the activations of one forward, and for the attention output of each layer.

    Args:
        ids: (N,), of a prompt of `prompt_tokens` and its answer.
        gates: (L, G), of each layer and key head.
        full: of `FULL`.

    Raises:
        SparsekitError: a layer of full attention ran none that could be gated.
    """
    own, arch, outputs = own_layers(model), facts(model), dict[int, Tensor]()
    blocks: list[Block] = []

    def dense(run: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        found = run(module, q, k, v, mask, **kwargs)
        if module.layer_idx not in own:
            outputs[module.layer_idx] = found[0]
        return found

    def gated(run: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        layer = module.layer_idx
        if layer in own:
            return run(module, q, k, v, mask, **kwargs)
        if not blocks:
            blocks.extend(kept_blocks(pattern, q, prompt_tokens))
        softmax = softmax_of(module, q, kwargs)
        sparse: Any = checkpoint(
            kept_attention, q, k, v, softmax, blocks, use_reentrant=False, preserve_rng_state=False
        )
        gate = gates[layer].repeat_interleave(q.shape[1] // gates.shape[1])[:, None].to(wide(q))  # (H, 1)
        dense_out = outputs.pop(layer)
        if full == "gated":
            dense_out = run(module, q, k, v, mask, **kwargs)[0]
        mixed = gate * dense_out + (1 - gate) * sparse.transpose(1, 2)
        return mixed.to(q.dtype), None

    with torch.no_grad():
        h_full = _last_hidden(model, ids, prompt_tokens, dense)
    missing = set(range(arch.num_layers)) - own.keys() - outputs.keys()
    if missing:
        raise SparsekitError(f"layers {sorted(missing)} of {arch.model_type} ran no attention that could be gated.")
    with frozen(model), torch.enable_grad():
        return h_full, _last_hidden(model, ids, prompt_tokens, gated)


def _last_hidden(model: PreTrainedModel, ids: Tensor, prompt_tokens: int, attention: Any) -> Tensor:
    """What the output embedding is given, (A, hidden size), at the prompt's last token and those after it."""
    seen: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with wrap_attention(model, attention):
            model(ids[None].to(model.device), use_cache=False, logits_to_keep=len(ids) - prompt_tokens + 1)
    finally:
        hook.remove()
    return seen[0][0].to(wide(seen[0]))


# ---- the gates of a model


def train_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pattern: Pattern | str | Mapping[str, Any],
    *,
    steps: int = 150,
    tasks: Sequence[str | Task] = ("passkeys10",),
    tokens: Sequence[int] = (4096,),
    full: str = "dense",
    learning_rate: float = 0.02,
    regularisation: float = 0.05,
    seed: int = 0,
    quiet: bool = False,
) -> Gates:
    """The gate of each key head.

    Args:
        pattern: what a gate of 0 runs: a static one. DuoAttention's streams, with 128 sink and 256 window tokens.
        steps: prompts, one a step, dealt to the tasks and lengths in turn. The paper has 2,000.
        tasks: whose answers are compared; all answers of a prompt, one after another.
        tokens: of a prompt and its answer.
        full: of `FULL`.
        learning_rate, regularisation: as published.
        seed: of the prompts.

    Raises:
        SparsekitError: a pattern that looks at q and k, an unknown `full`, no layer of full attention, prompts beyond
            the model's positions, or a loss that is not finite.
    """
    own, arch, runs = own_layers(model, some=True), facts(model), parse_pattern(pattern)
    if not isinstance(runs, StaticPattern):
        raise SparsekitError(
            f"pattern {runs.name!r}: want a static one, such as a_shape or triangle; gates train with it."
        )
    if full not in FULL:
        raise SparsekitError(f"full = {shown(full)}: one of {', '.join(FULL)}.{nearest(full, FULL)}")
    if not 0 < learning_rate < math.inf or not 0 <= regularisation < math.inf:
        raise SparsekitError(f"lr = {learning_rate}, reg = {regularisation}: want a rate above 0, and 0 or more.")
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=tokens, count=steps, seeds=[seed])
    open_ = [i for i in range(arch.num_layers) if i not in own]
    gates = torch.ones(arch.num_layers, arch.num_key_heads, device=model.device, requires_grad=True)
    optimiser = torch.optim.AdamW([gates], learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    done: list[Step] = []
    with progress("gates", steps, quiet=quiet) as bar:
        for prompt in prompts:
            ids, prompt_tokens = _with_answers(tokenizer, prompt)
            h_full, h = gated_states(model, ids, prompt_tokens, gates, runs, full)
            distance, size = (h_full - h).pow(2).mean(), gates[open_].abs().mean()
            optimiser.zero_grad()
            (distance + regularisation * size).backward()
            done.append(Step(len(ids), float(distance.detach()), float(size.detach())))
            if not math.isfinite(done[-1].distance):
                raise SparsekitError(f"step {len(done)}: loss = {done[-1].distance}; use --dtype bfloat16 or float32.")
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            bar(1)
            bar.says(
                f"step {len(done)} of {steps}: distance {done[-1].distance:.4f}, mean gate {done[-1].mean_gate:.3f}"
            )
    described = {"tasks": sorted({p.task.name for p in prompts}), "tokens": list(tokens), "seed": seed}
    found = tuple(map(tuple, gates.detach().tolist()))
    rates = {"learning_rate": learning_rate, "regularisation": regularisation}
    return Gates(
        arch.name, runs.to_yaml(), full, **rates, prompts=described, made=made_on(model), steps=tuple(done), gates=found
    )


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first fifth of the steps, down over the last, and a tenth at least."""
    fifth = max(steps // 5, 1)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _with_answers(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[Tensor, int]:
    """(ids of the prompt and of all its answers, tokens of the prompt)."""
    ids = prompt_ids(tokenizer, prompt.sample)[0]
    truth: list[int] = tokenizer(f" {', '.join(prompt.sample.answers)}", add_special_tokens=False)["input_ids"]
    return torch.cat([ids, torch.tensor(truth[: prompt.task.max_new_tokens], dtype=torch.int64)]), len(ids)
