"""Patterns of other packages: a broken one is a warning that names its package, and the rest go on."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from sparsekit import SparsekitError
from sparsekit.cli import app
from sparsekit.patterns import Triangle, base, parse_pattern, pattern_names
from sparsekit.patterns.base import StaticPattern

GOOD = """
from typing import Literal
from pydantic import Field
from sparsekit.patterns import StaticPattern
class {name}(StaticPattern):
    "The nearest keys."
    name: Literal["{name}"] = "{name}"
    tokens: int = Field(64, ge=1, description="nearest keys, tokens")
    weights: tuple[float, ...] = (1.0,)
    def keep(self, q_pos, k_pos, span):
        return k_pos <= q_pos
"""
BROKEN = {
    "import": "import a_module_that_is_not_there",
    "name": "x = undefined",
    "syntax": "def",
    "exit": "import sys; sys.exit('no licence')",
    "taken": GOOD.format(name="triangle").replace("class triangle", "class Other"),
    "list": GOOD.format(name="lists").replace("tuple[float, ...] = (1.0,)", "list[float] = [1.0]"),
    "assert": "assert False, 'line one\\nline two'",
}


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs entry points: name -> (value, source of the module)."""
    monkeypatch.syspath_prepend(tmp_path)
    registry, modules = dict(base._REGISTRY), set(sys.modules)

    def install(**points: tuple[str, str]) -> None:
        found = []
        for name, (value, source) in points.items():
            (tmp_path / f"{value.partition(':')[0]}.py").write_text(source)
            found.append(EntryPoint(name, value, base.ENTRY_POINTS))
        importlib.invalidate_caches()
        monkeypatch.setattr(base, "entry_points", lambda group: EntryPoints(found))
        monkeypatch.setattr(base, "_loaded", False)

    yield install
    base._REGISTRY.clear()
    base._REGISTRY.update(registry)
    for module in set(sys.modules) - modules:
        del sys.modules[module]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_does_not_stop_the_others(kind: str, offer: Callable[..., None]) -> None:
    offer(bad=("broken_plugin:x", BROKEN[kind]), good=("good_plugin:near", GOOD.format(name="near")))
    result = CliRunner().invoke(app, ["patterns", "--json"])
    assert result.exit_code == 0 and '"near"' in result.stdout and '"triangle"' in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: patterns of the package 'broken_plugin' are left out")
    assert (
        str(parse_pattern({"name": "near", "tokens": 3, "weights": [1.0, 2.0]})) == "near(tokens=3, weights=1.0 | 2.0)"
    )
    assert type(parse_pattern("triangle")) is Triangle
    assert not CliRunner().invoke(app, ["patterns"]).stderr  # said once


@pytest.mark.parametrize(
    ("value", "source", "says"),
    [
        ("odd_plugin:number", "number = 3", "neither a Pattern nor a module: 3"),
        ("odd_plugin:function", "def function(): ...", "neither a Pattern nor a module"),
        ("odd_plugin:int", "int = int", "neither a Pattern nor a module"),
        (
            "odd_plugin:StaticPattern",
            "from sparsekit.patterns import StaticPattern",
            "a pattern without a name of its own",
        ),
        ("odd_plugin:missing", "", "AttributeError"),
    ],
)
def test_an_entry_point_that_is_no_pattern(value: str, source: str, says: str, offer: Callable[..., None]) -> None:
    offer(odd=(value, source))
    with pytest.warns(RuntimeWarning, match=says):
        assert "triangle" in pattern_names()


def test_a_module_that_registers_its_patterns_and_asks_for_them(offer: Callable[..., None]) -> None:
    source = GOOD.format(name="near") + "from sparsekit.patterns import parse_pattern\nparse_pattern('near')\n"
    offer(module=("good_plugin", source))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "near" in pattern_names()


def test_a_field_that_cannot_be_hashed_is_refused_where_it_is_defined() -> None:
    for annotation in (
        list[int], dict[str, int], set[int], list[int] | None, tuple[list[int], ...], Mapping[str, int]
    ):  # fmt: skip
        with pytest.raises(SparsekitError, match="the field 'blocks' may be a list, a mapping or a set"):
            type(
                "Unhashable",
                (StaticPattern,),
                {
                    "__module__": __name__,
                    "__annotations__": {"name": Literal["unhashable"], "blocks": annotation},
                    "name": "unhashable",
                },
            )
    assert "unhashable" not in pattern_names()


def test_numbers_that_no_plan_holds() -> None:
    for fields in ({"name": "triangle", "last_tokens": 2**31}, {"name": "block_topk", "top_k": 10**30}):
        with pytest.raises(SparsekitError, match="is too large; numbers go up to 2,147,483,647"):
            parse_pattern(fields)
    with pytest.raises(ValueError, match="is too large"):
        Triangle(window_tokens=10**400)
    given: Any = {"name": "triangle", "window_tokens": 2**31 - 1}
    assert parse_pattern(given)
