"""Other projects' files become configs, and a file that does not fit is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsekit import SparsekitError, load
from sparsekit.cli import app
from sparsekit.config import ModelFacts
from sparsekit.config.convert import convert_duo_attention, convert_minference, convert_xattention
from sparsekit.patterns import AShape, BlockTopK, VerticalSlash, XAttention

run = CliRunner()


def write(folder: Path, text: str, name: str = "file.json") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# ---- MInference

LAYERS: list[dict[str, list[Any]]] = [
    {"0": ["vertical_and_slash", 1000, 6096, 0.33], "1": ["vertical_and_slash", 1000, 6096, 0.93]},
    {"0": ["vertical_and_slash", 30, 800, 0.33], "1": ["stream_llm", 100, 800, 0.96]},
    {"1": ["stream_llm", 100, 800, 1], "0": ["vertical_and_slash", 30, 800]},
    {"0": ["block_sparse", 1, 2, 0.5], "1": ["block_sparse", 7, 7, 0.5]},
]


@pytest.mark.parametrize("indent", [None, 2])
def test_minference(tmp_path: Path, indent: int | None) -> None:
    out = tmp_path / "out.yaml"
    config = convert_minference(write(tmp_path, json.dumps(LAYERS, indent=indent)), out)
    assert load(out) == config
    layers = config.resolve().layers
    assert (config.model.num_layers, config.model.num_heads) == (4, 2)
    assert layers[0].patterns == (VerticalSlash(vertical_tokens=1000, slash_tokens=6096),)
    assert layers[1].patterns == (
        VerticalSlash(vertical_tokens=30, slash_tokens=800),
        AShape(sink_tokens=100, window_tokens=800),
    )
    assert layers[1].patterns == layers[2].patterns and layers[2].pattern_of_head == (0, 1)
    assert layers[3].patterns == (BlockTopK(top_k=100),)
    assert set(config.layers) == {"0", "3"} and set(config.heads) == {"1-2"}
    assert config.provenance == {"converted_from": "file.json", "format": "minference"}


ONE = '{"0": ["vertical_and_slash", 30, 800, 1]}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1 column 1: not JSON: Expecting value"),
        ("{}", "{}: want a list with one mapping of heads for each layer"),
        ("[]", "[]: want a list"),
        ("3", "3: want a list"),
        (f"[{ONE}", "line 1 column 43: not JSON: Expecting ',' delimiter"),
        (f"[{ONE}]\n\nmore", "line 3 column 1: not JSON: Extra data"),
        (f"[{ONE},\n3]", "layer 1: 3: want a mapping of heads"),
        (f"[{ONE},\n {{}}]", "layer 1 lists no head 0"),
        (
            '[\n{0: ["stream_llm", 1, 2]}]',
            "line 2 column 2: not JSON: Expecting property name enclosed in double quotes",
        ),
        (
            f'[{ONE}, {{"zero": ["stream_llm", 1, 2]}}]',
            "layer 1, head 'zero': ['stream_llm', 1, 2]: a head is a whole number",
        ),
        ('[{"01": ["stream_llm", 1, 2]}]', "layer 0, head '01'"),
        ('[{"\u0663": ["stream_llm", 1, 2]}]', "a head is a whole number"),
        ('[{"0": ["stream_llm", 1, 2],\n"0": ["stream_llm", 1, 2]}]', "layer 0, head '0': .*listed twice"),
        ('[{"0": ["stream_llm", 1, 2],\n"2": ["stream_llm", 1, 2]}]', "layer 0 lists no head 1"),
        ('[{"1024": ["stream_llm", 1, 2]}]', "heads are numbered from 0 to 1,023"),
        ('[{"99999999999": ["stream_llm", 1, 2]}]', "a head is a whole number"),
        (f"[{', '.join([ONE] * 1025)}]", "1,025 layers; at most 1,024"),
        (
            f"[{ONE},\n" + '{"0": ["stream_llm", 1, 2], "1": ["stream_llm", 1, 2]}]',
            "layer 1 has 2 heads, layer 0",
        ),
        ('[{"0":\n7}]', "layer 0, head '0': 7: want [pattern, v, s, score]"),
        ('[\n{"0": ["stream_llm", 1]}]', "want [pattern, v, s, score]"),
        (
            '[\n{"0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0]}]',
            "layer 0, head '0': ['flex_vertical_and_slash', [0.9, 4096], [0.9, 4096], 0.0]: unknown pattern; "
            "one of vertical_and_slash, stream_llm, block_sparse",
        ),
        ('[\n{"0": ["vertical_and_slash", 1.5, 2, 0]}]', "v and s are whole numbers of tokens"),
        ('[\n{"0": ["block_sparse", "a", 2, 0]}]', "v and s are whole numbers of tokens"),
        ('[\n{"0": ["block_sparse", 1, 2, "high"]}]', "the score is a number"),
        ('[\n{"0": ["vertical_and_slash", 0, 2, 0]}]', "vertical_tokens = 0: it should be greater than or equal to 1"),
        (f'[{{"0": ["vertical_and_slash", {10**30}, 2, 0]}}]', "is too large; numbers go up to 2,147,483,647"),
        (f'[{{"0": ["vertical_and_slash", {"9" * 5000}, 2, 0]}}]', "not JSON: Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_minference_refused(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SparsekitError) as error:
        convert_minference(path, tmp_path / "out.yaml")
    assert str(error.value).startswith(str(path))
    assert says.replace(".*", "") in str(error.value) or all(part in str(error.value) for part in says.split(".*"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.yaml").exists()


# ---- XAttention

ROWS = [[0.9, 0.5], [0.8, 0.8], [0, 1]]
WRITTEN = {
    "json": json.dumps(ROWS),
    "json in lines": json.dumps(ROWS, indent=1),
    "python": f"import torch\n\ntable_8 = torch.tensor({ROWS})\n",
    "tuples": str(tuple(map(tuple, ROWS))),
    "text": "# S=8\n0.9 0.5\n0.8, 0.8\n\n0 1.0\n",
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_xattention(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.yaml"
    config = convert_xattention(write(tmp_path, WRITTEN[kind], "table"), out, stride=None if kind == "python" else 8)
    assert load(out) == config
    layers = config.resolve().layers
    assert [layer.patterns for layer in layers] == [
        (XAttention(threshold=(0.9, 0.5), stride=8),),
        (XAttention(threshold=0.8, stride=8),),
        (XAttention(threshold=(1e-6, 1.0), stride=8),),
    ]
    assert (config.model.num_layers, config.model.num_heads) == (3, 2)
    assert config.provenance["zeros"] == 1 and config.provenance["zeros_raised_to"] == 1e-6


def test_xattention_table_of_several(tmp_path: Path) -> None:
    path = write(tmp_path, "llama_4 = [[0.5]]\nllama_16 = [[0.25]]\n", "table.py")
    config = convert_xattention(path, table="llama_16")
    assert config.default.name == "dense"
    assert config.layers == {"0": XAttention(threshold=0.25, stride=16)}
    assert config.provenance == {"converted_from": "table.py", "format": "xattention", "table": "llama_16"}
    assert convert_xattention(path, table="llama_16", stride=4).layers == {"0": XAttention(threshold=0.25, stride=4)}
    unnamed = convert_xattention(write(tmp_path, "[[0.25]]", "t"))
    assert unnamed.layers == {"0": XAttention(threshold=0.25)}


# DuoAttention's full_attention_heads.tsv: scores of key heads, as numpy writes them.
SCORES = "\n".join(
    "\t".join(f"{score:.18e}" for score in row)
    for row in ([0.60546875, 0, 0.96875], [0.99609375, 0.02490234375, 1], [0, 0.9921875, 0.4375])
)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("# none\n", {}, "empty; want a row of thresholds for each layer"),
        ("x = 3\n", {}, "line 1: x = 3: want a list"),
        ("[[0.5],\n[0.5", {}, "line 2: [0.5: '[' was never closed"),
        ("[]", {}, "line 1: the table is empty"),
        ("[[0.5],\n 0.5]", {}, "line 2: 0.5]: layer 1: want a list of thresholds"),
        ("[[0.5],\n []]", {}, "line 2: []]: layer 1: want a list of thresholds"),
        ("[[0.5, 0.5],\n [0.5]]", {}, "line 2: layer 1 has 1 thresholds, layer 0 has 2"),
        ("[[0.5],\n ['high']]", {}, "line 2: 'high': layer 1, head 0: a threshold is a number"),
        ("[[0.5],\n [True]]", {}, "line 2: True: layer 1, head 0: a threshold is a number"),
        ("[[0.5],\n [1.5]]", {}, "line 2: layer 1, head 0: threshold 1.5 is not from 0 to 1"),
        ("[[0.5],\n [-0.5]]", {}, "line 2: layer 1, head 0: threshold -0.5 is not from 0 to 1"),
        ("0.5 0.5\n0.5 x\n", {}, "line 2: 0.5 x: want numbers, one for each query head"),
        ("0.5 0.5\n0.5 nan\n", {}, "line 2: 0.5 nan: want numbers"),
        ("0.5 0.5\n\n0.5\n", {}, "line 3: layer 1 has 1 thresholds, layer 0 has 2"),
        ("a = [[0.5]]\nb = [[0.5]]", {}, "2 tables (a, b): name one"),
        ("ab_4 = [[0.5]]", {"table": "ab_8"}, "no table 'ab_8'; it has ab_4. Did you mean 'ab_4'?"),
        ("0.5", {"table": "x"}, "table 'x': this file holds one table, without a name"),
        ("[" * 5000, {}, "line 1: [[["),
        ("-" * 100_000 + "1", {}, "line 1: ---"),
        ("x = [[" + "-" * 100_000 + "1]]", {}, "not a table of thresholds: nested too deeply"),
        ("[[0.5, " + "9" * 4000 + "]]", {}, "layer 0, head 1: a threshold is a number"),
        ("[[0.5, " + "9" * 5000 + "]]", {}, "line 1: [[0.5, 999"),
        ("[[0.5, 1e999]]", {}, "layer 0, head 1: a threshold is a number"),
        ("[[0.5, 10]]", {}, "threshold 10.0 is not from 0 to 1"),
        ("0.5\n" * 1025, {}, "1,025 rows; at most 1,024"),
        ("[[0, 1],\n [1, 0]]", {}, "all numbers are 0 or 1: a mask of heads"),
        ("[[0, 0],\n [0, 0]]", {}, "all numbers are 0 or 1: a mask of heads"),
        ("[[1.0, 1],\n [1, 1]]", {}, "all numbers are 0 or 1: a mask of heads"),
        (SCORES, {}, "line 2: the numbers go from 0.0249023 to 1: scores of heads, as DuoAttention's"),
        ("scores = [[0.9, 0.04],\n[1.0, 0.5]]", {}, "line 1: the numbers go from 0.04 to 1"),
        ("[[0.5]]", {"stride": 7}, "line 1: layer 0: xattention: stride = 7"),
        ("of_7 = [[0.5]]", {}, "line 1: layer 0: xattention: stride = 7"),
    ],
)
def test_xattention_refused(tmp_path: Path, text: str, options: dict[str, Any], says: str) -> None:
    path = write(tmp_path, text, "table")
    with pytest.raises(SparsekitError) as error:
        convert_xattention(path, **options)
    assert str(error.value).startswith(str(path)) and says in str(error.value)
    assert "\n" not in str(error.value)


def test_published_thresholds_are_no_scores(tmp_path: Path) -> None:
    """Those of XAttention for Llama-3.1 hold 0, 0.00040075 and 0.96: low ones alone are not refused."""
    path = write(tmp_path, "fuse_4: list = [[0.96, 0.0], [4.0075e-04, 0.93]]\n", "table.py")
    config = convert_xattention(path)
    assert config.layers["1"] == XAttention(threshold=(4.0075e-04, 0.93), stride=4)


def test_a_table_of_low_numbers_needs_a_model(tmp_path: Path) -> None:
    """Head scores without a 1 among them: 8 key heads of a model with 32 query heads."""
    scores = torch.rand(32, 8, generator=torch.Generator().manual_seed(0)).clamp(max=0.99)
    path = write(tmp_path, str(scores.tolist()), "table")
    with pytest.raises(SparsekitError, match=r"of 256 numbers are below 0\.5, as scores of heads are.*--model MODEL"):
        convert_xattention(path)
    with pytest.raises(SparsekitError, match="heads"):
        convert_xattention(path, model=ModelFacts(num_layers=32, num_heads=32))
    assert len(convert_xattention(path, model=ModelFacts(num_layers=32, num_heads=8)).layers) == 32


def test_a_file_must_fit_the_model(tmp_path: Path) -> None:
    """Scores of key heads that look like thresholds are told by their number."""
    model = ModelFacts(num_layers=2, num_heads=4, num_key_heads=2)
    path = write(tmp_path, "0.9 0.4\n0.8 0.5\n", "scores.tsv")
    with pytest.raises(
        SparsekitError, match="a number for each of 2 key heads; want one for each of the model's 4 query"
    ):
        convert_xattention(path, tmp_path / "out.yaml", model=model)
    with pytest.raises(SparsekitError, match="num_layers = 1, but the model has 2"):
        convert_xattention(write(tmp_path, "0.9 0.9 0.9 0.9\n", "t"), model=model)
    with pytest.raises(SparsekitError, match="num_heads = 3, but the model has 4"):
        convert_minference(
            write(tmp_path, json.dumps([{str(h): ["stream_llm", 1, 2] for h in range(3)}] * 2)), model=model
        )
    assert not (tmp_path / "out.yaml").exists()
    assert convert_xattention(path, model=ModelFacts(num_layers=2, num_heads=2, num_key_heads=2)).layers


# ---- files, and the command


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    write(tmp_path, "[]", "patterns.json")
    with pytest.raises(SparsekitError, match=r"no such file\. Did you mean '.*patterns.json'\?"):
        convert_minference(tmp_path / "pattern.json")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(SparsekitError, match="cannot be read as text"):
        convert_xattention(tmp_path / "b")
    with pytest.raises(SparsekitError, match=r"output .* cannot be written"):
        convert_minference(write(tmp_path, json.dumps(LAYERS)), tmp_path / "nowhere" / "out.yaml")


def test_commands(tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    patterns, table = write(tmp_path, json.dumps(LAYERS)), write(tmp_path, WRITTEN["python"], "table.py")
    assert run.invoke(app, ["convert", "minference", str(patterns), "-o", str(out)]).stdout.strip() == str(out)
    assert load(out) == convert_minference(patterns)
    done = run.invoke(
        app, ["convert", "xattention", str(table), "-o", str(out), "--table", "table_8", "--stride", "16"]
    )
    assert done.exit_code == 0, done.output
    assert load(out) == convert_xattention(table, stride=16)
    broken = run.invoke(app, ["convert", "minference", str(table), "-o", str(out)])
    assert broken.exit_code == 1 and broken.stderr == f"error: {table} line 1 column 1: not JSON: Expecting value.\n"
    assert run.invoke(app, ["convert", "minference", str(patterns)]).exit_code == 2


# ---- DuoAttention

SCORES = "0.9\t0.1\n1.2\t0.0\n0.5\t0.5\n"  # three layers, two key heads


def test_duo_attention_streams_the_lowest_key_heads(tmp_path: Path) -> None:
    file, out = write(tmp_path, SCORES, "heads.tsv"), tmp_path / "out.yaml"
    config = convert_duo_attention(file, out, share=0.5, group=2)
    assert load(out) == config
    sparse = [
        [h for p, heads in layer.groups() if p.name != "dense" for h in heads] for layer in config.resolve().layers
    ]
    assert sparse == [[2, 3], [2, 3], [0, 1]]  # 0.0, 0.1, then of 0.5 twice the lower head
    assert (config.model.num_layers, config.model.num_heads) == (3, 4)
    assert config.provenance["format"] == "duo-attention" and config.provenance["share"] == 0.5
    all_of_it = convert_duo_attention(file, share=1, pattern={"name": "triangle"}, group=2)
    assert {str(layer) for layer in all_of_it.resolve().layers} == {str(all_of_it.resolve().layers[0])}
    facts = ModelFacts(num_layers=3, num_heads=8, num_key_heads=2)
    assert convert_duo_attention(file, share=0.5, model=facts).model.num_heads == 8
    command = ["convert", "duo-attention", str(file), "--share", "0.5", "--group", "2", "-o", str(out)]
    assert run.invoke(app, command).exit_code == 0
    assert load(out).heads["0-1"]["2-3"].window_tokens == 256


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (SCORES, {"share": 0.5}, "counts key heads alone; say `group`"),
        (SCORES, {"share": 1.5, "group": 2}, "share = 1.5"),
        ("0.1\tx\n", {"share": 0.5, "group": 2}, "line 1: 0.1 x: want numbers, one for each key head"),
        ("0.1\t0.2\n0.1\n", {"share": 0.5, "group": 2}, "line 2: layer 1 has 1 scores, layer 0 has 2"),
        ("", {"share": 0.5, "group": 2}, "empty; want a row of scores"),
        (SCORES, {"share": 0.5, "model": ModelFacts(num_layers=3, num_heads=8, num_key_heads=4)}, "the model has 4"),
        (SCORES, {"share": 0.5, "model": ModelFacts(num_layers=4, num_heads=4, num_key_heads=2)}, "num_layers = 3"),
    ],
)
def test_duo_attention_refuses(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        convert_duo_attention(write(tmp_path, text, "heads.tsv"), **options)
