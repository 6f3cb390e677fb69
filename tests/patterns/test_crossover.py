"""Tables of crossovers, and `dense_below_tokens: auto` of a pattern."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from crossovers import HERE, own, row, write

import sparsekit
from sparsekit import SparsekitError
from sparsekit.config.settle import fingerprint
from sparsekit.patterns import BlockTopK, DynamicPattern, parse_pattern
from sparsekit.patterns.crossover import (
    ENV,
    NEVER,
    SHIPPED,
    Measured,
    device_type,
    faster_from,
    find,
    own_table,
    read_table,
    subject,
)

CPU = torch.device("cpu")
TOPK = {"name": "block_topk", "top_k": 1, "block_tokens": 64}
AUTO = {**TOPK, "dense_below_tokens": "auto"}


def key(pattern: object) -> dict[str, object]:
    return subject(parse_pattern(pattern).model_dump(mode="json"))  # type: ignore[arg-type]


def below(pattern: object, place: object = HERE) -> tuple[int, str]:
    said: list[str] = []
    found = parse_pattern(pattern).settled(place, said.append)  # type: ignore[arg-type]
    assert isinstance(found, DynamicPattern)
    return found.dense_below(CPU), " ".join(said)


@pytest.mark.parametrize(
    ("faster", "least"),
    [
        ((False, True, True), 200), ((True, True, True), 100), ((True, False, True), 300), ((True, True, False), None),
        ((False, False), None),
    ],
)  # fmt: skip
def test_the_crossover_is_the_least_length_from_which_all_longer_ones_are_faster(
    faster: tuple[bool, ...], least: int | None
) -> None:
    measured = [Measured(tokens=100 * i, dense="sdpa", times_dense=1, faster=x) for i, x in enumerate(faster, 1)]
    assert faster_from(measured) == faster_from(measured[::-1]) == least
    assert row("triangle", *faster).faster_from_tokens == least


def test_a_row_is_of_exactly_one_device_head_shape_dtype_and_pattern(tmp_path, monkeypatch) -> None:
    own(tmp_path, monkeypatch, row(TOPK, False, True, True))
    assert find(HERE, key(TOPK)).tokens == 200  # type: ignore[union-attr]
    spelled = {**TOPK, "force_sink": True, "dense_below_tokens": 7}  # defaults and the field itself make no difference
    assert find(HERE, key(spelled)) is not None
    assert find(HERE, key({**TOPK, "top_k": 2})) is None
    for name, other in (("device", "NVIDIA H200"), ("heads", 8), ("key_heads", 4), ("dim", 32), ("dtype", "float16")):
        assert find(HERE._replace(**{name: other}), key(TOPK)) is None


def test_the_users_own_table_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = write(tmp_path / "shipped.jsonl", row(TOPK, True, True), row("triangle", True, True))
    monkeypatch.setattr("sparsekit.patterns.crossover.SHIPPED", shipped)
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    assert find(HERE, key(TOPK)).tokens == 100  # type: ignore[union-attr]
    (tmp_path / "cache").mkdir()
    assert own_table() == tmp_path / "cache" / "crossover.jsonl"
    write(own_table(), row(TOPK, False, True))
    found = find(HERE, key(TOPK))
    assert found is not None and found.tokens == 200 and str(own_table()) in found.said
    assert find(HERE, key("triangle")).tokens == 100  # type: ignore[union-attr]
    own(tmp_path, monkeypatch, row(TOPK, False, False, True))
    assert find(HERE, key(TOPK)).tokens == 300  # type: ignore[union-attr]
    write(tmp_path / "own.jsonl", row(TOPK, False, False, False, True))  # read again when it was written
    assert find(HERE, key(TOPK)).tokens == 400  # type: ignore[union-attr]
    monkeypatch.setenv(ENV, str(tmp_path / "onw.jsonl"))
    with pytest.raises(SparsekitError, match=r"crossover table '.*onw.jsonl': no such file\. Did you mean 'own.jsonl'"):
        find(HERE, key(TOPK))


def test_a_table_that_cannot_be_looked_for_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    folder = f"{tmp_path}{'/x' * 2048}"[:4090]  # which is a name, and with the table's too long a one
    monkeypatch.setenv("SPARSEKIT_CACHE", folder)
    with pytest.raises(SparsekitError, match=r"^crossover table '.*/crossover.jsonl' cannot be looked for: File name"):
        find(HERE, key(TOPK))


def test_what_comes_with_sparsekit_is_a_table() -> None:
    for one in read_table(SHIPPED):
        assert one.by["date"] and one.measured
        assert one.pattern is None or key(one.pattern) == one.pattern, f"{one.label} has other fields: measure it again"
        if one.config is not None:  # the label is its file
            config = sparsekit.load(Path(__file__).parents[2] / one.label)
            without = config.model_copy(update={"dense_below_tokens": 0}).resolve()
            assert fingerprint(without, config.model) == one.config, f"{one.label} has changed: measure it again"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"faster_from_tokens": 100}, r"line 1: faster_from_tokens = 100, but by `measured` it is 200"),
        ({"pattern": None}, r"one of `pattern` and `config` is needed"),
        ({"config": "0123456789abcdef"}, r"one of `pattern` and `config` is needed"),
        ({"head": 4}, r"line 1: unknown field 'head' = 4; allowed: .*Did you mean 'heads'"),
        ({"heads": 0}, r"heads = 0: it should be greater than or equal to 1"),
        ({"measured": []}, r"measured = \[\]"),
    ],
)
def test_a_table_is_read_strictly(change: dict[str, object], said: str, tmp_path, monkeypatch) -> None:
    path = own(tmp_path, monkeypatch, row(TOPK, False, True))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) + "\n")
    with pytest.raises(
        SparsekitError, match=f"crossover table '.*own.jsonl', {said if 'line' in said else 'line 1: ' + said}"
    ):
        find(HERE, key(TOPK))


def test_a_row_stands_once_and_a_line_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch, row(TOPK, True), row(TOPK, False))
    with pytest.raises(SparsekitError, match=r"line 2: it on .*4 heads over 2 of size 16, float32 is there already"):
        find(HERE, key(TOPK))
    own(tmp_path, monkeypatch).write_text("faster\n")
    with pytest.raises(SparsekitError, match=r"line 1: .*Invalid JSON"):
        find(HERE, key(TOPK))


def test_auto_of_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own(tmp_path, monkeypatch, row(TOPK, False, True))
    tokens, said = below(AUTO)
    assert tokens == 200 and said.startswith("block_topk: dense_below_tokens auto is 200 (measured on cpu")
    assert str(path) in said
    own(tmp_path, monkeypatch, row(TOPK, True, False))
    assert below(AUTO)[0] == NEVER and "up to 200 tokens none was faster" in below(AUTO)[1]
    monkeypatch.setattr(BlockTopK, "pays_from_tokens", {"cpu": 700, "cuda": 900})
    tokens, said = below({**AUTO, "top_k": 2})
    assert tokens == 700 and "auto is 700, the pattern's default (no table has it on cpu" in said
    assert "900, the pattern's default" in below(AUTO, HERE._replace(device="NVIDIA H200"))[1]
    assert below({**TOPK, "dense_below_tokens": 5}) == (5, "") and below(TOPK) == (700, "")


@pytest.mark.parametrize(("device", "tokens"), [("NVIDIA H200", 16384), ("cpu (x86_64)", 0), ("mps", 0), ("xpu", 0)])
def test_without_a_row_auto_is_the_patterns_default_for_that_device(device: str, tokens: int) -> None:
    auto = BlockTopK(dense_below_tokens="auto", top_k=77)
    assert auto.settled(HERE._replace(device=device)).dense_below_tokens == tokens
    assert BlockTopK(top_k=77).dense_below(torch.device(device_type(device))) == tokens


def test_auto_of_a_union_and_of_its_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    union = {"name": "union", "of": [AUTO, "triangle"]}
    own(tmp_path, monkeypatch, row(TOPK, False, True), row(union, False, False, True))
    assert below(union)[0] == 200
    assert below({**union, "dense_below_tokens": "auto"})[0] == 300  # its own row, whatever its members'
    assert parse_pattern(union).settled(HERE) == parse_pattern(
        {**union, "of": [{**TOPK, "dense_below_tokens": 200}, "triangle"]}
    )
    static = parse_pattern("triangle")
    assert static.settled(HERE) is static


def test_attention_settles_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch, row(TOPK, False, False, True))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 400, 16, generator=generator) for heads in (4, 2))
    for tokens, like in ((299, "dense"), (300, {**TOPK, "dense_below_tokens": 0})):
        given = q[:, :, :tokens], k[:, :, :tokens], k[:, :, :tokens]
        assert torch.equal(sparsekit.attention(*given, AUTO), sparsekit.attention(*given, like))
    with pytest.raises(SparsekitError, match=r"dense_below_tokens = 'auto' is no number yet"):
        parse_pattern(AUTO).dense_below(CPU)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("atuo", r"dense_below_tokens = 'atuo': it should be a whole number of tokens, at least 0, or 'auto'\. Did you "
                 r"mean 'auto'\?$"),
        (-1, r"dense_below_tokens = -1: it should be a whole number of tokens, at least 0, or 'auto'\.$"),
        (True, "dense_below_tokens = True: it should be"),
        (1.5, "dense_below_tokens = 1.5: it should be"),
        (2**31, "numbers go up to"),
    ],
)  # fmt: skip
def test_values_that_are_refused(value: object, said: str) -> None:
    with pytest.raises(SparsekitError, match=said):
        parse_pattern({**TOPK, "dense_below_tokens": value})
    with pytest.raises(SparsekitError, match=said):
        sparsekit.load({"dense_below_tokens": value})


def test_auto_is_written_back() -> None:
    assert parse_pattern(AUTO).to_yaml() == AUTO
    config = sparsekit.load({"dense_below_tokens": "auto", "default": AUTO})
    assert sparsekit.load(config.dump()) == config and config.dense_below_tokens == "auto"
