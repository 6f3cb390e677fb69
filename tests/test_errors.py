"""What every error line and every written file is made of: `shown`, `nearest`, `read_text`, `writing`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from soon import soon

from sparsekit import SparsekitError
from sparsekit.errors import nearest, read_text, shown, writing


@pytest.mark.parametrize("kind", ["text", "list", "mapping", "number", "nested", "control"])
def test_a_value_is_shown_on_one_short_line(kind: str) -> None:
    value: object = {
        "text": "x" * 3_000_000,
        "list": [0] * 3_000_000,
        "mapping": {i: i for i in range(300_000)},
        "number": 10**100_000,
        "nested": [["a" * 999] * 99] * 99,
        "control": "\n\0\x1b[0m",
    }[kind]
    text = soon(lambda: shown(value), 0.5)
    assert len(text) <= 100 and text.isprintable()


def test_short_values_are_shown_as_they_are() -> None:
    for value in (0, -512, "triangle", ["triangle"], {"name": "x", "of": [1.5, None]}, 10**30, "it's"):
        assert shown(value) == repr(value)
    assert shown(10**5000) == "a number of about 5000 digits"


def test_nearest_of_very_long_names_is_quick() -> None:
    many = ["b" * 90 for _ in range(100_000)]
    soon(lambda: nearest("a" * 3_000_000, many), 1)
    assert nearest("trianlge", ["dense", "triangle"]) == " Did you mean 'triangle'?"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("ok\r\nok\n")
    (tmp_path / "binary").write_bytes(b"ok\xff")
    (tmp_path / "large").write_text("x" * 101)
    assert read_text(tmp_path / "good.yaml", "file") == "ok\nok\n"
    for name, says in (
        ("god.yaml", r"no such file\. Did you mean 'good.yaml'\?"),
        ("good.yaml/x", "no such file"),
        (".", "is a folder"),
        ("binary", "cannot be read as text: byte 2 is not UTF-8"),
        ("large", "too large: a file of at most 100 bytes is read"),
        ("a\0b", "is not the name of a file: embedded null byte"),
        ("\ud800", "is not the name of a file"),
        ("x" * 5000, "cannot be read: File name too long"),
    ):
        with pytest.raises(SparsekitError, match=says) as caught:
            read_text(tmp_path / name, "file", most=100)
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    with pytest.raises(SparsekitError, match="too large"):
        read_text("/dev/zero", "file", most=100)


def _interrupted(path: Path) -> None:
    with writing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_text("good")
    good.chmod(0o640)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(good)
    assert good.read_text() == "good" and list(tmp_path.iterdir()) == [good]
    with writing(good) as part:
        part.write_text("better")
        assert good.read_text() == "good"
    assert good.read_text() == "better" and good.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to("good")
    with writing(link) as part:
        part.write_text("best")
    assert link.is_symlink() and good.read_text() == "best"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "link"]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (".", "no/where", "a\0b", "file/x", "\ud800"):
        with pytest.raises(SparsekitError, match=r"output .* cannot be written: "), writing(tmp_path / name) as part:
            part.write_text("x")
    with writing(tmp_path / "new" / "folder" / "x", folders=True) as part:
        part.write_text("x")
    with writing("/dev/null") as part:  # a device is written itself
        part.write_text("x")
    assert Path("/dev/null").is_char_device()


def test_a_full_disk_leaves_the_config_that_was_there(tmp_path: Path) -> None:
    """In a process whose files may not exceed 8 bytes."""
    path = tmp_path / "c.yaml"
    path.write_text("default: dense\n")
    code = (
        "import resource, signal\n"
        "from sparsekit import load\n"
        "config = load({'default': 'triangle'})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))\n"
        f"config.dump({str(path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "cannot be written: File too large." in done.stderr.splitlines()[-1]
    assert path.read_text() == "default: dense\n" and list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("good")
    child = os.fork()
    if child == 0:
        with writing(path) as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_text() == "good"
