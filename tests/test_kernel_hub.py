"""The kernel for the Hugging Face Hub stands alone, and computes what sparsekit computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import package_kernel
import pytest
import torch

from sparsekit import SparsekitError

ROOT = Path(__file__).parents[1]
WITHOUT = "the package `kernels` is not installed: pip install 'sparsekit-attention[interop]'"
# A module of it: tests/kernels answers to the name alone.
needs_kernels = pytest.mark.skipif(find_spec("kernels.importer") is None, reason=WITHOUT)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; both are compared")


def _python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """In a process that leaves no bytecode in the folder: what is there is compared."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hub") / "kernel"
    ran = _python(str(ROOT / "kernel_hub" / "package_kernel.py"), "my-org/sparse-attention", str(made))
    assert ran.returncode == 0, ran.stderr
    return made


Run = Callable[[str], "tuple[dict[str, torch.Tensor], dict[str, Any]]"]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What `hub_kernel.py` saved and said, of a way to get the kernel."""

    def ran(way: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        saved = tmp_path_factory.mktemp(way) / "results.pt"
        child = _python(str(ROOT / "tests/hub_kernel.py"), way, str(folder), str(saved), TRITON_INTERPRET="1")
        assert child.returncode == 0, child.stderr[-4000:]
        said = json.loads(child.stdout.splitlines()[-1]) if way != "sparsekit" else {}
        return torch.load(saved), said

    return ran


@pytest.fixture(scope="module")
def wanted(run: Run) -> dict[str, torch.Tensor]:
    return run("sparsekit")[0]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", pytest.param("kernels", marks=needs_kernels)])
def test_it_runs_without_sparsekit_and_computes_the_same(way: str, run: Run, wanted: dict[str, torch.Tensor]) -> None:
    found, said = run(way)
    assert found.keys() == wanted.keys() and len(found) == 12
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert said["heavy"] == [] or way == "kernels"  # which reads YAML itself
    assert said["refused"] == [
        "window_tokens=0: a whole number of tokens, 1 or more.",
        "last_tokens=-1: a whole number of tokens, 0 or more.",
        "impl='trition': one of hopper, triton, torch, reference, hopper_fp8, triton_fp8, fp8, or None. "
        "Did you mean 'triton'?",
    ]


def test_a_build_holds_what_its_metadata_says(folder: Path) -> None:
    ids = set()
    for backend in ("cpu", "cuda", "rocm"):
        variant = folder / "build" / f"torch-{backend}"
        said = json.loads((variant / "metadata.json").read_text())
        files = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
        assert files - {"metadata.json"} == said["digest"]["files"].keys()
        assert said["backend"]["type"] == backend and said["id"].isidentifier()
        ids.add(said["id"])
        sources = folder / "torch-ext" / "sparse_attention"
        assert all((variant / name).read_bytes() == (sources / name).read_bytes() for name in said["digest"]["files"])
    assert len(ids) == 3
    assert not list(folder.rglob("*.pyc"))


@needs_kernels
def test_kernels_takes_its_files(folder: Path) -> None:
    from kernels import _rust

    build = _rust.Build.open(folder)
    assert [str(backend) for backend in build.general.backends] == ["cpu", "cuda", "rocm"]
    for variant in sorted((folder / "build").iterdir()):
        read = _rust.Metadata.read_from_file(variant / "metadata.json")
        assert read.python_depends == [] and read.kernel_depends == []
        read.digest.validate(_rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, variant))


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [
        ("sparse-attention", "an organisation and a name of small letters"),
        ("my-org/Sparse", "an organisation and a name of small letters"),
        ("my-org/sparse", "is not empty."),
    ],
)
def test_what_it_does_not_write_is_one_line(
    repo_id: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["package_kernel.py", repo_id, str(folder)])
    with pytest.raises(SystemExit) as ended:
        package_kernel.main()
    assert said in str(ended.value) and str(ended.value).startswith("error: ") and "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("text", "path", "written"),
    [
        ("from sparsekit.plan import A\n", "__init__.py", "from .plan import A\n"),
        ("from sparsekit.plan import A\n", "errors.py", "from .plan import A\n"),
        ("from sparsekit.plan.memo import A\n", "plan/rows.py", "from ..plan.memo import A\n"),
        ("def f():\n    from sparsekit.x import (\n        A,\n    )\n", "a/b/__init__.py", None),
    ],
)
def test_imports_become_relative(text: str, path: str, written: str | None) -> None:
    assert package_kernel.relative(text, path) == (written or text.replace("sparsekit.x", "...x"))


def test_what_a_kernel_may_not_import_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import torch.nn, einops\nif TYPE_CHECKING:\n    import pydantic\ndef f():\n    from yaml import load\n"
    assert package_kernel.absolute(text) - package_kernel.ALLOWED == {"einops", "yaml"}
    monkeypatch.setattr(package_kernel, "ALLOWED", package_kernel.ALLOWED - {"torch"})
    with pytest.raises(SparsekitError, match=r"__init__\.py imports torch: a kernel on the Hub may only"):
        package_kernel.sources()
