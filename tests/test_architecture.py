"""The house: imports go one way, files stay short, and importing sparsekit costs and changes nothing.

`python tests/test_architecture.py` prints the table of rooms in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparsekit

PACKAGE = Path(sparsekit.__file__).parent

# Lower rooms first. Rooms on one line do not import one another, except inside their own folder.
FLOORS: list[set[str]] = [
    {"errors"},
    {"call"},
    {"plan"},
    {"kernels"},
    {"patterns"},
    {"config", "testing"},
    {"patch", "serve"},
    {"models"},
    {"lab"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))

HOST_LINES = 450
LARGEST_TRACKED = 1 << 19  # bytes; the longest record has 150 KB


def _room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


@cache
def _imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, at run time?) of everything a file imports; `if TYPE_CHECKING:` does not run."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) not in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports from the top, `from sparsekit...`"
            found.append((node.module or "", node.lineno, id(node) not in typing_only))
            found += [(f"{node.module}.{alias.name}", node.lineno, id(node) not in typing_only) for alias in node.names]
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=lambda p: _room(p))
def test_imports_go_down(path: Path) -> None:
    room = _room(path)
    assert room in FLOOR_OF, f"{path.name}: a room that is not in the plan of the house"
    for module, line, runs in _imports(path):
        parts = module.split(".")
        if parts[0] != "sparsekit" or len(parts) < 2 or parts[1] == room or not runs:
            continue
        if parts[1].startswith("__") or parts[1] not in FLOOR_OF:
            assert parts[1] in sparsekit.__all__ or parts[1].startswith("__"), f"{path}:{line}: {module}?"
            continue
        assert FLOOR_OF[parts[1]] < FLOOR_OF[room], f"{path}:{line}: {room} imports {parts[1]}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_imports_stay_in_their_rooms(path: Path) -> None:
    for module, line, _ in _imports(path):
        top = module.split(".")[0]
        if top == "triton":
            assert _is_device_code(path) or _room(path) == "lab", f"{path}:{line}: triton is for kernels"
        if top == "transformers":
            assert _room(path) in {"patch", "models", "lab", "cli"}, f"{path}:{line}: transformers here"
        if top == "vllm":
            assert path.is_relative_to(PACKAGE / "serve" / "vllm"), f"{path}:{line}: vllm is for serve/vllm"
        if module.startswith("sparsekit.lab"):
            assert _room(path) in {"lab", "cli"}, f"{path}:{line}: only the command line knows the laboratory"


def _is_device_code(path: Path) -> bool:
    """Kernels, and what starts them."""
    stem = path.stem
    named = stem in {"launch", "primitives"} or stem.endswith("_triton") or stem.startswith("triton_")
    return _room(path) == "kernels" and (named or "hopper" in path.parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_host_files_are_short(path: Path) -> None:
    """Device code is exempt: a kernel is one function. The Hopper forms' starters stand in files of their own."""
    lines = len(path.read_text().splitlines())
    exempt = _is_device_code(path) and ("hopper" not in path.parts or path.stem.endswith("device"))
    assert lines <= HOST_LINES or exempt, f"{path} has {lines} lines, more than {HOST_LINES}"


def test_the_root_is_small() -> None:
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert len(entries) <= 15, entries


def _summary(room: str) -> str:
    """The first sentence of a room's docstring."""
    path = PACKAGE / room / "__init__.py"
    tree = ast.parse((path if path.is_file() else PACKAGE / f"{room}.py").read_text())
    text = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z])", text)[0]


def floors_table() -> str:
    rows = ["| floor | room | what it is |", "|---:|---|---|"]
    for floor in range(len(FLOORS) - 1, -1, -1):
        rows += [f"| {floor} | `{room}` | {_summary(room)} |" for room in sorted(FLOORS[floor])]
    return "\n".join(rows) + "\n"


def test_the_page_shows_the_floors() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    [shown] = re.findall(r"<!-- floors -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert shown == floors_table(), "`python tests/test_architecture.py` prints the table"


def _module(path: Path) -> str:
    return ".".join(("sparsekit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _graph() -> dict[str, set[str]]:
    """Which files of the package each file imports, at any depth of its code."""
    names = {_module(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        module = _module(path)
        imported = {name for name, _, _ in _imports(path)}
        graph[module] = (imported & names) - {module, "sparsekit"}
    return graph


def test_no_cycle_of_files() -> None:
    """Not even of files that import each other's types alone."""
    TopologicalSorter(_graph()).prepare()


def _folder(module: str, *names: str) -> bool:
    return module.startswith(tuple(f"sparsekit.kernels.{name}" for name in names))


def test_the_wings_of_kernels_do_not_know_one_another() -> None:
    for module, imported in _graph().items():
        for name in imported:
            assert not (_folder(module, "select") and _folder(name, "attend")), f"{module} imports {name}"
            assert not (_folder(module, "attend") and _folder(name, "select")), f"{module} imports {name}"
            twin = module.removesuffix("_triton")
            assert twin == module or name != twin, f"{module} imports {name}, which is its definition"


def test_no_room_for_everything() -> None:
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_import_is_light() -> None:
    """In a fresh process: neither triton nor transformers, and no public name missing."""
    code = (
        "import sys, sparsekit\n"
        "import sparsekit.patterns.attention, sparsekit.config, sparsekit.testing\n"
        "for name in sparsekit.__all__:\n"
        "    getattr(sparsekit, name)\n"
        "heavy = {'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(sparsekit.__all__) <= set(dir(sparsekit))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_without_triton() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, sparsekit\n"
        "q = torch.randn(1, 2, 100, 16)\n"
        "assert sparsekit.attention(q, q, q, 'triangle').shape == q.shape\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_names_exist() -> None:
    for name in sparsekit.__all__:
        assert getattr(sparsekit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = sparsekit.aply


if __name__ == "__main__":
    print(floors_table(), end="")


def test_what_is_tracked_is_small() -> None:
    """No weights, no build: a clone is read by everyone."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        pytest.skip("no Git checkout here; what is tracked is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    files = [root / name for name in listed.stdout.split("\0") if name]
    assert [str(file) for file in files if file.is_file() and file.stat().st_size > LARGEST_TRACKED] == []
