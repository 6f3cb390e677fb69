"""JSONL files that survive a kill: one row a line, on the disk before it counts as written.

A process may be killed at any moment, and a disk may be full. What is left is whole lines, and at most one unfinished
line at the end: its row was not written, and who appends next removes it with a word in the log. Any other line that is
no row is an error: the file is not ours.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsekit.errors import SparsekitError, writable

__all__ = ["Journal", "Lacking", "replacing"]

Lacking = Callable[[Any], str]  # why the JSON of a line is no row, or nothing


class Journal:
    """A JSONL file of one kind of rows.

    Args:
        path: the file, which need not be there.
        what: how errors call it: "results", "records".
        rows: how errors call one of its lines.
        lacking: says of a line's JSON why it is no row; default that it is no object.
        begins: how a line begins, which tells an unfinished one from a file of another kind.
    """

    def __init__(
        self, path: str | Path, what: str, rows: str, lacking: Lacking | None = None, begins: bytes = b'{"'
    ) -> None:
        self.path, self.what, self.rows, self.begins = Path(path), what, rows, begins
        self.lacking = lacking or (lambda row: "" if isinstance(row, dict) else "no JSON object")

    def read(self) -> tuple[list[dict[str, Any]], bytes]:
        """(rows, what follows the last whole line); nothing where there is no file. A last row that lacks nothing but
        the line's end is whole.

        Raises:
            SparsekitError: it cannot be read, or has a line that is no row.
        """
        try:
            there = self.path.exists() and not self.path.is_char_device()
            if there and not (self.path.is_file() or self.path.is_dir()):  # reading a pipe would wait for its writer
                raise SparsekitError(f"{self} cannot be read: it is no regular file.")
            data = self.path.read_bytes() if there else b""
        except OSError as error:
            raise SparsekitError(f"{self} cannot be read: {error.strerror or error}.") from None
        whole = data.rfind(b"\n") + 1
        rows: list[Any] = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            row = _json(line)
            if why := "no JSON" if row is None else self.lacking(row):
                raise self.no_row(number, why)
            rows.append(row)
        rest = data[whole:]
        if rest and (last := _json(rest)) is not None and not self.lacking(last):
            return [*rows, last], b""
        return rows, rest

    def mended(self) -> list[dict[str, Any]]:
        """The rows of a file that is fit to be appended to: an unfinished last line is removed.

        Raises:
            SparsekitError: as `read`; or its end is no beginning of a row, and so nothing of it is removed.
        """
        rows, rest = self.read()
        if rest:
            # After a power failure a file may end in zeros, where the system had made room but had not written.
            if not self.begins.startswith(rest.rstrip(b"\0")[: len(self.begins)]):
                raise self.no_row(len(rows) + 1, "no JSON")
            with writable(self.path, self.what):
                os.truncate(self.path, self.path.stat().st_size - len(rest))
            logging.getLogger(__name__).warning("%s: the last line is unfinished, and removed.", self.path)
        elif rows and not self.path.read_bytes().endswith(b"\n"):
            self._write(b"\n")
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, and return when the disk has it.

        Raises:
            SparsekitError: it could not be written (no space left); the file is as before.
        """
        self._write((json.dumps(row) + "\n").encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other process holds the file within this block, by a lock beside it that ends with the process.

        `FILE.lock` stays: were it removed, one process could lock the old file and another a new one of its name.
        """
        lock = FileLock(f"{self.path}.lock", timeout=0)
        refused = lock.lock_file if os.path.exists(lock.lock_file) else self.path  # another user's may be there
        with writable(refused, self.what):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except Timeout:
                raise SparsekitError(
                    f"{self} are being written by another process; wait for it, or give another file."
                ) from None
        try:
            yield
        finally:
            lock.release()

    def no_row(self, line: int, why: str) -> SparsekitError:
        return SparsekitError(
            f"{self}, line {line}: no record of {self.rows} ({why}); remove the line, or give another file."
        )

    def __str__(self) -> str:
        return f"{self.what} {str(self.path)!r}"

    def _write(self, data: bytes) -> None:
        new = not self.path.exists()
        with writable(self.path, self.what):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(fd).st_size
            try:
                while data:
                    data = data[os.write(fd, data) :]
                if self.path.is_file():  # a pipe has no disk
                    os.fsync(fd)
                if new and hasattr(os, "O_DIRECTORY"):  # the name of a new file is on the disk when its folder is
                    folder = os.open(self.path.parent, os.O_DIRECTORY)
                    os.fsync(folder)
                    os.close(folder)
            except OSError as error:
                with suppress(OSError):  # a device has nothing to cut
                    os.ftruncate(fd, before)
                    os.fsync(fd)
                raise SparsekitError(
                    f"{self}: {error.strerror or error}; make room, then give the same command again: what was "
                    "finished is kept."
                ) from None
        finally:
            os.close(fd)


def _json(line: bytes) -> Any | None:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


@contextmanager
def replacing(journal: Journal, kept: str = "") -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Write a file anew; yields what adds a row. Until all of them are there, the file is as before.

    They are gathered in `FILE.part`, which stays with its rows where the block does not end.

    Args:
        kept: lines of the file that stay, at its top.

    Raises:
        SparsekitError: another process holds the file, or it cannot be written.
    """
    if journal.path.is_dir():
        raise SparsekitError(f"{journal} must be a file.")
    if journal.path.exists() and not journal.path.is_file():  # a pipe, /dev/stdout
        yield journal.append
        return
    part = Journal(journal.path.with_name(f"{journal.path.name}.part"), journal.what, journal.rows)
    with journal.held():
        with writable(journal.path, journal.what):
            part.path.write_text(kept, encoding="utf-8")
        try:
            yield part.append
            with writable(journal.path, journal.what):
                part.path.replace(journal.path)
        finally:
            with suppress(OSError):
                if part.path.stat().st_size == len(kept.encode()):  # no row of it is new
                    part.path.unlink()
