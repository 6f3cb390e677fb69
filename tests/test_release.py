"""What a release promises: one version, bounds of what was tested, a notebook that runs, and data that is never code.

`make release-check` builds and installs what would be published.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import yaml

import sparsekit

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_prompt.ipynb"


def test_the_files_agree_on_the_version() -> None:
    """CITATION.cff and the changelog's first section below Unreleased; that has a date, or is not released yet."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    sections = re.findall(r"^## \[(.*?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    newest, when = sections[1]
    assert cited["version"] == newest == sparsekit.__version__
    assert re.fullmatch(r" - (\d{4}-\d\d-\d\d|not released yet)", when)
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in sections[2:])


def test_every_dependency_has_a_lower_bound() -> None:
    """`.ci/nightly` installs these bounds; without one it would install, or not, a release that nobody has tried."""
    text = (ROOT / "pyproject.toml").read_text()
    [needed] = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    [extras] = re.findall(r"^\[project.optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    checked = ("demo", "plots", "report", "test")
    lists = [line.partition("=")[2] for line in extras.splitlines() if line.startswith(checked)]
    named = re.findall(r'"([^"]+)"', needed + "".join(lists))
    assert len(named) > 15
    for requirement in named:
        assert ">=" in requirement or requirement.startswith("sparsekit-attention["), requirement


# ---- what SECURITY.md says


def _calls(tree: ast.AST) -> set[str]:
    """Names of what is imported or called, and the keywords of calls that are not False."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call):
            if isinstance(node.func, (ast.Name, ast.Attribute)):
                found.add(ast.unparse(node.func))
            found |= {
                keyword.arg
                for keyword in node.keywords
                if keyword.arg and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            }
    return found


FORBIDDEN = {
    *("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch.load"),
    *("eval", "exec", "compile", "os.system", "shell", "trust_remote_code", "allow_pickle"),
    *("yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.FullLoader"),
}


def test_what_is_read_is_data() -> None:
    """No file of the package unpickles, evaluates text, or lets a checkpoint bring code."""
    for path in Path(sparsekit.__file__).parent.rglob("*.py"):
        assert not _calls(ast.parse(path.read_text())) & FORBIDDEN, path


@pytest.mark.parametrize("line", ["import pickle", "torch.load(f)", "m.load(p, trust_remote_code=ask)", "eval(text)"])
def test_code_in_data_would_be_found(line: str) -> None:
    assert _calls(ast.parse(line)) & FORBIDDEN


# ---- the notebook


def test_the_notebook_is_stripped() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: `make test` installs it")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
        for link in re.findall(r"\]\(([^)#]+)\)", cell.source):
            assert link.startswith("https://") or (NOTEBOOK.parent / link).is_file(), link


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, from another folder, as a reader runs it."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: `make test` installs it")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: `make test` installs it")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: `make test` installs it")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    text = {
        name: "".join(one["text"] for one in cell if one.output_type == "stream" and one.name == "stdout")
        for name, cell in outputs.items()
    }
    assert re.match(r"dense: +'71432', first token after \d", text["ask"])
    assert re.match(r"TriangleMix: '71432', first token after \d", text["mix"])
    assert re.search(r"20 +dense .*\n +21 +sparse .*triangle", text["mix"])
    assert "Predicted prefill of 8,192 tokens" in text["explain"] and "heads 0-2: dense" in text["explain"]
    assert "dense said '71432'" in text["run-own"]
    for name in ("mask", "plot"):
        assert [one for one in outputs[name] if "image/png" in one.get("data", {})], name
