"""What was measured, kept while measuring: a JSONL file of (key, value) rows, so that an interrupted run goes on.

A key holds everything that the value depends on: the model's weights, the prompt, the pattern, the layer, the code. A
row is found again by its key's content, wherever in the file it stands and whatever else was measured beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekit.errors import shown, writable
from sparsekit.lab.journal import Journal
from sparsekit.lab.provenance import content_key

__all__ = ["Records"]


def _lacking(row: Any) -> str:
    if not isinstance(row, dict) or not {"id", "value"} <= row.keys():
        return "without id and value"
    return "" if isinstance(row["id"], str) else f"id = {shown(row['id'])}"


class Records:
    """Rows by key: in memory, and in `path` where one is given, each written when it is added."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._journal = None if path is None else Journal(path, "records", "`sparsekit calibrate`", _lacking)
        self._rows: dict[str, Any] = {}
        if self._journal is not None:
            with writable(self._journal.path, "records"):
                self._journal.path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = {row["id"]: row["value"] for row in self._journal.mended()}

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
        row = {"id": content_key(key), "key": key, "value": value}
        if self._journal is not None:
            self._journal.append(row)
        self._rows[row["id"]] = json.loads(json.dumps(value))
        return self._rows[row["id"]]
