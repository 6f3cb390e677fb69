"""Pages agree with the code: every pattern has one, its table is its fields, and examples do what they say."""

from __future__ import annotations

import json
import math
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from sparsekit import SparseConfig, SparsekitError, load
from sparsekit.cli import app, describe_patterns
from sparsekit.config import MeasuredOn, ModelFacts
from sparsekit.lab.calibrate.inspection import read_inspection
from sparsekit.lab.calibrate.rules import RULES
from sparsekit.lab.report import markdown_report
from sparsekit.lab.sweep import load_question, read_results
from sparsekit.lab.tasks import task_names
from sparsekit.patterns import DynamicPattern, pattern_class, pattern_names

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def _rows(text: str, section: str = "") -> list[list[str]]:
    """Cells of the first table after `section`, without its heading."""
    lines = text[text.index(section) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    body = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip() for cell in line.strip("|").split("|")])
    return body


def test_the_page_says_where_the_kernels_were_proved() -> None:
    from sparsekit.kernels.device import TARGETS

    expected = []
    for name, implementations, proved, shared in TARGETS:
        listed = ", ".join(f"`{one}`" for one in implementations)
        expected.append([name, listed, proved, f"{shared:,}" if shared else "none"])
    assert _rows((DOCS / "compatibility.md").read_text(), "## Devices") == expected


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("pattern", describe_patterns(), ids=lambda pattern: pattern["name"])
def test_every_pattern_has_a_page_with_its_fields(pattern: dict[str, object]) -> None:
    page = DOCS / "patterns" / f"{pattern['name']}.md"
    assert page.is_file(), f"write {page}"
    text = page.read_text()
    assert text.startswith(f"# {pattern['name']}\n")
    for word in ("**Formula.**", "**Cost.**", "**When.**"):
        assert word in text
    expected = [
        [
            f"`{p['name']}`",
            "required" if p["required"] else str(p["default"]),
            p["range"],
            p["meaning"],
        ]
        for p in pattern["parameters"]  # type: ignore[attr-defined]
    ]
    if expected:
        assert _rows(text, "**Parameters.**") == expected
    else:
        assert "**Parameters.** None." in text


@pytest.mark.parametrize("name", pattern_names(DynamicPattern))
def test_short_prompts_are_those_that_do_not_pay(name: str) -> None:
    """The page says from which length a pattern runs; the committed results say that it pays there and beyond."""
    cls = pattern_class(name)
    assert issubclass(cls, DynamicPattern)
    least = cls.pays_from_tokens.get("cuda")
    text = (DOCS / "patterns" / f"{name}.md").read_text()
    assert re.findall(r"prompts below ([\d,]+) tokens", text) == ([] if least is None else [f"{least:,}"])
    if least is None:
        return
    rows = [json.loads(line) for line in (DOCS / "results/dynamic-h100.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("input") == "structured" and row["tokens"] >= least and "ms" in row]
    mine = [row for row in rows if row["case"] == "dynamic" and row["method"] == name]
    assert mine
    for row in mine:
        dense = [r["ms"] for r in rows if r["case"] == "dense" and r["tokens"] == row["tokens"]]
        assert row["ms"] < min(dense), row["label"]


def test_the_reference_of_the_yaml_file_is_complete() -> None:
    text = (DOCS / "config.md").read_text()
    assert [row[0].strip("`") for row in _rows(text, "## Fields")] == list(SparseConfig.model_fields)
    assert [row[0].strip("`") for row in _rows(text, "### model")] == list(ModelFacts.model_fields)
    contract = (DOCS / "contract.md").read_text()
    assert [row[0].strip("`") for row in _rows(contract, "| field of")] == list(MeasuredOn.model_fields)
    for name, default, _ in _rows(text, "## Fields"):
        field = SparseConfig.model_fields[name.strip("`")]
        if default != "nothing":
            assert str(field.get_default(call_default_factory=True)) == default


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_yaml_examples_load_and_links_lead_somewhere(page: Path) -> None:
    for block in _blocks(page, "yaml"):
        config = load(block)
        facts = {"num_layers": 32, "num_heads": 32}
        assert config.resolve(ModelFacts(**facts)).layers  # type: ignore[arg-type]
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_errors_are_quoted_word_by_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    model = "model: {num_layers: 30, num_heads: 9}\n"
    root = DOCS.parent
    cases = [
        ("dense_impl: kernal\n", []),
        ("default: {name: triangle, last_n: 128}\n", []),
        ("default: {name: triangle, window_tokens: -512}\n", []),
        ('layers: {"0-5": dense, "5-8": triangle}\n', []),
        ('layers: {0: triangle, "0": dense}\n', []),
        ('layers:\n  "0": dense\n  "0": triangle\n', []),
        (f'{model}layers: {{"40": triangle}}\n', []),
        (f'{model}heads: {{"3": {{"12": triangle}}}}\n', []),
        (f'{model}layers: {{"4,8": block_topk, "9-12": {{reuse: 7}}}}\n', []),
        (f'{model}precision: {{"0-7": fp8}}\n', []),
        ((root / "configs/qwen2.5-7b/trianglemix.yaml").read_text(), ["--model", "smollm2-135m"]),
    ]
    said = []
    for text, options in cases:
        Path("c.yaml").write_text(text)
        said.append(CliRunner().invoke(app, ["validate", "c.yaml", *options]).stderr)
    page = (DOCS / "config.md").read_text()
    quoted = re.findall(r"```\n(error:.*?)```", page, re.DOTALL)[0]
    for line, given in zip(quoted.splitlines(), "".join(said).splitlines(), strict=True):
        known, cut, _ = line.partition(", ....")  # a list of names that is not written out
        assert given.startswith(known) if cut else given == line


def test_calls_name_tests_that_exist() -> None:
    tests = Path(__file__).parent / "patch"
    for call, holds, test in _rows((DOCS / "models.md").read_text(), "## Calls"):
        assert re.match(r"(supported|superset|refused)\b", holds), call
        file, name = test.strip("`").split("::")
        assert re.search(rf"^def {name}\(", (tests / file).read_text(), re.MULTILINE), test


def test_the_pages_of_commands_name_every_command() -> None:
    text = (DOCS / "cli.md").read_text()
    named = {row[0].strip("`").split()[0] for row in _rows(text)}
    commands = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert named == commands


def test_the_page_of_tasks_names_every_task() -> None:
    rows = _rows((DOCS / "tasks.md").read_text())
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[0])) == sorted(task_names())


@pytest.mark.parametrize("page", [*PAGES, DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_python_names_in_pages_exist(page: Path) -> None:
    text = page.read_text()
    names = set(re.findall(r"`(sparsekit(?:\.\w+)+)", text))
    for module, imported in re.findall(r"^from (sparsekit[\w.]*) import (.+)$", text, re.MULTILINE):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    for name in names:
        if not _is_module(name):
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module), attribute), name


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def test_rules_of_calibration_have_their_rows() -> None:
    expected = []
    for name, rule in RULES.items():
        options = [
            (f"--{field.replace('_', '-')}", info) for field, info in rule.model_fields.items() if field != "name"
        ]
        said = [f"`{o}`{'' if i.is_required() else f' {i.default}'}: {i.description}" for o, i in options]
        expected.append([f"`{name}`", (rule.__doc__ or "").splitlines()[0], "; ".join(said)])
    assert _rows((DOCS / "calibrate.md").read_text(), "| rule |") == expected


def test_columns_of_explain_are_fields_of_its_json() -> None:
    from dataclasses import fields

    from sparsekit.config.costs import LayerExplanation

    names = {field.name for field in fields(LayerExplanation)}
    for row in _rows((DOCS / "cli.md").read_text(), "## explain"):
        assert row[0].split("`")[1] in names


SWEEPS = sorted((DOCS.parent / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_shipped_sweeps_have_their_results_and_their_page(file: Path) -> None:
    """`sparsekit report docs/results/sweep-NAME.jsonl -o table.md` prints what stands between the marks."""
    question = load_question(file)
    records, remarks = read_results([DOCS / "results" / f"sweep-{file.stem}.jsonl"])
    assert not remarks and all(record["status"] == "ok" for record in records)
    asked = {run.asked for run in question.runs()}
    done = {record.get("asked", record["key"]) for record in records}
    trials = 0 if question.search is None else question.search.trials * len(question.tasks)
    assert asked <= done and len(done) == len(asked) + trials
    page = (DOCS / "sweeps.md").read_text()
    [shown] = re.findall(rf"<!-- sweep-{file.stem} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert shown == markdown_report(records)


def test_sections_of_inspected_models_are_their_records() -> None:
    """`python -m sparsekit.lab.calibrate.inspection docs/results/inspect-NAME.json` prints what stands there."""
    page = (DOCS / "sinks.md").read_text()
    shown = dict(re.findall(r"<!-- inspect-(\S+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    records = {file.stem.removeprefix("inspect-"): file for file in (DOCS / "results").glob("inspect-*.json")}
    assert "smollm2-135m" in records and records.keys() <= shown.keys()
    for name, text in shown.items():
        known = read_inspection(records[name]).markdown() if name in records else "No record of it is committed.\n"
        assert text == known, name


def _curve_table(records: list[dict[str, Any]]) -> str:
    """By head in the order of the gradient, beside by layer, from rows of `calibrate head-curve`."""
    lines = [
        "| prompts | share | KL by head | KL by layer | difference | score by head | score by layer | dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    layers = {(row["command"], row["task"], row["share"]): row for row in records if row["by"] == "layer"}
    probe = records[0]["probe"]
    for row in records:
        if row["by"] != "gradient" or row["probe"] != probe:
            continue
        beside = layers[row["command"], row["task"], row["share"]]
        kls = [f"{mean:.5f} ± {width:.5f}" for mean, width in (
            (row["kl"], row["kl_half_width"]), (beside["kl"], beside["kl_half_width"]), row["kl_below_layer"]
        )]  # fmt: skip
        scores = ["" if one is None else f"{one[0]:.2f}" for one in (row["score"], beside["score"], row["dense_score"])]
        prompts = f"{row['samples']} of {row['task']}, {row['tokens']:,} tokens"
        lines.append(" | ".join(["| " + prompts, f"{row['share']:.0%}", *kls, *scores]) + " |")
    return "\n".join(lines) + "\n"


def _gates_table() -> str:
    """Grad(Middle), DuoAttention's gates and the last layers on the same prompts."""
    of, lines = {}, []
    for name in ("duo-attention-qwen2.5-coder-1.5b", "head-curve-qwen2.5-coder-1.5b"):
        rows = [json.loads(line) for line in (DOCS / "results" / f"{name}.jsonl").read_text().splitlines()]
        of |= {(row["task"], row["share"], row["by"]): row for row in rows
               if (row["tokens"], row["samples"], row["probe"]) == (8192, 96, rows[0]["probe"])}  # fmt: skip
    for task in ("needle4", "vt", "perplexity"):
        for share in (0.5, 0.65, 0.75):
            three = [of[task, share, by] for by in ("gradient", "scores", "layer")]
            kls = [f"{row['kl']:.4f} ± {row['kl_half_width']:.4f}" for row in three]
            scores = ", ".join(f"{row['score'][0]:.2f}" for row in three if row["score"])
            lines.append(" | ".join([f"| {task}, {share:.0%}", *kls, scores]).rstrip() + " |\n")
    head = (
        "| 96 prompts of 8,192 tokens | KL, Grad(Middle) | KL, gates | KL, by layer | scores |\n|---|---|---|---|---|\n"
    )
    return head + "".join(lines)


def test_the_table_of_gates_is_that_of_the_records() -> None:
    page = (DOCS / "head-choice.md").read_text()
    [shown] = re.findall(r"<!-- duo-attention-qwen2.5-coder-1.5b -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert shown == _gates_table()


@pytest.mark.parametrize("name", ["head-curve-qwen2.5-coder-1.5b", "head-curve-smollm2"])
def test_tables_of_head_choice_are_those_of_the_records(name: str) -> None:
    records = [json.loads(line) for line in (DOCS / "results" / f"{name}.jsonl").read_text().splitlines()]
    page = (DOCS / "head-choice.md").read_text()
    [shown] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert shown == _curve_table(records)


def test_the_table_of_the_head_search_is_that_of_the_records() -> None:
    found, curve = (
        [json.loads(line) for line in (DOCS / "results" / f"{name}-qwen2.5-coder-1.5b.jsonl").read_text().splitlines()]
        for name in ("heads", "head-curve")
    )
    lines = []
    for row in found:
        [beside] = [one for one in curve if (one["task"], one["share"], one["tokens"], one["samples"], one["by"]) ==
                    (row["task"], 0.75, 8192, 96, "gradient") and one["probe"] == curve[0]["probe"]]  # fmt: skip
        kl = f"{row['kl']:.4f} ± {row['kl_width']:.4f} | {beside['kl']:.4f} ± {beside['kl_half_width']:.4f}"
        score = beside["score"] and f"{row['score']:.2f}, {beside['score'][0]:.2f}; {row['dense_score']:.2f}"
        tiles = f"{row['tile_density']:.2f}, {beside['tile_density']:.2f}"
        lines.append(f"| {row['task']} | {tiles} | {kl} | {score or ''} |\n")
    page = (DOCS / "head-choice.md").read_text()
    [shown] = re.findall(r"<!-- heads-qwen2.5-coder-1.5b -->\n.*?\n.*?\n(.*?)<!-- end -->", page, re.DOTALL)
    assert shown == "".join(lines)


def test_the_tables_of_gains_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "website")
    import gains

    for name in gains.TABLES:
        page = (DOCS / name).read_text()
        assert page == gains.with_tables(page, name)
    page = (DOCS / "gains.md").read_text()
    wrong = page.replace("| 53% |", "| 54% |")
    assert wrong != page == gains.with_tables(wrong)
    gains.draw(tmp_path / "gains.png")
    gains.draw_findings(tmp_path / "findings.png")


def test_what_gains_says_of_ruler_beside_its_tables_is_in_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "website")
    import gains

    page = " ".join((DOCS / "gains.md").read_text().split())
    lost, moved, off, widths = {}, [], {}, []
    for at in gains.LENGTHS:
        of = gains._ruler(at, gains.RULER, *gains.RULER_DYNAMIC)
        names = gains._dynamic(of)
        alone, over = ({name: of[name, above or name, "none"] for name in names} for above in ("", "triangle"))
        lost[at] = {name: gains._average(of[gains.DENSE]) - gains._average(alone[name]) for name in names}
        moved += [abs(gains._average(alone[name]) - gains._average(over[name])) for name in names]
        density = [
            {name: sum(row["density"] for row in rows[name].values()) for name in names} for rows in (alone, over)
        ]
        off[at] = {name: 1 - density[1][name] / density[0][name] for name in names}
        widths += [float(gains._less_dense(alone[name], of[gains.DENSE]).split()[-1]) for name in names]
    by_head = gains._less_dense(of["dense", "dense", "75%"], of[gains.DENSE])
    assert f"RULER at 32K: {by_head.lstrip('-')} points are lost at 75%" in page
    assert f"average to {min(widths):.0f} to {max(widths):.0f} points." in page
    near = ("vertical_slash", "flexprefill")
    losers = [f"`{name}` {points:.0f}" for name, points in sorted(lost[32768].items(), key=lambda item: -item[1])
              if name not in near]  # fmt: skip
    losers[0] += " points of RULER"
    assert f"with the settings of the sweep: {', '.join(losers[:-1])} and {losers[-1]}." in page
    assert all(abs(lost[at][name]) <= 3.55 for at in lost for name in near)
    assert 3.3 < max(moved) <= 3.4 and "moves no pattern's average by more than 3.4 points" in page
    for name, row in over.items():
        config = DOCS.parent / "configs" / "qwen2.5-coder-1.5b" / f"trianglemix-{name}.yaml"
        if config.exists():
            here, dense = (f"{gains._average(found):.1f}" for found in (row, of[gains.DENSE]))
            below = pattern_class(name).pays_from_tokens["cuda"]
            how = "this config" if below < 32768 else f"dense_below_tokens: 0 in {name}"  # prompts leave room to answer
            told = f"# RULER at 32K, eleven tasks: {here} with {how}, {dense} with dense attention"
            assert told in config.read_text()
            assert (f"# without it {name} runs dense below {below:,} tokens on a GPU." in config.read_text()) == (
                below >= 32768
            )
    every = [gains._ruler(at, gains.RULER) for at in gains.LENGTHS]
    mixed, plain = (f"{fmean(gains._average(of[key]) for of in every):.1f}" for key in (gains.MIXED, gains.DENSE))
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert f"averages **{mixed}** on eleven of RULER's tasks from 4K to 32K, dense attention {plain}." in readme
    rows_8k = {key: found["cwe", 0]["score"]
               for key, found in every[1].items()}  # fmt: skip
    cwe = [f"{rows_8k['dense', 'dense', share]:.2f}" for share in ("50%", "65%", "75%")]
    assert (
        f"scarcely answers: {rows_8k[gains.DENSE]:.2f}, and by head {cwe[0]}, {cwe[1]} and {cwe[2]} at 50%, 65% and "
        f"75%. TriangleMix has {rows_8k[gains.MIXED]:.2f}." in page
    )
    later = [share for at in gains.LENGTHS[1:] for share in off[at].values()]
    assert f"From 8K on it takes {min(later):.0%} to {max(later):.0%} off its pairs;" in page
    assert f"at 4K up to {max(off[4096].values()):.0%}, and none of `prism`'s." in page and off[4096]["prism"] <= 0

    rows = gains.rows(gains.RULER)
    again = {**rows[0], "label": "another"}
    monkeypatch.setattr(gains, "rows", lambda name: (*rows, again))
    with pytest.raises(ValueError, match=f"two rows of another, {rows[0]['task']}.*seed {rows[0]['seed']}"):
        gains._ruler(rows[0]["tokens"], gains.RULER)


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DOCS / "results" / f"{name}.jsonl").read_text().splitlines()]


def test_the_table_of_fp8_on_a_real_model_is_that_of_the_records() -> None:
    of = {(row["label"], row["task"]): row for row in _records("fp8-qwen2.5-coder-1.5b")}
    page = (DOCS / "kernels.md").read_text()
    for label, shown in (
        ("TriangleMix", "bfloat16"), ("TriangleMix, layers 21-27 in FP8", "layers 21-27 in FP8"),
        ("TriangleMix, all layers in FP8", "all layers in FP8"),
        (
            "TriangleMix, all layers in FP8, means of 512",
            "all layers in FP8, the mean of 512 keys and values taken off",
        ),
    ):  # fmt: skip
        keys, chain = of[label, "needle4"], of[label, "vt"]
        assert (
            f"| {shown} | {keys['kl']:.5f} ± {keys['kl_width']:.5f} | {keys['score']:.2f} | "
            f"{chain['kl']:.4f} ± {chain['kl_width']:.4f} | {chain['score']:.2f} |\n"
        ) in page
    before = of["TriangleMix, all layers in FP8, keys as they are", "needle4"]
    assert f"off the keys | {before['kl']:.2f} ± {before['kl_width']:.2f} | {before['score']:.2f} |" in page
    ms = [f"{row['ms'] / 1e3:.{digits}f}" for row, digits in
          zip(_records("prefill-fp8-h200"), (2, 2, 2, 3, 3, 3), strict=True)]  # fmt: skip
    said = " ".join(page.split())
    assert f"takes {ms[2]} s in place of {ms[1]} at 128K, and {ms[5]} s in place of {ms[4]} at 32K" in said
    assert f"the untouched model takes {ms[0]} and {ms[3]} " in said


def test_what_is_said_of_the_speed_of_fp8_is_in_the_records() -> None:
    page = (DOCS / "kernels.md").read_text()
    said = " ".join(page.split())
    rows = _records("fp8-h200")
    of = {(row["run"], row["case"], row["tokens"], row["impl"]): row for row in rows if "ms" in row}
    names = {"dense": "dense", "random tiles, 10% a head": "random", "Triangle (8, 512, 128)": "triangle"}
    for name, case in names.items():
        for tokens in (32768, 131072):
            line = rf"^\| {re.escape(name)}, {tokens // 1024}K \| (.*?) \| (.*?) \| (.*?) *\|$"
            [cells] = re.findall(line, page, re.MULTILINE)
            for cell, impl in zip(cells, ("hopper", "hopper_fp8"), strict=False):
                row = of[8, case, tokens, impl]
                ms, beside = re.findall(r"[\d.]+", cell)
                _rounds_to(row["ms"], ms)
                _rounds_to(row["tflops" if case == "dense" else "ms_best"], beside)
            if case == "dense":
                _rounds_to(of[8, "rounding", tokens, "hopper_fp8"]["ms"], cells[2])
                assert tokens < 131072 or f"rounds the whole cache: {cells[2]} ms at 128K" in said

    def faster(case: str, tokens: int, by: str) -> float:
        return float(of[8, case, tokens, "hopper"][by] / of[8, case, tokens, "hopper_fp8"][by])

    (random, triangle), (random_32, triangle_32) = (
        [[f"{faster(case, tokens, by):.2f}" for by in ("ms", "ms_best")] for case in ("random", "triangle")]
        for tokens in (131072, 32768)
    )
    assert (
        f"At 128K random tiles are {random[0]} times as fast by medians and {random[1]} times by the best launches, "
        f"Triangle {triangle[0]} and {triangle[1]} times. At 32K random tiles are {random_32[0]} and {random_32[1]} "
        f"times as fast, Triangle {triangle_32[0]} and {triangle_32[1]} times: rounding takes" in said
    )
    dense = [f"{faster('dense', tokens, 'ms'):.2f}" for tokens in (32768, 131072)]
    assert f"dense plans are {dense[0]} times as fast at 32K and {dense[1]} times at 128K, by medians." in said
    for run, impl, told in (
        (4, "hopper_fp8", "in another run, `hopper_fp8` made {} and {} TFLOP/s where"),
        (4, "hopper", "TFLOP/s where `hopper` made {} and {}."),
        (5, "hopper_fp8", "made {} and {}, in that of the polynomials"),
        (6, "hopper_fp8", "in that of the polynomials {} and {})"),
        (5, "hopper_fp8, kept every 32 steps", "The sum kept every 32 steps: {} and {}, faster by 2%."),
        (5, "hopper_fp8, q in shared memory", "q in shared memory: {} and {}. "),
        (6, "hopper_fp8, a quarter of the exponentials in arithmetic", "exponentials as polynomials: {} and {},"),
        (7, "hopper_fp8, steps in halves of 64 keys, q in shared memory", "in shared memory: {} and {}, in a run"),
        (7, "hopper_fp8, values as they are, kept every 8 steps", "as they are, kept every 8 steps, made {} and {}."),
    ):
        assert told.format(*(of[run, "dense", tokens, impl]["tflops"] for tokens in (32768, 131072))) in said


def test_the_times_of_the_maximum_of_the_first_step_are_in_the_records() -> None:
    page = (DOCS / "kernels.md").read_text()
    rows = _records("kernel-h200")
    turns = [row for row in rows if "in turn" in row["command"]]
    of = {(row["case"], row["tokens"], row.get("maximum", row["impl"])): row for row in turns}
    columns = ("the running maximum", "the maximum of the first step", "fa3")
    names = {"dense": "dense", "random tiles, 10% a head,": "random", "Triangle (8, 512, 128)": "triangle"}
    lines = re.findall(r"^\| ([^|]+) at (\d+)K \| (.*?) \| (.*?) \| (.*?) *\|$", page, re.MULTILINE)
    assert [(names[name], int(tokens)) for name, tokens, *_ in lines] == [
        ("dense", 4), ("dense", 32), ("random", 128), *(("triangle", n) for n in (4, 8, 32, 128)),
    ]  # fmt: skip
    for name, tokens, *cells in lines:
        for column, cell in zip(columns, cells, strict=True):
            if cell:
                row = of[names[name], int(tokens) * 1024, column]
                ms, *rate = re.findall(r"[\d.]+", cell)
                _rounds_to(row["ms"], ms)
                assert len(rate) == ("tflops" in row)
                for text in rate:
                    _rounds_to(row["tflops"], text)

    peers = [row for row in rows if row["command"].startswith("sparsekit bench kernel --cases triangle,dense")]
    last = {(row["case"], row["tokens"], row["impl"]): row for row in peers if "ms" in row}  # of three runs
    results = (DOCS / "results" / "README.md").read_text()
    faster = []
    for tokens in (32768, 131072):
        ours, other = (last["dense", tokens, impl] for impl in ("hopper", "fa3"))
        line = f"| dense {tokens // 1024}K | {ours['ms']:.3g} ms ({ours['tflops']:.0f}) | {other['ms']:.3g} ms ("
        assert f"{line}{other['tflops']:.0f}) |" in results
        faster.append(f"{other['ms'] / ours['ms']:.2f}")
    told = "1.05 times as fast as FlashAttention-3 at 32K and 1.03 times at 128K"
    assert told == "{} times as fast as FlashAttention-3 at 32K and {} times at 128K".format(*faster)
    assert told in " ".join(results.split())
    for name, case, lengths in (
        ("Triangle (8, 512, 128) at 32K; 128K; 1M tokens", "triangle", (32768, 131072, 1 << 20)),
        ("random tiles of each head, 10%, 32K; 128K", "random", (32768, 131072)),
    ):
        own = [last[case, tokens, "hopper"] for tokens in lengths]
        [cell] = re.findall(rf"^\| {re.escape(name)} \| (.*?) \| +\|$", results, re.MULTILINE)
        ms, rates = re.findall(r"([\d.]+) ms", cell), re.findall(r"\((\d+)\)", cell)
        assert [f"{row['tflops']:.0f}" for row in own] == rates
        for row, text in zip(own, ms, strict=True):
            _rounds_to(row["ms"], text)
    for doc in (DOCS.parent / "README.md", DOCS.parent / "CHANGELOG.md"):
        assert "1.03 to 1.05 times as fast as FlashAttention-3" in " ".join(doc.read_text().split())

    took = {
        (row["run"], row["case"], row["tokens"], row.get("variant", "").partition(":")[0]): row
        for row in _records("fp8-h200")
        if row["run"] > 10 and (row["impl"] == "hopper_fp8" or row.get("variant", "").startswith("the running"))
    }
    calls = (("dense", 32768), ("dense", 131072), ("random", 131072), ("triangle", 131072))

    def all_took(run: int, variant: str) -> str:
        return "{:.2f}, {:.1f}, {:.1f} and {:.2f}".format(*(took[(run, *call, variant)]["ms"] for call in calls))

    short, long, random, triangle = (took[(12, *call, "")] for call in calls)
    assert (
        f"dense takes {short['ms']:.2f} ms ({short['tflops']:.0f}) at 32K and {long['ms']:.1f} ({long['tflops']:.0f}) "
        f"at 128K, random tiles at 128K {random['ms']:.1f}, Triangle there {triangle['ms']:.2f}; with the running "
        f"maximum in the same run {all_took(12, 'the running maximum')}. Either has a loop of its own: one loop for "
        f"both took {all_took(11, '')}, and {all_took(11, 'the running maximum')} (run 11)."
    ) in " ".join(page.split())


def _rounds_to(value: float, text: str) -> None:
    digits = len(text.partition(".")[2])
    assert abs(value - float(text)) <= 0.5 * 10**-digits + 1e-9, (value, text)


def test_the_other_times_of_fp8_are_those_of_the_records() -> None:
    said = " ".join((DOCS / "kernels.md").read_text().split())
    rows = [row for row in _records("fp8-h200") if row["run"] > 8 and row.get("inputs") != "zeros"]

    def readings(case: str, tokens: int, tried: bool) -> list[float]:
        """Of run 9, in order; `tried`: with all four changes."""
        wanted = {True: "as `hopper` has it", False: ""}[tried]
        return [
            row["ms"]
            for row in rows
            if (row["run"], row["case"], row["tokens"]) == (9, case, tokens)
            and row.get("variant", "").partition(":")[0] == wanted
        ]

    for case, tokens, told in (
        ("dense", 32768, "dense at 32K {} and {} ms, {} and {} without;"),
        ("random", 131072, "random tiles at 128K {} and {}, {} and {} without;"),
        ("triangle", 131072, "Triangle there {} and {}, {} and {} without."),
    ):
        assert told.format(*(f"{ms:.2f}" for tried in (True, False) for ms in readings(case, tokens, tried))) in said
    gained = (readings("triangle", 32768, tried)[0] for tried in (True, False))
    assert "Triangle at 32K gained, in one reading: {:.2f}, {:.2f} without.".format(*gained) in said

    of = {
        (row["case"], row["tokens"], row["impl"]): row["ms"]
        for row in rows
        if row["run"] == 10 and row["tile"] == [128, 64 if row["impl"] == "triton" else 128]
    }
    short, long = (
        {
            case: [of[case, tokens, impl] for impl in ("triton_fp8", "triton")]
            for case in ("dense", "random", "triangle")
        }
        for tokens in (32768, 131072)
    )
    assert (
        "tiles of 128 x 128 (run 10 of the records; in brackets `triton` in bfloat16, of plans in tiles of 128 x 64): "
        + "dense {:.1f} ms at 32K ({:.1f}) and {:.0f} at 128K ({:.0f}), ".format(*short["dense"], *long["dense"])
        + "random tiles {:.2f} ({:.2f}) and {:.1f} ({:.1f}), ".format(*short["random"], *long["random"])
        + "Triangle {:.2f} ({:.2f}) and {:.2f} ({:.2f}).".format(*short["triangle"], *long["triangle"])
    ) in said


def test_the_error_of_fp8_is_that_of_the_records() -> None:
    said = " ".join((DOCS / "kernels.md").read_text().split())
    inputs = ("scale", "values_plus", "values_plus_and_minus_1_in_turn_every")
    of = {
        (row["tokens"], *(row.get(key) for key in inputs)): row
        for row in _records("fp8-h200")
        if row["run"] == 8 and "error_last_rows" in row
    }
    before = {
        row["tokens"]: f"{row['error_last_rows']:.3f}"
        for row in _records("fp8-h200")
        if row["run"] == 4 and "error_last_rows" in row and not any(key in row for key in inputs)
    }
    short, long = ({key[1:]: row for key, row in of.items() if key[0] == tokens} for tokens in (32768, 131072))

    def both(key: tuple[Any, ...], form: str) -> list[str]:
        return [format(found[key]["error_last_rows"], form) for found in (short, long)]

    forms = {
        (row["run"] > 7, row["note"]) for row in _records("fp8-h200") if row["run"] > 3 and row["impl"] == "hopper_fp8"
    }
    taken_off = "with the mean of {} keys and values taken off"  # other than the rows of earlier runs
    assert forms == {(False, taken_off.format("512")), (True, taken_off.format("4,096"))}
    plain, scaled = both((None, None, None), ".1%"), both((0.3, None, None), ".0%")
    assert "off by {} and {}, with that scale by {} and {}.".format(*plain, *scaled) in said
    assert "`hopper_fp8` makes {} at 32K and {} at 128K".format(*both((None, None, None), ".3f")) in said
    assert f"only nearly: with it {before[32768]} and {before[131072]}." in said
    taken = both((None, 1, None), ".4f")
    kept = long[None, 1, None]["mean_of_wanted"]
    assert f"as `hopper_fp8` does | {taken[0]} | {taken[1]} | {kept:.4f} |" in said
    assert "The error of that little is {} at 32K and {} at 128K.".format(*both((None, None, 8192), ".2f")) in said


def test_the_table_of_shared_plans_on_a_larger_model_is_that_of_the_records() -> None:
    page = (DOCS / "reuse.md").read_text()
    for row, chosen in zip(_records("reuse-qwen2.5-coder-1.5b"), (28, 9), strict=True):
        score = f"{row['score']:.2f} ({row['score_low']:.2f} to {row['score_high']:.2f})"
        assert f"| {chosen} | {row['kl']:.4f} ± {row['kl_width']:.4f} | {score} |\n" in page


def test_the_table_of_short_prompts_is_that_of_the_records() -> None:
    page = (DOCS / "results" / "README.md").read_text()
    rows = _records("prefill-short-h200")
    order = ("", "-vertical_slash", "-flexprefill", "-xattention", "-block_topk", "-s2o")
    for tokens in (4096, 8192):
        ms = {row["config"]: (row["ms"], row["faster"]) for row in rows if row["tokens"] == tokens}
        cells = [ms[f"configs/llama-3.1-8b/trianglemix{name}.yaml"] for name in order]
        told = " | ".join(f"{time:.1f}; {faster:.3f}" for time, faster in cells)
        assert f"| {tokens:,} tokens | {ms['untouched'][0]:.1f} | {told} |\n" in page


def test_what_head_choice_says_beside_its_table_is_in_the_records() -> None:
    path = DOCS / "results" / "head-curve-qwen2.5-coder-1.5b.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["probe"] == rows[0]["probe"] and row["by"] in ("gradient", "layer")]
    kl = {(row["task"], row["tokens"], row["share"], row["by"], row["samples"]): row["kl"] for row in rows}
    times = {key[:3]: value / kl[(*key[:3], "gradient", key[4])] for key, value in kl.items() if
             key[3] == "layer" and (*key[:3], "gradient", key[4]) in kl}  # fmt: skip
    text = [1 / value for (task, _, share), value in times.items() if task == "perplexity" and share >= 0.5]
    layers = dict.fromkeys(f"{28 * row['heads_share']:.0f}" for row in rows if row["by"] == "layer")
    page = " ".join((DOCS / "head-choice.md").read_text().split())
    assert f"0.55 at 75%, with {times['needle4', 8192, 0.75]:.0f} times the KL" in page
    assert f"changes {min(text):.2f} to {max(text):.2f} times as much as by layer from 50% on" in page
    assert f"come nearest: {', '.join(list(layers)[:-1])} and {list(layers)[-1]}." in page
    commands = {row["command"] for row in rows}
    assert any(command.startswith("sparsekit calibrate head-curve") and command in page.replace("\\ ", "")
               for command in commands)  # fmt: skip
    found = {(row["task"], row["tokens"]): row["dense_score"][0] - row["score"][0] for row in rows
             if (row["share"], row["by"], row["samples"]) == (0.65, "gradient", 96) and row["score"]}  # fmt: skip
    page = (DOCS / "gains.md").read_text()
    bound = re.search(r"four keys and variables stay within ([\d.]+) of dense attention's score", page)
    assert bound is not None and max(found.values()) <= float(bound[1])


def test_what_is_said_of_single_layers_is_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "website")
    import evidence
    import gains

    record = gains.single_layers()
    value, low, high = record["correlation"]
    above, below = gains.misjudged(record["rows"])
    page = " ".join((DOCS / "gains.md").read_text().split())
    assert f"by Spearman's correlation {value:.2f} ({low:.2f} to {high:.2f}) with the KL" in page
    assert f"too well of layer {above}, and too ill of {below[0]} and {below[1]}." in page
    samples, tokens = record["rows"][0]["samples"], record["prompts"]["tokens"]
    results = (DOCS / "results" / "README.md").read_text()
    assert (
        f"Qwen2.5-Coder-1.5B, {samples} four-key prompts of {tokens // 1024}K, {record['dtype']}, H200; one object"
        in results
    )
    for job in evidence.jobs():
        assert (f"`{job}`" in results) == (job.name in ("probe", "layers")), job


def test_what_is_said_of_start_layers_is_in_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen2.5-Coder-1.5B. When the records grow, each of these sentences changes or goes."""
    monkeypatch.syspath_prepend(DOCS.parent / "website")
    import evidence
    import gains

    of, page = gains.start_layers(), " ".join((DOCS / "gains.md").read_text().split())
    names, starts = [*evidence.patterns()], [int(start) for start in evidence.STARTS.split(",")]
    missing = [
        (tokens, name, start)
        for tokens in evidence.LENGTHS for name in names for start in starts
        if start not in of.get(tokens, {}).get(name, {})
    ]  # fmt: skip
    assert not missing
    samples = {row["samples"] for row in gains.rows(gains.STARTS)}
    lengths = " and ".join(f"{tokens // 1024}K" for tokens in of)
    told = f"Qwen2.5-Coder-1.5B, {max(samples)} four-key prompts of {lengths}, bfloat16, H200"
    assert len(samples) == 1 and told in (DOCS / "results" / "README.md").read_text()
    assert f"with the settings of the sweep, {max(samples)} four-key prompts: dense attention's score" in page
    row = of[8192]["triangle"][7]
    lost = row["dense_score"][0] - row["score"][0]
    assert f"the same model loses answers early: from layer 7 on {100 * lost:.0f}% of them at 8K." in page
    kls = {name: [row["kl"] for row in found.values()] for name, found in of[gains.DRAWN].items()}
    assert {name for name, of_name in kls.items() if max(of_name) < 10 * min(of_name)} == {"vertical_slash"}
    assert max(kls["vertical_slash"]) < 1e-4
    assert "Each curve but `vertical_slash`'s, which is low from layer 0 on, falls by a factor of ten" in page
    assert all(max(row["kl"] for row in found.values()) > 10 * found[25]["kl"] for found in of[16384].values())
    assert min(of[8192], key=lambda name: of[8192][name][21]["kl"]) == "flashprefill"
    grown = {name: of[16384][name][0]["kl"] / found[0]["kl"] for name, found in of[8192].items()}
    dynamic = sorted((ratio, name) for name, ratio in grown.items() if name not in ("triangle", "a_shape"))
    assert [(f"{ratio:.2g}", name) for ratio, name in (dynamic[0], dynamic[-1])] == [
        ("1.5", "flashprefill"), ("13", "vertical_slash"),
    ]  # fmt: skip
    assert min(of[8192], key=lambda name: of[8192][name][0]["kl"]) == "vertical_slash"
    assert "by a factor of 1.5 (`flashprefill`) to 13 (`vertical_slash`, from the lowest of all)" in page
    lost = {
        name: [round(100 * (of[at][name][0]["dense_score"][0] - of[at][name][0]["score"][0])) for at in (16384, 8192)]
        for name in of[8192]
    }
    assert {name: points for name, points in lost.items() if points[0] > max(points[1], 0)} == {
        "triangle": [62, 59], "flashprefill": [28, 17], "prism": [14, 11], "s2o": [4, 0],
    }  # fmt: skip
    assert lost["a_shape"] == [65, 72] and lost["flexprefill"] == [1, 1] and lost["flashprefill"][1] == 17
    assert all(lost[name][0] <= 0 for name in ("vertical_slash", "xattention", "block_topk"))
    deep = {name: [f"{of[at][name][21]['kl']:.4f}" for at in (8192, 16384)] for name in of[8192]}
    assert {name: kl for name, kl in deep.items() if max(kl) > "0.0002"} == {
        "a_shape": ["0.0019", "0.0019"], "prism": ["0.0018", "0.0008"],
    }  # fmt: skip
    probe = json.loads((DOCS / "results" / "probe-qwen2.5-coder-1.5b.json").read_text())
    middle = [layer["gradient"]["middle"] for layer in probe["layers"]]
    bound = math.ceil(100 * max(middle[21:]) / max(middle)) / 100
    assert f"There the probe's Grad(Middle) stays below {bound:.2f} of its maximum." in page
    assert f"# below {bound:.2f} of its maximum." in evidence.SWEEP.read_text()


def test_a_pattern_without_a_row_at_a_length_is_named_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one that is not named loses no answer."""
    monkeypatch.syspath_prepend(DOCS.parent / "website")
    import gains

    def row(tokens: int, pattern: str, start: int, score: float) -> dict[str, Any]:
        prompts = {"tokens": tokens}
        return {"prompts": prompts, "pattern": pattern, "start": start, "score": [score], "dense_score": [1.0]}

    found = [row(8192, name, start, 0.9) for name in ("triangle", "s2o") for start in (21, 14, 0)]
    found += [row(16384, "triangle", start, 1.0) for start in (21, 14)]
    monkeypatch.setattr(gains, "rows", lambda _: found)
    said = " ".join(gains.start_losses().split())
    assert said.endswith(
        "At 16,384 tokens: from layer 21 on none (not measured: `s2o`); from layer 14 on none (not measured: `s2o`); "
        "in all layers not measured."
    )


def test_which_seeds_of_ruler_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "website")
    import gains

    page = " ".join((DOCS / "gains.md").read_text().split())
    rows = [row for name in (gains.RULER, *gains.RULER_DYNAMIC) for row in gains.rows(name)]
    further = {(row["seed"], row["tokens"], gains.mixture_of(row)) for row in rows if row["seed"] > 0}
    here = further == {(seed, 8192, mixture) for seed in (1, 2) for mixture in (gains.DENSE, gains.MIXED)}
    assert ("The second and third seed of RULER, but for dense attention and TriangleMix at 8K." in page) == here
    assert ("at 8K three, 24 prompts a task, elsewhere the first:" in page) == here


def test_a_page_can_fail() -> None:
    """The examples are really loaded: a misspelt one is refused."""
    block = _blocks(DOCS / "patterns/triangle.md", "yaml")[0]
    assert yaml.safe_load(block)["layers"]
    with pytest.raises(SparsekitError, match="last_n"):
        load(block.replace("last_tokens", "last_n"))


def _published() -> list[tuple[str, list[str]]]:
    """(page, cells) of the rows of "Published, and here" that are ours: those that name a record."""
    found = []
    for page in sorted((DOCS / "patterns").glob("*.md")):
        text = page.read_text()
        if "**Published, and here.**" in text and "| what | dense |" in text:
            found += [(page.stem, row) for row in _rows(text, "**Published, and here.**") if ".jsonl`" in row[-1]]
    return found


@pytest.mark.parametrize(("page", "row"), _published(), ids=lambda value: value if isinstance(value, str) else "")
def test_our_figures_beside_the_papers_are_of_the_records(page: str, row: list[str]) -> None:
    """Both times are in the file that the row names, at its length and on its card, and the ratio is theirs."""
    what, dense, sparse, ratio, where = row
    [file] = re.findall(r"`(\S+\.jsonl)`", where)
    [length] = re.findall(r"\b(\d+)K\b", what) or ["128"]
    rows = [json.loads(line) for line in (DOCS / "results" / file).read_text().splitlines()]
    rows = [one for one in rows if one.get("tokens") == int(length) * 1024 and "ms" in one]
    card = re.findall(r"H\d00", where) or ["H100"]
    assert rows and all(card[0] in one["device"] for one in rows)
    cases = {"dense": ("dense", "prefill"), "sparse": ("triangle", "dynamic", "prefill")}

    def times(said: str, kind: str) -> list[float]:
        number, unit = said.split()
        digits = len(number.partition(".")[2])
        scale = 1000 if unit == "s" else 1
        own = [one["ms"] / scale for one in rows if one["case"] in cases[kind]]
        return [ms for ms in own if f"{ms:.{digits}f}" == number]

    ratios = {f"{b / a:.{len(ratio) - 2}f}" for a in times(dense, "dense") for b in times(sparse, "sparse")}
    assert ratio in ratios, f"{page}: {row}"


def test_what_is_said_of_real_layers_is_in_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "website")
    import gains

    of = {(name, at): row for name, found in gains.real_layers().items() for at, row in found.items()}
    names, layers = {name for name, _ in of}, sorted({layer for _, layer in of})
    assert layers == list(range(28))
    count = "all 28"
    first = of["prism", layers[0]]
    where = "a CPU core" if first["cuda"] is None else "H200"
    told = f"{count} layers of Qwen2.5-Coder-1.5B, {round(first['tokens'] / 1024)}K tokens, with the least density"
    assert f"{told} possible; {first['dtype']}, {where} |" in (DOCS / "results" / "README.md").read_text()
    errors, shares = (
        sorted(f"{row[key]:.2f}" for (name, _), row in of.items() if name == "prism")
        for key in ("error_l1", "tile_density")
    )
    page = " ".join((DOCS / "patterns" / "prism.md").read_text().split())
    assert f"q, k and v of {count} layers of a 1.5B model `top_p: 0.7` errs by {errors[0]} to {errors[-1]}" in page
    assert f"with {shares[0]} to {shares[-1]} of the tiles" in page
    more = {key: row["tile_density"] / row["oracle_tile_density"] for key, row in of.items()}
    most = {name: max(more[name, at] for at in layers) for name in names}
    assert {name: f"{ratio:.1f}" for name, ratio in most.items()} == {
        "flashprefill": "4.0", "vertical_slash": "3.3", "block_topk": "2.7", "prism": "2.6", "flexprefill": "2.2",
        "xattention": "2.1", "s2o": "1.6",
    }  # fmt: skip
    assert sum(more["s2o", at] < 1 for at in layers) == 18

    def by(choose: Any, key: str) -> dict[int, str]:
        return {at: choose(names, key=lambda name: of[name, at][key]) for at in layers}

    worst, best = by(max, "error_l1"), by(min, "error_l1")
    least, fullest = by(min, "tile_density"), by(max, "tile_density")
    assert [worst[at] for at in layers if worst[at] not in ("prism", "flashprefill")] == ["s2o"] * 3
    assert [*least.values()].count("prism") == 22
    assert [[*of_layer.values()].count("vertical_slash") for of_layer in (best, fullest)] == [19, 24]
    page = " ".join((DOCS / "gains.md").read_text().split())
    for said in (
        "`flashprefill` 4.0 times as many, `vertical_slash` 3.3, `block_topk` 2.7, `prism` 2.6, `flexprefill` 2.2, "
        "`xattention` 2.1. `s2o` ranks single keys, and comes below what 128 x 128 tiles can in 18 of the 28 layers.",
        "`vertical_slash` errs least in 19 layers, and keeps most tiles in 24. `prism` keeps fewest in 22.",
        "`prism` or `flashprefill` errs most in 25 layers, `s2o` in the other three.",
    ):
        assert said in page
    assert {(row["method"], row["block_q"], row["block_kv"]) for row in of.values()} == {
        (name, 64 if name == "vertical_slash" else 128, 64 if name in ("vertical_slash", "block_topk", "s2o") else 128)
        for name in names
    }
    swept = {(row["method"], row["parameters"].get("top_k"), row["parameters"].get("top_p")): row["error_l1"]
             for row in gains.rows("dynamic-sweep-h200") if row["case"] == "dynamic"}  # fmt: skip
    for top_k, top_p in ((64, 0.3), (200, 0.5)):  # of about as many tiles
        assert 0.4 < swept["block_topk", top_k, None] / swept["prism", None, top_p] < 0.67


def test_what_is_said_of_half_a_million_tokens_is_in_the_records() -> None:
    page, readme = ((DOCS / name).read_text() for name in ("long.md", "../README.md"))
    untouched, sparse = (row for row in _records("prefill-long-h200") if "chunk_tokens" not in row)
    assert f"**{sparse['faster']:.1f} times faster** than the untouched model" in page
    seconds = sparse["ms"] / 1e3, untouched["ms"] / 1e3
    assert "half a million tokens in **{:.1f} s** instead of {:.0f}".format(*seconds) in readme


def test_the_time_that_ruler_took_is_in_the_records() -> None:
    row = json.loads((DOCS / "results" / "evidence-times-h200.json").read_text())
    page = " ".join((DOCS / "gains.md").read_text().split())
    assert (
        f"RULER's {row['runs']} runs of the first seed took {row['seconds'] / 60:.1f} minutes of one H200, with seven"
        in page
    )
    assert f"{row['runs']} runs at {row['seconds'] / row['runs']:.1f} s a run" in page
    assert (row["code"], row["workers"], row["gpus"]) == (0, 7, 1)
