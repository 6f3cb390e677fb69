"""The report: one file without links, of a bounded size; its points, filters, table and diff are the records'."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsekit import SparsekitError, load
from sparsekit.cli import app
from sparsekit.report import report_data, write_report
from sparsekit.sweep.grid import config_key

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
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


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    write_report([folder / "r.jsonl"], folder / "report.html")
    return folder / "report.html"


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


def test_no_text_of_a_record_ends_the_script(tmp_path: Path) -> None:
    records = sweep(1)
    records[0]["device"] = "</script><script>alert(1)</script>"
    page = written(tmp_path, records).read_text()
    parser = _Links()
    parser.feed(page)
    assert parser.scripts == 3
    data = json.loads(page[page.index("const DATA = ") + 13 : page.index(';</script>\n<script>"use strict"')])
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


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's scripts show, run in Node over a document of the tests' own."""
    if NODE is None:
        pytest.skip("node is not installed; the page's scripts were not run")
    records = [*sweep(3), {**sweep(1)[1], "key": "x", "status": "failed", "error": "out of memory"}]
    page = written(tmp_path_factory.mktemp("report"), records)
    done = subprocess.run(
        [NODE, str(Path(__file__).with_name("report_page.js")), str(page)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_page_draws_every_config(seen: dict[str, Any]) -> None:
    first = seen["first"]
    assert first["ready"] == "24" and first["count"] == "24 of 24 records, 4 configs"
    line, points = first["plots"]["score-time"]
    assert sorted(zip(points["x"], points["y"], strict=True)) == [
        (pytest.approx(0.5 + i / 8), pytest.approx(0.9 * i / 4)) for i in (1, 2, 3, 4)
    ]
    assert line["y"] == sorted(line["y"]) and len(line["y"]) == 4
    density_front = first["plots"]["score-density"][0]
    assert density_front["x"] == [0.775, 1] and density_front["y"] == [pytest.approx(0.675), pytest.approx(0.9)]
    [layers] = first["plots"]["layer-map"]
    assert layers["y"] == ["window_tokens=64", "window_tokens=128", "window_tokens=192"]
    assert layers["z"][0] == [1] * 21 + [0.25] * 9
    [heat] = first["plots"]["needle-map"]
    assert heat["x"] == ["1024", "2048"] and len(heat["z"]) == 10
    counted = [value for row in heat["z"] for value in row if value is not None]
    assert counted and all(0 <= value <= 1 for value in counted)
    assert first["failed"] == ["window_tokens=64, passkey at 1024: out of memory"] and not first["failures_hidden"]


def test_filters_work_and_stay_in_the_address(seen: dict[str, Any]) -> None:
    assert seen["first"]["options"]["filter-task"] == ["all (3)", "passkey", "needle4", "vt"]
    filtered = seen["filtered"]
    assert filtered["count"] == "8 of 24 records, 4 configs" and filtered["address"] == "#task=needle4"
    assert {row[2] for row in filtered["table"][1:]} == {"needle4"}
    searched = seen["searched"]
    assert {row[0] for row in searched["table"][1:]} == {"dense", "window_tokens=64"}
    assert len(searched["plots"]["score-time"][1]["x"]) == 2


def test_the_table_sorts_and_the_diff_shows_what_differs(seen: dict[str, Any]) -> None:
    for name, reverse in (("descending", True), ("ascending", False)):
        tokens = [int(row[3]) for row in seen[name][1:]]
        assert len(tokens) == 24 and tokens == sorted(tokens, reverse=reverse)
    assert {"less", "more"} <= {kind for kind, _ in seen["compared"]}
    assert ["more", "+ layers 21-29, heads 0-8: triangle(sink_tokens=8, window_tokens=192)"] in seen["compared"]


@pytest.mark.skipif(NODE is None, reason="node is not installed; the page's scripts were not run")
def test_the_address_chooses_filters(tmp_path: Path) -> None:
    page = written(tmp_path, sweep(2))
    script = str(Path(__file__).with_name("report_page.js"))
    done = subprocess.run(
        [str(NODE), script, str(page), "tokens=2048&config=128"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["first"]["count"] == "6 of 18 records, 2 configs"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the page was not opened in a browser")
def test_a_browser_opens_it(tmp_path: Path) -> None:
    """Points are there, a filter works, the picture is not blank, and the console is empty."""
    page = written(tmp_path, sweep(83))
    flags = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    flags += ["--virtual-time-budget=10000", "--window-size=1400,2000"]
    start = time.perf_counter()
    for hash, count in (("", "504"), ("#task=needle4", "168")):
        done = subprocess.run(
            [*flags, "--dump-dom", f"{page.as_uri()}{hash}"], capture_output=True, text=True, check=True, timeout=60
        )
        assert f'data-ready="{count}"' in done.stdout
        assert done.stdout.count('class="point"') >= 2 * 84
        assert "CONSOLE" not in done.stderr
    assert time.perf_counter() - start < 20
    picture = tmp_path / "shot.png"
    subprocess.run([*flags, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=60)
    from matplotlib.image import imread

    assert imread(picture)[..., :3].std() > 0.02


def test_what_cannot_be_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "r.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in sweep(1)) + '{"task": "pass')
    assert write_report([results], tmp_path / "new" / "r.html") == [
        f"{results}: the last line is unfinished, and left out."
    ]
    for given, out, says in (
        ([results], tmp_path / "r.txt", "must end in .html"),
        ([tmp_path / "no.jsonl"], tmp_path / "r.html", "cannot be read: No such file"),
        ([results], results / "r.html", "cannot be written"),
    ):
        with pytest.raises(SparsekitError, match=says) as error:
            write_report(given, out)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("sparsekit.report.find_spec", lambda name: None)
    with pytest.raises(SparsekitError, match=r"pip install 'sparsekit-attention\[report\]'"):
        write_report([results], tmp_path / "r.html")


def test_the_command(tmp_path: Path) -> None:
    page = written(tmp_path, sweep(1))
    page.unlink()
    ran = CliRunner().invoke(app, ["report", str(tmp_path / "r.jsonl"), "-o", str(page), "--title", "Windows"])
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.strip() == str(page) and "<h1>Windows</h1>" in page.read_text()
