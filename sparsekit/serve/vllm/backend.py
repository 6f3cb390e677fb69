"""Any of vLLM's attention backends with sparsekit over it: `over(stock)` gives the classes that vLLM asks for.

A prompt's long chunks run here, and everything else in the stock implementation: decoding, dense layers, the prompt's
dense last rows, and whole steps without such a chunk. A step's metadata is the stock builder's, and carries a `Step`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import count, product, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekit.call.keys import Keys, pages_of
from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns
from sparsekit.errors import SparsekitError
from sparsekit.kernels.select import plan_of_heads
from sparsekit.patterns import DynamicPattern
from sparsekit.patterns.shared import SharedPlans
from sparsekit.serve.prompts import Chunk, Part, attend_part, part_of, read_e4m3, why_dense
from sparsekit.serve.vllm.layers import Bound
from sparsekit.serve.vllm.meter import METER, LayerCounts
from sparsekit.serve.vllm.settings import E4M3, OFF, Served, Settings
from sparsekit.serve.vllm.steps import Told, current

__all__ = ["Step", "over", "rows_of", "serving", "use"]

# Fields of CommonAttentionMetadata by what they have one entry for. Any other that holds something cannot be cut.
ROWS = {
    "seq_lens", "seq_lens_cpu_upper_bound", "block_table_tensor", "is_prefilling", "req_idx", "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
}  # fmt: skip
TOKENS = {"slot_mapping", "positions"}
SET = {
    "query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len", "causal",
    "logits_indices_padded", "num_logits_indices", "max_logits_per_req", "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
}  # fmt: skip

_settings: Settings | None = None


def use(settings: Settings | None) -> None:
    """What this process serves; None: vLLM alone. The model that follows has yet to take its scratch."""
    global _settings
    _SCRATCHED.clear()
    _settings = settings


def serving() -> Settings | None:
    return _settings


class Row(NamedTuple):
    """A prompt's chunk in a step's flattened batch: its queries are `[begin, begin + chunk.end - chunk.first)`."""

    row: int
    begin: int
    chunk: Chunk
    served: Served


class Run(NamedTuple):
    """A row's part in a layer. table: int32 (1, n), the pages that it reads."""

    row: Row
    part: Part
    patterns: LayerPatterns
    table: Tensor


class Other(NamedTuple):
    """A run of the batch's rows that the stock implementation computes, and their metadata."""

    begin: int
    end: int
    metadata: Any


class Step:
    """The prompts' chunks of a step, and for each group of layers what of them runs here and what does not."""

    def __init__(self, common: Any, rows: list[Row], build: Callable[[Any], Any], plans: SharedPlans) -> None:
        self._common, self._rows, self._build = common, rows, build
        self.plans = plans
        self._runs: dict[tuple[int, int], list[Run]] = {}
        self._others: dict[tuple[int, ...], list[Other]] = {}

    def runs(self, bound: Bound, page_tokens: int) -> list[Run]:
        """What runs here in a layer; made once a step for all that run the same."""
        key = (bound.group, page_tokens)
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = list(self._make_runs(bound, page_tokens))
        return found

    def _make_runs(self, bound: Bound, page_tokens: int) -> Iterator[Run]:
        table = self._common.block_table_tensor
        for row in self._rows:
            patterns = bound.patterns.get(row.served.name)
            if patterns is None:
                continue
            dense_here = row.served.name in bound.dense_here
            part = part_of(patterns, row.chunk, table.device, page=page_tokens, dense_here=dense_here)
            if part is not None:
                yield Run(row, part, patterns, pages_of(table[row.row][None], page_tokens, part.reads))
            elif why := why_dense(patterns, row.chunk, table.device):
                METER.fall_back(row.served.name, f"{patterns.patterns[0].name}: the prompt is below {why}")

    def others(self, runs: list[Run]) -> list[Other]:
        """The rest of the batch: rows without a run, and what of a row its run leaves."""
        ends = tuple(run.row.begin + run.part.geometry.q_len for run in runs)
        key = (*(run.row.row for run in runs), *ends)
        found = self._others.get(key)
        if found is None:
            found, at = [], 0
            total = int(self._common.query_start_loc_cpu[self._common.num_reqs])
            for begin, end in zip([*(run.row.begin for run in runs), total], [*ends, total], strict=True):
                if begin > at:
                    found.append(Other(at, begin, self._build(rows_of(self._common, at, begin))))
                at = end
            self._others[key] = found
        return found


def rows_of(common: Any, begin: int, end: int) -> Any:
    """The metadata of the queries `[begin, end)` of a batch alone: its end is a row's, its begin may lie within one."""
    starts = common.query_start_loc_cpu
    first = int(torch.searchsorted(starts[: common.num_reqs + 1], begin, right=True)) - 1
    last = int(torch.searchsorted(starts[: common.num_reqs + 1], end, right=False))
    new: dict[str, Any] = {}
    for one in fields(common):
        value = getattr(common, one.name)
        if one.name.endswith("_cache"):
            new[one.name] = None
        elif value is None or one.name in SET:
            continue
        elif one.name in ROWS:
            new[one.name] = value[first:last]
        elif one.name in TOKENS:
            new[one.name] = value[begin:end]
    host = (starts[first : last + 1] - begin).clamp_(min=0)
    return replace(
        common,
        num_reqs=last - first,
        num_actual_tokens=end - begin,
        query_start_loc=(common.query_start_loc[first : last + 1] - begin).clamp_(min=0),
        query_start_loc_cpu=host,
        max_query_len=int(host.diff().max()),
        max_seq_len=int(common.seq_lens_cpu_upper_bound[first:last].max()),
        **new,
    )


@contextmanager
def fresh_buffers(builder: Any) -> Iterator[None]:
    """Metadata built here are in memory of their own.

    FLEX_ATTENTION's lie in buffers of their builder, and change with what it builds next: the rest of a step is built
    by the builder of the whole step, which layers without a sparse pattern still use.
    """
    held = {name: x for name, x in vars(builder).items() if name.startswith("persistent_") and isinstance(x, Tensor)}
    vars(builder).update({name: torch.empty_like(x) for name, x in held.items()})
    try:
        yield
    finally:
        vars(builder).update(held)


def uncut(common: Any) -> str:
    """A field of a batch's metadata that `rows_of` does not know how to cut, or nothing."""
    known = ROWS | TOKENS | SET
    held = (one.name for one in fields(common) if one.name not in known and getattr(common, one.name) is not None)
    return next(held, "" if common.causal is True else "causal")


def chunks_of(common: Any, told: Told, settings: Settings) -> list[Row]:
    """The rows of a batch that are chunks of prompts to be run here; the others are counted by reason."""
    rows: list[Row] = []
    prefilling, keys = common.is_prefilling, common.seq_lens_cpu_upper_bound
    if prefilling is None or keys is None or not bool(prefilling.any()):
        return rows
    starts = common.query_start_loc_cpu.tolist()
    for row in torch.nonzero(prefilling[: common.num_reqs]).flatten().tolist():
        queries, end, prompt = starts[row + 1] - starts[row], int(keys[row]), int(told.prompt_tokens[row])
        if not queries or end - queries >= prompt:
            continue
        served = settings.choose(told.extra_args(row))
        if served is None:
            METER.fall_back(OFF, "the request said off" if settings.default != OFF else "off by default")
        elif why := served.why_dense(queries, prompt):
            METER.fall_back(served.name, why)
        else:
            rows.append(Row(row, starts[row], Chunk(end - queries, end, prompt), served))
    if rows and (field := uncut(common)):
        for row in rows:
            METER.fall_back(row.served.name, f"the batch has {field}")
        return []
    return rows


def over(stock: Any, module: str) -> tuple[Any, Any, Any]:
    """Backend, builder and implementation over a stock backend, as classes of `module`: vLLM finds them by name."""
    from vllm.v1.attention.backend import AttentionCGSupport

    transposed = stock.get_name() == "CPU_ATTN"

    class Builder(stock.get_builder_cls()):  # type: ignore[misc]
        supports_update_block_table = False  # a copy with another block table would keep this one's Step

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._settings = serving()  # of this builder's engine: another one of the process may come with its own
            if transposed and self._settings is not None and self.isa != "vec":
                raise SparsekitError(
                    f"CPU_ATTN packs its pages for {self.isa!r} here; sparsekit reads those for 'vec' alone: on x86, "
                    "head sizes that are multiples of 32; where there is AMX, in float32."
                )

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> Any:
            """At most graphs of decoding: one of mixed batches would hold no sparse prompt."""
            support = super().get_cudagraph_support(*args, **kwargs)
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda each: each.value)

        def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
            return False

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **more: Any
        ) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **more)
            told, settings = current(), self._settings
            if told is not None and settings is not None:
                rows = chunks_of(common_attn_metadata, told, settings)
                if rows:
                    build = super().build

                    def rest(part: Any) -> Any:
                        with fresh_buffers(self):
                            return build(0, part, True, **more)

                    metadata.sparsekit = Step(common_attn_metadata, rows, rest, told.plans)
            return metadata

    class Impl(stock.get_impl_cls()):  # type: ignore[misc]
        sparsekit: Bound | None = None  # set once the model is loaded
        _softmax: Softmax | None = None

        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return False

        def fused_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_rope_kvcache_supported(self) -> bool:
            return False

        def forward(
            self, layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor, attn_metadata: Any,
            output: Tensor, *rest: Any, **more: Any,
        ) -> Tensor:  # fmt: skip
            bound = self.sparsekit
            if bound is not None and attn_metadata is None:
                self._take_scratch(bound, query, output)
            step: Step | None = getattr(attn_metadata, "sparsekit", None)
            runs = step.runs(bound, kv_cache.shape[2]) if step is not None and bound is not None else None
            if step is None or bound is None or not runs:
                return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *rest, **more)
            for begin, end, metadata in step.others(runs):
                part = slice(begin, end)
                k, v = (None if x is None else x[part] for x in (key, value))
                super().forward(layer, query[part], k, v, kv_cache, metadata, output[part])
            pages = self._pages(kv_cache)
            for run in runs:
                self._run(bound, run, layer, query, Keys(*pages, run.table), output, step.plans)
            return output

        def _run(
            self, bound: Bound, run: Run, layer: Any, query: Tensor, keys: Keys, output: Tensor, plans: SharedPlans
        ) -> None:
            rows = run.part.geometry.q_len
            here = slice(run.row.begin, run.row.begin + rows)
            q = query[here].view(rows, self.num_heads, self.head_size)
            with METER.measured(run.row.served.name, bound.layer, query.device) as counts:
                if self.kv_cache_dtype in E4M3:
                    scales = layer._k_scale_float, layer._v_scale_float
                    keys = read_e4m3(keys, run.part.geometry, scales, output.dtype)
                    if q.dtype != output.dtype:  # in e4m3 too, where the stock implementation takes it so
                        q = q.to(output.dtype).mul_(layer._q_scale_float)
                out = output[here].view(q.shape)
                plan = attend_part(run.part, run.patterns, q, keys, self._softmax_of(), out, plans, run.row.row)
            counts.rows += rows
            counts.causal_pairs += self.num_heads * (rows * (2 * run.part.end - rows + 1)) / 2
            METER.keep(counts, plan, run.part.pairs, self.num_heads)

        def _softmax_of(self) -> Softmax:
            if self._softmax is None:
                self._softmax = Softmax(self.scale, self.logits_soft_cap or None, getattr(self, "sinks", None))
            return self._softmax

        def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
            """Keys and values, (pages, G, size, D) each, of a cache (pages, G, size, 2 D)."""
            if not transposed:
                return kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]
            count, heads, size, width = kv_cache.shape
            keys, values = kv_cache.reshape(count, heads, 2, size * width // 2).unbind(2)
            return (
                keys.view(count, heads, -1, size).transpose(2, 3),
                values.view(count, heads, size, -1),
            )

        def _take_scratch(self, bound: Bound, query: Tensor, output: Tensor) -> None:
            """In vLLM's profiling run, take the memory of the largest chunk once, so that it is counted; this also
            compiles the kernels."""
            if query.device.type != "cuda" or bound.group in _SCRATCHED:
                return
            _SCRATCHED.add(bound.group)
            q = query.view(query.shape[0], self.num_heads, self.head_size).to(output.dtype)
            take_scratch(bound, q, self.num_kv_heads, self._softmax_of(), e4m3=self.kv_cache_dtype in E4M3)

    class Backend(stock):
        supports_kv_cache_update_bypass = False

        @staticmethod
        def get_impl_cls() -> Any:
            return Impl

        @staticmethod
        def get_builder_cls() -> Any:
            return Builder

    for cls in (Backend, Builder, Impl):
        cls.__module__, cls.__qualname__ = module, cls.__name__
    return Backend, Builder, Impl


_SCRATCHED: set[int] = set()
WARM_TOKENS = 4096  # of a chunk that compiles kernels
TILE_ROWS = 128  # of a chunk that is short beside its keys: the kernel cuts its rows over keys
FEWEST_KEYS = 256
WHOLE = 16 * 128  # tokens: the kernels of tables tell whether their columns are a multiple of 16
OFF_BLOCK = 200  # tokens: no multiple of a block, and more than one
FIRST_TOKENS = (0, 40), (8, 40)
FAR = 1 << 20  # tokens that a prompt goes on


def warm_chunks(longest: int, rows: int, pays_from: Collection[int] = ()) -> list[Chunk]:
    """Chunks that have every kernel compiled which a prompt of up to `longest` tokens may ask for.

    A prompt's first few tokens, of which windows drop nothing. At each power of two, where tables of key blocks double:
    as long as any, shorter, and of few rows; such as begin and end on a block, and neither, as where decoding shares
    their step; in the middle of a prompt, and its last one. And the largest one, which takes the most memory, when what
    is kept between calls is there already.

    Args:
        rows: of the largest chunk.
        pays_from: prompts below each of these run dense in some heads, tokens.
    """
    sizes = [min(rows, size) for size in (rows, WARM_TOKENS, TILE_ROWS)]
    doubled = takewhile(lambda end: end < longest, (FEWEST_KEYS << power for power in count()))
    ends = [end - off for end in (*doubled, longest // WHOLE * WHOLE, longest) for off in (0, OFF_BLOCK) if end > off]
    spans = list(dict.fromkeys([*FIRST_TOKENS, *((max(end - size, 0), end) for end in ends for size in sizes)]))
    chunks = [Chunk(first, end, end + more) for more in (FAR, 0) for first, end in spans]
    chunks += [Chunk(*span, below - 1) for below in sorted(pays_from) for span in spans if span[1] < below]
    return [*chunks, Chunk(longest - rows, longest, longest + FAR)]


def take_scratch(bound: Bound, q: Tensor, key_heads: int, softmax: Softmax, *, e4m3: bool = False) -> None:
    """Run what compiles kernels, in each config, and the largest chunk of the longest prompt.

    The cache is not there yet: all its pages are one of zeros. It is the first of two, so that strides are as of many.

    Args:
        e4m3: the cache is to hold such numbers.
    """
    dynamic = {x for p in bound.patterns.values() for x in p.patterns if isinstance(x, DynamicPattern)}
    chunks = warm_chunks(bound.longest, min(len(q), bound.longest), {x.dense_below(q.device) for x in dynamic})
    for chunk, (name, patterns) in product(chunks, bound.patterns.items()):
        part = part_of(patterns, chunk, q.device, page=bound.page, dense_here=name in bound.dense_here)
        if part is not None:
            stored = torch.uint8 if e4m3 else q.dtype
            cache = torch.zeros(2, bound.page, key_heads, 2 * q.shape[2], dtype=stored, device=q.device)
            k, v = cache.transpose(1, 2).chunk(2, -1)
            table = torch.zeros(1, -(-part.end // bound.page), dtype=torch.int32, device=q.device)
            some = q[: part.geometry.q_len]
            own = replace(patterns, reused=None)  # a layer that reuses a plan holds one as large
            keys, out = Keys(k, v, table).at(part.reads), torch.empty_like(some)
            if e4m3:
                keys = read_e4m3(keys, part.geometry, (1.0, 1.0), q.dtype)
            plan = attend_part(part, own, some, keys, softmax, out)
            METER.keep(LayerCounts(), plan, part.pairs, q.shape[1])  # in counts that nobody reads
            if patterns.reused is not None:
                plan_of_heads(plan, patterns.reused.taken)
