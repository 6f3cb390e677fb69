"""Plans are checked where they are made, whoever makes them; and outputs are defined for any plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from kernel_cases import loose_plans
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import sparsekit.patterns.base as registry
from sparsekit import BlockPlan, Geometry, SparsekitError, attention
from sparsekit.call.geometry import Span
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.patterns import DynamicPattern, Pattern, StaticPattern, Union, parse_pattern
from sparsekit.plan import TokenRule, plan_from_block_mask, plan_from_rule
from sparsekit.plan.flex import from_flex
from sparsekit.testing import check_pattern, inputs_for

IMPLS = ("torch", "reference")


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patterns defined in a test are forgotten after it."""
    registry.pattern_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return


def _inputs(tokens: int, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, n, tokens, 16, generator=g) for n in (heads, 2, 2))  # type: ignore[return-value]


# ---- where they are made


def test_a_static_pattern_that_forgets_queries_is_named(scratch_registry: None) -> None:
    class EvenBlocks(StaticPattern):
        """Keys of every second block."""

        name: Literal["even_blocks"] = "even_blocks"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
            return (k_pos <= q_pos) & ((q_pos // 128) % 2 == 0)

    q, k, v = _inputs(400)
    with pytest.raises(SparsekitError, match=r"pattern 'even_blocks': query 128 does not keep itself"):
        attention(q, k, v, EvenBlocks())
    with pytest.raises(AssertionError, match="query 128 does not keep itself"):
        check_pattern(EvenBlocks(), [Geometry.of(300, block_q=64, block_kv=64)])
    # In a chunk the first bad query is the chunk's own, counted from the prompt's start.
    with pytest.raises(SparsekitError, match="query 130 does not keep itself"):
        registry.static_plan(EvenBlocks(), Geometry.of(100, 230), torch.device("cpu"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (TokenRule(4, 0, 300), "pattern 'broken': .*query 4 does not keep itself"),
        (TokenRule(-5, -1, 300), "query 0 does not keep itself"),
        (TokenRule(4, 2.5, 0), "three whole numbers"),
        (TokenRule(4, True, 0), "three whole numbers"),
    ],
)
def test_a_rule_that_forgets_queries_is_named(scratch_registry: None, rule: TokenRule, message: str) -> None:
    class Broken(StaticPattern):
        """Its rule is not a plan's."""

        name: Literal["broken"] = "broken"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
            return k_pos <= q_pos

        def rule(self, span: Span) -> TokenRule:
            return rule

    with pytest.raises(SparsekitError, match=message):
        attention(*_inputs(300), Broken())


def test_a_rule_without_a_window_is_fine_where_every_query_is_a_sink_or_dense() -> None:
    geometry = Geometry.of(300, block_q=64)
    for rule in (TokenRule(300, 0, 10**12), TokenRule(0, 0, 0), TokenRule(100, 0, 100)):
        plan = plan_from_rule(rule, geometry)
        assert plan.density() == 1, rule
    assert plan_from_rule(TokenRule(-3, 10**30, -(10**30)), geometry).all_dense  # numbers past int32 are only large
    with pytest.raises(SparsekitError, match="2 token rules: one, or one for each of 3 samples"):
        plan_from_rule([TokenRule(1, 1, 1)] * 2, Geometry.of(10, batch=3))


def test_what_keep_returns(scratch_registry: None) -> None:
    class Floats(StaticPattern):
        """Returns scores."""

        name: Literal["floats"] = "floats"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
            return (k_pos <= q_pos).float()

    with pytest.raises(SparsekitError, match=r"pattern 'floats': `keep` returns a tensor of torch.float32, not a bool"):
        attention(*_inputs(100), Floats())


def test_a_dynamic_pattern_that_returns_no_plan_is_named(scratch_registry: None) -> None:
    class Nothing(DynamicPattern):
        """Selects nothing."""

        name: Literal["nothing"] = "nothing"

        def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
            return None  # type: ignore[return-value]

    with pytest.raises(SparsekitError, match="pattern 'nothing': `select` returns a NoneType, not a BlockPlan"):
        attention(*_inputs(100), Nothing())


OTHER_CALLS = {
    "batch=2": Geometry.of(100, batch=2),
    "q_len=99": Geometry.of(99, 100),
    "kv_len=101": Geometry.of(100, 101, q_offset=0),
    r"kv_start=\(3,\)": Geometry.of(100, kv_start=[3], prompt_len=100),
    r"kv_end=\(90,\)": Geometry.of(100, kv_end=[90], prompt_len=100),
    r"prompt_tokens=\(200,\)": Geometry.of(100, prompt_len=200),
}


@pytest.mark.parametrize("field", OTHER_CALLS)
def test_a_plan_of_another_call_is_refused(scratch_registry: None, field: str) -> None:
    """By itself, in a union and as a plain Pattern; another tile is fine."""

    class Stale(DynamicPattern):
        """Returns a plan that it was not asked for."""

        name: Literal["stale"] = "stale"

        def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
            return BlockPlan(made[0])

    class Plain(Pattern):
        """The same without `select`."""

        name: Literal["plain"] = "plain"

        def plan(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
            return BlockPlan(made[0])

    made, inputs = [OTHER_CALLS[field]], _inputs(100)
    for pattern, said in ((Stale(), "'stale': `select`"), (Plain(), "'plain': `plan`")):
        for one in (pattern, parse_pattern({"name": "union", "of": [pattern]})):
            made[0] = OTHER_CALLS[field]
            with pytest.raises(SparsekitError, match=f"pattern {said} returns a plan of another call, with {field}"):
                attention(*inputs, one)
            made[0] = Geometry.of(100, block_q=32, block_kv=16)
            assert torch.equal(attention(*inputs, one), attention(*inputs, "dense"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tiles", "dense", "columns", "query"),
    [
        ([[], []], [False, False], None, 0),
        ([[0], [64, 96]], [False, False], None, 32),
        ([[0, 32], []], [False, False], None, 64),
        ([[0, 32], [0, 32]], [False, False], None, 64),
        ([[0, 32], [0, 64]], [False, False], None, 96),
        ([[0, 32], [0, 64]], [False, False], range(96, 99), 99),
        ([[0, 32], [0, 64]], [False, False], range(96, 100), None),
        ([[0, 32], []], [False, True], None, None),
        ([[0, 32], [64, 96]], [False, False], None, None),
    ],
)
def test_a_dynamic_plan_that_drops_a_query_is_refused(
    scratch_registry: None, tiles: list[list[int]], dense: list[bool], columns: range | None, query: int | None
) -> None:
    """100 queries in two rows of 64; key tiles of 32, a column for some keys."""

    class Loses(DynamicPattern):
        """Its rows list what the test says."""

        name: Literal["loses"] = "loses"

        def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
            return BlockPlan(
                geometry,
                row_ptr=torch.tensor([0, len(tiles[0]), len(tiles[0]) + len(tiles[1])], dtype=torch.int32),
                entries=torch.tensor([*tiles[0], *tiles[1]], dtype=torch.int32) << 2 | 1,
                dense_rows=torch.tensor(dense),
                tokens=None if columns is None else torch.tensor([[[*columns]]], dtype=torch.int32),
                token_bits=None if columns is None else torch.tensor([[0], [2 ** len(columns) - 1]], dtype=torch.int32),
                order=torch.arange(2, dtype=torch.int32),
            )

    q, k, _ = _inputs(100)
    geometry = Geometry.of(100, block_q=64, block_kv=32)
    if query is None:
        plan = Loses().plan(q, k, geometry, Softmax(0.25))
        assert bool((plan.multiplicity().diagonal(dim1=-2, dim2=-1) == 1).all())
        return
    with pytest.raises(SparsekitError, match=f"'loses': query {query} of sample 0, head 0 does not keep itself"):
        Loses().plan(q, k, geometry, Softmax(0.25))


def test_what_other_methods_return(scratch_registry: None) -> None:
    class NoPlan(Pattern):
        """Plans nothing."""

        name: Literal["no_plan"] = "no_plan"

        def plan(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
            return None  # type: ignore[return-value]

    class PlainTuple(StaticPattern):
        """Its rule is no TokenRule."""

        name: Literal["plain_tuple"] = "plain_tuple"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
            return k_pos <= q_pos

        def rule(self, span: Span) -> TokenRule:
            return 4, 9, 300  # type: ignore[return-value]

    class Narrow(StaticPattern):
        """Says it for three keys."""

        name: Literal["three"] = "three"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
            return (k_pos <= q_pos)[:, :3]

    rule = r"pattern 'plain_tuple': `rule` returns \(4, 9, 300\), a tuple, not a TokenRule"
    for pattern, message in (
        (NoPlan(), "pattern 'no_plan': `plan` returns a NoneType, not a BlockPlan"),
        (PlainTuple(), rule),
        (Union(of=(PlainTuple(), PlainTuple())), rule),
        (Narrow(), r"pattern 'three': `keep` returns a tensor of shape \(100, 3\), which does not broadcast to"),
    ):
        with pytest.raises(SparsekitError, match=message):
            attention(*_inputs(100), pattern)


def test_a_block_mask_keeps_every_query() -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    mask = torch.ones(1, 2, 5, 5, dtype=torch.bool)
    mask[0, 1, 3, 3] = False
    with pytest.raises(SparsekitError, match="block mask: query 192 of sample 0, head 1 does not keep itself"):
        plan_from_block_mask(mask, geometry)
    mask[0, 1, 3] = True
    mask[0, 1, 0, 4] = False  # in the future, and past the end
    assert plan_from_block_mask(mask, geometry).density() == 1
    fine = Geometry.of(300, block_q=64, block_kv=32)  # two key tiles hold a row's own queries
    mask = torch.ones(1, 1, 5, 10, dtype=torch.bool)
    mask[0, 0, 1, 3] = False
    with pytest.raises(SparsekitError, match="query 96 of sample 0, head 0"):
        plan_from_block_mask(mask, fine)
    for bad in (mask[..., :5], mask.float(), mask[0], mask[:, :0], mask[:, :, :4]):
        with pytest.raises(SparsekitError, match=r"block mask .*want bool"):
            plan_from_block_mask(bad, fine)


def test_a_flex_mask_keeps_every_query() -> None:
    def causal_but_one(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ~((q // 128 == 1) & (k // 128 == 1))

    mask = create_block_mask(causal_but_one, 1, 1, 384, 384, device="cpu")
    with pytest.raises(SparsekitError, match="query 128 of sample 0, head 0 does not keep itself"):
        from_flex(mask)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    mask = create_block_mask(causal, 1, 1, 384, 384, device="cpu")
    with pytest.raises(SparsekitError, match="query 2 does not keep itself"):
        from_flex(mask, rule=TokenRule(2, 0, 384))
    with pytest.raises(SparsekitError, match="BlockMask of 384 queries and 384 keys, geometry of 256 and 256"):
        from_flex(mask, geometry=Geometry.of(256, block_q=128, block_kv=128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_ptr": torch.zeros(3, dtype=torch.int32)}, r"plan\.row_ptr \(3,\): want \(6,\)"),
        ({"row_ptr": torch.zeros(6)}, r"plan\.row_ptr is torch.float32: want torch.int32 or torch.int64"),
        ({"entries": torch.zeros(4)}, r"plan\.entries is torch.float32"),
        ({"entries": None}, "row_ptr comes with entries"),
        ({"rule": torch.zeros(1, 2, 3, dtype=torch.int32)}, r"plan\.rule \(1, 2, 3\): want \(1, 1, 3\)"),
        ({"dense_rows": torch.zeros(5)}, r"plan\.dense_rows is torch.float32"),
        ({"order": torch.zeros(4, dtype=torch.int32)}, r"plan\.order \(4,\): want \(5,\)"),
        ({"tokens": torch.zeros(1, 1, 40, dtype=torch.int32)}, "tokens with token_bits"),
    ],
)
def test_tensors_of_a_plan_have_their_shapes(change: dict[str, Tensor | None], message: str) -> None:
    whole = {"row_ptr": torch.zeros(6, dtype=torch.int32), "entries": torch.zeros(0, dtype=torch.int32)}
    with pytest.raises(SparsekitError, match=message):
        BlockPlan(Geometry.of(300, block_q=64), **{**whole, **change})  # type: ignore[arg-type]


def test_one_sample_of_a_plan_does_not_serve_samples_that_differ() -> None:
    with pytest.raises(SparsekitError, match="plan of 1 samples: want 2, the batch, or 1 if all are alike"):
        BlockPlan(Geometry.of(300, batch=2, kv_start=(0, 7)))


@pytest.mark.parametrize("name", ["block_topk", "xattention", "flexprefill", "vertical_slash"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dynamic_patterns_keep_every_query_whatever_the_inputs_hold(name: str, value: float) -> None:
    q, k, _ = _inputs(700)
    q[:, :, 600:] = value
    k[:, 0, 100:300] = value
    pattern = parse_pattern({"name": name, "top_k": 2} if name == "block_topk" else name)
    often = pattern.plan(q, k, Geometry.of(700, block_q=64, block_kv=64), Softmax(0.25)).multiplicity()
    assert int(often.max()) == 1 and not bool(often.triu(1).any())
    assert bool((often.diagonal(dim1=-2, dim2=-1) == 1).all())


def test_a_union_of_broken_rules_is_named(scratch_registry: None) -> None:
    class NoWindow(StaticPattern):
        """Sinks alone."""

        name: Literal["no_window"] = "no_window"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
            return self.rule(span).keep(q_pos, k_pos)

        def rule(self, span: Span) -> TokenRule:
            return TokenRule(4, 0, span.prompt_tokens)

    assert issubclass(NoWindow, Pattern)
    with pytest.raises(SparsekitError, match="query 4 does not keep itself"):
        attention(*_inputs(300), Union.model_validate({"of": (NoWindow(), NoWindow())}))


# ---- what is computed of plans that nobody checked


LOOSE = tuple(loose_plans(Geometry.of(300, block_q=64, block_kv=64)))


@pytest.mark.parametrize("kind", LOOSE)
@pytest.mark.parametrize("extra", ["plain", "soft-cap", "sinks"])
def test_rows_that_keep_nothing_give_zero(kind: str, extra: str) -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    plan, (q, k, v) = loose_plans(geometry)[kind], _inputs(300)
    softcap = 5.0 if extra == "soft-cap" else None
    sinks = torch.tensor([0.5, -1.0, 2.0, float("-inf")]) if extra == "sinks" else None
    mask = (plan.multiplicity() > 0).repeat_interleave(4 // plan.heads, 1)
    kept = mask.any(-1)
    assert not bool(kept.all())
    z = q.double() @ k.double().repeat_interleave(2, 1).mT / 4
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~mask, float("-inf"))
    lse = z.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None])
    weights = torch.exp(z - lse[..., None]).nan_to_num(0)
    expected = (weights @ v.double().repeat_interleave(2, 1)).masked_fill(~kept[..., None], 0)
    for impl in IMPLS:
        out, got = attend(q, k, v, plan, impl=impl, softcap=softcap, sink_logits=sinks, return_lse=True)
        fast = attend(q, k, v, plan, impl=impl, softcap=softcap, sink_logits=sinks)
        assert isinstance(fast, Tensor)
        for result in (out, fast):
            assert float((result - expected).abs().max()) < 1e-5, impl
            assert bool((result[~kept] == 0).all()), impl
        assert bool((got[~kept] == float("-inf")).all()), impl
        assert torch.allclose(got[kept].double(), lse[kept], rtol=0, atol=1e-5), impl


@pytest.mark.parametrize(
    ("row_ptr", "entries", "says"),
    [
        ([0, 1, 2], [10**9, 10**9], "lies outside the 200 keys"),
        ([0, 1, 2], [-256, 1], "lies outside the 200 keys"),
        ([2, 1, 0], [1, 1], "row_ptr has to ascend within 0..2"),
        ([0, 5, 9], [1, 1], "row_ptr has to ascend within 0..2"),
        ([0, 1, 2], [64 * 4, 1], "ahead of query 0 without a causal mask"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_what_points_outside_is_refused(row_ptr: list[int], entries: list[int], says: str, impl: str) -> None:
    geometry = Geometry.of(200)
    numbers = (torch.tensor(values, dtype=torch.int32) for values in (row_ptr, entries))
    plan = BlockPlan(geometry, **dict(zip(("row_ptr", "entries"), numbers, strict=True)))
    with pytest.raises(SparsekitError, match=says):
        attend(*inputs_for(geometry), plan, impl=impl)


def test_a_traced_call_is_refused() -> None:
    q, _, _ = inputs_for(Geometry.of(200))
    for pattern in ("triangle", {"name": "block_topk", "top_k": 1, "dense_below_tokens": 0}):
        with pytest.raises(SparsekitError, match=r"torch\.jit\.trace would keep the plan"):
            torch.jit.trace(lambda q, pattern=pattern: attention(q, q, q, pattern), q)


def test_transforms_of_torch_func_are_refused() -> None:
    q = inputs_for(Geometry.of(200))[0][None]
    plan = plan_from_rule(TokenRule(4, 40, 180), Geometry.of(200))
    for run in (lambda q: attention(q, q, q, "triangle"), lambda q: attend(q, q, q, plan)):
        with pytest.raises(SparsekitError, match=r"forward only: torch\.func's vmap"):
            torch.func.vmap(run)(q)
