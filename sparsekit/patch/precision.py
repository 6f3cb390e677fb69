"""Layers that name an implementation by their `precision`: refused, by layer, where it cannot run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns, ModelFacts, ResolvedConfig
from sparsekit.errors import SparsekitError
from sparsekit.kernels import CannotRun, preferred_tile
from sparsekit.kernels.choose import choose_row
from sparsekit.patch.model import key_size
from sparsekit.patterns import shared_correction
from sparsekit.plan import BlockPlan, TokenRule, plan_from_rule


def refused(layer: LayerPatterns, why: str) -> SparsekitError:
    """The error of a layer whose implementation cannot run, for reasons in clauses."""
    return SparsekitError(
        f"precision: {layer.precision} in layer {layer.layer}, which runs {layer}: no {layer.impl} form can run it: "
        f"{why}; leave the layer out of `precision`, and it runs in the model's."
    )


def check_precision(resolved: ResolvedConfig, modules: Iterable[nn.Module], facts: ModelFacts) -> None:
    """Refuse what is known before a call: of the device, the head size, and the correction of rows.

    Raises:
        SparsekitError: the first such layer, and why.
    """
    for module in modules:
        layer: LayerPatterns = resolved.layers[module.layer_idx]  # type: ignore[index]
        device = next((weight.device for weight in module.parameters()), torch.device("meta"))
        if layer.impl is None or device.type == "meta":  # weights that come with the call
            continue
        size = key_size(module) or facts.head_dim
        try:
            tile = preferred_tile(device, layer.impl)
            if size is not None:
                choose_row(device, layer.impl, _call(layer, size, tile))
        except CannotRun as error:
            raise refused(layer, error.why) from None


def _call(
    layer: LayerPatterns, size: int, tile: tuple[int, int]
) -> tuple[Tensor, Keys, BlockPlan, Softmax, bool, None]:
    """A call of heads of that size whose rows are corrected as the layer's are, plain in all else."""
    q = torch.empty(1, 1, 2 * max(tile), size, dtype=torch.bfloat16, device="meta")
    plan = plan_from_rule(TokenRule(0, 1, q.shape[2]), Geometry.of(q.shape[2]).with_tile(*tile))
    return q, Keys(q, q), plan.corrected(shared_correction(layer.patterns)), Softmax(size**-0.5), False, None
