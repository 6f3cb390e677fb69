"""The tables and the pictures of docs/gains.md, and what docs/calibrate.md says of a real model, from docs/results.

`python website/gains.py` writes them. A test holds the pages against the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, median
from textwrap import fill
from typing import Any

from sparsekit.lab.stats import mean_interval, ranks

DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURE = DOCS / "images" / "gains.png"
FINDINGS = DOCS / "images" / "findings.png"
CURVE = "head-curve-qwen2.5-coder-1.5b"
STARTS, REAL = "start-layer-qwen2.5-coder-1.5b", "real-qwen2.5-coder-1.5b"
DRAWN = 8192  # tokens of the start layers that the picture shows
Row = Mapping[str, Any]

CONFIGS = {
    "configs/llama-3.1-8b/trianglemix.yaml": "TriangleMix, layers 16-31",
    "trianglemix": "TriangleMix, layers 16-31",
    "docs/results/heads-75.yaml": "triangle in 75% of the heads",
    "docs/results/heads-85.yaml": "triangle in 85% of the heads",
    "docs/results/alone-block_topk.yaml": "block_topk in all layers",
    "docs/results/trianglemix-dense-kernel.yaml": "TriangleMix, sparsekit's kernel in dense layers too",
    "block_topk": "TriangleMix over block_topk",
    "vertical_slash": "TriangleMix over vertical_slash",
}
DYNAMIC = ("vertical_slash", "flexprefill", "xattention", "block_topk", "s2o")
RULER = "ruler-qwen2.5-coder-1.5b"
RULER_DYNAMIC = ("ruler-dynamic-qwen2.5-coder-1.5b", "ruler-dynamic-long-qwen2.5-coder-1.5b")
LENGTHS = (4096, 8192, 16384, 32768)
# (below layer 21, from it on, heads of the lowest Grad(Middle)): what the sweep calls it.
DENSE = ("dense", "dense", "none")
MIXED = ("dense", "triangle", "none")
EVERYWHERE = ("triangle", "triangle", "none")
STATIC = {
    DENSE: "dense",
    MIXED: "TriangleMix, layers 21-27",
    ("dense", "dense", "50%"): "triangle in 50% of the heads",
    ("dense", "dense", "65%"): "triangle in 65% of the heads",
    ("dense", "dense", "75%"): "triangle in 75% of the heads",
    EVERYWHERE: "triangle in all layers",
    ("a_shape", "a_shape", "none"): "sinks and window alone, in all layers",
}
TASKS = {"needle4": "four keys", "vt": "chained variables", "perplexity": "text"}


@cache
def rows(name: str) -> tuple[Row, ...]:
    return tuple(json.loads(line) for line in (DOCS / "results" / f"{name}.jsonl").read_text().splitlines())


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


# ---- what it saves


def _beside(row: Row) -> bool:
    """Of the run that has each dynamic pattern alone and under TriangleMix: the table `alone` is of it."""
    return "alone-s2o.yaml" in row["command"] and row["tokens"] in (131072, 32768)


def _prefill(name: str) -> list[list[str]]:
    """Rows of `bench prefill`: a config follows the untouched model of its run."""
    lines: list[list[str]] = []
    dense = 0.0
    for row in rows(name):
        if row["config"] == "untouched":
            dense = row["ms"]
        elif row["config"] in CONFIGS and not _beside(row) and "layers" not in row:
            card, name = row["device"].split()[1], CONFIGS[row["config"]]
            name += ", structured q and k" if row.get("attends") == "structured" else ""
            lines.append(_saving("transformers", card, row["tokens"], name, dense / 1e3, row["ms"] / 1e3))
    return lines


def _saving(engine: str, card: str, tokens: int, config: str, dense: float, sparse: float) -> list[str]:
    return [engine, card, f"{tokens:,}", config, f"{dense:.3g} s", f"{sparse:.3g} s", f"{1 - sparse / dense:.0%}"]


def _served(part: str, configs: Sequence[str]) -> list[list[str]]:
    """Prompts inside vLLM: medians over the turns."""
    seconds: dict[tuple[int, str | None], list[float]] = {}
    for row in rows("serve-h200"):
        if row["part"] == part and row["config"] in (None, *configs):
            seconds.setdefault((row["tokens"], row["config"]), []).append(row["seconds"])
    middle = {key: median(times) for key, times in seconds.items()}
    keys = sorted(((tokens, config) for tokens, config in middle if config), key=lambda key: (-key[0], key[1]))
    return [
        _saving(f"vLLM, {_CHUNKS[part]}", "H200", tokens, CONFIGS[config], middle[tokens, None], middle[tokens, config])
        for tokens, config in keys
    ]  # fmt: skip


def alone() -> str:
    """Each dynamic pattern in all layers, and in the lower half under TriangleMix: one run, structured q and k."""
    lines = []
    for tokens in (131072, 32768):
        ms = {row["config"]: row["ms"] for row in rows("prefill-h200") if row["tokens"] == tokens and _beside(row)}
        stock = ms["untouched"]
        seconds = lambda value, stock=stock: f"{value / 1e3:.3g} s ({value / stock:.2f})"  # noqa: E731
        lines.append([f"{tokens:,}", "dense, untouched", seconds(stock), "", ""])
        for name, file in (("dense", "configs/llama-3.1-8b/trianglemix.yaml"),
                           ("dense, sparsekit's kernel", "docs/results/trianglemix-dense-kernel.yaml")):  # fmt: skip
            lines.append([f"{tokens:,}", name, "", seconds(ms[file]), ""])
        for name in DYNAMIC:
            own, mixed = ms[f"docs/results/alone-{name}.yaml"], ms[f"configs/llama-3.1-8b/trianglemix-{name}.yaml"]
            lines.append([f"{tokens:,}", name, seconds(own), seconds(mixed), f"{1 - mixed / own:.0%}"])
    return _table(["tokens", "pattern", "in all layers", "TriangleMix over it", "less than alone"], lines)


_CHUNKS = {"chunked": "chunks of 8,192", "whole": "whole prompts"}


def saves() -> str:
    """Time to the first token of one prompt, as it is and with a config; both of one run."""
    lines = [
        *_prefill("prefill-h200"), *_prefill("prefill-h100"),
        *_served("chunked", ["trianglemix"]), *_served("whole", ["block_topk", "vertical_slash"]),
    ]  # fmt: skip
    return _table(["engine", "GPU", "tokens", "config", "untouched", "with it", "less"], lines)


def load() -> str:
    """Sixteen clients of one server: means over the turns."""
    lines = []
    for part, spread in (("load", "log-uniform"), ("load-uniform", "uniform")):
        own = [row for row in rows("serve-h200") if row["part"] == part]
        [bound] = [row for row in own if "bound_half" in row]
        timed = [row for row in own if "engine" in row]

        def mean(config: str | None, key: str, timed: Sequence[Row] = timed) -> float:
            values = [row[key] for row in timed if row["config"] == config]
            return sum(values) / len(values)

        for config in (None, "trianglemix", "block_topk"):
            name = "stock vLLM" if config is None else CONFIGS[config]
            turns = [
                row["requests_per_second"] / mean(None, "requests_per_second")
                for row in timed
                if row["config"] == config
            ]
            span = "1" if config is None else " and ".join(f"{turn:.2f}" for turn in turns)
            limit = {None: "", "trianglemix": f"{bound['bound_half']:.2f}", "block_topk": f"{bound['bound_all']:.2f}"}[
                config
            ]
            lines.append([
                f"{spread}, 2K to 64K", name, f"{mean(config, 'requests_per_second'):.2f}", span, limit,
                f"{mean(config, 'first_p50'):.1f} s", f"{1e3 * mean(config, 'gap_p99'):.0f} ms",
            ])  # fmt: skip
    return _table(
        [
            "prompts",
            "config",
            "requests a second",
            "times stock, by turn",
            "at most",
            "first token, median",
            "gap, p99",
        ],
        lines,
    )


# ---- what it costs


def _curve(task: str, share: float, by: str) -> Row:
    """Of the first probe's choice, at 8K, 96 prompts."""
    [row] = [
        row for row in rows(CURVE)
        if (row["task"], row["share"], row["by"], row["tokens"], row["samples"]) == (task, share, by, 8192, 96)
        and row["probe"] == rows(CURVE)[0]["probe"]
    ]  # fmt: skip
    return row


def costs() -> str:
    """Qwen2.5-Coder-1.5B at 8K: KL and score, by head and by layer."""
    lines = []
    for task, name in TASKS.items():
        for share in (0.5, 0.65, 0.75, 0.85):
            head, layer = _curve(task, share, "gradient"), _curve(task, share, "layer")
            scores = [row["score"] and f"{row['score'][0]:.2f}" for row in (head, layer)]
            dense = head["dense_score"] and f"{head['dense_score'][0]:.2f}"
            kls = [f"{row['kl']:.4f} ± {row['kl_half_width']:.4f}" for row in (head, layer)]
            lines.append([name, f"{share:.0%}", *kls, *(text or "" for text in (*scores, dense))])
    return _table(
        ["prompts", "heads on triangle", "KL by head", "KL by layer", "score by head", "by layer", "dense"], lines
    )


def _named(value: Any) -> str:
    return str(value["name"] if isinstance(value, dict) else value)


Mixture = tuple[str, str, str]  # below layer 21, from it on, by head
Prompts = tuple[str, int]  # task and seed


def mixture_of(row: Row) -> Mixture:
    """Of a record of the sweep."""
    axes = row["axes"] or dict.fromkeys(("below", "above"), "dense") | {"by_head": "none"}
    return _named(axes["below"]), _named(axes["above"]), axes["by_head"]


def _ruler(tokens: int, *files: str, only: Sequence[Mixture] = ()) -> dict[Mixture, dict[Prompts, Row]]:
    """Each mixture's rows of the tasks and seeds that all of them, or all of `only`, have at that length."""
    of: dict[Mixture, dict[Prompts, Row]] = {}
    for row in (row for file in files for row in rows(file) if row["tokens"] == tokens):
        key = mixture_of(row)
        if only and key not in only:
            continue
        if of.setdefault(key, {}).setdefault((row["task"], row["seed"]), row) is not row:
            raise ValueError(f"two rows of {row['label']}, {row['task']}, {tokens} tokens, seed {row['seed']}")
    shared = set.intersection(*(set(found) for found in of.values()))
    return {key: {at: row for at, row in sorted(found.items()) if at in shared} for key, found in of.items()}


def _average(of: Mapping[Any, Row]) -> float:
    return 100 * mean(row["score"] for row in of.values())


def _less_dense(of: Mapping[Any, Row], dense: Mapping[Any, Row]) -> str:
    changes = [a - b for task, row in of.items() for a, b in zip(row["scores"], dense[task]["scores"], strict=True)]
    change, width = mean_interval(changes)
    return f"{round(100 * change, 1) + 0.0:+.1f} ± {100 * width:.1f}"  # + 0.0: no -0.0


def ruler() -> str:
    """RULER's tasks on Qwen2.5-Coder-1.5B: averages over the tasks, and the difference from dense, prompt by prompt."""
    lines = []
    for tokens in LENGTHS:
        of = _ruler(tokens, RULER)
        dense = of[DENSE]
        for key, name in STATIC.items():
            lines.append([
                f"{tokens:,}", str(len({task for task, _ in dense})), name, f"{_average(of[key]):.1f}",
                "" if name == "dense" else _less_dense(of[key], dense),
                f"{mean(row['kl'] for row in of[key].values()):.4f}",
            ])  # fmt: skip
    return _table(["tokens", "tasks", "config", "average", "less dense", "KL"], lines)


def ruler_seeds() -> str:
    """Dense attention and TriangleMix alone, over all seeds."""
    lines = []
    for tokens in LENGTHS:
        of = _ruler(tokens, RULER, only=(DENSE, MIXED))
        prompts = sum(len(row["scores"]) for row in of[DENSE].values())
        lines.append([
            f"{tokens:,}", str(len({task for task, _ in of[DENSE]})), str(prompts), f"{_average(of[DENSE]):.1f}",
            f"{_average(of[MIXED]):.1f}", _less_dense(of[MIXED], of[DENSE]),
        ])  # fmt: skip
    return _table(["tokens", "tasks", "prompts", "dense", "TriangleMix", "less dense"], lines)


def ruler_dynamic() -> str:
    """The same of each dynamic pattern: in all layers, and below layer 21 under TriangleMix."""
    lines = []
    for tokens in LENGTHS:
        of = _ruler(tokens, RULER, *RULER_DYNAMIC)
        dense = of[DENSE]
        lines.append([f"{tokens:,}", "dense", f"{_average(dense):.1f}", "", "", "1.00", f"{_average(of[MIXED]):.1f}",
                      _less_dense(of[MIXED], dense), *_costs(of[MIXED])])  # fmt: skip
        for name in sorted(_dynamic(of), key=lambda name: -_average(of[name, name, "none"])):
            cells = [f"{tokens:,}", name]
            for above in (name, "triangle"):
                found = of[name, above, "none"]
                cells += [f"{_average(found):.1f}", _less_dense(found, dense), *_costs(found)]
            lines.append(cells)
    costs = ("less dense", "KL", "density")
    return _table(["tokens", "pattern", "in all layers", *costs, "TriangleMix over it", *costs], lines)


def _dynamic(of: Mapping[Mixture, Any]) -> list[str]:
    """Patterns that stand below the triangle."""
    return sorted({below for below, above, _ in of if above not in ("dense", below)} - {"dense"})


def _costs(of: Mapping[Prompts, Row]) -> tuple[str, str]:
    return f"{mean(row['kl'] for row in of.values()):.4f}", f"{mean(row['density'] for row in of.values()):.2f}"


def start_layers() -> dict[int, dict[str, dict[int, Row]]]:
    """Qwen2.5-Coder-1.5B, every pattern in the last layers: by length, pattern, and the first layer that runs it."""
    of: dict[int, dict[str, dict[int, Row]]] = {}
    for row in rows(STARTS):
        found = of.setdefault(row["prompts"]["tokens"], {}).setdefault(row["pattern"].split("(")[0], {})
        found[row["start"]] = row
    return of


def _firsts(of: Mapping[int, Mapping[str, Mapping[int, Row]]]) -> list[int]:
    return sorted({start for found in of.values() for starts in found.values() for start in starts}, reverse=True)


def start_patterns() -> str:
    """KL and score of each."""
    of = start_layers()
    firsts = _firsts(of)
    lines = [
        [f"{tokens:,}", name, f"{next(iter(found.values()))['dense_score'][0]:.2f}",
         *(f"{found[at]['kl']:.4f}, {found[at]['score'][0]:.2f}" if at in found else "" for at in firsts)]
        for tokens, patterns in of.items() for name, found in patterns.items()
    ]  # fmt: skip
    return _table(["tokens", "pattern", "dense", *(f"from {start}" for start in firsts)], lines)


def start_losses() -> str:
    """A line for each length: how many answers in a hundred each pattern loses from some layers on."""
    text, of = "", start_layers()
    names = dict.fromkeys(name for patterns in of.values() for name in patterns)
    for tokens, patterns in of.items():
        said = []
        for at, where in ((21, "from layer 21 on"), (14, "from layer 14 on"), (0, "in all layers")):
            lost = {
                name: round(100 * (found[at]["dense_score"][0] - found[at]["score"][0]))
                for name, found in patterns.items() if at in found
            }  # fmt: skip
            named = [
                f"`{name}` {points}" for name, points in sorted(lost.items(), key=lambda item: -item[1]) if points > 0
            ]
            missing = [f"`{name}`" for name in names if name not in lost]
            beside = f" (not measured: {', '.join(missing)})" if missing else ""
            said.append(f"{where} {', '.join(named) or 'none'}{beside}" if lost else f"{where} not measured")
        text += _lines(f"- At {tokens:,} tokens: {'; '.join(said)}.", "  ")
    return text


def _lines(text: str, further: str = "") -> str:
    """As a page has it: lines of at most 138 characters, which end with whole words."""
    return fill(text, 138, subsequent_indent=further, break_long_words=False, break_on_hyphens=False) + "\n"


def single_layers() -> dict[str, Any]:
    """Qwen2.5-Coder-1.5B, `triangle` in one layer at a time: the record."""
    found: dict[str, Any] = json.loads((DOCS / "results" / "layers-qwen2.5-coder-1.5b.json").read_text())
    return found


def misjudged(layers: Sequence[Row]) -> tuple[int, list[int]]:
    """The layer whose place by KL is most above its place by Grad(Middle), and the two that are most below."""
    by_gradient, by_kl = (ranks([row[name] for row in layers]) for name in ("gradient", "kl"))
    order = sorted(range(len(layers)), key=lambda i: by_kl[i] - by_gradient[i])
    return layers[order[-1]]["layer"], sorted(layers[i]["layer"] for i in order[:2])


def agreement() -> str:
    """What docs/calibrate.md says of it."""
    record = single_layers()
    layers = record["rows"]
    worst = max(layers, key=lambda row: row["kl"])
    above, below = misjudged(layers)
    place = {
        name: [row["layer"] for row in sorted(layers, key=lambda row: -row[name])].index(above) + 1
        for name in ("gradient", "kl")
    }
    value, low, high = record["correlation"]
    deep = max(row["kl"] for row in layers if row["layer"] >= 18)
    lost = max(row["dense_score"][0] - row["score"][0] for row in layers)
    return _lines(
        f"On Qwen2.5-Coder-1.5B ({layers[0]['samples']} four-key prompts of {record['prompts']['tokens'] // 1024}K, "
        f"{record['dtype']}, {record['device'].split()[-1]}, the probe of [which heads](head-choice.md)) the rank "
        f"correlation over its {len(layers)} layers is {value:.2f} ({low:.2f} to {high:.2f}). One layer alone costs "
        f"{f'{lost:.2f} of the score at most' if lost > 0 else 'no answer'}: the worst, {worst['layer']}, has KL "
        f"{worst['kl']:.4f}, and layers 18 to 27 at most {deep:.4f}. The gradient thinks too well of layer {above}, "
        f"place {place['gradient']} of {len(layers)} by Grad(Middle) and {place['kl']} by KL, and too ill of layers "
        f"{below[0]} and {below[1]}: [layers-qwen2.5-coder-1.5b.json](results/layers-qwen2.5-coder-1.5b.json)."
    )


def real_layers() -> dict[str, dict[int, Row]]:
    """Dynamic patterns on that model's own q, k and v, by pattern and layer."""
    of: dict[str, dict[int, Row]] = {}
    for row in rows(REAL):
        if row["case"] == "dynamic":
            of.setdefault(row["method"], {})[row["layer"]] = row
    return of


def real() -> str:
    """Error, density, and the least possible one; of many layers every fifth, and the mean of all."""
    of = real_layers()
    layers = sorted({layer for found in of.values() for layer in found})
    shown = layers if len(layers) <= 8 else layers[1::5]
    first = next(iter(of.values()))[layers[0]]
    heads, where = (first["heads"], first["key_heads"]), "a CPU" if first["cuda"] is None else first["device"]
    head = ["pattern", *(f"layer {at}" for at in shown)]
    lines = [[name, *(_real_cell([found[at]]) for at in shown)] for name, found in of.items()]
    if shown != layers:
        head.append(f"mean of {len(layers)} layers")
        lines = [[*line, _real_cell([*of[line[0]].values()])] for line in lines]
    if "index_ms" in first:
        head += ["index, ms", "attention, ms"]
        for line in lines:
            line += [f"{median(row[name] for row in of[line[0]].values()):.2f}" for name in ("index_ms", "attend_ms")]
    told = f"{first['tokens']:,} tokens of a four-key prompt of 32K, {heads[0]} query heads, {heads[1]} of keys"
    return f"{told}, {first['dtype']}, {where}:\n\n{_table(head, lines)}"


def _real_cell(of: Sequence[Row]) -> str:
    error, kept, least = (mean(row[key] for row in of) for key in ("error_l1", "tile_density", "oracle_tile_density"))
    return f"{error:.3f} ({kept:.2f}, {least:.2f})"


def starts() -> str:
    """Qwen2.5-Coder-1.5B: triangle in the last layers, as the paper chooses them."""
    lines = []
    most: dict[tuple[int, float], Row] = {}  # of runs of several sizes, the largest
    for row in rows(CURVE):
        key = row["tokens"], row["heads_share"]
        few = key in most and most[key]["samples"] >= row["samples"]
        if row["by"] == "layer" and row["task"] == "needle4" and row["samples"] >= 45 and not few:
            most[key] = row
    for _, row in sorted(most.items()):
        first = 28 - round(28 * row["heads_share"])
        lines.append([
            f"{row['tokens']:,}", str(first), str(row["samples"]), f"{row['kl']:.4f} ± {row['kl_half_width']:.4f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*row["score"]), f"{row['dense_score'][0]:.2f}",
        ])  # fmt: skip
    return _table(["tokens", "triangle from layer", "prompts", "KL", "score", "dense"], lines)


# ---- beside the papers


def _one(name: str, **fields: Any) -> Row:
    """The first row with these fields."""
    return next(row for row in rows(name) if fields.items() <= row.items())


def published() -> str:
    flash = _one("kernel-peers-h200", case="dense", impl="fa3", tokens=131072)["ms"]
    triangle = _one("kernel-peers-h200", case="triangle", impl="hopper", tokens=131072)["ms"]
    s2o = _one("dynamic-h100", method="s2o", tokens=131072)["ms"]
    beside = _one("dynamic-h100", case="dense", impl="sdpa-cudnn", tokens=131072)["ms"]
    short, here = (
        _one("prefill-h200", config="configs/llama-3.1-8b/trianglemix.yaml", tokens=tokens, attends="structured")[
            "faster"
        ]
        for tokens in (32768, 131072)
    )
    whole = {row["config"]: row["ms"] for row in rows("prefill-h200") if row["tokens"] == 131072 and _beside(row)}
    further = [1 - whole[f"configs/llama-3.1-8b/trianglemix-{name}.yaml"] / whole[f"docs/results/alone-{name}.yaml"]
               for name in DYNAMIC]  # fmt: skip
    lengths = [_ruler(tokens, RULER) for tokens in LENGTHS]
    asked = set.intersection(*(set(of[MIXED]) for of in lengths))
    tasks = {task for task, _ in asked}
    score = {
        key: {(at, *prompts): of[key][prompts] for at, of in enumerate(lengths) for prompts in sorted(asked)}
        for key in (DENSE, MIXED, EVERYWHERE)
    }
    dense, mixed, everywhere = score.values()
    return _table(
        ["what", "published", "here", "agrees"],
        [
            [
                "one layer of triangle, 128K, times faster than dense", "15.3, A100, FlashAttention",
                f"{flash / triangle:.1f}, H200, FlashAttention-3", "larger: another kernel, another GPU",
            ],
            [
                "time to first token under TriangleMix, Llama 3.1 8B, 32K to 128K", "12% to 32% less, A100",
                f"{1 - 1 / short:.0%} less at 32K, {1 - 1 / here:.0%} at 128K, H200, random weights", "yes",
            ],
            [
                "triangle in deep layers harmless, in all of them not", "RULER 77.6 dense, 77.3 mixed, Llama 3.1 8B",
                f"1.5B model, {len(tasks)} tasks, 4K to 32K: {_average(dense):.1f} dense, "
                f"{_average(mixed):.1f} mixed ({_less_dense(mixed, dense)}), {_average(everywhere):.1f} in all layers",
                "yes",
            ],
            [
                "S2O, one layer, 128K, times faster than dense", "7.51, FlashAttention-2, as others quote it",
                f"{beside / s2o:.1f}, H100, against cuDNN", "nearly",
            ],
            [
                "S2O, whole prompt, times faster", "3.81, likewise",
                f"{whole['untouched'] / whole['docs/results/alone-s2o.yaml']:.2f} at 128K, H200, structured q and k",
                "no: less",
            ],
            [
                "TriangleMix over a dynamic pattern, below that pattern alone", "6% to 19% less",
                f"{min(further):.0%} to {max(further):.0%} less at 128K, H200, structured q and k", "yes, and beyond",
            ],
        ],
    )  # fmt: skip


TABLES: dict[str, dict[str, Callable[[], str]]] = {  # by page
    "gains.md": {
        "saves": saves, "alone": alone, "load": load, "costs": costs, "ruler": ruler, "ruler-seeds": ruler_seeds,
        "ruler-dynamic": ruler_dynamic, "starts": starts, "start-patterns": start_patterns,
        "start-losses": start_losses, "real": real, "published": published,
    },
    "calibrate.md": {"agreement": agreement},
}  # fmt: skip


def with_tables(page: str, name: str = "gains.md") -> str:
    """The page of that name with each `<!-- table NAME -->` filled up to its `<!-- end -->`."""
    for which, table in TABLES[name].items():
        page, count = re.subn(
            rf"(<!-- table {which} -->\n).*?(<!-- end -->)",
            lambda at, table=table: at[1] + table() + at[2],
            page,
            flags=re.DOTALL,
        )
        assert count == 1, which
    return page


# ---- the pictures


def draw(path: Path) -> None:
    """Before and after: seconds to the first token, and answers that stay right."""
    from matplotlib.figure import Figure

    before, after, layers, ink = "#9aa5b1", "#2a78b8", "#d1495b", "#1f2933"
    figure = Figure(figsize=(11, 3.6), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    times = [row for row in rows("prefill-h200") if row["tokens"] == 131072 and row["attends"] == "weights"]
    seconds = [row["ms"] / 1e3 for row in times]
    names = ["untouched", *(CONFIGS[row["config"]].replace(" in ", "\nin ") for row in times[1:])]
    bars = left.barh(names, seconds, color=[before, after, after], height=0.62)
    left.bar_label(bars, [f"{value:.1f} s" for value in seconds], padding=4, color=ink)
    left.invert_yaxis()
    left.set_xlim(0, 1.15 * max(seconds))
    left.set_title("Time to first token, 128K tokens\nLlama 3.1 8B's shape, H200", fontsize=11, color=ink)
    for place, task in enumerate(("needle4", "vt")):
        head, layer = _curve(task, 0.75, "gradient"), _curve(task, 0.75, "layer")
        for step, (value, colour, label) in enumerate((
            (head["dense_score"], before, "untouched"), (head["score"], after, "triangle in 75% of the heads, by head"),
            (layer["score"], layers, "the same share, by layer"),
        )):  # fmt: skip
            mean, low, high = value
            x = place + 0.27 * (step - 1)
            right.bar(x, mean, 0.25, color=colour, label=None if place else label)
            right.errorbar(x, mean, yerr=[[mean - low], [max(high - mean, 0)]], color=ink, linewidth=1, capsize=3)
            right.text(x, 0.04, f"{mean:.2f}", ha="center", color="white", fontsize=10, fontweight="bold")
    right.set_xticks([0, 1], ["four keys", "chained variables"])
    right.set_ylim(0, 1.42)
    right.set_yticks([0, 0.5, 1])
    right.legend(loc="upper right", frameon=False, fontsize=9)
    right.set_title("Answers that are right, 8K tokens, 96 prompts\nQwen2.5-Coder-1.5B, H200", fontsize=11, color=ink)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=ink)
    figure.savefig(path, dpi=110)


def draw_findings(path: Path) -> None:
    """The paper's three findings on Qwen2.5-Coder-1.5B: Grad(Middle), the start layer, one layer at a time."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    ink, alone = "#1f2933", single_layers()
    probe = json.loads((DOCS / "results" / "probe-qwen2.5-coder-1.5b.json").read_text())
    figure = Figure(figsize=(11, 7), facecolor="white", layout="constrained")
    (heads, single), (kls, scores) = figure.subplots(2, 2)
    grid = [[head["middle"] for head in layer["heads"]] for layer in probe["layers"]]
    most = max(map(max, grid))
    shares = [[max(row[head] / most, 1e-4) for row in grid] for head in range(len(grid[0]))]
    shown = heads.imshow(shares, norm=LogNorm(1e-4, 1), cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(shown, ax=heads, label="share of the largest")
    heads.set_title("Grad(Middle) by layer and head, prompts of 2K", fontsize=11, color=ink)
    heads.set_ylabel("head")
    above, below = misjudged(alone["rows"])
    named = {above, *below, 2, 12, 20, 26}
    for row in alone["rows"]:
        single.plot(row["gradient"], row["kl"], "o", color="#2a78b8", markersize=5)
        if row["layer"] in named:
            single.annotate(
                str(row["layer"]),
                (row["gradient"], row["kl"]),
                (-9 if row["layer"] in below[:1] else 4, 3),
                textcoords="offset points",
                fontsize=8,
            )
    value, low, high = alone["correlation"]
    single.set_title(
        f"triangle in one layer alone, 8K\nrank correlation {value:.2f} ({low:.2f} to {high:.2f})",
        fontsize=11,
        color=ink,
    )
    single.set_xscale("log")
    single.set_xlabel("Grad(Middle), share of the largest layer's")
    single.set_ylabel("KL from dense")
    of = start_layers()[DRAWN]
    for (name, starts), marker in zip(of.items(), "osv^D<>Px", strict=True):
        at = sorted(starts)
        found = [starts[start] for start in at]
        kls.plot(at, [row["kl"] for row in found], marker=marker, markersize=4, linewidth=1.3)
        score, lowest, highest = zip(*(row["score"] for row in found), strict=True)
        widths = [[a - b for a, b in zip(*pair, strict=True)] for pair in ((score, lowest), (highest, score))]
        scores.errorbar(at, score, widths, marker=marker, markersize=4, linewidth=1.3, elinewidth=0.6, label=name)
    scores.legend(frameon=False, fontsize=8, loc="lower right")
    dense = found[0]["dense_score"][0]
    kls.set_title(f"KL from dense, four keys, {DRAWN // 1024}K", fontsize=11, color=ink)
    scores.set_title(f"Answers that are right, of dense attention's {dense:.2f}", fontsize=11, color=ink)
    scores.set_ylim(0, 1.05)
    for axes in (kls, scores, heads):
        axes.set_xlabel("layer" if axes is heads else "first layer that runs the pattern")
    for axes in (kls, single):
        axes.set_yscale("log")
    for axes in (kls, single, scores):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for name in TABLES:
        (DOCS / name).write_text(with_tables((DOCS / name).read_text(), name))
    draw(PICTURE)
    draw_findings(FINDINGS)
