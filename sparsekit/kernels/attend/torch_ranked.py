"""Attention over a ranked plan with batched torch ops: every head and query tile of a segment at once.

The same walk as in the definition (reference.py), some tiles ahead at a time: what lies past the stop is masked out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.plan import BlockPlan, Ranked, segment_bounds
from sparsekit.plan.memo import VISITED
from sparsekit.plan.rows import nothing_visited

__all__ = ["attend_ranked"]

TILES_AT_ONCE = 16
UNSEEN = -1.0e30  # a finite running maximum of a row without keys: no NaN


def attend_ranked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    ranked: Ranked,
    softmax: Softmax,
    return_lse: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention as a ranked plan says; what it visited is `plan.visited` afterwards.

    Args:
        q: (B, H, Q, D). k, v: (B, G, K, D). Any strides; K and V are never repeated.

    Returns:
        out (B, H, Q, D), laid out as (B, Q, H, D), and lse (B, H, Q) float32 where asked for.
    """
    batch, heads, q_len, _ = q.shape
    out = output(q, out, True)
    lse = q.new_full((batch, heads, q_len), float("-inf"), dtype=torch.float32)
    visited = nothing_visited(plan, ranked)
    bounds = segment_bounds(plan.geometry, plan.samples, ranked.segment_tokens, torch.device("cpu"))
    for b, rows in enumerate(torch.stack(bounds, -1).tolist()):
        for at, (first, low, high) in enumerate(rows):
            if low < high:
                segment = _Segment(q[b], k[b], v[b], plan, ranked, softmax, b, at, first, high)
                segment.walk(visited[b, :, at])
                segment.store(out[b], lse[b])
    plan.memo[VISITED] = visited
    return out, lse if return_lse else None


class _Segment:
    """The queries of one segment of one sample, (H, W, D) in their plan order, and their running softmax."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, ranked: Ranked, softmax: Softmax,
        sample: int, at: int, first: int, high: int,
    ) -> None:  # fmt: skip
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.plan, self.ranked, self.softmax = plan, ranked, softmax
        self.sample, self.at, self.first = sample, at, first
        g = plan.geometry
        self.k, self.v = (x[:, g.kv_start[sample] :] for x in (k, v))
        index = ranked.q_index[sample, :, at]
        tiles = int((index[0] >= 0).sum() + plan.block_q - 1) // plan.block_q
        self.q_pos = index[:, : tiles * plan.block_q].long()
        self.rows = (self.q_pos + g.q_index(sample, 0)).clamp(min=0)
        head = torch.arange(len(q), device=q.device)[:, None]
        self.owner = head // (len(q) // len(k))
        self.q = q[head, self.rows].to(self.wide)
        self.m = torch.full(self.q_pos.shape, UNSEEN, dtype=self.wide, device=q.device)
        self.norm, self.acc = torch.zeros_like(self.m), torch.zeros_like(self.q)
        if softmax.sink_logits is not None:  # it joins first: a gain is a share of the whole denominator
            sinks = softmax.sink_logits.to(self.wide)[:, None]
            self.m = sinks.clamp(min=UNSEEN).expand_as(self.m)
            self.norm = (sinks - self.m).exp()
        own = slice(first, high)
        k_pos = torch.arange(first, high, device=q.device)
        every = torch.arange(len(q), device=q.device)
        self._join(every, self._scores(every, self._shared(self.k[:, own]), k_pos <= self.q_pos[..., None]),
                   self._shared(self.v[:, own]))  # fmt: skip
        if first:
            sink = slice(min(plan.block_kv, first))
            self._join(every, self._scores(every, self._shared(self.k[:, sink])), self._shared(self.v[:, sink]))

    def _shared(self, x: Tensor) -> Tensor:
        """(H, n, D) of keys or values that all query heads of a key head share."""
        return x.to(self.wide)[self.owner[:, 0]]

    def _scores(self, live: Tensor, keys: Tensor, kept: Tensor | None = None) -> Tensor:
        """(heads, W, n): logits of the heads `live` over keys (heads, n, D)."""
        z = self.softmax.logits(self.q[live] @ keys.mT)
        return z if kept is None else z.masked_fill(~kept, float("-inf"))

    def _join(self, live: Tensor, z: Tensor, values: Tensor) -> None:
        """One step of the running softmax of the heads `live`."""
        m = torch.maximum(self.m[live], z.amax(-1))
        weights, alpha = torch.exp(z - m[..., None]), torch.exp(self.m[live] - m)
        self.norm[live] = self.norm[live] * alpha + weights.sum(-1)
        self.acc[live] = self.acc[live] * alpha[..., None] + weights @ values
        self.m = self.m.index_copy(0, live, m)

    def walk(self, visited: Tensor) -> None:
        """The ranked keys of earlier segments, as far as each query tile goes: into visited (H, T)."""
        ranked, block, heads = self.ranked, self.plan.block_kv, len(self.q)
        ptr = ranked.key_ptr[self.sample, self.at : self.at + 2].tolist()
        listed = ranked.keys[self.sample, :, ptr[0] : ptr[1]].long()
        tiles = self.q_pos.shape[1] // self.plan.block_q
        quiet = torch.zeros(heads, tiles, dtype=torch.int64, device=self.q.device)
        seen = torch.zeros_like(quiet)
        for begin in range(0, listed.shape[1], TILES_AT_ONCE * block):
            live = (quiet < ranked.patience).any(1).nonzero().flatten()
            if not len(live):
                break
            keys = listed[live, begin : begin + TILES_AT_ONCE * block]
            count = -(-keys.shape[1] // block)
            exists = torch.arange(count * block, device=keys.device) < keys.shape[1]
            keys = pad(keys, (0, count * block - keys.shape[1]))
            owner = self.owner[live]
            z = self._scores(live, self.k[owner, keys].to(self.wide), exists).unflatten(-1, (count, block))
            loud = self._loud(live, z)
            going = torch.empty_like(loud)
            for i in range(count):
                going[..., i] = quiet[live] < ranked.patience
                after = torch.where(loud[..., i], 0, quiet[live] + 1)
                quiet[live] = torch.where(going[..., i], after, quiet[live])
            seen[live] += going.sum(-1)
            kept = going.repeat_interleave(self.plan.block_q, 1)[..., None]
            z = z.masked_fill(~kept, float("-inf")).flatten(-2)
            self._join(live, z, self.v[owner, keys].to(self.wide))
        visited[:, :tiles] = seen.to(torch.int32)

    def _loud(self, live: Tensor, z: Tensor) -> Tensor:
        """bool (heads, tiles, n): whether each of the next key tiles, z (heads, W, n, block), is a gain to a query."""
        part = z.logsumexp(-1)
        total = torch.cat([(self.m[live] + self.norm[live].log())[..., None], part], -1).logcumsumexp(-1)[..., 1:]
        loud = ~((part - total).exp() < self.ranked.stop_tau) & (self.q_pos[live] >= 0)[..., None]
        return loud.unflatten(1, (-1, self.plan.block_q)).any(2)

    def store(self, out: Tensor, lse: Tensor) -> None:
        """Into out (H, Q, D) and lse (H, Q), at the queries' own rows."""
        head, place = (self.q_pos >= 0).nonzero(as_tuple=True)
        row, norm = self.rows[head, place], self.norm[head, place]
        out[head, row] = (self.acc[head, place] / norm[:, None]).to(out.dtype)
        lse[head, row] = (self.m[head, place] + norm.log()).float()
