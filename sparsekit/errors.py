"""The one error that sparsekit raises for bad input, what goes into its line, and files that are read and written."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

__all__ = [
    "SparsekitError", "cache_folder", "named_path", "nearest", "one_line", "read_bytes", "read_text", "shown",
    "writable", "writing",
]  # fmt: skip

SHOWN = 100  # characters of a value that an error shows
MOST_WORDS = 1200  # characters of an error
MOST_BYTES = 8 << 20  # of a text file that is read whole; the largest tables of other projects take 2 MB
NEIGHBOURS = 1000  # names that a misspelt one is compared with


class SparsekitError(ValueError):
    """Bad input. The message is one line: the field, the value, what is allowed, and the nearest right name.

    A message that became long, since values in it were, keeps its beginning and its end.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if "\n" in text:
            text = " ".join(text.split())
        super().__init__(
            text if len(text) <= MOST_WORDS else f"{text[: MOST_WORDS // 2]} ... {text[-MOST_WORDS // 2 :]}"
        )


# ---- words of an error


class _Short(reprlib.Repr):
    """repr() that stops early: neither a list of a million items nor a text of a megabyte is spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, SHOWN, SHOWN, 50
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 6

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 1000:  # writing it out takes quadratic time, and Python refuses beyond 4,300 digits
            return f"a number of about {x.bit_length() * 30103 // 100000} digits"
        return super().repr_int(x, level)


_SHORT = _Short()


def shown(value: object) -> str:
    """repr() of a value on one line, cut in the middle where it is long."""
    text = " ".join(_SHORT.repr(value).split())
    half = SHOWN // 2 - 2
    return text if len(text) <= SHOWN else f"{text[:half]}...{text[-half:]}"


def nearest(name: object, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `allowed`, or nothing.

    Spelling distance first; then the same words in another order, so that `last_n` finds `n_last` and `last_tokens`.
    """
    text, names = str(name)[:SHOWN], [str(one) for one in islice(allowed, NEIGHBOURS)]
    close = get_close_matches(text, names, n=1, cutoff=0.6)
    if not close:
        words = set(text.lower().split("_"))
        shared = [(len(words & set(other.lower().split("_"))), other) for other in names]
        close = [other for count, other in sorted(shared, key=lambda pair: -pair[0]) if count]
    return f" Did you mean {shown(close[0])}?" if close else ""


def one_line(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """The first thing that pydantic found wrong with `model`: the field below `where`, its value, what is allowed."""
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # why another is missing
    loc, value = first["loc"], first["input"]
    path = _dotted(where, loc)
    if first["type"] == "extra_forbidden":
        owner = _inner(model, loc[:-1])
        fields = list(owner.model_fields) if owner is not None else []
        above, name = _dotted(where, loc[:-1]), str(loc[-1])
        return (
            f"{above}{': ' if above else ''}unknown field {shown(name)} = {shown(value)}; "
            f"allowed: {', '.join(fields)}.{nearest(name, fields)}"
        )
    if first["type"] == "missing":
        owner = _inner(model, loc[:-1])
        field = owner.model_fields.get(str(loc[-1])) if owner is not None else None
        return f"{path} is missing{f': {field.description}' if field is not None and field.description else ''}."
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should").rstrip(".")
    end = "" if message.endswith("?") else "."
    if isinstance(first.get("ctx", {}).get("error"), SparsekitError):  # which names the value itself
        return f"{path}{': ' if path else ''}{message}{end}"
    return f"{path or 'value'} = {shown(value)}: {message}{end}"


def _dotted(where: str, loc: Sequence[int | str]) -> str:
    """`layers.'0-3'`: names with points between them, in quotes where they are no plain words."""
    parts = [str(part) if isinstance(part, int) or part.isidentifier() else shown(part) for part in loc]
    return ".".join([where] * bool(where) + [part if len(part) <= SHOWN else shown(part) for part in parts])


def _inner(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    """The model that a path of field names leads to, if it leads to one."""
    for name in path:
        field = model.model_fields.get(str(name))
        kinds: tuple[Any, ...] = (field.annotation, *get_args(field.annotation)) if field is not None else ()
        inner = next((kind for kind in kinds if isinstance(kind, type) and hasattr(kind, "model_fields")), None)
        if inner is None:
            return None
        model = inner
    return model


# ---- files


def named_path(text: str | Path, what: str) -> Path:
    """The path that a text names, `~` spelled out; whether something is there can be asked of it.

    Raises:
        SparsekitError: `~` of a user that there is not, a name longer than any, or the system refuses to look.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        raise SparsekitError(f"{what} {shown(str(text))}: there is no such user, whose home folder `~` is.") from None
    except OSError as error:
        raise SparsekitError(f"{what} {shown(str(text))} cannot be looked for: {error.strerror or error}.") from None
    return path


def cache_folder() -> Path:
    """The user's own: `$SPARSEKIT_CACHE`, else `$XDG_CACHE_HOME/sparsekit`, else `~/.cache/sparsekit`.

    Raises:
        SparsekitError: as `named_path`; or none is set, and the user has no home folder.
    """
    own = os.environ.get("SPARSEKIT_CACHE")
    if own:
        return named_path(own, "SPARSEKIT_CACHE")
    if above := os.environ.get("XDG_CACHE_HOME"):
        return named_path(above, "XDG_CACHE_HOME") / "sparsekit"
    try:
        return Path.home() / ".cache" / "sparsekit"
    except RuntimeError:
        raise SparsekitError("there is no home folder to keep a cache in: set SPARSEKIT_CACHE to a folder.") from None


def read_bytes(path: Path | str, what: str, most: int = MOST_BYTES) -> bytes:
    """What a file holds.

    Raises:
        SparsekitError: one line that begins with `what` and the path: there is no such file (and the nearest name in
            its folder), it is a folder, it is larger than `most` bytes, or the system refuses.
    """
    path, named = Path(path), f"{what} {shown(str(path))}"
    try:
        if path.is_dir():
            raise SparsekitError(f"{named} is a folder; a file is needed.")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        beside: list[str] = []
        with suppress(OSError):
            beside = [one.name for one in islice(path.parent.iterdir(), NEIGHBOURS)]
        raise SparsekitError(f"{named}: no such file.{nearest(path.name, beside)}") from None
    except OSError as error:
        raise SparsekitError(f"{named} cannot be read: {error.strerror or error}.") from None
    except SparsekitError:
        raise
    except ValueError as error:  # a NUL in the path, or what no file name can hold
        raise SparsekitError(f"{named} is not the name of a file: {error}.") from None
    if len(data) > most:
        raise SparsekitError(f"{named} is too large: a file of at most {most:,} bytes is read.")
    return data


def read_text(path: Path | str, what: str, most: int = MOST_BYTES) -> str:
    """The text of a file, UTF-8; its lines end in "\\n". Errors: as `read_bytes`, or it is no text."""
    try:
        text = read_bytes(path, what, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SparsekitError(
            f"{what} {shown(str(path))} cannot be read as text: byte {error.start:,} is not UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def writable(path: Path | str, what: str = "output") -> Iterator[None]:
    """Within this block a path is written; what the system refuses is one line that names it."""
    try:
        os.fspath(path).encode("utf-8", "surrogateescape")
        if "\0" in os.fspath(path):
            raise OSError("a name holds no NUL")
        yield
    except (OSError, UnicodeEncodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise SparsekitError(f"{what} {shown(str(path))} cannot be written: {why}.") from None


@contextmanager
def writing(path: Path | str, what: str = "output", *, folders: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all: yields the path to write to, whose content then becomes that of `path`.

    The content goes to a file beside it, to the disk, and only then under its name: where the block raises, the disk
    is full, or the process is killed, `path` is what it was. A link stays a link. What is no regular file (a pipe,
    /dev/stdout) is written itself.

    Args:
        folders: make those that are missing.

    Raises:
        SparsekitError: the system refuses; one line that begins with `what` and the path.
    """
    path = Path(path)
    with writable(path, what):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if path.exists() and not path.is_file():
            yield path
            return
        target = path.resolve()
        if folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name[:200]}.{os.getpid()}.part{target.suffix}")
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                part.chmod(target.stat().st_mode & 0o7777)
            part.replace(target)
        finally:
            with suppress(OSError):
                part.unlink()
