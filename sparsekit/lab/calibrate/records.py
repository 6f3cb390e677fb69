"""What was measured, kept while measuring: a JSONL file of (key, value) rows, so that an interrupted run goes on.

A key holds everything that the value depends on: the model's weights, the prompt, the pattern, the layer. A row is
found again by its key's content, wherever in the file it stands and whatever else was measured beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekit import __version__
from sparsekit.errors import SparsekitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Records", "content_key", "fingerprint", "measured_on"]

VALUES_OF_A_WEIGHT = 32


class Records:
    """Rows by key: in memory, and in `path` where one is given, each written when it is added.

    A last line that an interrupt cut off is dropped. Any other line that cannot be read is an error: it is not ours.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: dict[str, Any] = {}
        if self.path is not None:
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The value of a key, or None where it was not measured yet."""
        return self._rows.get(content_key(key))

    def add(self, key: Mapping[str, Any], value: Any) -> Any:
        """Keep a value, on disk before this returns, and return it as it will be read back.

        Raises:
            SparsekitError: it could not be written.
        """
        row = json.dumps({"id": content_key(key), "key": key, "value": value})
        if self.path is not None:
            _append(self.path, f"{row}\n".encode())
        self._rows[content_key(key)] = json.loads(row)["value"]
        return self._rows[content_key(key)]

    def _read(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise SparsekitError(f"records {str(path)!r} cannot be used: {error}.") from None
        for number, line in enumerate(lines, 1):
            row = _parsed(line)
            if row is not None:
                self._rows[row[0]] = row[1]
            elif number < len(lines) or line.endswith("\n"):
                raise SparsekitError(
                    f"records {str(path)!r}, line {number}: not a record of sparsekit; give another file."
                )
        if lines and not lines[-1].endswith("\n"):
            if _parsed(lines[-1]) is not None:
                _append(path, b"\n")
            else:
                os.truncate(path, path.stat().st_size - len(lines[-1].encode()))


def _append(path: Path, data: bytes) -> None:
    """Returns when the disk has it; a file that could not take all of it is as before."""
    try:
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):  # a device has nothing to cut
                    file.truncate(before)
                raise
    except OSError as error:
        raise SparsekitError(
            f"records {str(path)!r}: {error.strerror or error}; make room, then give the same command again: what was "
            "measured is kept."
        ) from None


def _parsed(line: str) -> tuple[str, Any] | None:
    try:
        row = json.loads(line)
        return row["id"], row["value"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def content_key(key: Mapping[str, Any]) -> str:
    """A short text that is the same for equal contents, in any order of fields."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def fingerprint(model: PreTrainedModel) -> str:
    """Of a model's weights and dtype: the first and last values of every parameter, not its path or name."""
    digest = hashlib.blake2b(digest_size=8)
    parts = []
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        parts += [flat[:VALUES_OF_A_WEIGHT].float(), flat[-VALUES_OF_A_WEIGHT:].float()]
    digest.update(torch.cat([part.cpu() for part in parts]).numpy().tobytes())
    return digest.hexdigest()


def measured_on(model: PreTrainedModel) -> dict[str, Any]:
    """Where and with what a result was made, for provenance."""
    device = model.device
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "sparsekit": __version__,
    }
