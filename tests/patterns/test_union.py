"""Unions of static and dynamic patterns: what any member keeps, in one plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from join_cases import TRIANGLE, random_plan
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry, Span
from sparsekit.call.softmax import Softmax
from sparsekit.patterns import (
    AShape,
    BlockTopK,
    DynamicPattern,
    DynamicUnion,
    Pattern,
    StaticPattern,
    Triangle,
    Union,
    base,
    parse_pattern,
)
from sparsekit.plan import BlockPlan
from sparsekit.testing import GEOMETRIES, check_pattern, inputs_for

SOFTMAX = Softmax(0.25)


class Scattered(DynamicPattern):
    """Unaligned tiles and columns at random places, the same for the same lengths."""

    name: str = "scattered"
    seed: int = 0
    tiles: int = 3
    columns: int = 5

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        return random_plan(geometry, self.seed, heads=q.shape[1], tiles=self.tiles, columns=self.columns, spare=3)


class Alone(Scattered):
    """Needs a layer of its own."""

    name: str = "alone"
    whole_layer: ClassVar[bool] = True


class EveryThird(StaticPattern):
    """Every third block of 64 keys, and the query's own; no rule."""

    name: str = "every_third"

    def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
        return (k_pos <= q_pos) & ((k_pos // 64 % 3 == 0) | (k_pos // 64 == q_pos // 64))


class Uniform(Pattern):
    """Neither static nor dynamic: a plan of its own."""

    name: str = "uniform"

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        return AShape(sink_tokens=0, window_tokens=9).plan(q, k, geometry, softmax)


# Other files look at the whole registry: these are in it only while this file's tests run.
OWN = {name: base._REGISTRY.pop(name) for name in ("scattered", "alone", "every_third", "uniform")}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    base._REGISTRY.update(OWN)
    yield
    for name in OWN:
        del base._REGISTRY[name]


UNIONS: list[Pattern] = [
    parse_pattern({"name": "union", "of": [Scattered(), TRIANGLE]}),
    parse_pattern({"name": "union", "of": [Scattered(seed=1), Scattered(seed=2, columns=40)]}),
    parse_pattern({"name": "union", "of": [{"name": "block_topk", "top_k": 2}, TRIANGLE]}),
    parse_pattern({"name": "union", "of": [{"name": "block_topk", "top_k": 2}, Scattered(), {"name": "a_shape"}]}),
    parse_pattern({"name": "union", "of": [{"name": "union", "of": [Scattered(), TRIANGLE]}, AShape(sink_tokens=70)]}),
]


@pytest.mark.parametrize("pattern", UNIONS, ids=range(len(UNIONS)))
def test_contract(pattern: Pattern) -> None:
    assert isinstance(pattern, DynamicUnion)
    check_pattern(pattern)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=range(len(GEOMETRIES)))
def test_a_union_keeps_what_its_members_keep(geometry: Geometry) -> None:
    q, k, _ = inputs_for(geometry)
    for pattern in UNIONS:
        assert isinstance(pattern, DynamicUnion)
        mask = pattern.plan(q, k, geometry, SOFTMAX).to_mask()
        for leaf in pattern.leaves():
            own = leaf.plan(q, k, geometry, SOFTMAX).to_mask()
            assert bool((mask | ~own).all()), f"{leaf} is not in {pattern}"


@pytest.mark.parametrize("other", [AShape(sink_tokens=70, window_tokens=1), Uniform()], ids=str)
def test_no_member_need_be_dynamic(other: Pattern) -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    q, k, _ = inputs_for(geometry)
    for members in ((TRIANGLE,), (TRIANGLE, other)):
        pattern = DynamicUnion(name="union", of=members)
        wanted = [leaf.plan(q, k, geometry, SOFTMAX).to_mask() for leaf in members]
        mask = pattern.plan(q, k, geometry, SOFTMAX).to_mask()
        assert all(bool((mask | ~own).all()) for own in wanted)
        assert not bool(mask.all())
        assert pattern.dense_below(torch.device("cuda")) == 0
    assert (
        DynamicUnion(name="union", of=(TRIANGLE, other), dense_below_tokens=301).plan(q, k, geometry, SOFTMAX).all_dense
    )


def test_static_members_without_a_rule_join_by_their_tiles() -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    members = (EveryThird(), TRIANGLE, Scattered(tiles=0, columns=0), AShape(sink_tokens=3, window_tokens=10))
    mask = DynamicUnion(name="union", of=members).plan(*inputs_for(geometry)[:2], geometry, SOFTMAX).to_mask()
    wanted = [leaf.plan(*inputs_for(geometry)[:2], geometry, SOFTMAX).to_mask() for leaf in members]
    assert torch.equal(mask, wanted[0] | wanted[1] | wanted[2] | wanted[3])


def test_yaml_makes_the_kind_that_its_members_need() -> None:
    static = parse_pattern({"name": "union", "of": ["a_shape", "triangle"]})
    assert isinstance(static, Union) and isinstance(static, StaticPattern)
    mixed = parse_pattern({"name": "union", "of": ["a_shape", {"name": "block_topk", "top_k": 3}]})
    assert isinstance(mixed, DynamicUnion) and mixed.name == "union"
    assert mixed.of == (AShape(), BlockTopK(top_k=3))
    assert parse_pattern(mixed.to_yaml()) == mixed
    assert str(mixed).startswith("union(of=a_shape(") and "block_topk(top_k=3" in str(mixed)
    nested = parse_pattern({"name": "union", "of": ["triangle", static]})
    assert isinstance(nested, Union)


def test_one_dense_member_makes_it_dense_before_anything_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scattered, "select", lambda *_: pytest.fail("estimated"))
    pattern = parse_pattern({"name": "union", "of": [Scattered(), "dense"]})
    geometry = Geometry.of(300)
    assert pattern.plan(*inputs_for(geometry)[:2], geometry, SOFTMAX).all_dense


def test_a_union_runs_dense_where_its_members_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scattered, "pays_from_tokens", {"cpu": 301})
    for tokens, dense in ((300, True), (301, False)):
        geometry = Geometry.of(tokens)
        assert UNIONS[0].plan(*inputs_for(geometry)[:2], geometry, SOFTMAX).all_dense is dense


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (["triangle", "alone"], r"union: of.*of\[1\]: 'alone' needs a layer of its own; a union cannot hold it"),
        (["scattered", {"name": "union", "of": ["alone"]}], r"of\[1\]: .*of\[0\]: 'alone' needs a layer of its own"),
        (["scattered", "nope"], r"of\[1\]: unknown pattern 'nope'"),
        ([], "at least 1 item"),
        ("triangle", "it must be a list of patterns"),
    ],
)
def test_refused(of: object, says: str) -> None:
    with pytest.raises(SparsekitError, match=says):
        parse_pattern({"name": "union", "of": of})


def test_a_static_union_in_python_names_the_other_kind() -> None:
    with pytest.raises(ValueError, match=r"of\[1\]: 'scattered' is dynamic; join it with a DynamicUnion"):
        Union(of=(Triangle(), Scattered()))  # type: ignore[arg-type]
    assert DynamicUnion(name="union", of=(Triangle(), Scattered())) == parse_pattern(
        {"name": "union", "of": ["triangle", Scattered()]}
    )
