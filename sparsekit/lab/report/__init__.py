"""One page of a sweep's or an evaluation's results: plots, needle map, gradients, configs with a diff, tables, filters.

The page is one HTML file without any link: Plotly, the data and the script are inside, so that it opens anywhere,
offline. Its filters are kept in the address (`report.html#task=needle4&tokens=2048`). A name that ends in .md gives the
table of scores alone, for an issue or a page of docs.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from sparsekit.config import format_range, load, parse_range
from sparsekit.config.drawing import draw_heads
from sparsekit.errors import SparsekitError, writing
from sparsekit.lab.sweep import read_results
from sparsekit.lab.sweep.best import overview
from sparsekit.lab.sweep.runs import config_key

__all__ = ["markdown_report", "report_data", "write_report"]

# What the page shows of a record.
FIELDS = (
    *("model", "task", "tokens", "seed", "samples", "score", "score_low", "score_high", "kl", "ttft_s", "ttft_s_p20"),
    *("ttft_s_p80", "density", "tile_density", "plan_ms", "peak_memory_bytes", "device", "dtype"),
)
DIGITS = 6
# How a file of `sparsekit calibrate probe -o` begins, whole or cut off.
_PROBE = re.compile(rb'\s*\{\s*"kind"\s*:\s*"probe"')


def write_report(results: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> list[str]:
    """Write the page of one or several result files; returns remarks (a last line that was unfinished).

    Args:
        results: JSONL files of `sparsekit sweep` or `sparsekit eval`, and JSON files of `sparsekit calibrate probe -o`.
        out: the page, .html, or the table alone, .md. What stands there stays if it cannot be written.
        title: its heading; default the question that the records tell.

    Raises:
        SparsekitError: plotly is not installed, a file cannot be read or is of another kind, or the page cannot be
            written.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm", ".md"):
        raise SparsekitError(f"output {str(path)!r}: the name must end in .html, or in .md for the table alone.")
    table_alone = path.suffix.lower() == ".md"
    if not table_alone and find_spec("plotly") is None:
        raise SparsekitError("reports need plotly: pip install 'sparsekit-attention[report]'")
    probes = [file for file in results if _is_probe(file)]
    if table_alone and probes:
        raise SparsekitError(f"probe {str(probes[0])!r}: a table (.md) has no place for it; write a page (.html).")
    others = [file for file in results if file not in probes]
    records, remarks = read_results(others) if others or not probes else ([], [])
    if table_alone:
        page = markdown_report(records, title=title)
    else:
        page = _page(records, [_probe(file) for file in probes], title)
    with writing(path, folders=True) as part:
        part.write_text(page, encoding="utf-8")
    return remarks


def markdown_report(records: Sequence[Mapping[str, Any]], *, title: str | None = None) -> str:
    """A row for each config, with its mean score on each task and length, and what it ran on; as Markdown.

    Args:
        records: of a sweep or an evaluation; failed ones are left out.
        title: a line above the table; default the question that the records tell.
    """
    done = [{**record, "config_key": _key(record)} for record in records if record.get("status", "ok") == "ok"]
    if not done:
        first = f": {records[0].get('error', 'no reason given')}" if records else ""
        raise SparsekitError(f"none of {len(records)} records is of a run that succeeded{first}")
    head, rows = overview(done)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    samples = sorted({record["samples"] for record in done if record.get("samples")})
    prompts = f"{' or '.join(map(str, samples))} prompts a score. " if samples else ""
    return f"{_title(records, title)}\n\n{table}\n\n{prompts}{_subtitle(records)}\n"


def _page(records: Sequence[Mapping[str, Any]], probes: list[dict[str, Any]], title: str | None) -> str:
    from plotly.offline import get_plotlyjs

    data = {**report_data(records), "probes": probes}
    here = files("sparsekit.lab.report")
    return Template(here.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(_title(records, title)),
        subtitle=html.escape(_subtitle(records)),
        plotly=get_plotlyjs(),
        # No text of a record can end the script element, or is markup.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        script=here.joinpath("page.js").read_text(encoding="utf-8"),
    )


def _title(records: Sequence[Mapping[str, Any]], given: str | None) -> str:
    asked = dict.fromkeys(record["question"] for record in records if record.get("question"))
    return given or " ".join(asked) or "sparsekit results"


def _key(record: Mapping[str, Any]) -> str:
    """The config's key, which records of `sparsekit eval` do not have.

    Raises:
        SparsekitError: a config that is not as `sparsekit sweep` and `eval` write it.
    """
    try:
        return record.get("config_key") or config_key(None if record["config"] is None else load(record["config"]))
    except (KeyError, TypeError, AttributeError, SparsekitError) as error:
        raise _not_ours(record, error) from None


def _not_ours(record: Mapping[str, Any], error: Exception) -> SparsekitError:
    where = f"{record['label']}, {record['task']} at {record['tokens']}"
    return SparsekitError(f"record of {where}: not as sparsekit writes it ({error}).")


def report_data(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page is made of: `records`, `configs` by key with their text, and `failed`.

    A config has one label on the whole page, the first that a record gives it.

    Raises:
        SparsekitError: a record whose config or results are not as `sparsekit sweep` and `eval` write them.
    """
    shown: list[dict[str, Any]] = []
    configs: dict[str, dict[str, str]] = {}
    labels: set[str] = set()
    for record in records:
        if record.get("status", "ok") != "ok":
            continue
        key = _key(record)
        try:
            if key not in configs:
                label = _free("dense" if key == "dense" else record["label"], labels)
                configs[key] = {"label": label, "text": _text(record)}
            shown.append(
                {
                    **{name: _rounded(record.get(name)) for name in FIELDS},
                    "label": configs[key]["label"],
                    "config_key": key,
                    "scores": _rounded(record.get("scores", [])),
                    "depths": _rounded(record.get("depths", [])),
                    "layer_density": _rounded(record.get("layer_density")),
                }
            )
        except (KeyError, TypeError, AttributeError, SparsekitError) as error:
            raise _not_ours(record, error) from None
    failed = [
        {name: record.get(name) for name in ("label", "task", "tokens", "error")}
        for record in records
        if record.get("status") == "failed"
    ]
    return {"records": shown, "configs": configs, "failed": failed}


def _free(label: str, taken: set[str]) -> str:
    """The label, with a number where other configs have it already."""
    found, count = label, 1
    while found in taken:
        count += 1
        found = f"{label} ({count})"
    taken.add(found)
    return found


def _text(record: Mapping[str, Any]) -> str:
    """The config spelled out, a line for each run of layers and pattern, so that a diff of two shows what differs."""
    if not record.get("resolved"):
        return "every layer: the model's own attention"
    lines, drawn = [], []
    for run in record["resolved"]:
        groups = []
        for pattern in run["patterns"]:
            given = ", ".join(f"{k}={_said(v)}" for k, v in pattern.items() if k not in ("name", "heads"))
            lines.append(f"layers {run['layers']}, heads {pattern['heads']}: {pattern['name']}({given})")
            groups.append((f"{pattern['name']}({given})" if given else pattern["name"], parse_range(pattern["heads"])))
        drawn.append((str(run["layers"]), groups))
    config = record.get("config") or {}
    lines += draw_heads(drawn)
    lines += [
        f"{name}: {_said(config[name])}"
        for name in ("dense_below_tokens", "min_queries", "dense_impl", "precision")
        if name in config
    ]
    lines += record.get("settled", [])
    return "\n".join(lines)


def _said(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _subtitle(records: Sequence[Mapping[str, Any]]) -> str:
    """Models, devices and versions that the records tell."""
    done = [record for record in records if record.get("status", "ok") == "ok"]

    def of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(record[name]) for record in done if record.get(name)))

    versions = dict.fromkeys(
        ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        for record in done
        if record.get("versions")
    )
    return "".join(f"{part}. " for part in (of("model"), of("device"), of("dtype"), *versions) if part).strip()


# ---- probes


def _is_probe(file: str | Path) -> bool:
    try:
        with open(file, "rb") as opened:
            return _PROBE.match(opened.read(100)) is not None
    except OSError:
        return False  # who reads it as results says why


def _probe(file: str | Path) -> dict[str, Any]:
    """What the page shows of a probe: a number for each section and probed layer, and what was asked, in words."""
    from sparsekit.lab.calibrate.probe import SECTIONS, read_probe

    probe = read_probe(file)
    layers = [layer for layer in probe.layers if layer.gradient is not None]
    if not layers:
        raise SparsekitError(f"probe {str(file)!r}: no layer of {probe.model} was probed.")

    def of(field: str) -> dict[str, list[Any]]:
        return {name: [_rounded(getattr(layer, field)[name]) for layer in layers] for name in SECTIONS}

    try:
        asked = f"{probe.samples} prompts of {probe.prompts['tokens']} tokens ({', '.join(probe.prompts['tasks'])})"
        errors = of("gradient_error") if all(layer.gradient_error for layer in layers) else None
        found = {"gradient": of("gradient"), "gradient_error": errors, "mass": of("mass")}
    except (KeyError, TypeError) as error:
        raise SparsekitError(
            f"probe {str(file)!r}: not as `sparsekit calibrate probe -o` writes it ({error})."
        ) from None
    cut = probe.sections
    own = [layer.layer for layer in probe.layers if layer.gradient is None]
    says = (
        f"How much the answer's logit depends on each section of a layer's attention, and how much attention is there. "
        f"{probe.model}, {asked}. Streaming is {cut.sink_tokens} sink tokens and a window of {cut.window_tokens}, far "
        f"above the others: a click on its name shows it. Last is the last {cut.last_tokens} rows, Middle all else."
    )
    if errors:
        says += " Bars are standard errors over the prompts."
    if own:
        says += f" Layers {format_range(own)} keep the model's own attention and were not probed."
    named = {"file": Path(file).name, "model": probe.model, "says": says}
    return {**named, "layers": [layer.layer for layer in layers], **found}
