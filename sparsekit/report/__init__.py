"""One page of a sweep's or an evaluation's results: plots, needle map, configs with a diff, a table, filters.

The page is one HTML file without any link: Plotly, the data and the script are inside, so that it opens anywhere,
offline. Its filters are kept in the address (`report.html#task=needle4&tokens=2048`).
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from sparsekit.config import load
from sparsekit.errors import SparsekitError
from sparsekit.sweep import read_results
from sparsekit.sweep.grid import config_key

__all__ = ["report_data", "write_report"]

# What the page shows of a record.
FIELDS = (
    *("label", "model", "task", "tokens", "seed", "samples", "score", "score_low", "score_high", "kl", "ttft_s"),
    *("ttft_s_p20", "ttft_s_p80", "density", "tile_density", "plan_ms", "peak_memory_bytes", "device", "dtype"),
)
DIGITS = 6


def write_report(results: Sequence[str | Path], out: str | Path, *, title: str | None = None) -> list[str]:
    """Write the page of one or several result files; returns remarks (a last line that was unfinished).

    Args:
        results: JSONL files of `sparsekit sweep` or `sparsekit eval`.
        out: the page, .html.
        title: its heading; default the question that the records tell.

    Raises:
        SparsekitError: plotly is not installed, results cannot be read, or the page cannot be written.
    """
    if find_spec("plotly") is None:
        raise SparsekitError("reports need plotly: pip install 'sparsekit-attention[report]'")
    from plotly.offline import get_plotlyjs

    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise SparsekitError(f"output {str(path)!r}: the name must end in .html.")
    records, remarks = read_results(results)
    data = report_data(records)
    asked = list(dict.fromkeys(record["question"] for record in records if record.get("question")))
    here = files("sparsekit.report")
    page = Template(here.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title or " ".join(asked) or "sparsekit results"),
        subtitle=html.escape(_subtitle(records)),
        plotly=get_plotlyjs(),
        # No text of a record can end the script element, or is markup.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        script=here.joinpath("page.js").read_text(encoding="utf-8"),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise SparsekitError(f"output {str(path)!r} cannot be written: {error.strerror or error}.") from None
    return remarks


def report_data(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page is made of: `records`, `configs` by key with their text, and `failed`."""
    shown: list[dict[str, Any]] = []
    configs: dict[str, dict[str, str]] = {}
    for record in records:
        if record.get("status", "ok") != "ok":
            continue
        key = record.get("config_key") or config_key(None if record["config"] is None else load(record["config"]))
        label = "dense" if key == "dense" else record["label"]
        configs.setdefault(key, {"label": label, "text": _text(record)})
        shown.append(
            {
                **{name: _rounded(record.get(name)) for name in FIELDS},
                "label": label,
                "config_key": key,
                "scores": _rounded(record.get("scores", [])),
                "depths": _rounded(record.get("depths", [])),
                "layer_density": _rounded(record.get("layer_density")),
            }
        )
    failed = [
        {name: record.get(name) for name in ("label", "task", "tokens", "error")}
        for record in records
        if record.get("status") == "failed"
    ]
    return {"records": shown, "configs": configs, "failed": failed}


def _text(record: Mapping[str, Any]) -> str:
    """The config spelled out, a line for each run of layers and pattern, so that a diff of two shows what differs."""
    if not record.get("resolved"):
        return "every layer: the model's own attention"
    lines = []
    for run in record["resolved"]:
        for pattern in run["patterns"]:
            given = ", ".join(f"{k}={_said(v)}" for k, v in pattern.items() if k not in ("name", "heads"))
            lines.append(f"layers {run['layers']}, heads {pattern['heads']}: {pattern['name']}({given})")
    config = record.get("config") or {}
    lines += [
        f"{name}: {config[name]}" for name in ("dense_below_tokens", "min_queries", "dense_impl") if name in config
    ]
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
    return ". ".join(part for part in (of("model"), of("device"), of("dtype"), *versions) if part) + "."
