"""Writes sparsekit's kernel for the Hugging Face Hub: `python kernel_hub/package_kernel.py ORG/NAME FOLDER`.

    build.toml, README.md, LICENSE   what `kernel-builder upload` reads, the card, the licence
    torch-ext/NAME/                  the sources: those that `kernel_api.py` needs, with relative imports alone
    build/torch-BACKEND/             the same for each backend, and metadata.json: what `kernels.get_kernel` loads

The layout is that of the PyPI package `kernels` 0.17 for kernels without compiled code ("noarch"):
https://huggingface.co/docs/kernels/kernel-requirements. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import kernel_api

import sparsekit
from sparsekit.errors import SparsekitError, shown, writable
from sparsekit.kernels.device import TARGETS

HERE = Path(__file__).resolve().parent
PACKAGE = Path(sparsekit.__file__).resolve().parent
NAME = r"[a-z][-a-z0-9]*[a-z0-9]"  # of a kernel, as `kernels` takes it
VERSION = int(sparsekit.__version__.split(".")[0])  # 0 says that the kernel's API may still change
BACKENDS = ("cpu", "cuda", "rocm")
ARCHS = {"cuda": ["8.0+PTX"], "rocm": ["gfx942"]}  # +PTX: that one and later
# What a kernel on the Hub may import besides itself. Triton comes with torch.
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repo_id", metavar="ORG/NAME", help="where on the Hub the kernel will be")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="empty, or not there yet")
    given = parser.parse_args()
    try:
        write_package(given.repo_id, given.folder)
    except SparsekitError as error:
        sys.exit(f"error: {error}")


def write_package(repo_id: str, folder: Path) -> None:
    """Write the repository `repo_id` into `folder`.

    Raises:
        SparsekitError: a name that the Hub or `kernels` does not take, or a folder that is not empty.
    """
    if not re.fullmatch(rf"[\w.-]+/{NAME}", repo_id):
        raise SparsekitError(
            f"ORG/NAME={shown(repo_id)}: an organisation and a name of small letters, digits and hyphens, such as "
            "my-org/sparse-attention."
        )
    name = repo_id.split("/")[1]
    files = sources()
    with writable(folder, "folder"):
        if folder.exists() and any(folder.iterdir()):
            raise SparsekitError(f"folder {shown(str(folder))} is not empty.")
        source = folder / "torch-ext" / name.replace("-", "_")
        for path, text in files.items():
            target = source / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        for backend in BACKENDS:
            variant = folder / "build" / f"torch-{backend}"
            shutil.copytree(source, variant)
            said = json.dumps(metadata(name, backend, files), indent=2)
            (variant / "metadata.json").write_text(f"{said}\n", encoding="utf-8")
        (folder / "build.toml").write_text(build_toml(repo_id), encoding="utf-8")
        (folder / "README.md").write_text(card(repo_id), encoding="utf-8")
        shutil.copy(HERE.parent / "LICENSE", folder / "LICENSE")


# ---- sources


def sources() -> dict[str, str]:
    """Path -> text of `kernel_api.py` and of all of sparsekit that it needs, each standing alone.

    Raises:
        SparsekitError: one of them imports what a kernel on the Hub must not.
    """
    found = {"__init__.py": (HERE / "kernel_api.py").read_text(encoding="utf-8")}
    waiting = ["__init__.py"]
    while waiting:
        for path in _files(found[waiting.pop()]):
            if path not in found:
                found[path] = (PACKAGE / path).read_text(encoding="utf-8")
                waiting.append(path)
    files = {path: relative(text, path) for path, text in sorted(found.items())}
    for path, text in files.items():
        if strangers := sorted(absolute(text) - ALLOWED):
            raise SparsekitError(f"{path} imports {', '.join(strangers)}: a kernel on the Hub may only import torch.")
    return files


def _own(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """Imports from sparsekit, at any depth; as in all of the package each is a `from`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsekit":
            yield node


def _files(text: str) -> Iterator[str]:
    """The files of the package that a file of it imports, with the packages that they lie in."""
    for node in _own(ast.parse(text)):
        module = Path(*(node.module or "").split(".")[1:])
        for path in (module, *(module / alias.name for alias in node.names)):
            if (PACKAGE / path).with_suffix(".py").is_file():
                yield f"{path.as_posix()}.py"
            for folder in (path, *path.parents):
                if folder.name and (PACKAGE / folder / "__init__.py").is_file():
                    yield f"{folder.as_posix()}/__init__.py"


def relative(text: str, path: str) -> str:
    """The text of the package's file `path`, whose imports from sparsekit are relative."""
    lines = text.splitlines(keepends=True)
    dots = "." * len(Path(path).parts)
    for node in _own(ast.parse(text)):
        line = lines[node.lineno - 1]
        begin = f"from {node.module} "
        assert line[node.col_offset :].startswith(begin), f"{path}:{node.lineno}: {line}"
        inner = (node.module or "").removeprefix("sparsekit").removeprefix(".")
        lines[node.lineno - 1] = line.replace(begin, f"from {dots}{inner} ", 1)
    return "".join(lines)


def absolute(text: str) -> set[str]:
    """The packages that a file imports by name when it runs, at any depth."""
    tree = ast.parse(text)
    idle = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names if id(node) not in idle}
        elif isinstance(node, ast.ImportFrom) and not node.level and id(node) not in idle:
            found.add((node.module or "").split(".")[0])
    return found


# ---- what describes them


def build_toml(repo_id: str) -> str:
    quoted = {key: json.dumps(archs) for key, archs in ARCHS.items()}
    return f"""[general]
name = "{repo_id.split("/")[1]}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
cuda_capabilities = {quoted["cuda"]}
rocm_archs = {quoted["rocm"]}
"""


def metadata(name: str, backend: str, files: dict[str, str]) -> dict[str, object]:
    """What `kernels` asks of a build; its `id`, the name of the loaded module, tells sources apart."""
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in files.items()}
    all_of_them = hashlib.sha256(b"".join(digests[path] for path in sorted(digests))).hexdigest()
    return {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{backend}_{all_of_them[:7]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend, **({"archs": ARCHS[backend]} if backend in ARCHS else {})},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(digest).decode() for path, digest in sorted(digests.items())},
        },
    }


def card(repo_id: str) -> str:
    """README.md: `CARD.md` with the names of the API and the targets filled in."""
    names = [f"| `{name}` | {_summary(getattr(kernel_api, name))} |" for name in kernel_api.__all__]
    targets = [f"| {one.name} | {', '.join(f'`{i}`' for i in one.implementations)} | {one.proved} |" for one in TARGETS]
    return Template((HERE / "CARD.md").read_text(encoding="utf-8")).substitute(
        repo_id=repo_id, version=VERSION, names="\n".join(names), targets="\n".join(targets)
    )


def _summary(value: object) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.;:]) (?=[A-Z])", text)[0].replace("|", "\\|")


if __name__ == "__main__":
    main()
