"""What would be published, checked as a user gets it. `make release-check` runs it; nothing is uploaded.

- The wheel holds exactly the tracked files of sparsekit/ and configs/, the sdist all but those of CI and the Git host.
- A wheel built from the unpacked sdist has the same files, byte for byte. The sdist's tests are all collected, and some
  are run there.
- The metadata is valid and the same in both, and the wheel has no stray files (check-wheel-contents).
- The wheel, installed without its dependencies into a new environment, works outside of any checkout. That environment
  sees the dependencies of the project's own through a .pth file, which does not lead on to the editable install there:
  nothing is downloaded twice, and what is imported comes from the wheel. Whether the declared dependencies suffice, and
  in which versions, is for .ci/nightly.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/smollm2-135m/trianglemix.yaml"
# Sparse differs from dense, and nothing stays behind.
APPLY = """
import torch, sparsekit
from sparsekit.models import tiny
model = tiny("llama")
config = {"default": {"name": "triangle", "window_tokens": 64, "last_tokens": 64}, "dense_below_tokens": 0}
tokens = torch.arange(2, 202).repeat(2)[None]
with torch.inference_mode():
    dense = model(tokens).logits
    with sparsekit.apply(model, config) as handle:
        sparse = model(tokens).logits
        report = str(handle.report())
    assert "sparse" in report, report
    assert not torch.equal(dense, sparse), "triangle changed nothing"
    assert torch.equal(dense, model(tokens).logits), "the model is not what it was"
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Stdout; a command that fails ends the check with all that it said."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"release-check: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def same(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        lines = [f"  too much: {name}" for name in sorted(found - expected)]
        lines += [f"  missing: {name}" for name in sorted(expected - found)]
        sys.exit("\n".join([f"release-check: {what}", *lines]))


def build(kind: str, source: Path, out: Path) -> Path:
    """Without isolation: the build backend is installed with the other tools of a developer."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source)
    [built] = out.iterdir()
    return built


def wheel_files(wheel: Path) -> dict[str, int]:
    """File -> checksum."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


def unpacked(sdist: Path, out: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    [folder] = out.iterdir()
    return folder


def check_metadata(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name)
    Metadata.from_email(text, validate=True)  # an unknown or malformed field is an error
    assert text == (source / "PKG-INFO").read_bytes(), "the sdist's metadata is not the wheel's"


def check_files(wheel: Path, source: Path) -> None:
    tracked = set(run("git", "ls-files").splitlines())
    package = {name for name in tracked if name.startswith("sparsekit/")}
    package |= {f"sparsekit/{name}" for name in tracked if name.startswith("configs/")}
    same("files of the wheel", {name for name in wheel_files(wheel) if ".dist-info/" not in name}, package)
    held = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    shipped = {name for name in tracked if not name.startswith((".ci/", ".github/"))}
    same("files of the sdist", held, shipped | {"PKG-INFO"})


def check_sdist(wheel: Path, source: Path, work: Path) -> None:
    rebuilt = wheel_files(build("wheel", source, work / "rebuilt"))
    same("wheel of the sdist beside that of the checkout", set(rebuilt), set(wheel_files(wheel)))
    changed = [name for name, checksum in wheel_files(wheel).items() if rebuilt[name] != checksum]
    if changed:
        sys.exit(f"release-check: the sdist's wheel has other content in {', '.join(changed)}")
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    run(*pytest, "--collect-only", "tests", cwd=source, PYTHONPATH=str(source))
    run(*pytest, "tests/test_architecture.py", "tests/plan", cwd=source, PYTHONPATH=str(source))


def check_wheel(wheel: Path, work: Path) -> None:
    venv.create(work / "venv", with_pip=False, symlinks=True)
    python = work / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    [site] = (work / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    away = work / "away"
    away.mkdir()

    def said(*command: str | Path) -> str:
        return run(*command, cwd=away, HF_HUB_OFFLINE="1")

    sparsekit = python.with_name("sparsekit")
    home = Path(said(python, "-c", "import sparsekit; print(sparsekit.__file__)").strip()).parent
    assert home == site / "sparsekit", f"{home} is not the wheel's"
    version = wheel.name.split("-")[1]
    assert said(sparsekit, "--version").strip() == version, "--version is not the wheel's"
    assert "triangle" in said(sparsekit, "patterns")
    configs = sorted(path.stem for path in (home / "configs" / "smollm2-135m").glob("*.yaml"))
    listed = said(sparsekit, "configs", "list")
    assert configs and all(f"smollm2-135m/{name} " in listed for name in configs), listed
    assert "Predicted prefill" in said(sparsekit, "explain", home / CONFIG, "--tokens", "8192")
    assert "torch" in said(sparsekit, "doctor")
    said(sparsekit, "demo", "--help")
    said(python, "-c", APPLY)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, wheel = build("sdist", ROOT, work / "sdist"), build("wheel", ROOT, work / "wheel")
        run(sys.executable, "-m", "check_wheel_contents", wheel)
        source = unpacked(sdist, work / "source")
        check_metadata(wheel, source)
        check_files(wheel, source)
        check_sdist(wheel, source, work)
        check_wheel(wheel, work)
        print(f"release-check: {sdist.name} and {wheel.name} hold what is tracked, and work outside the checkout")


if __name__ == "__main__":
    main()
