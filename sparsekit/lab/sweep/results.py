"""The result file of a sweep: a record a run, appended and on the disk before the run counts as done.

One process writes at a time, held by a lock beside the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError, shown
from sparsekit.lab.journal import Journal
from sparsekit.lab.journal import replacing as replacing_rows

__all__ = ["ResultFile", "read_results", "replacing"]

# What every record has, what one that did not fail has too, and how a line of a sweep begins.
NEEDED = ("label", "model", "task", "tokens", "seed")
MEASURED = ("score", "density", "config")
START = b'{"key": "'
START_OF_ANY = b'{"'
# Fields that every record has right or not at all, and numbers of one that did not fail.
RIGHT: dict[str, Callable[[Any], bool]] = {
    "key": lambda value: isinstance(value, str),
    "asked": lambda value: isinstance(value, str),
    "versions": lambda value: isinstance(value, dict),
    "tokens": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
}
NUMBERS = ("score", "density")
LARGEST = 1e300  # no number of a record comes near it


def lacking(record: Any) -> str:
    """Why a line's JSON is no record, or nothing."""
    if not isinstance(record, dict):
        return "no JSON object"
    needed = NEEDED if record.get("status", "ok") != "ok" else NEEDED + MEASURED
    if lacking := [name for name in needed if name not in record]:
        return f"without {', '.join(lacking)}"
    wrong = [name for name, right in RIGHT.items() if name in record and not right(record[name])]
    wrong += [name for name in NUMBERS if name in needed and not _number(record[name])]
    wrong += ["kl"] if record.get("kl") is not None and not _number(record["kl"]) else []
    return ", ".join(f"{name} = {shown(record[name])}" for name in wrong)


def _number(value: Any) -> bool:
    """A finite one: JSON as Python reads it knows NaN and Infinity too."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < LARGEST


def _results(path: str | Path, begins: bytes = START_OF_ANY) -> Journal:
    return Journal(path, "results", "`sparsekit sweep` or `sparsekit eval`", lacking, begins)


class ResultFile:
    """Records by run key; the last record of a key is the one that counts. Use `with file.writing():` to append.

    Args:
        shared: records without a key, of `sparsekit eval`'s own tasks, may stand in the file too; else it is refused.
    """

    def __init__(self, path: str | Path, *, shared: bool = False) -> None:
        self.path, self.shared = Path(path), shared
        self._journal = _results(path, START_OF_ANY if shared else START)

    @contextmanager
    def writing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Hold the file; yields what it has, by key. An unfinished last line of a sweep is removed first.

        Raises:
            SparsekitError: another process holds it, it cannot be opened, or it has a line that is no record. Nothing
                is removed from a file of another kind.
        """
        with self._journal.held():
            if not self.shared and any("key" not in record for record in self._journal.read()[0]):
                raise SparsekitError(f"{self._journal} are of `sparsekit eval`; give a sweep a file of its own.")
            yield {record["key"]: record for record in self._journal.mended() if "key" in record}

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, and return when the disk has it.

        Raises:
            SparsekitError: it could not be written (no space left); the file is as before.
        """
        self._journal.append(record)


@contextmanager
def replacing(path: str | Path, kept: str = "") -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Write a result file anew, as `sparsekit.lab.journal.replacing`; one that has runs of a sweep is refused."""
    journal = _results(path)
    if journal.path.is_file():
        records, rest = journal.read()
        if rest and not records:
            raise journal.no_row(1, "no whole line")
        if any("key" in record and "harness" not in record for record in records):
            raise SparsekitError(f"{journal} are of `sparsekit sweep`; give `eval` a file of its own.")
    with replacing_rows(journal, kept) as add:
        yield add


def read_results(paths: Sequence[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """(records, remarks) of result files: the last record of what was asked, in order; nothing is changed.

    One that was asked again, of changed weights or by changed code, stands for the earlier ones. Records of
    `sparsekit eval`, which have no key, all count. A remark tells of an unfinished last line, and of a file that holds
    nothing beside others that do.

    Raises:
        SparsekitError: a file that cannot be read, has a line that is no record, or no file holds a record.
    """
    found: dict[str, dict[str, Any]] = {}
    remarks = []
    for path in map(Path, paths):
        if not path.exists():
            raise SparsekitError(f"results {str(path)!r} cannot be read: No such file or directory.")
        records, rest = _results(path).read()
        if rest:
            remarks.append(f"{path}: the last line is unfinished, and left out.")
        elif not records:
            remarks.append(f"{path}: holds no record.")
        for record in records:
            asked = record.get("asked") or record.get("key") or f"{path} {len(found)}"
            found.pop(asked, None)
            found[asked] = record
    if not found:
        raise SparsekitError(f"results {', '.join(map(str, paths))}: no record in there.")
    return list(found.values()), remarks
