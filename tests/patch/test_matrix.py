"""docs/compatibility.md's table of families and calls: a cell that says `yes` is what this file runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from test_families import FAMILIES, SLIDING, _model
from tiny import TOKENS, TRIANGLE, ids, logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import sparsekit
from sparsekit.patch import Handle

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
PADDING = 63


def rows_of(section: str) -> list[list[str]]:
    """Cells of the first table of a section, its heading first."""
    lines = PAGE[PAGE.index(f"## {section}\n") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        if not line.startswith("|---"):
            rows.append([re.sub(r"\[\^\w+\]", "", cell).strip() for cell in line.strip("|").split("|")])
    return rows


HEAD, *ROWS = rows_of("Families, calls and engines")


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest logit."""
    return float((got - expected).abs().max()) / max(float(expected.abs().max()), 1.0)


def _padded_batch(model: PreTrainedModel, handle: Handle | None) -> float:
    """Two prompts, the second shorter and padded on the left: how far each is from what it is alone."""
    both, mask = torch.cat([ids(), ids(seed=1)]), torch.ones(2, TOKENS, dtype=torch.long)
    both[1, :PADDING], mask[1, :PADDING] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model, both, attention_mask=mask, position_ids=places)
    first = _difference(together[:1], logits(model, ids()))
    return max(first, _difference(together[1:, PADDING:], logits(model, ids(seed=1)[:, PADDING:])))


def _chunks(model: PreTrainedModel, handle: Handle | None) -> float:
    """A prompt in two pieces, its length given: how far it is from one piece."""
    kept = DynamicCache(config=model.config)
    with nullcontext() if handle is None else handle.prompt(tokens=TOKENS):
        pieces = [logits(model, part, past_key_values=kept) for part in (ids()[:, :120], ids()[:, 120:])]
    return _difference(torch.cat(pieces, 1), logits(model, ids()))


def _decoding(model: PreTrainedModel, handle: Handle | None) -> float:
    """Tokens after the prompt: nothing but the model's own attention over what the prefill left, bit for bit."""
    steps = ids(seed=2)[:, :3]

    def decoded(pause: Callable[[], AbstractContextManager[object]]) -> Tensor:
        kept = DynamicCache(config=model.config)
        logits(model, ids(), past_key_values=kept)
        with pause():
            return torch.cat([logits(model, steps[:, i : i + 1], past_key_values=kept) for i in range(3)])

    assert torch.equal(decoded(nullcontext), decoded(nullcontext if handle is None else handle.pause))
    return 0.0


def _generation(model: PreTrainedModel, handle: Handle | None) -> float:
    """`generate` says what forwards say: the prompt's, and then one of each token."""
    with torch.inference_mode():
        said = model.generate(ids(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)[:, TOKENS:]
    kept = DynamicCache(config=model.config)
    step, expected = ids(), []
    for _ in range(4):
        row = logits(model, step, past_key_values=kept)[:, -1].clone()
        row[:, model.generation_config.eos_token_id or []] = -torch.inf
        step = row.argmax(-1, keepdim=True)
        expected.append(step)
    assert said.tolist() == torch.cat(expected, 1).tolist()
    return 0.0


CALLS: dict[str, Callable[[PreTrainedModel, Handle | None], float]] = {
    "padded batch": _padded_batch,
    "chunks": _chunks,
    "decoding": _decoding,
    "`generate`": _generation,
}
CELLS = [(row[0], call) for row in ROWS for call in CALLS if row[HEAD.index(call)] == "yes"]


@pytest.mark.parametrize(("family", "call"), CELLS)
def test_a_cell_is_what_runs(family: str, call: str) -> None:
    """Within float32 rounding; where the stock model itself rounds more (linear layers), no more than it does."""
    model = _model(family)
    stock = CALLS[call](model, None)
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        ours = CALLS[call](model, handle)
        assert {layer.ran for layer in handle.report().layers} <= {"sparse", "own"}
    assert ours < max(1e-5, 3 * stock)


def test_the_table_has_every_family() -> None:
    assert [row[0] for row in ROWS] == list(FAMILIES)
    assert all(row[HEAD.index("prompt")] == "yes" for row in ROWS)  # test_families.py
    assert [row[0] for row in ROWS if row[HEAD.index("sliding layers by a rule")] == "yes"] == SLIDING


def test_families_in_vllm_are_those_of_its_tests() -> None:
    made = re.findall(r"^def save_tiny_(\w+)\(", (ROOT / "tests/serve/vllm/tiny_llama.py").read_text(), re.MULTILINE)
    kinds = {FAMILIES[row[0]][0] for row in ROWS if row[HEAD.index("vLLM")] == "tested"}
    assert kinds == set(made)


def test_footnotes_are_used_and_there() -> None:
    notes = set(re.findall(r"^\[\^(\w+)\]:", PAGE, re.MULTILINE))
    assert notes == set(re.findall(r"(?<=.)\[\^(\w+)\]", PAGE))
