"""What comes out of a model's layers as it runs: of each attention head, what it adds; of each layer, its outliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.patch.model import attention_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Outputs", "massive_channels", "sink_logits_are", "watch_outputs"]

ROWS = 1024  # queries over which the norm of a head's output is taken, evenly spaced
CHANNELS = 4  # of a layer's hidden state, the largest ones


@dataclass
class Outputs:
    """What one forward showed, by layer.

    Attributes:
        heads: root mean square norm of what each head adds to the hidden state, through its part of the output
            projection and without its bias, as a share of what all heads add together, (H,). Layers whose output
            projection was not seen are missing.
        gates: the share of attention's output, by absolute value, that an output gate lets through.
        between: what else stands between attention and its output projection.
        hidden: `massive_channels` of what comes out of each layer.
    """

    heads: dict[int, list[float]] = field(default_factory=dict)
    gates: dict[int, float] = field(default_factory=dict)
    between: dict[int, str] = field(default_factory=dict)
    hidden: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


class _Watched:
    """One attention module while it runs: what its function returned, and what its children were given after that."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.projection: nn.Module | None = None
        self.given: Tensor | None = None
        self.between = ""
        self._passed = ""

    def child(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.out is None or not args or not isinstance(args[0], Tensor) or args[0].numel() != self.out.numel():
            return
        if any(weight.ndim > 1 for weight in (*module.parameters(), *module.buffers())):
            # The last such child: a gate's own comes before it.
            self.projection, self.given, self.between = module, args[0].detach(), self._passed
        elif any(True for _ in module.parameters()):
            self._passed = type(module).__name__


@contextmanager
def watch_outputs(model: PreTrainedModel, from_row: int) -> Iterator[tuple[Outputs, Callable[[Any, Tensor], None]]]:
    """Within this block a forward of one prompt fills the outputs.

    The second value is to be called by an attention function, with its module and its result (1, N, H, D). Heads are
    measured over the rows from `from_row` on, or all of a prompt that has no more.

    Raises:
        SparsekitError: a model whose layers stand in no list; in the forward, a layer whose output is not finite.
    """
    found = Outputs()
    modules = attention_modules(model, model.config.get_text_config(decoder=True))
    watched: dict[Any, _Watched] = {module.layer_idx: _Watched() for module in modules}

    def attended(module: Any, out: Tensor) -> None:
        if module.layer_idx in watched:
            watched[module.layer_idx].out = out.detach()

    def done(module: Any, args: Any, result: Any) -> None:
        seen = watched[module.layer_idx]
        watched[module.layer_idx] = _Watched()
        if seen.out is not None and seen.projection is not None and seen.given is not None:
            with torch.no_grad():
                _note(found, module.layer_idx, seen, from_row)

    def layer_done(i: int) -> Callable[..., None]:
        def note(module: Any, args: Any, result: Any) -> None:
            hidden = (result[0] if isinstance(result, tuple) else result).detach()
            if not bool(hidden.isfinite().all()):
                dtype = str(hidden.dtype).removeprefix("torch.")
                raise SparsekitError(
                    f"what comes out of layer {i} is not finite in {dtype}, so nothing can be said of sinks."
                )
            found.hidden[i] = massive_channels(hidden)

        return note

    hooks = [layer.register_forward_hook(layer_done(i)) for i, layer in _layers(model, modules).items()]
    for module in modules:
        hooks.append(module.register_forward_hook(done))
        hooks += [child.register_forward_pre_hook(_to(watched, module)) for child in module.children()]
    try:
        yield found, attended
    finally:
        for hook in hooks:
            hook.remove()


def _to(watched: dict[Any, _Watched], module: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda child, args: watched[module.layer_idx].child(child, args)


def _layers(model: PreTrainedModel, modules: Sequence[Any]) -> dict[int, nn.Module]:
    """The decoder's layers by number: members of the list that holds all attention modules.

    A member that holds the attention of several numbers stands for each of them.
    """
    numbers = {id(module): module.layer_idx for module in modules}
    for found in model.modules():
        if isinstance(found, nn.ModuleList):
            holds = {numbers[id(m)]: member for member in found for m in member.modules() if id(m) in numbers}
            if len(holds) == len(numbers):
                return {**dict(enumerate(found)), **holds}
    raise SparsekitError(f"{type(model).__name__}: no list holds its attention layers, so their outputs are not found.")


def _note(into: Outputs, layer: int, seen: _Watched, from_row: int) -> None:
    """Of a layer: its heads' parts of the output, and what stands between attention and the output projection."""
    assert seen.out is not None and seen.given is not None and seen.projection is not None
    out, project = seen.out[0], seen.projection
    n, heads, dim = out.shape
    first = from_row if n > from_row else 0
    rows = torch.linspace(first, n - 1, min(n - first, ROWS), device=out.device).long()
    given, out = seen.given.reshape(n, heads, dim)[rows], out[rows]
    if seen.between:
        into.between[layer] = seen.between
    elif not torch.equal(given, out):
        room = 2 * torch.finfo(out.dtype).eps
        gate = (given.float() * out.float() >= 0) & (given.float().abs() <= out.float().abs() * (1 + room))
        if bool(gate.all()):
            into.gates[layer] = float(given.float().abs().sum() / out.float().abs().sum())
        else:
            into.between[layer] = "something that is no factor from 0 to 1"
    zero = torch.zeros_like(given)
    bias = project(zero[None].flatten(2))[0].float()
    norm = lambda x: float((project(x[None].flatten(2))[0].float() - bias).square().sum().sqrt())  # noqa: E731
    whole = norm(given)
    parts = []
    for head in range(heads):
        alone = zero.clone()
        alone[:, head] = given[:, head]
        parts.append(norm(alone) / whole if whole else 0.0)
    into.heads[layer] = parts


def massive_channels(hidden: Tensor) -> list[dict[str, Any]]:
    """The channels of a hidden state (..., N, F) with the largest magnitudes: where, how large, and over the median."""
    hidden = hidden.flatten(0, -3) if hidden.ndim > 3 else hidden.reshape(-1, *hidden.shape[-2:])
    tokens = hidden.shape[1]
    x = hidden.float().flatten(0, 1)
    size = x.abs()
    middle = float(size.median())
    most, at = size.max(0)
    best = most.topk(min(CHANNELS, len(most)))
    found = []
    for feature, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        row = int(at[feature])
        ratio = value / middle if middle else math.inf
        found.append({"channel": feature, "position": row % tokens, "value": float(x[row, feature]), "ratio": ratio})
    return found


def sink_logits_are(softmax: Softmax) -> str:
    """What a softmax has besides its keys: `sink logits`, `softmax off by one`, or nothing.

    A sink logit of 0 adds 1 to the denominator, which is the softmax off by one; of -inf nothing.
    """
    if softmax.sink_logits is None:
        return ""
    logits = softmax.sink_logits[softmax.sink_logits > -math.inf]
    if not len(logits):
        return ""
    return "softmax off by one" if bool((logits == 0).all()) else "sink logits"
