"""The result file of a sweep: JSONL, one record a run, appended and on the disk before the run counts as done.

A process may be killed at any moment. What it leaves is whole lines, and at most one unfinished line at the end, which
the next writer removes: its run was not done. One process writes at a time, held by a lock beside the file that the
system releases when the process ends, however it ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsekit.errors import SparsekitError, writable

__all__ = ["ResultFile", "read_results", "replacing"]

# What every record has, what one that did not fail has too, and how a line of a sweep begins.
NEEDED = ("label", "model", "task", "tokens", "seed")
MEASURED = ("score", "density", "config")
START = b'{"key": "'
START_OF_ANY = b'{"'


class ResultFile:
    """Records by run key; the last record of a key is the one that counts. Use `with file.writing():` to append.

    Args:
        shared: records without a key, of `sparsekit eval`'s own tasks, may stand in the file too; else it is refused.
    """

    def __init__(self, path: str | Path, *, shared: bool = False) -> None:
        self.path, self.shared = Path(path), shared
        self._fd: int | None = None

    @contextmanager
    def writing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Hold the file; yields what it has, by key. An unfinished last line of a sweep is removed first.

        Raises:
            SparsekitError: another process holds it, it cannot be opened, or it has a line that is no record. Nothing
                is removed from a file of another kind.
        """
        with _held(self.path):
            try:
                self._fd = self._open()
                yield self._mended()
            finally:
                if self._fd is not None:
                    os.close(self._fd)
                    self._fd = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, and return when the disk has it.

        Raises:
            SparsekitError: it could not be written (no space left); the file is as before.
        """
        assert self._fd is not None, "append outside `with writing()`"
        line = (json.dumps(record) + "\n").encode()
        before = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
            os.fsync(self._fd)
        except OSError as error:
            self._cut(before)
            raise SparsekitError(
                f"results {str(self.path)!r}: {error.strerror or error}; make room, then give the same command again: "
                "finished runs are kept."
            ) from None

    def _open(self) -> int:
        new = not self.path.exists()
        with writable(self.path, "results"):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if new and hasattr(os, "O_DIRECTORY"):  # the name of a new file is on the disk when its folder is
                folder = os.open(self.path.parent, os.O_DIRECTORY)
                os.fsync(folder)
                os.close(folder)
        return fd

    def _mended(self) -> dict[str, dict[str, Any]]:
        records, rest = _parse(self.path)
        if not self.shared and any("key" not in record for record in records):
            raise SparsekitError(f"results {str(self.path)!r} are of `sparsekit eval`; give a sweep a file of its own.")
        if rest:
            # After a power failure a file may end in zeros, where the system had made room but had not written.
            start = START_OF_ANY if self.shared else START
            if not start.startswith(rest.rstrip(b"\0")[: len(start)]):
                raise _no_record(self.path, len(records) + 1, "no JSON")
            assert self._fd is not None
            self._cut(os.fstat(self._fd).st_size - len(rest))
        return {record["key"]: record for record in records if "key" in record}

    def _cut(self, size: int) -> None:
        """Back to `size` bytes; a file that cannot be cut (a device) has nothing to cut."""
        assert self._fd is not None
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        except OSError:
            return


@contextmanager
def replacing(path: str | Path, kept: str = "") -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Write a result file anew; yields what adds a record. Until all of them are there, the file is as before.

    They are gathered in `FILE.part`, which stays where the block does not end.

    Args:
        kept: lines of the file that stay, at its top.

    Raises:
        SparsekitError: another process holds the file, it has runs of a sweep, or it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    with _held(path):
        if path.exists():
            _check_replaceable(path)
        with writable(path, "results"):
            part.write_text(kept, encoding="utf-8")

        def add(record: Mapping[str, Any]) -> None:
            with writable(path, "results"), part.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

        yield add
        with writable(path, "results"):
            part.replace(path)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """No other process writes the file within this block."""
    lock = FileLock(f"{path}.lock", timeout=0)
    with writable(path, "results"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise SparsekitError(
                f"results {str(path)!r} are being written by another process; wait for it, or give another file."
            ) from None
    try:
        yield
    finally:
        lock.release()


def _check_replaceable(path: Path) -> None:
    if not path.is_file():
        raise SparsekitError(f"results {str(path)!r} must be a file.")
    records, rest = _parse(path)
    if rest and not records:
        raise _no_record(path, 1, "no whole line")
    if any("key" in record and "harness" not in record for record in records):
        raise SparsekitError(f"results {str(path)!r} are of `sparsekit sweep`; give `eval` a file of its own.")


def read_results(paths: Sequence[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """(records, remarks) of result files: the last record of each key, in order; nothing is changed.

    Records of `sparsekit eval`, which have no key, all count. A remark tells of an unfinished last line, and of a file
    that holds nothing beside others that do.

    Raises:
        SparsekitError: a file that cannot be read, has a line that is no record, or no file holds a record.
    """
    found: dict[str, dict[str, Any]] = {}
    remarks = []
    for path in map(Path, paths):
        records, rest = _parse(path)
        if rest:
            remarks.append(f"{path}: the last line is unfinished, and left out.")
        elif not records:
            remarks.append(f"{path}: holds no record.")
        for record in records:
            key = record.get("key", f"{path} {len(found)}")
            found.pop(key, None)
            found[key] = record
    if not found:
        raise SparsekitError(f"results {', '.join(map(str, paths))}: no record in there.")
    return list(found.values()), remarks


def _parse(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """(records of the whole lines, what follows the last of them)."""
    try:
        data = path.read_bytes() if not path.is_char_device() else b""
    except OSError as error:
        raise SparsekitError(f"results {str(path)!r} cannot be read: {error.strerror or error}.") from None
    whole = data.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise _no_record(path, number, "no JSON") from None
        if why := _lacking(record):
            raise _no_record(path, number, why)
        records.append(record)
    return records, data[whole:]


def _lacking(record: Any) -> str:
    """Why a line's JSON is no record, or nothing."""
    if not isinstance(record, dict):
        return "no JSON object"
    needed = NEEDED if record.get("status", "ok") != "ok" else NEEDED + MEASURED
    if lacking := [name for name in needed if name not in record]:
        return f"without {', '.join(lacking)}"
    numbers = [name for name in needed if name in ("tokens", "score", "density")]
    wrong = [name for name in numbers if isinstance(record[name], bool) or not isinstance(record[name], int | float)]
    return ", ".join(f"{name} = {record[name]!r}" for name in wrong)


def _no_record(path: Path, line: int, why: str) -> SparsekitError:
    return SparsekitError(
        f"results {str(path)!r}, line {line}: no record of `sparsekit sweep` or `sparsekit eval` ({why}); remove the "
        "line, or give another file."
    )
