"""Other projects' files -> a sparsekit config. A file that does not fit is refused with the line that does not."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsekit.config.facts import ModelFacts
from sparsekit.config.ranges import MOST, format_range
from sparsekit.config.schema import SparseConfig, load
from sparsekit.errors import SparsekitError, nearest, read_text, shown
from sparsekit.patterns import Pattern, parse_pattern

__all__ = ["convert_duo_attention", "convert_minference", "convert_xattention", "duo_attention_scores"]

MINFERENCE_PATTERNS = ("vertical_and_slash", "stream_llm", "block_sparse")
BLOCK_SPARSE_TOP_K = 100  # fixed in MInference's code, which ignores the numbers of the file
# XAttention writes 0 for heads that keep no more than the forced blocks, which any small share does too.
SMALLEST_THRESHOLD = 1e-6
# XAttention's published thresholds end at 0.96 and go down to 0.0004: a table of shares that has both heads of 1, which
# keep everything, and heads below this one is of something else, as DuoAttention's scores, which go from 0 to 1.
LOW_SHARE = 0.3
# In the published tables at most an eighth of the heads is below a half; of scores in general about half of them is.
HALF, MOST_BELOW_HALF, TELLING = 0.5, 1 / 3, 64  # TELLING: numbers from which on their spread tells
QUOTED = 60  # characters of a line that an error shows
LARGEST = 1e9  # a number that is quoted in an error; thresholds end at 1


def convert_minference(
    path: str | Path, output: str | Path | None = None, *, model: ModelFacts | None = None
) -> SparseConfig:
    """The config of one of MInference's JSON files (`minference/configs/*.json`), also written to `output`.

    The file lists layers; each maps a head's number, as text, to `[pattern, v, s, score]`. `vertical_and_slash` becomes
    `vertical_slash` with v columns and s diagonals, `stream_llm` `a_shape` with v sinks and a window of s,
    `block_sparse` `block_topk` with 100 blocks, whatever the file says, as MInference runs it. Scores are dropped.

    Args:
        output: also write the config there.
        model: what the file must fit: so many layers and query heads.

    Raises:
        SparsekitError: the file, the layer and head, and what does not fit there. Every layer must list the same heads.
    """
    where = str(path)
    layers = _json(read_text(path, "file"), where)
    if not isinstance(layers, list) or not layers:
        raise SparsekitError(f"{where}: {shown(layers)}: want a list with one mapping of heads for each layer.")
    _check_count(where, "layers", len(layers))
    heads = [_heads_of(f"{where}: layer {number}", entries) for number, entries in enumerate(layers)]
    for number, found in enumerate(heads):
        missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
        if missing:
            raise SparsekitError(f"{where}: layer {number} lists no head {format_range(missing)}.")
        if len(found) != len(heads[0]):
            raise SparsekitError(f"{where}: layer {number} has {len(found)} heads, layer 0 has {len(heads[0])}.")
    source = {"converted_from": Path(path).name, "format": "minference"}
    return finish(_config(heads, source), where, model, output)


def convert_xattention(
    path: str | Path,
    output: str | Path | None = None,
    *,
    table: str | None = None,
    stride: int | None = None,
    model: ModelFacts | None = None,
) -> SparseConfig:
    """The config of a table of XAttention thresholds, a row for each layer and a number for each query head.

    The file holds the table as text (a row a line, numbers apart by spaces or commas), as JSON, or as Python, also
    under a name and inside a call, as in `xattn/threshold/llama_threshold.py`. A threshold of 0 is written as 1e-6.
    A table whose numbers are no thresholds, such as the scores or masks of heads of other methods, is refused.

    Args:
        output: also write the config there.
        table: the name of the table, where the file holds several.
        stride: what the thresholds were made for; default the number that ends the table's name, else the pattern's.
        model: what the table must fit: so many layers and query heads.

    Raises:
        SparsekitError: the file, the line, and what does not fit there.
    """
    where = str(path)
    name, rows = _table(read_text(path, "file"), where, table)
    if stride is None:
        ending = name.rpartition("_")[2]
        stride = int(ending) if ending.isdecimal() and len(ending) < 5 else None
    _check_count(where, "rows", len(rows))
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
    _check_thresholds(rows, where, fits_a_model=model is not None)
    layers: list[dict[int, Pattern]] = []
    for number, (line, values) in enumerate(rows):
        raised = [value or SMALLEST_THRESHOLD for value in values]
        fields: dict[str, Any] = {"name": "xattention"} | ({} if stride is None else {"stride": stride})
        fields["threshold"] = raised[0] if len(set(raised)) == 1 else raised
        pattern = parse_pattern(fields, f"{where} line {line}: layer {number}")
        layers.append(dict.fromkeys(range(len(values)), pattern))
    zeros = sum(values.count(0) for _, values in rows)
    source: dict[str, Any] = {"converted_from": Path(path).name, "format": "xattention"}
    source |= {"table": name} if name else {}
    source |= {"zeros_raised_to": SMALLEST_THRESHOLD, "zeros": zeros} if zeros else {}
    return finish(_config(layers, source), where, model, output)


def convert_duo_attention(
    path: str | Path,
    output: str | Path | None = None,
    *,
    share: float,
    pattern: Pattern | str | Mapping[str, Any] = "a_shape",
    group: int | None = None,
    model: ModelFacts | None = None,
) -> SparseConfig:
    """The config of DuoAttention's scores of heads (`full_attention_heads.tsv`), also written to `output`.

    The file has a row for each layer and a score from 0 to 1 for each key head. As with `sparsity` there, that share of
    the key heads, those of the lowest scores, stream; the others stay dense. Scores beyond 0 and 1 are cut off, and of
    equal ones the deeper layer's head streams first, where DuoAttention draws.

    Args:
        output: also write the config there.
        share: of the key heads that stream, 0 to 1.
        pattern: what these heads run. DuoAttention's `config.json` beside the file says its sinks and window.
        group: query heads of a key head; default by `model`, without which it is needed.
        model: what the file must fit: so many layers and key heads.

    Raises:
        SparsekitError: the file, the line, and what does not fit there.
    """
    where, runs = str(path), parse_pattern(pattern)
    if not 0 < share <= 1:
        raise SparsekitError(f"share = {shown(share)}: the share of the key heads that stream, above 0 and up to 1.")
    rows = duo_attention_scores(path, model)
    key_heads = len(rows[0])
    group = group_of(where, key_heads, group, model)
    _check_count(where, "layers", len(rows))
    scores = {(n, head): value for n, row in enumerate(rows) for head, value in enumerate(row)}
    order = sorted(scores, key=lambda head: (scores[head], -head[0], head[1]))
    streaming = set(order[: round(share * len(order))])
    dense = parse_pattern("dense")
    layers: list[dict[int, Pattern]] = [
        {head: runs if (n, head // group) in streaming else dense for head in range(group * key_heads)}
        for n in range(len(rows))
    ]
    source = {
        "converted_from": Path(path).name,
        "format": "duo-attention",
        "share": share,
        "query_heads_of_each": group,
    }
    return finish(_config(layers, source), where, model, output)


def duo_attention_scores(path: str | Path, model: ModelFacts | None = None) -> list[list[float]]:
    """Of each layer, the score of each key head, cut to 0 to 1: the lower, the less it needs beyond sinks and window.

    Raises:
        SparsekitError: the file, the line, and what does not fit there, or does not fit `model`'s key heads.
    """
    where = str(path)
    rows = _plain_rows(read_text(path, "file"), where, "key head")
    if not rows:
        raise SparsekitError(f"{where}: empty; want a row of scores for each layer.")
    for number, (line, values) in enumerate(rows):
        if len(values) != len(rows[0].values):
            raise SparsekitError(
                f"{where} line {line}: layer {number} has {len(values)} scores, layer 0 has {len(rows[0].values)}."
            )
    key_heads = len(rows[0].values)
    if model is not None and model.num_key_heads not in (None, key_heads):
        raise SparsekitError(f"{where}: {key_heads} key heads a layer, but the model has {model.num_key_heads}.")
    return [[min(max(value, 0.0), 1.0) for value in row.values] for row in rows]


# ---- MInference's JSON


class _Twice(list[tuple[str, Any]]):
    """The entries of a JSON object that has a key twice."""


def _entries(pairs: list[tuple[str, Any]]) -> Any:
    return dict(pairs) if len(dict(pairs)) == len(pairs) else _Twice(pairs)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_entries)
    except json.JSONDecodeError as error:
        raise SparsekitError(f"{where} line {error.lineno} column {error.colno}: not JSON: {error.msg}.") from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise SparsekitError(f"{where}: not JSON: {str(error).partition(';')[0]}.") from None
    except RecursionError:
        raise SparsekitError(f"{where}: not a list of layers: nested too deeply.") from None


def _heads_of(where: str, entries: Any) -> dict[int, Pattern]:
    if not isinstance(entries, dict | _Twice):
        raise SparsekitError(f"{where}: {shown(entries)}: want a mapping of heads.")
    _check_count(where, "heads", len(entries))
    heads: dict[int, Pattern] = {}
    for head, entry in entries.items() if isinstance(entries, dict) else entries:
        at = f"{where}, head {shown(head)}: {shown(entry)}"
        if not (head.isascii() and head.isdigit()) or (len(head) > 1 and head[0] == "0") or len(head) > 5:
            raise SparsekitError(f"{at}: a head is a whole number in double quotes.")
        if int(head) >= MOST:
            raise SparsekitError(f"{at}: heads are numbered from 0 to {MOST - 1:,}.")
        if int(head) in heads:
            raise SparsekitError(f"{at}: the head is listed twice.")
        heads[int(head)] = _minference_pattern(entry, at)
    return heads


def _minference_pattern(entry: Any, at: str) -> Pattern:
    if not isinstance(entry, list) or len(entry) not in (3, 4) or not isinstance(entry[0], str):
        raise SparsekitError(f"{at}: want [pattern, v, s, score].")
    name, v, s, *score = entry
    if name not in MINFERENCE_PATTERNS:
        raise SparsekitError(f"{at}: unknown pattern; one of {', '.join(MINFERENCE_PATTERNS)}.")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (v, s)):
        raise SparsekitError(f"{at}: v and s are whole numbers of tokens.")
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in score):
        raise SparsekitError(f"{at}: the score is a number.")
    if name == "block_sparse":
        return parse_pattern({"name": "block_topk", "top_k": BLOCK_SPARSE_TOP_K})
    fields: dict[str, Any] = {"name": "vertical_slash", "vertical_tokens": v, "slash_tokens": s}
    if name == "stream_llm":
        fields = {"name": "a_shape", "sink_tokens": v, "window_tokens": s}
    return parse_pattern(fields, at)


# ---- XAttention's tables


class _Line(NamedTuple):
    line: int
    values: list[float]


def _check_thresholds(rows: list[_Line], where: str, *, fits_a_model: bool) -> None:
    """That the numbers, all from 0 to 1, can be thresholds; those of other tables of heads are told by their values.

    Scores of key heads may look like thresholds: then their number tells, against a model's query heads.
    """
    every = {value for _, values in rows for value in values}
    if every <= {0.0, 1.0}:
        raise SparsekitError(
            f"{where}: all numbers are 0 or 1: a mask of heads, not a table of thresholds; a threshold is the share of "
            "attention that a head keeps."
        )
    lowest = min(every - {0.0}, default=1.0)
    if 1.0 in every and lowest < LOW_SHARE:
        line = next(row.line for row in rows if lowest in row.values)
        raise SparsekitError(
            f"{where} line {line}: the numbers go from {lowest:g} to 1: scores of heads, as DuoAttention's, not "
            "thresholds, which end below 1; a threshold is the share of attention that a head keeps."
        )
    numbers = [value for _, values in rows for value in values]
    below = sum(value < HALF for value in numbers)
    if not fits_a_model and len(numbers) >= TELLING and below > MOST_BELOW_HALF * len(numbers):
        raise SparsekitError(
            f"{where}: {below} of {len(numbers)} numbers are below {HALF:g}, as scores of heads are and thresholds are "
            "not; --model MODEL compares their number with the model's query heads, and then takes them."
        )


def _table(text: str, where: str, wanted: str | None) -> tuple[str, list[_Line]]:
    """(name or nothing, rows) of the one table in a file, or of the one that is wanted."""
    written = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not written:
        raise SparsekitError(f"{where}: empty; want a row of thresholds for each layer.")
    if written[0][0].isdigit() or written[0][0] in "-+.":
        if wanted is not None:
            raise SparsekitError(f"{where}: table {shown(wanted)}: this file holds one table, without a name.")
        return "", _plain_rows(text, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about the file's code
            body = ast.parse(text).body
    except SyntaxError as error:
        line = error.lineno or 1
        raise SparsekitError(f"{where} line {line}: {_quoted(_line_of(text, line))}: {error.msg}.") from None
    except (ValueError, RecursionError, MemoryError) as error:
        why = "nested too deeply" if not isinstance(error, ValueError) else str(error).partition(";")[0]
        raise SparsekitError(f"{where}: not a table of thresholds: {why}.") from None
    tables: dict[str, ast.List | ast.Tuple] = {}
    for statement in body:
        value = _unwrapped(getattr(statement, "value", None))
        if value is None:
            continue
        if isinstance(statement, ast.Expr):
            tables[""] = value
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            tables |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    if not tables:
        raise SparsekitError(f"{where} line 1: {_quoted(_line_of(text, 1))}: want a list with one row for each layer.")
    if wanted is None and len(tables) > 1:
        raise SparsekitError(f"{where}: {len(tables)} tables ({_names(tables)}): name one.")
    name = next(iter(tables)) if wanted is None else wanted
    if name not in tables:
        raise SparsekitError(f"{where}: no table {shown(name)}; it has {_names(tables)}.{nearest(name, tables)}")
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
    quoted = f"{where} line {node.lineno}: {_quoted(_line_of(text, node.lineno)[node.col_offset :])}"
    if row is None or not row.elts:
        raise SparsekitError(f"{quoted}: layer {number}: want a list of thresholds, one for each query head.")
    values = []
    for head, item in enumerate(row.elts):
        value = _number(item)
        if value is None:
            text_of = ast.get_source_segment(text, item) or ""
            raise SparsekitError(
                f"{where} line {item.lineno}: {_quoted(text_of)}: layer {number}, head {head}: a threshold is a number."
            )
        values.append(value)
    return _Line(node.lineno, values)


def _number(node: ast.expr) -> float | None:
    """A finite number, or None; a whole one that no float holds is as wrong as any."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node, sign = node.operand, -1
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
        return None
    return sign * float(value)


def _plain_rows(text: str, where: str, each: str = "query head") -> list[_Line]:
    rows = []
    for line, content in enumerate(text.splitlines(), 1):
        words = content.partition("#")[0].replace(",", " ").split()
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise SparsekitError(f"{where} line {line}: {_quoted(content)}: want numbers, one for each {each}.")
        if values:
            rows.append(_Line(line, values))
    return rows


def _line_of(text: str, line: int) -> str:
    lines = text.splitlines()
    return lines[line - 1] if line <= len(lines) else ""


def _quoted(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= QUOTED else text[: QUOTED - 4].rstrip() + " ..."


def _names(tables: Mapping[str, Any]) -> str:
    return ", ".join(list(tables)[:20]) + (", ..." if len(tables) > 20 else "")


def _check_count(where: str, what: str, count: int) -> None:
    if count > MOST:
        raise SparsekitError(f"{where}: {count:,} {what}; at most {MOST:,}.")


def group_of(where: str, key_heads: int, group: int | None, model: ModelFacts | None) -> int:
    """Query heads of each of a file's key heads: as they are said, or the model's."""
    if group is None:
        if model is None or model.num_heads is None:
            raise SparsekitError(f"{where}: it counts key heads alone; say `group`, query heads of each, or the model.")
        group = model.num_heads // key_heads
    _check_count(where, "query heads", group * key_heads)
    return group


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


def finish(config: SparseConfig, where: str, model: ModelFacts | None, output: str | Path | None) -> SparseConfig:
    """The config, checked against a model and written where that is asked for."""
    if model is not None and config.model.num_key_heads is None:
        key_heads = getattr(model, "num_key_heads", None)
        if config.model.num_heads == key_heads != model.num_heads:
            raise SparsekitError(
                f"{where}: it has a number for each of {key_heads} key heads; want one for each of the model's "
                f"{model.num_heads} query heads."
            )
    config.resolve(model)
    if model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update=model.identity())})
    if output is not None:
        config.dump(output)
    return config
