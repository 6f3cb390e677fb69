"""Other projects' files become configs, and a file that does not fit is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsekit import SparsekitError, load
from sparsekit.cli import app
from sparsekit.config.convert import convert_minference, convert_xattention
from sparsekit.patterns import (
    AShape,
    BlockTopK,
    VerticalSlash,
    XAttention,
)

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
        ("", "line 1: the end of the file: want a list with one mapping of heads for each layer"),
        ("{}", "line 1: {}: want a list"),
        ("[]", "no layers"),
        (f"[{ONE}", "line 1: the end of the file: want a comma or ']'"),
        (f"[{ONE},\n]", "line 2: ]: a comma before the end"),
        (f"[{ONE}]\n\nmore", "line 3: more: something follows the list"),
        (f"[{ONE},\n3]", "line 2: 3]: want a mapping of heads"),
        (f"[{ONE},\n {{}}]", "line 2: layer 1 lists no head 0"),
        ('[\n{"0" ["stream_llm", 1, 2]}]', 'line 2: ["stream_llm", 1, 2]}]: want a colon after the head'),
        ('[\n{0: ["stream_llm", 1, 2]}]', "line 2: 0: want the number of a head in double quotes"),
        ('[\n{"0": ["stream_llm", 1 2]}]', "line 2: 2]}]: not JSON: Expecting ',' delimiter"),
        (
            '[\n{"zero": ["stream_llm", 1, 2]}]',
            "line 2: layer 0, head 'zero': [\"stream_llm\", 1, 2]: a head is a whole",
        ),
        ('[{"0": ["stream_llm", 1, 2],\n"0": ["stream_llm", 1, 2]}]', "line 2: layer 0, head '0': .*listed twice"),
        ('[{"0": ["stream_llm", 1, 2],\n"2": ["stream_llm", 1, 2]}]', "line 1: layer 0 lists no head 1"),
        (
            f"[{ONE},\n" + '{"0": ["stream_llm", 1, 2], "1": ["stream_llm", 1, 2]}]',
            "line 2: layer 1 has 2 heads, layer 0",
        ),
        ('[{"0":\n7}]', "line 1: layer 0, head '0': 7: want [pattern, v, s, score]"),
        ('[\n{"0": ["stream_llm", 1]}]', "want [pattern, v, s, score]"),
        (
            '[\n{"0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0]}]',
            "line 2: layer 0, head '0': [\"flex_vertical_and_slash\", [0.9, 4096], [0.9, 4096], 0.0]: unknown pattern; "
            "one of vertical_and_slash, stream_llm, block_sparse",
        ),
        ('[\n{"0": ["vertical_and_slash", 1.5, 2, 0]}]', "v and s are whole numbers of tokens"),
        ('[\n{"0": ["vertical_and_slash", 0, 2, 0]}]', "vertical_tokens = 0: it should be greater than or equal to 1"),
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
    assert broken.exit_code == 1 and broken.stderr.startswith(f"error: {table} line 1: import torch: want a list")
    assert run.invoke(app, ["convert", "minference", str(patterns)]).exit_code == 2
