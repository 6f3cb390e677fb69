"""`sparsekit convert kascade`: which layer reuses whose choice, head by head, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sparsekit import SparsekitError, load
from sparsekit.cli import app
from sparsekit.config import ModelFacts, Reuse
from sparsekit.config.kascade import convert_kascade

# Anchors 0, 2 and 4 of 7 layers with 3 key heads.
MAP = [[0, 1, 2], [0, 0, 0], [0, 1, 2], [2, 1, 1], [0, 1, 2], [1, 1, 0], [0, 1, 2]]
NAME = "Some-Model-8B_layers_0_2_4.npy"


def _write(path: Path, rows: object = MAP, kind: str = "int32") -> Path:
    np.save(path, np.array(rows, dtype=kind))
    return path


def test_anchors_choose_and_heads_take_those_of_their_key_head(tmp_path: Path) -> None:
    path = _write(tmp_path / NAME)
    config = convert_kascade(path, tmp_path / "out.yaml", pattern={"name": "block_topk", "top_k": 8}, group=2)
    assert load(tmp_path / "out.yaml") == config
    assert (config.model.num_layers, config.model.num_heads, config.model.num_key_heads) == (7, 6, 3)
    layers = config.resolve().layers
    # Layer 0 is dense, as there; layer 1, which would reuse it, chooses for itself.
    assert [layer.dense for layer in layers] == [True] + [False] * 6
    assert [layer.reused and layer.reused.layer for layer in layers] == [None, None, None, 2, None, 4, 4]
    assert config.layers["3"] == Reuse(reuse=2, heads=(4, 5, 2, 3, 2, 3))
    assert layers[6].reused is not None and layers[6].reused.straight
    assert config.provenance["anchors"] == [0, 2, 4]
    assert config.provenance["chosen_by_themselves"] == "1"


def test_anchors_may_be_said_and_the_model_is_checked(tmp_path: Path) -> None:
    path = _write(tmp_path / "map.npy")
    facts = ModelFacts(num_layers=7, num_heads=12, num_key_heads=3)
    config = convert_kascade(path, anchors=[4, 2], model=facts)
    assert config.model.num_heads == 12
    assert config.resolve().layers[2].patterns[0].name == "xattention"
    with pytest.raises(SparsekitError, match=r"map\.npy: 7 layers, but the model has 8"):
        convert_kascade(path, anchors=[2, 4], model=ModelFacts(num_layers=8, num_heads=12, num_key_heads=3))
    with pytest.raises(SparsekitError, match="3 key heads a layer, but the model has 4"):
        convert_kascade(path, anchors=[2, 4], model=ModelFacts(num_layers=7, num_heads=12, num_key_heads=4))
    with pytest.raises(SparsekitError, match="this config is for a model with num_heads = 3, but the model has 12"):
        convert_kascade(path, anchors=[2, 4], group=1, model=facts)
    with pytest.raises(SparsekitError, match="say `group`, query heads of each, or the model"):
        convert_kascade(path, anchors=[2, 4])
    with pytest.raises(SparsekitError, match=r"its name does not end in its anchors, as NAME_layers_0_2_8\.npy does"):
        convert_kascade(path, group=2)
    with pytest.raises(SparsekitError, match=r"anchor 9 of a file with 7 layers; allowed: 0-6\."):
        convert_kascade(path, anchors=[2, 9], group=2)
    with pytest.raises(SparsekitError, match="in layer 3: that layer runs triangle"):
        convert_kascade(path, anchors=[2, 4], group=2, pattern="triangle")


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        (MAP, "float32", r"holds float32 \(7, 3\); want whole numbers, a row for each layer"),
        (MAP[0], "int32", r"holds int32 \(3,\)"),
        ([], "int32", r"holds int32 \(0,\)"),
        ([[0] * 3] * 1025, "int32", "at most 1,024 layers and heads"),
        ([*MAP[:3], [0, 3, 1], *MAP[4:]], "int64", r"layer 3: key head 3 of 3; allowed: 0-2\."),
        ([*MAP[:3], [0, -1, 1], *MAP[4:]], "int64", "layer 3: key head -1 of 3"),
        ([*MAP[:2], [1, 0, 2], *MAP[3:]], "int32", r"layer 2 is an anchor, and its heads map to \[1, 0, 2\]"),
    ],
)
def test_arrays_that_are_no_head_map(tmp_path: Path, rows: object, kind: str, said: str) -> None:
    with pytest.raises(SparsekitError, match=said):
        convert_kascade(_write(tmp_path / NAME, rows, kind), tmp_path / "out.yaml", group=2)
    assert not (tmp_path / "out.yaml").exists()


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with pytest.raises(SparsekitError, match=r"layers_0_2_4\.npy': no such file"):
        convert_kascade(path, group=2)
    with pytest.raises(SparsekitError, match="is a folder; a file is needed"):
        convert_kascade(tmp_path, anchors=[2], group=2)
    np.save(path, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(SparsekitError, match=r"is no array of numpy's \.npy format"):
        convert_kascade(path, group=2)
    for data in (b"", b"PK", b"\x93NUMPY\x01\x00", _write(tmp_path / "whole.npy").read_bytes()[:-4]):
        path.write_bytes(data)
        with pytest.raises(SparsekitError, match=r"is no array of numpy's \.npy format"):
            convert_kascade(path, group=2)


def test_the_command(tmp_path: Path) -> None:
    path, out = _write(tmp_path / NAME), tmp_path / "out.yaml"
    done = CliRunner().invoke(app, ["convert", "kascade", str(path), "-o", str(out), "--group", "2"])
    assert done.exit_code == 0, done.output
    assert "for a model of 7 layers and 6 query heads; --model checks it" in done.stderr
    assert load(out).layers["3"] == Reuse(reuse=2, heads=(4, 5, 2, 3, 2, 3))
    refused = CliRunner().invoke(app, ["convert", "kascade", str(path), "-o", str(out)])
    assert refused.exit_code == 1 and "say `group`" in refused.stderr
