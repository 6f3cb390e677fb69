"""The gradient probe: how much the answer depends on each section of each layer's attention (TriangleMix, 2507.21526).

The paper inserts a factor theta = 1 on every attention weight, after the softmax, shared by the heads of a layer, and
averages the gradient of the answer's logit over the sections Streaming, Last and Middle of the causal mask. That
gradient needs no theta:

    dy/dtheta_ij = sum over heads of (dy/dO_i . V_j) P_ij,

and the backward pass of attention computes both factors anyway. So attention runs here as an autograd function that
goes through its rows in blocks, forwards and backwards, and adds each block's gradients to the sums of its layer. What
is kept grows linearly with the prompt; no N x N tensor is ever made.

Not published, and our choice: the mean is over the absolute values (`signed` gives the other), divided by the number of
pairs of the section.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekit.call.geometry import Span
from sparsekit.call.softmax import Softmax
from sparsekit.config import load
from sparsekit.errors import SparsekitError, read_text
from sparsekit.lab.calibrate.blocks import grouped, row_blocks, scores, times, wide
from sparsekit.lab.calibrate.prompts import TASKS, Prompt, ask, make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import content_of_model, made_on
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patch.call import softmax_of
from sparsekit.patch.capture import wrap_attention
from sparsekit.plan import TokenRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SECTIONS", "LayerProbe", "Probe", "Sections", "Sums", "probe", "probe_batch", "read_probe"]

SECTIONS = ("streaming", "last", "middle")
OF_HEADS = ("heads", "head_signed", "head_mass")
FIGURES = ("gradient", "signed", "mass", *OF_HEADS)


@dataclass(frozen=True)
class Sections:
    """Where the causal mask is cut. Pair (i, j) of a prompt of n tokens is in the first that holds of

    streaming: `j < sink_tokens` or `i - j < window_tokens`; last: `i >= n - last_tokens`; middle: all others.
    """

    sink_tokens: int = 64
    window_tokens: int = 128
    last_tokens: int = 128

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < (0 if name == "sink_tokens" else 1):
                raise SparsekitError(f"{name} = {value!r}: a number of tokens, at least {int(name != 'sink_tokens')}.")

    def pairs(self, tokens: int) -> tuple[int, int, int]:
        """How many pairs each of `SECTIONS` has."""
        span = Span(0, tokens, tokens, tokens)
        near = TokenRule(self.sink_tokens, self.window_tokens, tokens).pairs(span)
        kept = TokenRule(self.sink_tokens, self.window_tokens, max(tokens - self.last_tokens, 0)).pairs(span)
        return near, kept - near, span.causal_pairs - kept


class Sums:
    """Sums over one batch, float64, by layer, sample and section.

    Attributes:
        gradient: of |dy/dtheta|, theta shared by the heads. signed: of dy/dtheta. mass: of the attention weights, heads
            added. Each (L, B, 3).
        heads: of |dy/dtheta| of each head's own theta; head_signed, head_mass: as above. Each (L, B, H, 3).
        seen: layers that were probed.
    """

    def __init__(self, layers: int, batch: int, heads: int, device: torch.device) -> None:
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        self.gradient = zeros(layers, batch, 3)
        self.heads, self.head_signed, self.head_mass = (zeros(layers, batch, heads, 3) for _ in range(3))
        self.seen: set[int] = set()

    @property
    def signed(self) -> Tensor:
        return self.head_signed.sum(2)

    @property
    def mass(self) -> Tensor:
        return self.head_mass.sum(2)

    def add(self, layer: int, weights: Tensor, gradient: Tensor, near: Tensor, rows: Tensor) -> None:
        """Take a block of rows in: weights and gradient (B, H, r, k), near (r, k) bool, rows (3, B, r)."""
        self.seen.add(layer)
        for into, values in (
            (self.gradient, gradient.sum(1).abs()),
            (self.heads, gradient.abs()),
            (self.head_signed, gradient),
            (self.head_mass, weights),
        ):
            whole = values.ndim == 4
            streaming, others = (values.masked_fill(out, 0).sum(-1).double() for out in (~near, near))
            parts = torch.stack([streaming, others, others], -1)  # (B, [H,] r, 3)
            share = rows.permute(1, 2, 0).to(parts.dtype)
            into[layer] += (parts * (share[:, None] if whole else share)).sum(-2)


class _Probed(torch.autograd.Function):
    """Causal attention of q (B, H, N, D) over k, v (B, G, N, D), whose backward pass reports dy/dtheta."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, report: Callable[[int, int, Tensor, Tensor], None]
    ) -> Tensor:
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=wide(q), device=q.device)
        for a, b in row_blocks(q):
            logits = scores(q, k, softmax, a, b)[0]
            lse[:, :, a:b] = logits.logsumexp(-1)
            if softmax.sink_logits is not None:
                sinks = softmax.sink_logits.to(lse)[None, :, None]
                lse[:, :, a:b] = torch.logaddexp(lse[:, :, a:b], sinks)
            weights = torch.exp(logits - lse[:, :, a:b, None])
            out[:, :, a:b] = times(weights, v[:, :, :b]).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.softmax, ctx.report = softmax, report
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dtype = wide(q)
        softmax: Softmax = ctx.softmax
        d_out = grads[0].to(dtype)
        d_q = torch.empty_like(q, dtype=dtype)
        d_k, d_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        groups = k.shape[1]
        for a, b in row_blocks(q):
            logits, slope = scores(q, k, softmax, a, b)
            weights = torch.exp(logits - lse[:, :, a:b, None])
            d_rows = d_out[:, :, a:b]
            d_weights = times(d_rows, v[:, :, :b].mT)
            gradient = weights * d_weights  # of theta, head by head
            ctx.report(a, b, weights, gradient)
            total = (d_rows * out[:, :, a:b].to(dtype)).sum(-1, keepdim=True)  # = gradient.sum(-1), sinks included
            d_scores = gradient - weights * total
            if slope is not None:
                d_scores *= slope
            d_scores *= softmax.scale
            d_q[:, :, a:b] = times(d_scores, k[:, :, :b])
            d_k[:, :, :b] += grouped(d_scores, groups).mT @ grouped(q[:, :, a:b].to(dtype), groups)
            d_v[:, :, :b] += grouped(weights, groups).mT @ grouped(d_rows, groups)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


# ---- one batch


def probe_batch(
    model: PreTrainedModel, prompts: Sequence[Tensor], targets: Sequence[int], sections: Sections
) -> tuple[Tensor, Sums]:
    """(y (B,), the sums of its gradient) of the logits of `targets` after each of `prompts`, 1-D token ids.

    Prompts of different lengths are padded on the right, where a causal model does not look. Parameters get no
    gradient; layers that are not full causal attention run as they are.
    """
    if len(prompts) != len(targets) or not prompts:
        raise SparsekitError(f"{len(prompts)} prompts and {len(targets)} targets: as many of both, at least one.")
    device, arch = model.device, facts(model)
    lengths = torch.tensor([len(ids) for ids in prompts])
    tokens = int(lengths.max())
    ids = torch.zeros(len(prompts), tokens, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    own = own_layers(model)
    sums = Sums(arch.num_layers, len(prompts), arch.num_heads, device)
    rows = _section_rows(lengths, tokens, sections).to(device)

    def attention(run: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        layer = module.layer_idx
        if layer in own:
            return run(module, q, k, v, mask, **kwargs)

        def report(a: int, b: int, weights: Tensor, gradient: Tensor) -> None:
            at = torch.arange(b, device=device)
            near = (at < sections.sink_tokens) | (at[a:b, None] - at < sections.window_tokens)
            sums.add(layer, weights, gradient, near, rows[:, :, a:b])

        softmax = softmax_of(module, q, kwargs)
        out: Tensor = _Probed.apply(q, k, v, softmax, report)
        return out.transpose(1, 2).contiguous(), None

    read, place = torch.unique(lengths - 1, return_inverse=True)
    with activations_alone(model), wrap_attention(model, attention), torch.enable_grad():
        found: Any = model(ids.to(device), use_cache=False, logits_to_keep=read.to(device))
        logits = found.logits[torch.arange(len(prompts)), place.to(device), torch.tensor(targets, device=device)]
        logits.float().sum().backward()
    missing = set(range(arch.num_layers)) - own.keys() - sums.seen
    if missing:
        raise SparsekitError(f"layers {sorted(missing)} of {arch.model_type} ran no attention that could be probed.")
    return logits.detach(), sums


def _section_rows(lengths: Tensor, tokens: int, sections: Sections) -> Tensor:
    """bool (3, B, N): the rows whose pairs count as streaming where they are near, as last or middle where not."""
    at = torch.arange(tokens)
    valid = at < lengths[:, None]
    last = valid & (at >= lengths[:, None] - sections.last_tokens)
    return torch.stack([valid, last, valid & ~last])


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradient for parameters."""
    asked = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asked:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)


@contextmanager
def activations_alone(model: PreTrainedModel) -> Iterator[None]:
    """Gradients for what comes out of the embedding, none for parameters."""

    def start(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    embedding: Any = model.get_input_embeddings()
    hook = embedding.register_forward_hook(start)
    try:
        with frozen(model):
            yield
    finally:
        hook.remove()


def own_layers(model: PreTrainedModel, *, some: bool = False) -> dict[int, str]:
    """Layers that cannot run sparse, each with the reason: not full causal attention, or not computed by a kernel.

    Raises:
        SparsekitError: with `some`, where that are all of them: nothing can be measured.
    """
    arch = facts(model)
    missing = {i: f"layer that no kernel computes ({why})" for i, why in enumerate(arch.not_computed or ()) if why}
    own = missing | load({}).resolve(arch).own_layers(arch)
    if some and len(own) == arch.num_layers:
        raise SparsekitError(
            f"every layer of {arch.name} keeps its own attention (layer 0 is a {own[0]}): there is nothing to measure, "
            "and none can be sparse."
        )
    return own


# ---- the probe of a model


@dataclass(frozen=True)
class LayerProbe:
    """One layer; numbers by section, means over its pairs and then over the samples. An `own` layer has none.

    Attributes:
        layer: its number.
        own: why it keeps its own attention, or nothing.
        gradient: of |dy/dtheta|; signed: of dy/dtheta; mass: of the attention weights, heads added.
        gradient_error: standard error of `gradient` over the samples.
        heads: for each head, of |dy/dtheta| of its own theta; head_signed, head_mass: of each head as of the layer.
    """

    layer: int
    own: str = ""
    gradient: dict[str, float] | None = None
    gradient_error: dict[str, float] | None = None
    signed: dict[str, float] | None = None
    mass: dict[str, float] | None = None
    heads: tuple[dict[str, float], ...] = ()
    head_signed: tuple[dict[str, float], ...] = ()
    head_mass: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Probe:
    """What `probe` found. `made` says with what; `prompts` are lengths, tasks and seeds."""

    model: str
    sections: Sections
    samples: int
    prompts: dict[str, Any]
    made: dict[str, Any]
    layers: tuple[LayerProbe, ...]

    def relative(self, section: str = "middle", *, signed: bool = False) -> list[float | None]:
        """The mean gradient of each layer as a share of the largest layer's; None for layers that were not probed."""
        if section not in SECTIONS:
            raise SparsekitError(f"section {section!r}: one of {', '.join(SECTIONS)}.")
        found = [layer.signed if signed else layer.gradient for layer in self.layers]
        values = [None if by is None else by[section] for by in found]
        known = [abs(value) for value in values if value is not None]
        if not known or not 0 < (most := max(known)) < math.inf or any(map(math.isnan, known)):
            told = f"gradients of {min(known)} to {max(known)}" if known else "no layer was probed"
            raise SparsekitError(
                f"probe of {self.model}, section {section}: {told}, so no layer can be told from another; probe in "
                "float32 (--dtype float32), longer prompts, or a model of full attention."
            )
        return [None if value is None else value / most for value in values]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "probe", **asdict(self)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words."""
        head = [
            "layer",
            *(f"Grad({name})" for name in SECTIONS),
            "Middle / max",
            *(f"Att({name})" for name in SECTIONS),
        ]
        rows = []
        for layer, share in zip(self.layers, self.relative(), strict=True):
            if layer.gradient is None or layer.mass is None:
                rows.append([str(layer.layer), layer.own, *[""] * (len(head) - 2)])
                continue
            by_section = [f"{layer.gradient[name]:.2e}" for name in SECTIONS]
            masses = [f"{layer.mass[name]:.2e}" for name in SECTIONS]
            rows.append([str(layer.layer), *by_section, f"{share:.3f}", *masses])
        return head, rows


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 16,
    tokens: int = 1024,
    seeds: Sequence[int] = (0, 1, 2, 3),
    tasks: Sequence[str | Task] = TASKS,
    sections: Sections = Sections(),
    batch: int = 1,
    records: str | Path | None = None,
    quiet: bool = False,
) -> Probe:
    """Grad and Att of every section and layer of a model, over retrieval prompts.

    Args:
        samples: prompts in all, dealt to the seeds and tasks in turn. The paper has 100 of about 2000 tokens.
        tokens: of a prompt and its answer.
        sections: sinks, window and last rows of the probe, which are not those of a pattern.
        batch: prompts a forward; memory grows with it.
        records: a JSONL file that keeps what was measured; an interrupted probe goes on from it.

    Raises:
        SparsekitError: prompts beyond the model's positions, or a model outside transformers' attention interface.
    """
    own_layers(model, some=True)
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=[tokens], count=samples, seeds=seeds)
    if batch < 1:
        raise SparsekitError(f"batch = {batch}: at least 1.")
    if not sections.pairs(tokens)[SECTIONS.index("middle")]:
        raise SparsekitError(f"tokens = {tokens}: sinks, window and last rows of {sections} leave no Middle section.")
    kept = Records(records)
    place = {"model": content_of_model(model, tokenizer), "device": model.device.type}
    keys = [{"kind": "probe by head", **place, "sections": asdict(sections), **prompt.key} for prompt in prompts]
    with progress("probe", len(prompts), quiet=quiet) as step:
        waiting = [(key, prompt) for key, prompt in zip(keys, prompts, strict=True) if kept.get(key) is None]
        step(len(prompts) - len(waiting))
        for at in range(0, len(waiting), batch):
            part = waiting[at : at + batch]
            rows = _measure(model, tokenizer, [prompt for _, prompt in part], sections)
            for (key, _), row in zip(part, rows, strict=True):
                kept.add(key, row)
            step(len(part))
    described = {"tasks": sorted({p.task.name for p in prompts}), "tokens": tokens, "seeds": list(seeds)}
    return _summed([kept.get(key) for key in keys], model, sections, described)


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], sections: Sections
) -> list[dict[str, Any]]:
    """Of each prompt, the means over the pairs of each section: lists (L, 3), and (L, H, 3) of heads."""
    ids, targets = zip(*(ask(tokenizer, prompt.sample) for prompt in prompts), strict=True)
    logits, sums = probe_batch(model, ids, targets, sections)
    out = []
    for b, row in enumerate(ids):
        pairs = torch.tensor(sections.pairs(len(row)), dtype=torch.float64).clamp(min=1)
        mean = lambda values, at=b, over=pairs: (values[:, at].cpu() / over).tolist()  # noqa: E731
        values = {name: mean(getattr(sums, name)) for name in FIGURES}
        out.append({"logit": float(logits[b]), "tokens": len(row), **values})
    return out


def _summed(rows: Sequence[Any], model: PreTrainedModel, sections: Sections, prompts: dict[str, Any]) -> Probe:
    own = own_layers(model)
    stacked = {name: torch.tensor([row[name] for row in rows]) for name in FIGURES}
    error = stacked["gradient"].std(0) / math.sqrt(len(rows)) if len(rows) > 1 else None
    named = lambda values: dict(zip(SECTIONS, values.tolist(), strict=True))  # noqa: E731
    by_head = lambda name, i: tuple(named(head) for head in stacked[name][:, i].mean(0))  # noqa: E731
    layers = [
        LayerProbe(i, own[i])
        if i in own
        else LayerProbe(
            i,
            gradient=named(stacked["gradient"][:, i].mean(0)),
            gradient_error=None if error is None else named(error[i]),
            signed=named(stacked["signed"][:, i].mean(0)),
            mass=named(stacked["mass"][:, i].mean(0)),
            heads=by_head("heads", i),
            head_signed=by_head("head_signed", i),
            head_mass=by_head("head_mass", i),
        )
        for i in range(stacked["gradient"].shape[1])
    ]
    return Probe(facts(model).name, sections, len(rows), prompts, made_on(model), tuple(layers))


def read_probe(path: str | Path) -> Probe:
    """The probe that `sparsekit calibrate probe -o FILE` wrote."""
    text = read_text(path, "probe")
    try:
        found = json.loads(text)
        if found.pop("kind") != "probe":
            raise ValueError("kind")
        some = [(layer, {name: tuple(layer.get(name, ())) for name in OF_HEADS}) for layer in found.pop("layers")]
        layers = tuple(LayerProbe(**{**layer, **heads}) for layer, heads in some)
        return Probe(sections=Sections(**found.pop("sections")), layers=layers, **found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SparsekitError(f"probe {str(path)!r}: not a file of `sparsekit calibrate probe -o` ({error}).") from None
