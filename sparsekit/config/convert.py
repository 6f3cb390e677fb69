"""Other projects' files -> a sparsekit config. A file that does not fit is refused with the line that does not."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsekit.config.ranges import format_range
from sparsekit.config.schema import SparseConfig, load
from sparsekit.errors import SparsekitError, nearest
from sparsekit.patterns import parse_pattern

__all__ = ["convert_minference", "convert_xattention"]

MINFERENCE_PATTERNS = ("vertical_and_slash", "stream_llm", "block_sparse")
BLOCK_SPARSE_TOP_K = 100  # fixed in MInference's code, which ignores the numbers of the file
# XAttention writes 0 for heads that keep no more than the forced blocks, which any small share does too.
SMALLEST_THRESHOLD = 1e-6
QUOTED = 60  # characters of a line that an error shows

_SPACES = " \t\r\n"


def convert_minference(path: str | Path, output: str | Path | None = None) -> SparseConfig:
    """The config of one of MInference's JSON files (`minference/configs/*.json`), also written to `output`.

    The file lists layers; each maps a head's number, as text, to `[pattern, v, s, score]`. `vertical_and_slash` becomes
    `vertical_slash` with v columns and s diagonals, `stream_llm` `a_shape` with v sinks and a window of s,
    `block_sparse` `block_topk` with 100 blocks, whatever the file says, as MInference runs it. Scores are dropped.

    Raises:
        SparsekitError: the file, the line, and what does not fit there. Every layer must list the same heads.
    """
    text, where = _read(path)
    layers = [
        (line, dict(_heads_of(where, number, entries, line)))
        for number, (entries, line) in enumerate(_Json(text, where).layers())
    ]
    if not layers:
        raise SparsekitError(f"{where}: no layers; want a list with one mapping of heads for each layer.")
    heads = len(layers[0][1])
    for number, (line, found) in enumerate(layers):
        missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
        if missing:
            raise SparsekitError(f"{where} line {line}: layer {number} lists no head {format_range(missing)}.")
        if len(found) != heads:
            raise SparsekitError(f"{where} line {line}: layer {number} has {len(found)} heads, layer 0 has {heads}.")
    source = {"converted_from": Path(path).name, "format": "minference"}
    return _write(_config([found for _, found in layers], source), output)


def convert_xattention(
    path: str | Path, output: str | Path | None = None, *, table: str | None = None, stride: int | None = None
) -> SparseConfig:
    """The config of a table of XAttention thresholds, a row for each layer and a number for each query head.

    The file holds the table as text (a row a line, numbers apart by spaces or commas), as JSON, or as Python, also
    under a name and inside a call, as in `xattn/threshold/llama_threshold.py`. A threshold of 0 is written as 1e-6.

    Args:
        output: also write the config there.
        table: the name of the table, where the file holds several.
        stride: what the thresholds were made for; default the number that ends the table's name, else the pattern's.

    Raises:
        SparsekitError: the file, the line, and what does not fit there.
    """
    text, where = _read(path)
    name, rows = _table(text, where, table)
    if stride is None:
        ending = name.rpartition("_")[2]
        stride = int(ending) if ending.isdecimal() else None
    layers: list[dict[int, Any]] = []
    zeros = 0
    for number, (line, values) in enumerate(rows):
        if len(values) != len(rows[0][1]):
            raise SparsekitError(
                f"{where} line {line}: layer {number} has {len(values)} thresholds, layer 0 has {len(rows[0][1])}."
            )
        for head, value in enumerate(values):
            if not 0 <= value <= 1:
                raise SparsekitError(
                    f"{where} line {line}: layer {number}, head {head}: threshold {value!r} is not from 0 to 1."
                )
        zeros += values.count(0)
        raised = [value or SMALLEST_THRESHOLD for value in values]
        fields: dict[str, Any] = {"name": "xattention"} | ({} if stride is None else {"stride": stride})
        fields["threshold"] = raised[0] if len(set(raised)) == 1 else raised
        pattern = parse_pattern(fields, f"{where} line {line}: layer {number}")
        layers.append(dict.fromkeys(range(len(values)), pattern))
    source: dict[str, Any] = {"converted_from": Path(path).name, "format": "xattention"}
    source |= {"table": name} if name else {}
    source |= {"zeros_raised_to": SMALLEST_THRESHOLD, "zeros": zeros} if zeros else {}
    return _write(_config(layers, source), output)


# ---- reading


class _Line(NamedTuple):
    line: int
    values: list[float]


def _read(path: str | Path) -> tuple[str, str]:
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SparsekitError(f"{str(path)!r}: no such file.{nearest(str(path), beside)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SparsekitError(f"{str(path)!r} cannot be read as text: {error}.") from None


class _Json:
    """A list of mappings, read piece by piece, so that every entry knows its line."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def layers(self) -> Iterator[tuple[list[tuple[str, Any, int]], int]]:
        """Each layer's (head, entry, line), and the layer's own line."""
        self._take("[", "want a list with one mapping of heads for each layer")
        while not self._maybe("]"):
            line = self._skip()
            yield list(self._heads()), line
            self._between("]")
        if self._skip() and self.at < len(self.text):
            raise self._wrong("something follows the list")

    def _heads(self) -> Iterator[tuple[str, Any, int]]:
        self._take("{", "want a mapping of heads")
        while not self._maybe("}"):
            line = self._skip()
            head = self._value()
            if not isinstance(head, str):
                raise SparsekitError(f"{self.where} line {line}: {head!r}: want the number of a head in double quotes.")
            self._take(":", "want a colon after the head")
            yield head, self._value(), line
            self._between("}")

    def _value(self) -> Any:
        self._skip()
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.at = min(error.pos, len(self.text))
            raise self._wrong(f"not JSON: {error.msg}") from None
        return value

    def _skip(self) -> int:
        """Past white space; the line that follows."""
        while self.at < len(self.text) and self.text[self.at] in _SPACES:
            self.at += 1
        return self.line

    def _maybe(self, sign: str) -> bool:
        self._skip()
        found = self.text.startswith(sign, self.at)
        self.at += found
        return found

    def _take(self, sign: str, wanted: str) -> None:
        if not self._maybe(sign):
            raise self._wrong(wanted)

    def _between(self, end: str) -> None:
        """A comma with something after it, or nothing before `end`."""
        if self._maybe(","):
            self._skip()
            if self.text.startswith(end, self.at):
                raise self._wrong("a comma before the end")
        elif not self.text.startswith(end, self.at):
            raise self._wrong(f"want a comma or {end!r}")

    def _wrong(self, what: str) -> SparsekitError:
        self._skip()
        rest = self.text[self.at :].partition("\n")[0] or "the end of the file"
        return SparsekitError(f"{self.where} line {self.line}: {_short(rest)}: {what}.")


def _heads_of(
    where: str, layer: int, entries: list[tuple[str, Any, int]], layer_line: int
) -> Iterator[tuple[int, Any]]:
    seen: set[int] = set()
    for head, entry, line in entries:
        said = f"{where} line {line}: layer {layer}, head {head!r}: {_short(json.dumps(entry))}"
        if not head.isdecimal() or (len(head) > 1 and head[0] == "0"):
            raise SparsekitError(f"{said}: a head is a whole number in double quotes.")
        if int(head) in seen:
            raise SparsekitError(f"{said}: the head is listed twice.")
        seen.add(int(head))
        yield int(head), _minference_pattern(entry, said)


def _minference_pattern(entry: Any, said: str) -> Any:
    if not isinstance(entry, list) or len(entry) not in (3, 4) or not isinstance(entry[0], str):
        raise SparsekitError(f"{said}: want [pattern, v, s, score].")
    name, v, s = entry[:3]
    if name not in MINFERENCE_PATTERNS:
        raise SparsekitError(f"{said}: unknown pattern; one of {', '.join(MINFERENCE_PATTERNS)}.")
    if name == "block_sparse":
        return parse_pattern({"name": "block_topk", "top_k": BLOCK_SPARSE_TOP_K})
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (v, s)):
        raise SparsekitError(f"{said}: v and s are whole numbers of tokens.")
    fields: dict[str, Any] = {"name": "vertical_slash", "vertical_tokens": v, "slash_tokens": s}
    if name == "stream_llm":
        fields = {"name": "a_shape", "sink_tokens": v, "window_tokens": s}
    return parse_pattern(fields, said)


def _table(text: str, where: str, wanted: str | None) -> tuple[str, list[_Line]]:
    """(name or nothing, rows) of the one table in a file, or of the one that is wanted."""
    written = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not written:
        raise SparsekitError(f"{where}: empty; want a row of thresholds for each layer.")
    if written[0][0].isdigit() or written[0][0] in "-+.":
        if wanted is not None:
            raise SparsekitError(f"{where}: table {wanted!r}: this file holds one table, without a name.")
        return "", _plain_rows(text, where)
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        line = error.lineno or 1
        raise SparsekitError(f"{where} line {line}: {_short(_line_of(text, line))}: {error.msg}.") from None
    tables: dict[str, ast.List | ast.Tuple] = {}
    for statement in body:
        value = _unwrapped(getattr(statement, "value", None))
        if value is None:
            continue
        if isinstance(statement, ast.Expr):
            tables[""] = value
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            tables[statement.targets[0].id] = value
    if not tables:
        raise SparsekitError(f"{where} line 1: {_short(_line_of(text, 1))}: want a list with one row for each layer.")
    if wanted is None and len(tables) > 1:
        raise SparsekitError(f"{where}: {len(tables)} tables ({', '.join(tables)}): name one.")
    name = next(iter(tables)) if wanted is None else wanted
    if name not in tables:
        raise SparsekitError(f"{where}: no table {name!r}; it has {', '.join(tables)}.{nearest(name, tables)}")
    rows = [_row(item, text, where, number) for number, item in enumerate(tables[name].elts)]
    if not rows:
        raise SparsekitError(f"{where} line {tables[name].lineno}: the table is empty; want one row for each layer.")
    return name, rows


def _unwrapped(node: ast.AST | None) -> ast.List | ast.Tuple | None:
    """A list, also as what a call is given first, as in `torch.tensor([...])`."""
    while isinstance(node, ast.Call) and node.args:
        node = node.args[0]
    return node if isinstance(node, ast.List | ast.Tuple) else None


def _row(node: ast.expr, text: str, where: str, number: int) -> _Line:
    row = _unwrapped(node)
    quoted = f"{where} line {node.lineno}: {_short(_line_of(text, node.lineno)[node.col_offset :])}"
    if row is None or not row.elts:
        raise SparsekitError(f"{quoted}: layer {number}: want a list of thresholds, one for each query head.")
    values = []
    for head, item in enumerate(row.elts):
        try:
            value = ast.literal_eval(item)
        except ValueError:
            value = None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SparsekitError(
                f"{where} line {item.lineno}: {_short(ast.unparse(item))}: layer {number}, head {head}: "
                "a threshold is a number."
            )
        values.append(float(value))
    return _Line(node.lineno, values)


def _plain_rows(text: str, where: str) -> list[_Line]:
    rows = []
    for line, content in enumerate(text.splitlines(), 1):
        words = content.partition("#")[0].replace(",", " ").split()
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise SparsekitError(f"{where} line {line}: {_short(content)}: want numbers, one for each query head.")
        if values:
            rows.append(_Line(line, values))
    return rows


def _line_of(text: str, line: int) -> str:
    lines = text.splitlines()
    return lines[line - 1] if line <= len(lines) else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= QUOTED else text[: QUOTED - 4].rstrip() + " ..."


# ---- writing


def _config(layers: list[dict[int, Any]], source: Mapping[str, Any]) -> SparseConfig:
    """Layers of one pattern under `layers`, the others under `heads`; layers that are alike in one rule."""
    alike: dict[tuple[tuple[Any, str], ...], list[int]] = {}
    for number, by_head in enumerate(layers):
        groups: dict[Any, list[int]] = {}
        for head in sorted(by_head):
            groups.setdefault(by_head[head], []).append(head)
        alike.setdefault(tuple((p, format_range(heads)) for p, heads in groups.items()), []).append(number)
    whole: dict[str, Any] = {}
    mixed: dict[str, dict[str, Any]] = {}
    for groups_of, numbers in alike.items():
        if len(groups_of) == 1:
            whole[format_range(numbers)] = groups_of[0][0]
        else:
            mixed[format_range(numbers)] = {heads: pattern for pattern, heads in groups_of}
    config: dict[str, Any] = {
        "version": 1,
        "model": {"num_layers": len(layers), "num_heads": len(layers[0])},
        "default": "dense",
    }
    config |= {"layers": whole} if whole else {}
    config |= {"heads": mixed} if mixed else {}
    return load({**config, "provenance": dict(source)})


def _write(config: SparseConfig, output: str | Path | None) -> SparseConfig:
    if output is not None:
        config.dump(output)
    return config
