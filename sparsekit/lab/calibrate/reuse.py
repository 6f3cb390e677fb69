"""Which layers choose for themselves, and which reuse whose plan: measured, then chosen by dynamic programming.

Kascade's way (arXiv 2512.16391): of every layer and head, how much of its attention mass lies on the pairs that each
head of each earlier layer chose; anchor layers that keep most in the layers up to the next anchor; and a map of heads.

We depart from the published code (github.com/microsoft/kascade). Its similarity is a ratio to the layer's own choice in
the worst query, weighted by how much the layer's attention changes the residual stream; ours is the mass lost against
the layer's own choice, the mean over queries. Its first anchor is layer 0; ours is the first sparse layer. Its heads
take the anchor's head that keeps most, so that many take the same one; ours take one each, so that a layer sees as much
of the prompt as its anchor does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.config import ArchFacts, SparseConfig, format_range, load
from sparsekit.errors import SparsekitError
from sparsekit.kernels import geometry_for
from sparsekit.lab.calibrate.probe import own_layers
from sparsekit.lab.calibrate.prompts import TASKS, Prompt, make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import content_of_code, content_of_model, made_on
from sparsekit.lab.tasks import Task, prompt_ids
from sparsekit.models import facts
from sparsekit.patch.call import softmax_of
from sparsekit.patch.capture import wrap_attention
from sparsekit.patterns import DynamicPattern, Pattern, parse_pattern
from sparsekit.plan import BlockPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ReuseSearch", "choose_anchors", "choose_reuse", "kept_keys", "one_to_one", "row_mass"]

LAYERS_PER_ANCHOR = 4


@dataclass(frozen=True)
class ReuseSearch:
    """What `choose_reuse` found.

    Attributes:
        layers: those that run the pattern, ascending; below, they are numbered from 0 in this order.
        anchor: of each of them, the layer whose plan it runs, itself included.
        heads: of each, the head there for every head here.
        own, kept: of each, the share of the attention mass that its own choice keeps, and that what it runs keeps: the
            mean over heads, queries and prompts.
    """

    config: SparseConfig
    layers: tuple[int, ...]
    anchor: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    own: tuple[float, ...]
    kept: tuple[float, ...]

    @property
    def anchors(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.anchor)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "reuse",
            "anchors": list(self.anchors),
            "layers": [
                {"layer": layer, "anchor": anchor, "heads": list(heads), "own_mass": own, "kept_mass": kept}
                for layer, anchor, heads, own, kept in zip(
                    self.layers, self.anchor, self.heads, self.own, self.kept, strict=True
                )
            ],
            "config": self.config.to_dict(),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows): for each anchor, the layers that run its plan and the mass that is kept there."""
        rows = []
        for anchor in self.anchors:
            mine = [i for i, there in enumerate(self.anchor) if there == anchor]
            own, kept = (sum(values[i] for i in mine) / len(mine) for values in (self.own, self.kept))
            least = min(mine, key=lambda i: self.kept[i] - self.own[i])
            rows.append(
                [
                    str(anchor),
                    format_range([self.layers[i] for i in mine]),
                    f"{own:.4f}",
                    f"{kept:.4f}",
                    f"{self.layers[least]}: {self.kept[least] - self.own[least]:+.4f}",
                ]
            )
        return ["anchor", "layers", "own mass", "kept mass", "most lost in"], rows


def choose_anchors(lost: Tensor, anchors: int | None = None) -> list[int]:
    """So many of n layers, the first among them, that lose least where each layer takes the nearest before it.

    Args:
        lost: float64 (n, n), `lost[i, a]` of layer i under the choice of layer a <= i; infinite: not allowed. What is
            above the diagonal is not read. A layer's own choice loses 0.
        anchors: None: as few as are allowed.
    """
    count = len(lost)
    most = count if anchors is None else anchors
    # best[m, i]: the least that layers 0 to i - 1 lose with m anchors; since[m, i]: the last of these anchors.
    best = torch.full((most + 1, count + 1), math.inf, dtype=torch.float64)
    since = torch.zeros(most + 1, count + 1, dtype=torch.int64)
    best[0, 0] = 0
    for m in range(1, most + 1):
        for a in range(count):
            ends = best[m - 1, a] + lost[a:, a].cumsum(0)
            better = ends < best[m, a + 1 :]
            best[m, a + 1 :] = torch.where(better, ends, best[m, a + 1 :])
            since[m, a + 1 :] = torch.where(better, a, since[m, a + 1 :])
    m = int(best[:, count].isfinite().nonzero()[0]) if anchors is None else anchors
    chosen, end = [], count
    while m:
        end = int(since[m, end])
        chosen.append(end)
        m -= 1
    return chosen[::-1]


def one_to_one(worth: Tensor) -> list[int]:
    """A column for each row of (H, H), none twice, of a large sum: the best pairs first, exchanged while that gains.

    The result is as good as any that differs from it in two rows.
    """
    left, of = worth.clone(), [0] * len(worth)
    for _ in of:
        row, column = divmod(int(left.argmax()), len(of))
        of[row] = column
        left[row], left[:, column] = -math.inf, -math.inf
    columns = torch.tensor(of)
    while True:
        given = worth[:, columns]  # [a, b]: what row a has from the column of row b
        own = given.diagonal()
        gain = given + given.T - own[:, None] - own[None]
        a, b = divmod(int(gain.argmax()), len(of))
        if float(gain[a, b]) <= 1e-9:
            return columns.tolist()
        columns[[a, b]] = columns[[b, a]]


def choose_reuse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pattern: Pattern | str | Mapping[str, Any] = "block_topk",
    *,
    anchors: int | None = None,
    recall: float | None = None,
    run: int | None = None,
    layers: Sequence[int] | None = None,
    samples: int = 8,
    tokens: int = 2048,
    seed: int = 0,
    tasks: Sequence[str | Task] = TASKS,
    dense_below_tokens: int = 1024,
    records: str | Path | None = None,
    quiet: bool = False,
) -> ReuseSearch:
    """Anchors and head maps for a pattern in all, or some, full-attention layers of a model.

    Args:
        anchors: how many layers choose for themselves; default a quarter of the layers, rounded up.
        recall: in place of `anchors`: as few as keep, in every layer, this share of the mass that its own choice keeps.
        run: layers in a row that one plan serves at most, its anchor included; default as few as `anchors` allow, or 4.
            Mass does not tell that what a shared plan drops is dropped in all of its layers (docs/reuse.md).
        layers: those that run the pattern; default all that are full causal attention. The others are dense.
        samples, tokens, seed, tasks: of the prompts. The pattern is measured at any length, also below the one from
            which it runs on such a device.

    Raises:
        SparsekitError: a pattern that makes no lists of tiles for the whole prompt, a layer that cannot be sparse, or
            nothing that the prompts drop.
    """
    runs, arch = parse_pattern(pattern), facts(model)
    if not isinstance(runs, DynamicPattern) or runs.whole_layer:
        why = "ranks keys within its own heads' order" if runs.whole_layer else "costs no index"
        raise SparsekitError(f"pattern = {runs}: it {why}; a dynamic pattern that lists tiles is needed.")
    sparse = _layers(arch, own_layers(model, some=True), layers)
    if anchors is not None and recall is not None:
        raise SparsekitError(f"anchors = {anchors} and recall = {recall}: one of the two.")
    if anchors is not None and not 1 <= anchors <= len(sparse):
        raise SparsekitError(f"anchors = {anchors}: at least 1 and at most {len(sparse)}, the layers that run sparse.")
    if recall is not None and not 0 < recall <= 1:
        raise SparsekitError(
            f"recall = {recall}: a share of the mass that a layer's own choice keeps, above 0 up to 1."
        )
    count = len(sparse)
    wanted = None if recall is not None else anchors or -(-count // LAYERS_PER_ANCHOR)
    least = 1 if wanted is None else -(-count // wanted)
    longest = run if run is not None else max(least, LAYERS_PER_ANCHOR if wanted is None else 0)
    if longest < least:
        raise SparsekitError(f"run = {run}: {wanted} plans have to serve {count} layers; at least {least}.")
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=[tokens], count=samples, seeds=[seed])
    kept, weights = Records(records), content_of_model(model, tokenizer)
    with progress("reuse", len(prompts) * len(sparse), quiet=quiet) as step:
        found = [_measure(model, tokenizer, prompt, runs, sparse, kept, weights, step) for prompt in prompts]
    mass = torch.stack(found).mean(0)
    own = mass[range(count), range(count)].diagonal(dim1=-2, dim2=-1).mean(-1)  # (n,)
    if float(own.min()) >= 1 - 1e-6:
        raise SparsekitError(
            f"pattern = {runs}: it keeps every pair of a prompt of {tokens} tokens in some layer, so there is "
            "nothing to choose; take longer prompts (--tokens) or a smaller budget."
        )
    maps = {(i, a): one_to_one(mass[i, a]) for i in range(count) for a in range(i)}
    heads = range(mass.shape[-1])
    maps |= {(i, i): list(heads) for i in range(count)}
    shared = torch.zeros(count, count, dtype=torch.float64)
    for (i, a), of in maps.items():
        shared[i, a] = mass[i, a][heads, of].mean()
    lost = own[:, None] - shared
    if recall is not None:
        lost[shared < recall * own[:, None]] = math.inf
        lost.fill_diagonal_(0)
    lost[torch.arange(count)[:, None] - torch.arange(count) >= longest] = math.inf
    chosen = choose_anchors(lost, wanted)
    at = [max(a for a in chosen if a <= i) for i in range(count)]
    kept_mass = [float(shared[i, a]) for i, a in enumerate(at)]
    of_layer = [maps[i, a] for i, a in enumerate(at)]
    described = {
        "by": "sparsekit calibrate reuse",
        "scored_on": "attention mass that a plan keeps",
        "anchors": [sparse[a] for a in chosen],
        "longest_run": longest,
        **({} if recall is None else {"least_recall": recall}),
        "own_mass": round(float(own.mean()), 5),
        "kept_mass": round(sum(kept_mass) / count, 5),
        "prompts": {
            "tasks": sorted({p.task.name for p in prompts}),
            "tokens": tokens,
            "seed": seed,
            "samples": samples,
        },
        **made_on(model),
    }
    anchor = tuple(sparse[a] for a in at)
    config = _config(arch, runs, sparse, anchor, of_layer, described, dense_below_tokens)
    return ReuseSearch(
        config, tuple(sparse), anchor, tuple(map(tuple, of_layer)), tuple(own.tolist()), tuple(kept_mass)
    )


def _layers(arch: ArchFacts, own: Mapping[int, str], wanted: Sequence[int] | None) -> list[int]:
    open_ = [layer for layer in range(arch.num_layers) if layer not in own]
    wrong = [layer for layer in wanted or () if layer not in open_]
    if wrong:
        why = f" ({own[wrong[0]]})" if wrong[0] in own else ""
        raise SparsekitError(
            f"layers: {wrong[0]}{why}: layers that are full causal attention are {format_range(open_)}."
        )
    sparse = open_ if wanted is None else sorted(wanted)
    if len(sparse) < 2:
        raise SparsekitError(f"layers: {len(sparse)} of them; two at least are needed for one to reuse another's plan.")
    heads = {arch.heads(layer) for layer in sparse}
    if len(heads) > 1:
        raise SparsekitError(f"layers: they have {sorted(heads)} query heads; layers that share a plan have as many.")
    return sparse


# ---- measuring


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    pattern: DynamicPattern,
    layers: Sequence[int],
    kept: Records,
    weights: str,
    step: Any,
) -> Tensor:
    """float64 (n, n, H, H): of layer i's head h, the share of the mass that the choice of layer a's head there keeps.

    Zero where a > i.
    """
    code = content_of_code([prompt.task, pattern])
    base = {"kind": "reuse", "model": weights, "device": model.device.type, "code": code, "prompt": prompt.key}
    said = {**base, "pattern": pattern.model_dump(mode="json"), "layers": list(layers)}
    chosen: list[Tensor] = []

    def attention(run: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        result = run(module, q, k, v, mask, **kwargs)
        if module.layer_idx in layers:
            softmax = softmax_of(module, q, kwargs)
            plan = pattern.select(q, k, geometry_for(q, k), softmax)
            chosen.append(kept_keys(plan, q.shape[1]).to(q.device))
            mass = row_mass(q, k, softmax, plan.block_q).flatten(1)
            shares = [(mass @ there.flatten(1).T.to(mass) / mass.sum(1, keepdim=True)).tolist() for there in chosen]
            kept.add({**said, "layer": module.layer_idx}, [[[round(x, 6) for x in h] for h in a] for a in shares])
            step(1)
        return result

    if all(kept.get({**said, "layer": layer}) is not None for layer in layers):
        step(len(layers))
    else:
        with wrap_attention(model, attention), torch.no_grad():
            model(prompt_ids(tokenizer, prompt.sample).to(model.device), use_cache=False, logits_to_keep=1)
    found: list[Any] = [kept.get({**said, "layer": layer}) for layer in layers]
    heads = len(found[0][0])
    out = torch.zeros(len(layers), len(layers), heads, heads, dtype=torch.float64)
    for i, shares in enumerate(found):
        out[i, : i + 1] = torch.tensor(shares, dtype=torch.float64)
    return out


def row_mass(q: Tensor, k: Tensor, softmax: Softmax, block_q: int) -> Tensor:
    """float32 (H, R, K): dense causal attention of q (1, H, N, D) over k (1, G, N, D), summed over blocks of queries.

    Holds H x block_q x N logits at a time. Learned sinks take their part.
    """
    _, heads, tokens, _ = q.shape
    group, rows = heads // k.shape[1], -(-tokens // block_q)
    out = torch.zeros(heads, rows, tokens, device=q.device)
    for row in range(rows):
        a, b = row * block_q, min((row + 1) * block_q, tokens)
        logits = softmax.logits((q[0, :, a:b] @ k[0, :, :b].repeat_interleave(group, 0).mT).float())
        future = torch.arange(b, device=q.device) > torch.arange(a, b, device=q.device)[:, None]
        logits.masked_fill_(future, -math.inf)
        lse = softmax.join(logits.logsumexp(-1))
        out[:, row, :b] = (logits - lse[..., None]).exp().sum(1)
    return out


def kept_keys(plan: BlockPlan, heads: int) -> Tensor:
    """bool (H, R, K) on the CPU: the keys that some query of a query tile visits, in a plan of one sample.

    A tile counts whole: that its future is masked takes away nothing, since no mass is there; its token rule may.
    """
    keys, rows = plan.geometry.kv_len, plan.rows
    edges = torch.zeros(plan.heads * rows, keys + plan.block_kv + 1, dtype=torch.int32)
    for row, head, _, key in plan.entry_blocks(0):
        at = head * rows + row
        edges.view(-1).index_add_(0, at * edges.shape[1] + key, torch.ones_like(key, dtype=torch.int32))
        edges.view(-1).index_add_(
            0, at * edges.shape[1] + key + plan.block_kv, -torch.ones_like(key, dtype=torch.int32)
        )
    kept = (edges.cumsum(1) > 0)[:, :keys]
    kept[plan.rows_of(plan.dense_rows, 0)] = True
    kept |= torch.tensor(plan.all_dense)
    if plan.tokens is not None:
        for place in range(plan.heads * rows):
            of_head, of_row = divmod(place, rows)
            columns = plan.tokens[0, of_head].cpu()[plan.columns_of(0, of_head, of_row).cpu()]
            kept[place, columns.long()] = True
    return kept.view(plan.heads, rows, keys).repeat_interleave(heads // plan.heads, 0)


def _config(
    arch: ArchFacts,
    pattern: Pattern,
    layers: Sequence[int],
    anchor: Sequence[int],
    maps: Sequence[Sequence[int]],
    provenance: Mapping[str, Any],
    dense_below_tokens: int,
) -> SparseConfig:
    anchors = [layer for layer, there in zip(layers, anchor, strict=True) if layer == there]
    rules: dict[str, Any] = {format_range(anchors): pattern.to_yaml()}
    for layer, there, heads in zip(layers, anchor, maps, strict=True):
        if layer != there:
            straight = list(heads) == list(range(len(heads)))
            rules[str(layer)] = {"reuse": there, **({} if straight else {"heads": list(heads)})}
    return load(
        {
            "version": 1,
            "model": arch.model_dump(exclude_none=True),
            "dense_below_tokens": dense_below_tokens,
            "default": "dense",
            "layers": rules,
            "provenance": dict(provenance),
        }
    )
