"""The API reference lists what is public: all of `sparsekit.__all__`, and the named parts of a few modules below.

The site puts the docstrings there (website/hooks.py). `python tests/test_reference.py MODULE` prints a page's table.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sparsekit
from sparsekit.patterns import Pattern, pattern_class, pattern_names

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "README.md")


def listed(page: Path) -> dict[str, list[str]]:
    """Module -> the names in its table on a page."""
    tables = re.findall(r"<!-- reference (\S+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL)
    return {module: re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for module, table in tables}


PUBLIC = {module: names for page in PAGES for module, names in listed(page).items()}


def summary(value: object) -> str:
    """The first paragraph of a docstring up to its first sentence's end, as a cell of a table."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.;:]) (?=[A-Z])", text)[0].replace("|", "\\|")


def table(module: str, names: list[str]) -> str:
    rows = [f"| `{name}` | {summary(getattr(import_module(module), name))} |\n" for name in names]
    return "".join(["| name | what it is |\n", "|---|---|\n", *rows])


def test_all_of_sparsekit_is_in_the_reference() -> None:
    assert PUBLIC["sparsekit"] == sparsekit.__all__


@pytest.mark.parametrize("module", PUBLIC)
def test_listed_names_are_public_and_documented(module: str) -> None:
    own = import_module(module)
    assert PUBLIC[module]
    for name in PUBLIC[module]:
        assert name in own.__all__, f"{module}.{name} is not in its `__all__`"
        assert summary(getattr(own, name)), f"{module}.{name} has no docstring"
    assert len(set(PUBLIC[module])) == len(PUBLIC[module])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_are_the_docstrings(page: Path) -> None:
    text = page.read_text()
    for module, names in listed(page).items():
        [shown] = re.findall(rf"<!-- reference {module} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert shown == table(module, names), f"`python tests/test_reference.py {module}` prints the table"


def test_every_page_is_in_the_list_of_pages() -> None:
    links = re.findall(r"\]\((\w+\.md)\)", (FOLDER / "README.md").read_text())
    assert sorted(links) == [page.name for page in PAGES]


def _imported(text: str) -> set[tuple[str, str]]:
    """(module, name) that the Python of a page imports from sparsekit: no laboratory, nothing it defines itself."""
    found, defined = set(), set()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ClassDef):
                defined.add(node.name)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsekit"):
                found |= {(node.module or "", alias.name) for alias in node.names}
    return {(module, name) for module, name in found if not module.startswith("sparsekit.lab") and name not in defined}


PATHS = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]


@pytest.mark.parametrize("path", PATHS)
def test_what_pages_import_is_public(path: str) -> None:
    objects = [getattr(import_module(module), name) for module, names in PUBLIC.items() for name in names]
    patterns = [pattern_class(name) for name in pattern_names()]  # each has a page of its own
    for module, name in _imported((ROOT / path).read_text()):
        value = getattr(import_module(module), name)
        assert any(value is one for one in (*objects, *patterns)), (
            f"{path} imports {module}.{name}, which is not public"
        )


def test_patterns_are_documented_by_their_own_pages() -> None:
    assert not {pattern_class(name).__name__ for name in pattern_names()} & set(PUBLIC["sparsekit.patterns"])
    assert issubclass(sparsekit.patterns.BlockPattern, Pattern)


if __name__ == "__main__":
    print(table(sys.argv[1], PUBLIC[sys.argv[1]]), end="")
