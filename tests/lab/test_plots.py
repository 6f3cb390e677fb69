"""Pictures show what the plan says: the right sections in the right places."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.lab.plots import COLOURS, SECTIONS, draw_masks, mask_figure, section_image
from sparsekit.patterns import AShape, Dense, Pattern, StaticPattern, Triangle, Union, parse_pattern

LLAMA = Path(__file__).parents[2] / "configs/llama-3.1-8b/trianglemix.yaml"
PATTERNS = [
    Dense(),
    AShape(sink_tokens=5, window_tokens=70),
    Triangle(sink_tokens=8, window_tokens=40, last_tokens=20),
    Triangle(sink_tokens=0, window_tokens=40, last_tokens=500),
    Union(of=(AShape(sink_tokens=30, window_tokens=20), Triangle(window_tokens=64, last_tokens=9))),
]


def section(image: Tensor, name: str) -> Tensor:
    return image == SECTIONS.index(name)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [16, 129, 300])
def test_every_pair_is_a_cell(pattern: StaticPattern, tokens: int) -> None:
    image, cell = section_image(pattern, tokens)
    assert (cell, image.shape) == (1, (tokens, tokens))
    q, k = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    kept = pattern.keep(q, k, Geometry.of(tokens).spans[0])
    assert torch.equal(section(image, "future"), k > q)
    assert torch.equal(section(image, "skipped"), (k <= q) & ~kept)


def test_sections_of_triangle() -> None:
    image, _ = section_image(Triangle(sink_tokens=8, window_tokens=40, last_tokens=20), 300)
    q, k = torch.arange(300)[:, None], torch.arange(300)[None]
    assert torch.equal(section(image, "sink"), (k <= q) & (k < 8))
    assert torch.equal(section(image, "window"), (k <= q) & (k >= 8) & (q - k < 40))
    assert torch.equal(section(image, "last"), (k >= 8) & (q - k >= 40) & (q >= 280))
    assert not section(image, "kept").any()


def test_a_long_prompt_is_drawn_in_tiles() -> None:
    image, cell = section_image(Triangle(sink_tokens=8, window_tokens=512, last_tokens=128), 131072)
    assert (cell, image.shape) == (128, (1024, 1024))
    assert section(image, "sink")[:, 0].all()
    assert section(image, "window").diagonal()[1:].all()
    assert section(image, "last")[-1, 1:-5].all()
    assert section(image, "skipped")[500, 1:495].all()
    assert torch.equal(section(image, "future"), torch.ones(1024, 1024).triu(1).bool())


def test_the_picture_of_trianglemix(tmp_path: Path) -> None:
    """Two panels side by side; in the right one blue follows the diagonal, red the left edge, amber the last rows."""
    from matplotlib.colors import to_rgb

    figure = mask_figure(LLAMA, 2048)
    dense, triangle = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["Layers 0-15: dense", "Layers 16-31: triangle"]
    assert "100% of the causal pairs" in dense.get_xlabel()
    assert "53.26% of the causal pairs at 2,048 tokens" in triangle.get_xlabel()
    words = {text.get_text() for text in triangle.texts}
    assert words == {"skipped", "8 sink keys", "window of 512 keys", "last 128 rows"}

    path = draw_masks(LLAMA, 2048, tmp_path / "mask.png")
    from matplotlib.image import imread

    picture = imread(path)[..., :3]
    figure.set_dpi(160)
    figure.draw_without_rendering()  # lays the panels out
    box = triangle.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    height = picture.shape[0]

    def dot(q: float, k: float) -> tuple[float, ...]:
        """Colour of a query and key given as shares of the panel."""
        x = (box.x0 + k * box.width) * 160
        y = height - (box.y1 - q * box.height) * 160
        return tuple(picture[round(y), round(x)])

    for q, k, name in (
        (0.90, 0.86, "window"),
        (0.30, 0.27, "window"),
        (0.98, 0.60, "last"),
        (0.90, 0.50, "skipped"),
        (0.20, 0.80, "future"),
        (0.80, 0.00, "sink"),
    ):
        assert dot(q, k) == pytest.approx(to_rgb(COLOURS[name]), abs=0.02), (q, k, name)


def test_a_second_length_is_written_below() -> None:
    figure = mask_figure(LLAMA, 512, also=131072)
    assert figure.axes[1].get_xlabel() == "keys\n0.99% of the causal pairs at 131,072 tokens"


def test_panels_are_the_different_patterns() -> None:
    config = {
        "model": {"num_layers": 4, "num_heads": 4},
        "layers": {"1": "triangle"},
        "heads": {"3": {"1-2": "a_shape"}},
    }
    titles = [axes.get_title() for axes in mask_figure(config, 300, title="All").axes]
    assert titles == [
        "Layers 0,2; layer 3, heads 0,3: dense",
        "Layer 1: triangle",
        "Layer 3, heads 1-2: a_shape",
    ]


def test_a_config_that_names_no_model_can_be_drawn() -> None:
    figure = mask_figure({"layers": {"21-29": "triangle"}, "heads": {"3": {"0-1": "a_shape"}}}, 300)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Other layers: dense", "Layers 21-29: triangle", "Layer 3, heads 0-1: a_shape"]
    assert mask_figure({"default": "a_shape"}, 300).axes[0].get_title() == "Every layer: a_shape"
    chain = {"layers": {"2": "block_topk", "3": {"reuse": 2}, "4": {"reuse": 3}}}
    with pytest.raises(SparsekitError, match="layers: reuse = 3: that layer runs the plan of layer 2 itself"):
        mask_figure(chain, 300)


@pytest.mark.parametrize("pattern", [*PATTERNS, "dense", {"name": "a_shape", "sink_tokens": 0}], ids=str)
@pytest.mark.parametrize("tokens", [16, 700])
def test_every_pattern_can_be_drawn(pattern: Pattern | str | dict[str, object], tokens: int, tmp_path: Path) -> None:
    path = draw_masks({"default": parse_pattern(pattern)}, tokens, tmp_path / "one.png", dpi=50)
    from matplotlib.image import imread

    assert imread(path)[..., :3].std() > 0.05  # not blank


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_other_formats(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = draw_masks({"default": "triangle"}, 300, tmp_path / f"mask{suffix}")
    assert path.read_bytes().startswith(start)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsekitError, match=r"output '.*mask.bmp': the name must end in .png, .svg, .pdf"):
        draw_masks(LLAMA, 300, tmp_path / "mask.bmp")
    with pytest.raises(SparsekitError, match="tokens = 3: a picture shows prompts of 16 to 1048576 tokens"):
        draw_masks(LLAMA, 3, tmp_path / "mask.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsekitError, match="cannot be written"):
        draw_masks(LLAMA, 300, tmp_path / "file" / "mask.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SparsekitError, match=r"pictures need matplotlib: pip install 'sparsekit-attention\[plots\]'"):
        draw_masks(LLAMA, 300, tmp_path / "mask.png")


def test_the_readmes_picture_is_there_and_small() -> None:
    picture = Path(__file__).parents[2] / "docs/images/trianglemix-mask.png"
    assert 10_000 < picture.stat().st_size < 150_000
