"""The recipes of CONTRIBUTING.md: the one for a pattern is followed to the letter, and all name files that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
CODE_LINES = 25


def _section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def _files() -> dict[str, str]:
    """Path -> text of the three files of the recipe for a pattern."""
    text = _section("A pattern")
    steps = re.findall(r"^\*\*\d\. `(.*?)`\*\*.*?\n(`{3,})\w+\n(.*?)\n\2$", text, re.DOTALL | re.MULTILINE)
    return {path: f"{block}\n" for path, _, block in steps}


def _command(word: str) -> list[str]:
    """The recipe's command with that word, for this Python."""
    [block] = re.findall(r"```bash\n(.*?)```", _section("A pattern"), re.DOTALL)
    [line] = [line for line in block.replace("\\\n", "").splitlines() if word in line]
    return [sys.executable, *shlex.split(line)[1:]]


def _run(repository: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which the recipe was followed."""
    copy = tmp_path_factory.mktemp("repository")
    skip = shutil.ignore_patterns("__pycache__", "*.png")
    for name in ("sparsekit", "tests", "docs", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    for path, text in _files().items():
        target = copy / path
        if not target.exists():
            target.write_text(text)
            continue
        [name] = re.findall(r"import (\w+)$", text)
        marked = target.read_text().replace("__all__ = [", f'{text}\n__all__ = [\n    "{name}",')
        assert marked.count(text) == 1
        target.write_text(marked)
    return copy


def test_a_pattern_is_three_files_and_few_lines() -> None:
    files = _files()
    assert [Path(path).parent.as_posix() for path in files] == [
        "sparsekit/patterns",
        "sparsekit/patterns",
        "docs/patterns",
    ]
    new = [path for path in files if not (ROOT / path).exists()]
    assert len(new) == 2
    code = [line for line in files[new[0]].splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= CODE_LINES, f"{len(code)} lines"


@pytest.mark.slow
def test_the_pattern_of_the_recipe_passes_the_tests_of_patterns(repository: Path) -> None:
    """Those of its contract, of every kind of call, of unions with it, of pages and of the house."""
    name = Path(next(iter(_files()))).stem
    ran = _run(repository, *_command("pytest"), "-v", "-p", "no:cacheprovider")
    assert ran.returncode == 0, ran.stdout[-3000:]
    passed = [line.split("::") for line in ran.stdout.splitlines() if "PASSED" in line and name in line]
    assert {"test_patterns.py", "test_calls.py", "test_composition.py", "test_docs.py", "test_architecture.py"} <= {
        Path(file).name for file, *_ in passed
    }
    assert {"test_contract", "test_padded_batches_are_the_single_runs", "test_dynamic_patterns_in_chunks"} <= {
        test.split("[")[0] for _, test in passed
    }


@pytest.mark.slow
def test_the_pattern_of_the_recipe_can_be_measured(repository: Path) -> None:
    ran = _run(repository, *_command("bench"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert re.search(r"loud_blocks +0\.\d{4} ", ran.stdout), ran.stdout  # a share of the pairs


def test_recipes_name_files_that_exist() -> None:
    made = {path for path in _files() if not (ROOT / path).exists()}
    named = set(re.findall(r"`((?:sparsekit|tests|docs)/[\w./]+)`", PAGE)) | {"docs/architecture.md"}
    assert len(named) > 20
    missing = sorted(path for path in named - made if "NAME" not in path and not (ROOT / path).exists())
    assert not missing
    for path in named:
        assert "NAME" not in path or (ROOT / path).parent.is_dir(), path


def test_there_is_a_recipe_for_each_kind_of_addition() -> None:
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert titles == [
        "A pattern",
        "A layer rule",
        "Another project's settings",
        "A bench",
        "A device's crossovers",
        "A model family's quirk",
        "A kernel form",
        "A task",
        "A release",
    ]
