"""How a batch is parted between vLLM and sparsekit, on metadata written by hand; without vLLM."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.config import ModelFacts
from sparsekit.patterns.shared import SharedPlans
from sparsekit.serve.vllm import backend
from sparsekit.serve.vllm.backend import Step, chunks_of, fresh_buffers, rows_of, uncut
from sparsekit.serve.vllm.layers import Bound
from sparsekit.serve.vllm.meter import METER, LayerCounts, Meter
from sparsekit.serve.vllm.settings import Settings, settings_of
from sparsekit.serve.vllm.steps import Told, _note_v2, hook

T = "{name: triangle, sink_tokens: 8, window_tokens: 64, last_tokens: 32}"
FACTS = ModelFacts(num_layers=2, num_heads=4)


@dataclass
class Common:
    """The fields of vLLM's CommonAttentionMetadata that matter here."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    mm_req_doc_ranges: Any = None
    _num_computed_tokens_cache: Tensor | None = None


def _batch(rows: list[tuple[int, int, int]]) -> tuple[Common, Any]:
    """Of rows (queries, keys so far, prompt)."""
    starts = torch.tensor([0, *np.cumsum([q for q, _, _ in rows])])
    keys, prompts = torch.tensor([k for _, k, _ in rows]), np.array([p for _, _, p in rows])
    total = int(starts[-1])
    common = Common(
        starts, starts.clone(), keys, len(rows), total, max(q for q, _, _ in rows), int(keys.max()),
        torch.arange(len(rows) * 200).view(len(rows), 200), torch.arange(total),
        is_prefilling=torch.tensor([k - q < p for q, k, p in rows]), seq_lens_cpu_upper_bound=keys.clone(),
        _num_computed_tokens_cache=keys,
    )  # fmt: skip
    return common, prompts


@pytest.fixture(autouse=True)
def _counts() -> Iterator[None]:
    METER.reset()
    yield
    METER.reset()


def _settings(text: str = f"version: 1\nmin_queries: 16\ndense_below_tokens: 200\ndefault: {T}\n") -> Settings:
    return settings_of({"configs": {"a": text}, "default": "a"}, FACTS)


def test_chunks_are_told_from_decodes_and_short_ones() -> None:
    rows = [
        (1, 500, 400),
        (300, 300, 300),
        (1, 301, 300),
        (15, 1000, 1000),
        (150, 150, 150),
        (64, 800, 900),
        (64, 99, 999),
    ]
    common, prompts = _batch(rows)
    asked = {6: {"sparsekit": "off"}}
    found = chunks_of(common, Told(prompts, asked.get), _settings())
    assert [(row.row, row.begin, tuple(row.chunk)) for row in found] == [
        (1, 1, (0, 300, 300)),
        (3, 302, (985, 1000, 1000)),
        (5, 467, (736, 800, 900)),
    ]
    assert dict(METER.fallbacks) == {
        ("a", "the prompt is below dense_below_tokens"): 1,
        ("off", "the request said off"): 1,
    }
    dynamic = _settings("version: 1\nmin_queries: 16\ndefault: block_topk\n")
    assert [row.row for row in chunks_of(common, Told(prompts, lambda _: None), dynamic)] == [1, 4, 5, 6]
    assert METER.fallbacks["a", "a chunk below min_queries"] == 1


def test_a_batch_that_cannot_be_cut_stays_whole() -> None:
    common, prompts = _batch([(300, 300, 300), (1, 10, 5), (64, 800, 900)])
    assert uncut(common) == ""
    common.mm_req_doc_ranges = {0: [(1, 2)]}
    assert uncut(common) == "mm_req_doc_ranges"
    assert chunks_of(common, Told(prompts, lambda _: None), _settings()) == []
    assert dict(METER.fallbacks) == {("a", "the batch has mm_req_doc_ranges"): 2}  # chunks


def test_rows_are_cut_out_with_their_metadata() -> None:
    common, _ = _batch([(3, 10, 5), (300, 300, 300), (1, 301, 300), (64, 800, 900)])
    part = rows_of(common, 271, 304)  # the last 32 queries of row 1, and row 2
    assert part.num_reqs == 2
    assert part.num_actual_tokens == 33
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist() == [0, 32, 33]
    assert part.seq_lens.tolist() == [300, 301]
    assert part.slot_mapping.tolist() == list(range(271, 304))
    assert torch.equal(part.block_table_tensor, common.block_table_tensor[1:3])
    assert (part.max_query_len, part.max_seq_len) == (32, 301)
    assert part._num_computed_tokens_cache is None
    whole = rows_of(common, 0, 368)
    assert whole.query_start_loc.tolist() == common.query_start_loc.tolist()


def test_what_a_run_leaves_joins_the_rows_behind_it() -> None:
    common, prompts = _batch([(1, 50, 40), (300, 300, 300), (1, 301, 300), (64, 800, 900), (2, 70, 68)])
    settings = _settings()
    rows = chunks_of(common, Told(prompts, lambda _: None), settings)
    step = Step(common, rows, lambda part: part, SharedPlans())
    patterns = settings.configs["a"].resolved.layers[0]
    runs = step.runs(Bound(0, {"a": patterns}, 0), 16)
    assert [(run.row.row, run.part.end) for run in runs] == [(1, 268), (3, 800)]
    others = step.others(runs)
    assert [(other.begin, other.end) for other in others] == [(0, 1), (269, 302), (366, 368)]
    assert step.others(runs) is others  # once a step
    covered = sorted(
        [i for other in others for i in range(other.begin, other.end)]
        + [i for run in runs for i in range(run.row.begin, run.row.begin + run.part.geometry.q_len)]
    )
    assert covered == list(range(368))
    assert step.runs(Bound(1, {}, 1), 16) == []  # a dense layer


def test_metadata_in_their_builders_buffers_stay() -> None:
    """As FLEX_ATTENTION's do, whose builder writes each step's into the same tensors."""

    class Builder:
        def __init__(self) -> None:
            self.persistent_seq_lens, self.persistent_later = torch.empty(8, dtype=torch.int64), None

        def build(self, common: Common) -> Tensor:
            self.persistent_seq_lens[: common.num_reqs] = common.seq_lens
            return self.persistent_seq_lens[: common.num_reqs]

    builder, (common, _) = Builder(), _batch([(1, 50, 40), (300, 300, 300), (1, 301, 300)])
    whole, buffer = builder.build(common), builder.persistent_seq_lens
    rest = []
    for begin, end in ((0, 1), (269, 302)):
        with fresh_buffers(builder):
            rest.append(builder.build(rows_of(common, begin, end)))
    assert whole.tolist() == [50, 300, 301]
    assert [part.tolist() for part in rest] == [[50], [300, 301]]
    assert builder.persistent_seq_lens is buffer


def test_layers_of_one_group_share_a_runs_pages() -> None:
    common, prompts = _batch([(300, 300, 300)])
    settings = _settings()
    step = Step(common, chunks_of(common, Told(prompts, lambda _: None), settings), lambda part: part, SharedPlans())
    patterns = settings.configs["a"].resolved.layers[0]
    one, other = (step.runs(Bound(i, {"a": patterns}, 0), 16) for i in range(2))
    assert one is other
    another = step.runs(Bound(2, {"a": patterns}, 1), 32)[0]
    assert (one[0].table.tolist(), another.table.tolist()) == (
        common.block_table_tensor[:1, :17].tolist(), common.block_table_tensor[:1, :9].tolist(),
    )  # fmt: skip


def test_the_profiling_run_takes_what_the_longest_prompt_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dynamic pattern reads all keys, a static one its sinks, window and chunk; once for each config."""
    texts = {"a": f"version: 1\ndefault: {T}\n", "b": "version: 1\ndefault: {name: block_topk, top_k: 2}\n"}
    settings = settings_of({"configs": texts, "default": "a"}, FACTS)
    layers = {name: served.resolved.layers[0] for name, served in settings.configs.items()}
    read: list[int] = []
    attend = backend.attend_part

    def noted(part: Any, patterns: Any, q: Tensor, keys: Any, *more: Any) -> Any:
        assert len(keys.k) == 2  # no memory but for two pages
        read.append(keys.tokens)
        return attend(part, patterns, q, keys, *more)

    monkeypatch.setattr(backend, "attend_part", noted)
    backend.take_scratch(Bound(0, layers, 0, longest=4096), torch.zeros(256, 4, 16), 2, Softmax(1.0))
    assert read[-2:] == [128 + 128 + 256, 4096]  # when what is kept between calls is there
    assert max(read) == 4096 and len(read) > 2 * 2 * 5


def test_each_model_of_a_process_takes_its_scratch() -> None:
    """Its groups of layers are counted from 0 anew."""
    backend._SCRATCHED.add(0)
    backend.use(None)
    assert not backend._SCRATCHED


def test_the_profiling_run_meets_every_size_of_table() -> None:
    """Kernels are compiled for the power of two above a prompt's key blocks, and whether 16 divides their number."""
    chunks = backend.warm_chunks(131_584, 8192)
    assert chunks[-1][:2] == (131_584 - 8192, 131_584)
    for block in (64, 128):
        columns = [-(-chunk.end // block) for chunk in chunks]
        kinds = {(1 << (n - 1).bit_length(), n % 16 == 0) for n in columns}
        sizes = [4096 * 2**i // block for i in range(6)]
        assert kinds >= {(size, divides) for size in sizes for divides in (True, False)}
    assert {chunk.first % 128 == 0 for chunk in chunks} == {True, False}
    assert {chunk.end == chunk.prompt for chunk in chunks} == {True, False}
    assert any(chunk.end - chunk.first < 256 for chunk in chunks if chunk.end > 65_536)  # its rows are cut over keys
    assert any(chunk.first == 0 and chunk.end < 512 for chunk in chunks)  # within a window: a kernel without a rule
    assert all(0 <= chunk.first < chunk.end <= min(131_584, chunk.prompt) for chunk in chunks)


def test_a_prompt_below_what_one_of_two_patterns_pays_from_is_met_too() -> None:
    chunks = backend.warm_chunks(131_584, 8192, {0, 16_384})
    below = [chunk for chunk in chunks if chunk.prompt == 16_383]
    assert below and all(chunk.end < 16_384 for chunk in below)
    assert not any(chunk.prompt < 0 for chunk in chunks)


def test_reading_the_counts_does_not_hold_up_who_starts_kernels() -> None:
    """A number on a GPU is waited for without the lock; what is counted meanwhile is added to it."""
    meter, begun, done = Meter(), threading.Event(), threading.Event()
    counts = meter.layers.setdefault(("a", 0), LayerCounts())
    counts.on_device = torch.tensor(3.0)
    counts.summed = SimpleNamespace(synchronize=lambda: (begun.set(), done.wait(10)))
    found: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: found.append(meter.report(wait=False)))
    reader.start()
    assert begun.wait(10)
    adding = threading.Thread(target=lambda: meter.keep(counts, None, 5, 1))  # type: ignore[arg-type]
    adding.start()
    adding.join(10)
    assert not adding.is_alive() and reader.is_alive()
    done.set()
    reader.join(10)
    assert found[0]["configs"]["a"]["layers"]["0"]["kept_pairs"] == 8
    assert counts.on_device is None and meter.report()["configs"]["a"]["layers"]["0"]["kept_pairs"] == 8


def test_counts_are_apart_by_config() -> None:
    """A layer's density is of one config; a choice of none has its reasons."""
    meter = Meter()
    for config, kept in (("a", 3), ("b", 5), ("b", 5)):
        with meter.measured(config, 7, torch.device("cpu")) as counts:
            counts.causal_pairs += 10
        meter.keep(counts, None, kept, 1)  # type: ignore[arg-type]
    meter.fall_back("off", "the request said off")
    found = meter.report()["configs"]
    assert {name: config["layers"].get("7", {}).get("density") for name, config in found.items()} == {
        "a": 0.3, "b": 0.5, "off": None,
    }  # fmt: skip
    assert found["off"]["fallbacks"] == {"the request said off": 1}


def test_the_second_runner_forgets_requests_that_have_ended() -> None:
    """It keeps no sampling parameters, so that its requests' choices are noted beside it."""

    class Runner:
        def __init__(self) -> None:
            self.req_states = SimpleNamespace(req_id_to_index=dict[str, int]())

        def add_requests(self, output: Any) -> None:
            self.req_states.req_id_to_index = {request.req_id: 0 for request in output.scheduled_new_reqs}

    hook(Runner, "add_requests", _note_v2)
    runner: Any = Runner()
    for i in range(1000):
        params = SimpleNamespace(extra_args={"sparsekit": str(i)})
        runner.add_requests(
            SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(req_id=f"r{i}", sampling_params=params)])
        )
        assert runner.sparsekit_extra_args[f"r{i}"] == {"sparsekit": str(i)}
    assert len(runner.sparsekit_extra_args) < 100
