"""The report: one file without links, of a bounded size; its points, filters, tables and diff are the records'."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium, need_chromium
from typer.testing import CliRunner

from sparsekit import SparsekitError, load
from sparsekit.cli import app
from sparsekit.lab.calibrate.probe import SECTIONS, LayerProbe, Probe, Sections
from sparsekit.lab.report import markdown_report, report_data, write_report
from sparsekit.lab.sweep.runs import config_key

NODE = shutil.which("node")


def record(
    label: str, config: dict[str, Any] | None, task: str, tokens: int, *, score: float, ttft: float
) -> dict[str, Any]:
    rng = random.Random(f"{label} {task} {tokens}")
    key = config_key(None if config is None else load(config))
    layers = [1.0] * 21 + [0.25] * 9
    return {
        "key": f"{key} {task} {tokens}", "status": "ok", "question": "How <wide> a window?", "label": label,
        "config": config, "config_key": key, "model": "smollm2-135m", "task": task, "tokens": tokens, "seed": 0,
        "samples": 24, "score": score, "score_low": score - 0.1, "score_high": score + 0.1, "kl": 0.01 * (1 - score),
        "ttft_s": ttft, "ttft_s_p20": 0.9 * ttft, "ttft_s_p80": 1.1 * ttft, "density": 0.775 if config else 1.0,
        "tile_density": 0.8, "layer_density": layers if config else None, "plan_ms": 1.5, "peak_memory_bytes": 10**9,
        "device": "cpu (x86_64)", "dtype": "float32", "scores": [float(rng.random() < score) for _ in range(24)],
        "depths": [rng.random() for _ in range(24)] if task != "vt" else [None] * 24,
        "texts": [" 12345"] * 24, "versions": {"sparsekit": "0.1.0", "torch": "2.13.0"},
        "resolved": None if config is None else [
            {"layers": "0-20", "patterns": [{"name": "dense", "heads": "0-8"}]},
            {"layers": "21-29", "patterns": [{**config["layers"]["21-29"], "heads": "0-8"}]},
        ],
    }  # fmt: skip


def window(tokens: int) -> dict[str, Any]:
    return {"layers": {"21-29": {"name": "triangle", "sink_tokens": 8, "window_tokens": tokens}}}


def sweep(configs: int) -> list[dict[str, Any]]:
    """`configs` windows and dense, on three tasks at two lengths; a wider window is better and slower."""
    found = []
    for task in ("passkey", "needle4", "vt"):
        for tokens in (1024, 2048):
            found.append(record("dense", None, task, tokens, score=0.9, ttft=tokens / 1000))
            for i in range(configs):
                label, share = f"window_tokens={64 * (i + 1)}", (i + 1) / (configs + 1)
                found.append(
                    record(
                        label,
                        window(64 * (i + 1)),
                        task,
                        tokens,
                        score=0.9 * share,
                        ttft=tokens / 1000 * (0.5 + share / 2),
                    )
                )
    return found


def written(folder: Path, records: list[dict[str, Any]], *probes: Path) -> Path:
    results = folder / "r.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in records))
    write_report([*([results] if records else []), *probes], folder / "report.html")
    return folder / "report.html"


def probed(folder: Path, model: str = "smollm2-135m", layers: int = 6) -> Path:
    """A probe file: Grad(Middle) of layer i is 1e-6 * (i + 1); layer 2 keeps its own attention."""
    found = [
        LayerProbe(
            i,
            gradient={name: (i + 1) * 10.0 ** (j - 8) for j, name in enumerate(reversed(SECTIONS))},
            gradient_error=dict.fromkeys(SECTIONS, 1e-9),
            signed=dict.fromkeys(SECTIONS, 0.0),
            mass={name: (j + 1) / 100 for j, name in enumerate(SECTIONS)},
        )
        if i != 2
        else LayerProbe(i, own="sliding window")
        for i in range(layers)
    ]
    asked = {"tasks": ["needle4", "passkey"], "tokens": 1024, "seeds": [0]}
    file = folder / f"probe-{model}.json"
    file.write_text(json.dumps(Probe(model, Sections(), 16, asked, {"dtype": "float32"}, tuple(found)).to_dict()))
    return file


class _Links(HTMLParser):
    """What a page would load, and the ids that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data") and value]
        self.ids += [found["id"]] if found.get("id") else []
        self.scripts += tag == "script"


def test_one_file_without_links(tmp_path: Path) -> None:
    page = written(tmp_path, sweep(3)).read_text()
    parser = _Links()
    parser.feed(page)
    assert parser.links == ["data:,"]
    assert "@import" not in page and "url(" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert parser.scripts == 3
    assert len(parser.ids) == len(set(parser.ids))
    assert "<h1>How &lt;wide&gt; a window?</h1>" in page
    assert "smollm2-135m. cpu (x86_64). float32. sparsekit 0.1.0, torch 2.13.0." in page


def test_five_hundred_records_weigh_under_eight_megabytes(tmp_path: Path) -> None:
    records = sweep(83)
    assert len(records) > 500
    assert written(tmp_path, records).stat().st_size < 8_000_000


def data_of(page: str) -> dict[str, Any]:
    start, end = page.index("const DATA = ") + 13, page.index(';</script>\n<script>"use strict"')
    found: dict[str, Any] = json.loads(page[start:end])
    return found


def test_no_text_of_a_record_ends_the_script(tmp_path: Path) -> None:
    records = sweep(1)
    records[0]["device"] = "</script><script>alert(1)</script>"
    page = written(tmp_path, records).read_text()
    parser = _Links()
    parser.feed(page)
    assert parser.scripts == 3
    data = data_of(page)
    assert data["records"][0]["device"] == records[0]["device"]


def test_data_holds_every_record_and_each_config_once() -> None:
    records = [*sweep(3), {**sweep(1)[1], "status": "failed", "error": "out of memory"}]
    data = report_data(records)
    assert len(data["records"]) == 24 and len(data["configs"]) == 4
    assert data["failed"] == [
        {"label": "window_tokens=64", "task": "passkey", "tokens": 1024, "error": "out of memory"}
    ]
    text = data["configs"][records[1]["config_key"]]["text"]
    assert text.splitlines()[1] == "layers 21-29, heads 0-8: triangle(sink_tokens=8, window_tokens=64)"
    assert data["configs"]["dense"]["text"] == "every layer: the model's own attention"
    plain = {k: v for k, v in records[1].items() if k not in ("config_key", "status", "question", "key")}
    assert report_data([plain])["records"][0]["config_key"] == records[1]["config_key"]


def test_a_table_for_a_page_of_docs(tmp_path: Path) -> None:
    plain = {k: v for k, v in sweep(1)[1].items() if k not in ("config_key", "status", "question", "key")}
    records = [*sweep(2), {**plain, "task": "cwe", "label": "a|b", "score": 0.5}]
    records.append({**sweep(1)[1], "key": "another", "status": "failed"})
    results, table = tmp_path / "r.jsonl", tmp_path / "table.md"
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert write_report([results], table) == []
    assert table.read_text() == markdown_report(records)
    question, blank, head, line, *rows, after, caption = table.read_text().splitlines()
    assert question == "How <wide> a window?" and blank == after == ""
    tasks = [f"{task} {tokens}" for task in ("passkey", "needle4", "vt") for tokens in (1024, 2048)]
    assert head == f"| config | {' | '.join([*tasks, 'cwe 1024'])} | KL | time of dense | density |"
    assert line == "| --- |" + " ---: |" * 10
    assert rows[0] == "| dense |" + " 0.900 |" * 6 + "  | 0.0010 | 1.00 | 1.000 |"
    assert rows[1].startswith("| window_tokens=64 |" + " 0.300 |" * 6 + " 0.500 |")
    assert len(rows) == 3 and rows[2].startswith("| window_tokens=128 |")
    assert caption == "24 prompts a score. smollm2-135m. cpu (x86_64). float32. sparsekit 0.1.0, torch 2.13.0."
    [row] = markdown_report([records[-2]], title="Mine").splitlines()[4:5]
    assert row.startswith("| a\\|b | 0.500 |")


def test_rows_of_a_table_do_not_mix_devices_or_models() -> None:
    card = [{**record, "device": "H100", "ttft_s": record["ttft_s"] / 100, "score": 0.1} for record in sweep(1)]
    table = markdown_report([*sweep(1), *card]).splitlines()
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:]] for cells in (line.split("|") for line in table[4:8])
    }
    assert list(rows) == [
        f"{label}, {device}" for device in ("cpu (x86_64)", "H100") for label in ("dense", "window_tokens=64")
    ]
    assert rows["dense, H100"][0] == "0.100" and rows["dense, cpu (x86_64)"][0] == "0.900"
    assert {row[-3] for name, row in rows.items() if name.startswith("dense")} == {"1.00"}
    assert rows["window_tokens=64, H100"][-3] == rows["window_tokens=64, cpu (x86_64)"][-3]


def test_a_config_has_one_label_and_a_label_one_config() -> None:
    one, other = sweep(2)[1:3]
    data = report_data([one, {**other, "label": one["label"]}, {**one, "tokens": 4096, "label": "again"}])
    assert [row["label"] for row in data["records"]] == ["window_tokens=64", "window_tokens=64 (2)", "window_tokens=64"]
    assert [config["label"] for config in data["configs"].values()] == ["window_tokens=64", "window_tokens=64 (2)"]


def test_a_probe_beside_the_records_or_alone(tmp_path: Path) -> None:
    probe = probed(tmp_path)
    for records in (sweep(1), []):
        data = data_of(written(tmp_path, records, probe).read_text())
        assert len(data["records"]) == len(records)
        [found] = data["probes"]
        assert found["layers"] == [0, 1, 3, 4, 5]
        assert found["gradient"]["middle"] == pytest.approx([1e-8 * (i + 1) for i in found["layers"]])
        assert found["gradient_error"]["last"] == [1e-9] * 5 and found["mass"]["streaming"] == [0.01] * 5
        assert "16 prompts of 1024 tokens (needle4, passkey)" in found["says"]
        assert "64 sink tokens and a window of 128" in found["says"]
        assert "Layers 2 keep the model's own attention" in found["says"]


# ---- the page's scripts, in Node

NO_PROBE = (
    "No probe was given: `sparsekit calibrate probe MODEL -o probe.json` makes one, to be named beside the results."
)


def in_node(page: Path, hash: str = "") -> dict[str, Any]:
    """What the page's scripts show over a document of the tests' own, step by step."""
    if NODE is None:
        pytest.skip("node is not installed; the page's scripts were not run")
    script = str(Path(__file__).with_name("report_page.js"))
    done = subprocess.run([NODE, script, str(page), hash], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    records = [*sweep(3), {**sweep(1)[1], "key": "x", "status": "failed", "error": "out of memory"}]
    folder = tmp_path_factory.mktemp("report")
    return in_node(written(folder, records, probed(folder)))


def test_the_page_draws_every_config(seen: dict[str, Any]) -> None:
    first = seen["first"]
    assert first["ready"] == "24" and first["count"] == "24 of 24 records, 4 configs"
    assert first["words"] == {} and first["hidden"] == []
    line, points = first["plots"]["score-time"]
    assert sorted(zip(points["x"], points["y"], strict=True)) == [
        (pytest.approx(0.5 + i / 8), pytest.approx(0.9 * i / 4)) for i in (1, 2, 3, 4)
    ]
    assert line["y"] == sorted(line["y"]) and len(line["y"]) == 4
    assert points["marker"]["symbol"] == ["circle"] * 3 + ["diamond"]
    assert first["axes"]["score-time"][0]["title"]["text"] == "time to first token (dense: 1)"
    front, points = first["plots"]["score-density"]
    assert front["x"] == [0.775, 1] and front["y"] == [pytest.approx(0.675), pytest.approx(0.9)]
    assert points["marker"]["symbol"] == ["circle-open"] * 2 + ["circle", "diamond"]
    assert first["failed"] == ["window_tokens=64, passkey at 1024: out of memory"] and not first["failures_hidden"]


def test_needle_maps_layers_and_gradients(seen: dict[str, Any]) -> None:
    first = seen["first"]
    [layers] = first["plots"]["layer-map"]
    assert first["axes"]["layer-map"][1]["ticktext"] == [f"window_tokens={64 * i}" for i in (1, 2, 3)]
    assert layers["y"] == [0, 1, 2] and layers["x"] == list(range(30))
    assert layers["z"] == [[1] * 21 + [0.25] * 9] * 3
    assert "window_tokens=192" in json.dumps(layers["text"][2])
    assert first["chosen"]["other"] == first["chosen"]["before"] == "dense"
    for name, key in (("needle-map", first["chosen"]["needle"]), ("other-map", "dense")):
        [heat] = first["plots"][name]
        assert heat["x"] == ["1024", "2048"] and len(heat["z"]) == len(heat["customdata"]) == 10
        wanted = [r for r in sweep(3) if r["config_key"] == key and r["task"] != "vt"]
        for column, tokens in enumerate((1024, 2048)):
            for bin in range(10):
                scores = [
                    score
                    for r in wanted
                    if r["tokens"] == tokens
                    for depth, score in zip(r["depths"], r["scores"], strict=True)
                    if bin / 10 <= depth < (bin + 1) / 10
                ]
                assert heat["customdata"][bin][column] == len(scores)
                mean = sum(scores) / len(scores) if scores else None
                assert heat["z"][bin][column] == (mean if mean is None else pytest.approx(mean))
    middle, last, streaming = first["plots"]["probe-gradient"]
    assert [trace["name"] for trace in (middle, last, streaming)] == ["middle", "last", "streaming"]
    assert middle["x"] == [0, 1, 3, 4, 5] and middle["y"] == pytest.approx([1e-8, 2e-8, 4e-8, 5e-8, 6e-8])
    assert last["error_y"]["array"] == [1e-9] * 5 and streaming["visible"] == "legendonly"
    assert [trace["y"][0] for trace in first["plots"]["probe-mass"]] == [0.03, 0.02, 0.01]
    assert first["probe"].startswith("How much the answer's logit depends on")


def test_filters_work_and_stay_in_the_address(seen: dict[str, Any]) -> None:
    assert seen["first"]["options"]["filter-task"] == ["all (3)", "passkey", "needle4", "vt"]
    filtered = seen["filtered"]
    assert filtered["count"] == "8 of 24 records, 4 configs" and filtered["address"] == "#task=needle4"
    assert {row[1] for row in filtered["table"][1:]} == {"needle4"}
    searched = seen["searched"]
    assert {row[0] for row in searched["table"][1:]} == {"dense", "window_tokens=64"}
    assert len(searched["plots"]["score-time"][1]["x"]) == 2
    assert seen["reset"]["count"] == "24 of 24 records, 4 configs" and seen["reset"]["address"] == "#"
    moved = seen["moved"]
    assert moved["count"] == "8 of 24 records, 4 configs" and "needle-map" not in moved["plots"]
    assert moved["words"] == dict.fromkeys(
        ("needle-map-words", "other-map-words"),
        "No record of this choice tells where its answers stand: passkey and needle tasks do.",
    )


def test_tables_sort_and_tell_what_is_the_same(seen: dict[str, Any]) -> None:
    for name, reverse in (("descending", True), ("ascending", False)):
        tokens = [int(row[2]) for row in seen[name][1:]]
        assert len(tokens) == 24 and tokens == sorted(tokens, reverse=reverse)
    assert seen["first"]["constant"] == (
        "A click on a heading sorts. The same in all: model smollm2-135m, seed 0, prompts 24, device cpu (x86_64), "
        "dtype float32."
    )
    head, *rows = seen["first"]["configs"]
    assert head == ["config", "score ▾", "time of dense", "density", "KL", "records", "on the front of"]
    assert rows[0] == ["dense", "0.900", "1.000", "1.000", "0.0010", "6", "time, density"]
    assert rows[-1] == ["window_tokens=64", "0.225", "0.625", "0.775", "0.0077", "6", "time"]
    assert [row[3] for row in seen["byDensity"][1:]] == ["1.000", "0.775", "0.775", "0.775"]


def test_the_diff_shows_what_differs(seen: dict[str, Any]) -> None:
    assert seen["compared"] == [
        ["less", "- every layer: the model's own attention"],
        ["more", "+ layers 0-20, heads 0-8: dense()"],
        ["more", "+ layers 21-29, heads 0-8: triangle(sink_tokens=8, window_tokens=192)"],
    ]
    assert [kind for kind, _ in seen["same"]] == ["same"] * 3 and seen["same"][0][1] == "The two run the same:"
    clicked = seen["clicked"]
    assert clicked["chosen"]["needle"] == clicked["chosen"]["after"] == clicked["key"]
    assert clicked["diff"][-1][1].endswith("window_tokens=64)")


def test_the_address_chooses_filters(tmp_path: Path) -> None:
    found = in_node(written(tmp_path, sweep(2)), "#tokens=2048&config=128")
    assert found["first"]["count"] == "6 of 18 records, 2 configs"
    nothing = in_node(tmp_path / "report.html", "#tokens=77")["first"]
    assert nothing["count"] == "0 of 18 records, 0 configs" and nothing["plots"] == {}
    assert nothing["words"].pop("probe-words") == NO_PROBE
    assert set(nothing["words"].values()) == {"No record passes these filters."} and len(nothing["words"]) == 6


def test_devices_and_models_are_not_mixed(tmp_path: Path) -> None:
    """A point for each config on each device; times are held against dense on the same one."""
    card = [
        {**r, "device": "H100", "key": f"{r['key']} h", "ttft_s": r["ttft_s"] / 100, "score": r["score"] / 2}
        for r in sweep(2)
    ]
    first = in_node(written(tmp_path, [*sweep(2), *card]))["first"]
    assert first["count"] == "36 of 36 records, 3 configs"
    _, cpu, _, gpu = first["plots"]["score-time"]
    assert (cpu["name"], gpu["name"]) == ("cpu (x86_64)", "H100")
    assert gpu["x"] == pytest.approx(cpu["x"]) and gpu["y"] == pytest.approx([y / 2 for y in cpu["y"]])
    assert len(first["plots"]["layer-map"][0]["z"]) == 2
    other = [{**r, "model": "m", "key": f"{r['key']} m"} for r in sweep(2) if r["tokens"] == 1024]
    both = in_node(written(tmp_path, [*sweep(2), *other], probed(tmp_path, "m")), "#model=smollm2-135m")["first"]
    assert both["words"] == {"probe-words": "There is no probe of smollm2-135m here."}
    lacking = in_node(written(tmp_path, [*sweep(2), *other][:-1]))["first"]
    assert "; 1 lacks some task, length or seed of these" in lacking["count"]
    assert [trace["name"] for trace in lacking["plots"]["score-density"][1::2]] == ["smollm2-135m", "m"]
    assert len(lacking["plots"]["layer-map"][0]["z"]) == 4


def test_a_sweep_that_is_not_whole_opens_where_most_configs_compare(tmp_path: Path) -> None:
    """Here at 1,024 tokens; with no time in any record, the plot of times is not shown."""
    untimed = [{**r, "ttft_s": None} for r in sweep(3)]
    part = [r for r in untimed if r["tokens"] == 1024 or r["label"] in ("dense", "window_tokens=64")]
    steps = in_node(written(tmp_path, part))
    assert steps["first"]["count"] == "12 of 18 records, 4 configs"
    assert len(steps["first"]["plots"]["score-density"][1]["x"]) == 4 and "timed" in steps["first"]["hidden"]
    assert "18 of 18 records, 4 configs; 2 lack some task" in steps["reset"]["count"]
    linked = in_node(written(tmp_path, part), "#task=vt")["first"]
    assert linked["count"].startswith("6 of 18 records, 4 configs; 2 lack")
    left = in_node(written(tmp_path, part), steps["reset"]["address"])["first"]
    assert steps["reset"]["address"] == "#" and left["count"] == steps["reset"]["count"]
    assert in_node(written(tmp_path, untimed))["first"]["count"] == "24 of 24 records, 4 configs"
    assert in_node(written(tmp_path, sweep(3)))["first"]["hidden"] == []


def test_what_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    dense = in_node(written(tmp_path, [{**sweep(1)[0], "ttft_s": None, "task": "perplexity", "depths": [None] * 24}]))
    assert dense["first"]["words"] == {
        "score-time-words": "No task of this choice was timed.",
        "needle-map-words": "No record of this choice tells where its answers stand: passkey and needle tasks do.",
        "other-map-words": "No record of this choice tells where its answers stand: passkey and needle tasks do.",
        "layer-map-words": "Only dense attention here: every layer has 1.",
        "probe-words": NO_PROBE,
    }
    one = in_node(written(tmp_path, sweep(1)[1:2]))["first"]
    assert one["words"]["other-map-words"] == "There is no other config."
    assert one["axes"]["score-time"][0]["title"]["text"] == "time to first token, s"
    failed = in_node(written(tmp_path, [{**sweep(1)[1], "status": "failed", "error": "out of memory"}]))["first"]
    assert failed["hidden"] == ["results", "details", "gradients", "timed"] and not failed["failures_hidden"]
    assert failed["failed"] == ["window_tokens=64, passkey at 1024: out of memory"]
    alone = in_node(written(tmp_path, [], probed(tmp_path)))["first"]
    assert alone["hidden"] == ["results", "details", "timed"]
    assert set(alone["plots"]) == {"probe-gradient", "probe-mass"}


# ---- the page in a browser


PLOTS = ("score-time", "score-density", "needle-map", "other-map", "layer-map", "probe-gradient", "probe-mass")
# Pairs of texts of one figure that cover each other by more than a rounding.
OVERLAPS = """[...document.querySelectorAll(".js-plotly-plot")].filter((box) => !box.hidden).flatMap((box) => {
  const texts = [...box.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
  const shown = texts.filter(([said, r]) => said.trim() && r.width && r.height);
  return shown.flatMap(([a, r], i) => shown.slice(i + 1).filter(([, s]) =>
    Math.min(r.right, s.right) - Math.max(r.left, s.left) > 2 &&
    Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 3).map(([b]) => `${box.id}: ${a} / ${b}`));
})"""

# (row, column) of the middle of every point of the first figure.
POINTS = """[...document.querySelectorAll("#score-time .point")].map((point) => {
  const { x, y, width, height } = point.getBoundingClientRect();
  return [y + scrollY + height / 2, x + width / 2].map(Math.floor);
})"""


def open_report(chromium: Chromium, page: Path, hash: str = "") -> tuple[float, float]:
    return chromium.open(page.as_uri() + hash, "'ready' in document.body.dataset")


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    need_chromium()
    found = Chromium(tmp_path / "chromium")
    yield found
    found.close()


@pytest.mark.slow
def test_a_browser_opens_it(tmp_path: Path, chromium: Chromium) -> None:
    """A page of 500 records: nothing on the console, nothing loaded, points, figures that are not blank, a filter."""
    page = written(tmp_path, sweep(83), probed(tmp_path))
    assert page.stat().st_size < 8_000_000
    open_report(chromium, page)
    assert chromium.complaints() == []
    assert chromium.loaded() == [page.as_uri()]
    assert chromium.run("document.body.dataset.ready") == "504"
    for name in ("score-time", "score-density"):
        assert chromium.run(f"document.querySelectorAll('#{name} .point').length") == 84
    assert chromium.run("document.querySelectorAll('#probe-gradient .point').length") == 2 * 5
    assert chromium.run(OVERLAPS) == []
    picture = chromium.picture()
    assert picture.std() > 0.02
    for name in PLOTS:
        x, y, width, height = chromium.run(
            f"(({{x, y, width, height}}) => [x, y + scrollY, width, height].map(Math.round))"
            f"(document.getElementById('{name}').getBoundingClientRect())"
        )
        assert width > 400 and height > 200, name
        assert picture[y : y + height, x : x + width].std() > 0.02, name

    for place in chromium.run(POINTS):  # each point is drawn where it is said to be, and blue
        assert picture[tuple(place)] == pytest.approx((0, 0x72 / 255, 0xB2 / 255), abs=0.1)

    chromium.run("(box => { box.value = 'needle4'; box.dispatchEvent(new Event('change')); })(at('filter-task'))")
    assert chromium.run("at('count').textContent") == "168 of 504 records, 84 configs"
    assert chromium.run("[...new Set([...at('table').rows].slice(1).map((row) => row.cells[1].textContent))]") == [
        "needle4"
    ]
    assert chromium.run("location.hash") == "#task=needle4"
    chromium.run("at('filter-config').focus()")
    chromium.ask("Input.insertText", text="=5312")
    assert chromium.run("at('count').textContent") == "4 of 504 records, 2 configs"
    assert chromium.run("document.querySelectorAll('#score-time .point').length") == 2
    chromium.run("location.hash = '#task=vt&tokens=77'")
    chromium.run("new Promise((done) => setTimeout(done, 50))")
    assert chromium.run("at('score-time-words').textContent") == "No record passes these filters."
    assert chromium.run("at('score-time').getBoundingClientRect().height") == 0
    chromium.run("at('reset').click()")
    assert chromium.run("document.querySelectorAll('#score-time .point').length") == 84
    before = chromium.run("at('after').value")
    x, y = chromium.run(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelector('#score-time .point').getBoundingClientRect())"
    )
    chromium.click(x, y)
    assert chromium.run("at('after').value === at('needle').value") and chromium.run("at('after').value") != before
    assert chromium.complaints() == [] and chromium.loaded() == [page.as_uri()]


@pytest.mark.slow
def test_other_pages_in_a_browser(tmp_path: Path, chromium: Chromium) -> None:
    """Few records, two devices, long labels, a narrow window: nothing on the console, and no text on another."""
    rng = random.Random(0)
    long = [
        {**r, "label": f"start=12-29, layers.21-29=union(triangle, a_shape), {r['label']}", "score": rng.random()}
        for r in sweep(30)
    ]
    pages = {
        "one": sweep(1)[:1],
        "few": sweep(3)[:4],
        "long": long,
        "two": [*long, *({**r, "device": "NVIDIA H100 80GB HBM3", "key": f"{r['key']} h"} for r in long)],
        "none": [],
    }
    for name, records in pages.items():
        (tmp_path / name).mkdir()
        page = written(tmp_path / name, records, probed(tmp_path))
        for width in (1400, 420):
            chromium.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            open_report(chromium, page)
            assert chromium.complaints() == [], name
            assert chromium.run(OVERLAPS) == [], name
            wide = (
                "[...document.body.querySelectorAll('*')].filter((e) => e.getBoundingClientRect().right > innerWidth)"
            )
            inside = "document.documentElement.scrollWidth <= innerWidth"
            assert chromium.run(inside), (name, width, chromium.run(f"{wide}.map((e) => e.outerHTML.slice(0, 60))"))


@pytest.mark.slow
def test_five_hundred_records_open_in_two_seconds(tmp_path: Path, chromium: Chromium) -> None:
    """Of the main thread's own time, which other programs on the machine change little; on the clock they may add."""
    page = written(tmp_path, sweep(83), probed(tmp_path))
    opened = [open_report(chromium, page) for _ in range(3)]
    assert min(thread for _, thread in opened) < 2, opened
    assert min(wall for wall, _ in opened) < 5, opened


# ---- bad input


def test_what_cannot_be_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = tmp_path / "r.jsonl", tmp_path / "r.html"
    results.write_text("".join(json.dumps(row) + "\n" for row in sweep(1)) + '{"task": "pass')
    assert write_report([results], tmp_path / "new" / "r.html") == [
        f"{results}: the last line is unfinished, and left out."
    ]
    (tmp_path / "empty.jsonl").write_text("")
    assert write_report([results, tmp_path / "empty.jsonl"], page)[1:] == [f"{tmp_path}/empty.jsonl: holds no record."]
    first, second = results.read_text().splitlines()[:2]
    other = {"kind": "other", "task": "passkey", "tokens": 512}
    probe = probed(tmp_path)
    bad = {
        "middle.jsonl": (f"{first}\n{second[:90]}\n{second}\n", r"middle.jsonl', line 2: no record .*\(no JSON\)"),
        "binary.jsonl": (f"{first}\n\0\0\n", r"binary.jsonl', line 2: no record .*\(no JSON\)"),
        "list.jsonl": ("[1]\n", r"list.jsonl', line 1: .*\(no JSON object\)"),
        "other.jsonl": (json.dumps(other) + "\n", r"line 1: .*\(without label, model, seed, score, density, config\)"),
        "words.jsonl": (first.replace('"score": 0.9', '"score": "high"') + "\n", r"line 1: .*\(score = 'high'\)"),
        "resolved.jsonl": (
            second.replace('"layers": "0-20"', '"l": 1') + "\n",
            r"record of .* 1024: not as .*'layers'",
        ),
        "empty.jsonl": ("", "empty.jsonl: no record in there"),
        "cut.jsonl": (first[:90], "cut.jsonl: no record in there"),
        "cut.json": (probe.read_text()[:400], r"probe .*cut.json': not a file of `sparsekit calibrate probe -o`"),
        "half.json": (probe.read_text().replace('"middle"', '"mid"'), r"probe .*half.json': not as `sparsekit calibr"),
    }
    for name, (text, _) in bad.items():
        (tmp_path / name).write_text(text)
    for given, out, says in (
        *(([tmp_path / name], page, says) for name, (_, says) in bad.items()),
        ([results], tmp_path / "r.txt", r"must end in \.html, or in \.md for the table alone"),
        ([probe], tmp_path / "r.md", r"probe .*: a table \(\.md\) has no place for it"),
        ([tmp_path / "no.jsonl"], page, "cannot be read: No such file"),
        ([tmp_path], page, "cannot be read: Is a directory"),
        ([results], results / "r.html", "cannot be written"),
    ):
        with pytest.raises(SparsekitError, match=says) as error:
            write_report(given, out)
        assert "\n" not in str(error.value)
        called = CliRunner().invoke(app, ["report", *map(str, given), "-o", str(out)])
        assert called.exit_code == 1 and called.stderr == f"error: {error.value}\n"
    monkeypatch.setattr("sparsekit.lab.report.find_spec", lambda name: None)
    with pytest.raises(SparsekitError, match=r"pip install 'sparsekit-attention\[report\]'"):
        write_report([results], page)


def test_a_full_disk_leaves_the_page_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = written(tmp_path, sweep(1))
    before, real = page.read_bytes(), Path.write_text

    def write_text(self: Path, text: str, **options: Any) -> int:
        real(self, text[:1000], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(SparsekitError, match=r"report\.html' cannot be written: No space left on device"):
        write_report([tmp_path / "r.jsonl"], page)
    assert page.read_bytes() == before and sorted(file.name for file in tmp_path.iterdir()) == [
        "r.jsonl",
        "report.html",
    ]


def test_the_command(tmp_path: Path) -> None:
    page = written(tmp_path, sweep(1))
    page.unlink()
    ran = CliRunner().invoke(app, ["report", str(tmp_path / "r.jsonl"), "-o", str(page), "--title", "Windows"])
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.strip() == str(page) and "<h1>Windows</h1>" in page.read_text()


def test_mixed_heads_are_drawn_below_the_lines_of_a_config() -> None:
    triangle = {"name": "triangle", "window_tokens": 512}
    one = {**sweep(1)[0]}
    one["resolved"] = [
        {"layers": "0-20", "patterns": [{"name": "dense", "heads": "0,3"}, {**triangle, "heads": "1-2"}]},
        {"layers": "21-29", "patterns": [{**triangle, "heads": "0-3"}]},
    ]
    [config] = report_data([one])["configs"].values()
    lines = config["text"].splitlines()
    assert lines[3:6] == ["heads: . dense, a triangle(window_tokens=512)", "layer  0-20  .aa.", "layer 21-29  aaaa"]
