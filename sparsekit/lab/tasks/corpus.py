"""Texts that essay-based tasks hide their needles in: a folder of the user's, or the manual inside every Python.

>>> from sparsekit.lab.tasks.corpus import read_corpus
>>> corpus = read_corpus("pydoc")
>>> len(corpus.words) > 50_000
True
>>> corpus.text(3) == " ".join(corpus.words[:3])
True
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from sparsekit.errors import SparsekitError, named_path

__all__ = ["PYDOC", "Corpus", "need_corpus", "read_corpus"]

PYDOC = "pydoc"  # the language reference that `help()` shows: 65,000 words, which no licence keeps from us
SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Corpus:
    """Words in reading order, white space removed.

    Attributes:
        name: the folder as given, or `pydoc`.
        digest: of the words, for result files: scores over different texts do not compare.
    """

    name: str
    words: tuple[str, ...] = field(repr=False)
    digest: str

    def text(self, count: int, start: int = 0) -> str:
        """`count` words from `start` on, beginning again after the last."""
        total, start = len(self.words), start % len(self.words)
        rounds = -(-(start + count) // total)
        return " ".join((self.words * rounds if rounds > 1 else self.words)[start : start + count])


def read_corpus(name: str) -> Corpus:
    """The .txt, .md and .rst files below a folder in the order of their paths, a single file, or `pydoc`.

    Raises:
        SparsekitError: no such folder, no text in it, or a file that is not UTF-8.
    """
    files = () if name == PYDOC else _files(named_path(name, "corpus"))
    stats = [file.stat() for file in files]
    written = tuple((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
    return _corpus(name, tuple(files), written)


@lru_cache(maxsize=4)
def _corpus(name: str, files: tuple[Path, ...], written: tuple[tuple[int, int, int], ...]) -> Corpus:
    """Read again where a file's size or a time says that it was written."""
    words = (_pydoc() if name == PYDOC else _read(name, files)).split()
    if not words:
        raise SparsekitError(f"corpus {name!r} holds no words.")
    return Corpus(name, tuple(words), hashlib.blake2b(" ".join(words).encode(), digest_size=6).hexdigest())


def need_corpus(task: str, corpus: str | None) -> Corpus:
    """The corpus of a task that cannot do without one."""
    if corpus is None:
        raise SparsekitError(
            f"{task} needs a text: a `corpus`, which is a folder with {', '.join(SUFFIXES)} files, or {PYDOC} for the "
            "manual that comes with Python."
        )
    return read_corpus(corpus)


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not path.exists():
        raise SparsekitError(f"corpus {str(path)!r}: there is no such folder.")
    if not files:
        raise SparsekitError(f"corpus {str(path)!r}: no {', '.join(SUFFIXES)} file in it.")
    return files


def _read(name: str, files: Sequence[Path]) -> str:
    try:
        return "\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise SparsekitError(f"corpus {name!r} cannot be read as text: {error}.") from None
