"""What `sparsekit bench crossover` times: a layer's attention as a patched model runs it, and dense attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns, ModelFacts, ResolvedConfig
from sparsekit.kernels import choose_call, geometry_for, prepare
from sparsekit.lab.bench.inputs import Inputs
from sparsekit.patterns import Pattern, parse_pattern
from sparsekit.patterns.shared import SharedPlans
from sparsekit.plan import dense_plan

__all__ = ["Kind", "Layers", "attends", "dense_calls", "layers_of"]


@dataclass(frozen=True)
class Kind:
    """Layers that take the same time: `layer`, and the one whose plan it runs, both numbered 0."""

    layer: LayerPatterns
    anchor: LayerPatterns | None = None

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return self.layer.patterns if self.anchor is None else (*self.anchor.patterns, *self.layer.patterns)


@dataclass(frozen=True)
class Layers:
    """The layers of a config that attend to all keys in the model.

    Attributes:
        sparse: how many there are of each kind; dense ones in another precision than the model's are some of them.
        own: dense ones, by the model's own attention.
        kernel: dense ones, by sparsekit's kernel in the model's precision.
    """

    sparse: Counter[Kind]
    own: int = 0
    kernel: int = 0

    @property
    def count(self) -> int:
        return sum(self.sparse.values()) + self.own + self.kernel


def layers_of(resolved: ResolvedConfig, facts: ModelFacts) -> Layers:
    """Those of a config; layers with a window, or of another kind, are left out."""
    out = resolved.own_layers(facts).keys() | resolved.window_layers(facts)
    there = [layer for layer in resolved.layers if layer.layer not in out]
    sparse = Counter(_kind(layer, resolved) for layer in there if not layer.exact)
    dense = sum(layer.exact for layer in there)
    in_kernel = resolved.config.dense_impl == "kernel"
    return Layers(sparse, own=0 if in_kernel else dense, kernel=dense if in_kernel else 0)


def _kind(layer: LayerPatterns, resolved: ResolvedConfig) -> Kind:
    plain = replace(layer, layer=0, shared=False)
    if layer.reused is None:
        return Kind(plain)
    anchor = replace(resolved.layers[layer.reused.layer], layer=0, shared=True)
    return Kind(replace(plain, reused=replace(layer.reused, layer=0, last=False)), anchor)


def attends(kind: Kind, x: Inputs) -> Callable[[], Tensor]:
    """A call that plans and attends like such a layer of a patched model; a reused plan is there before."""
    impl, softmax, plans = kind.layer.impl, Softmax(x.q.shape[-1] ** -0.5), SharedPlans()
    geometry, keys = geometry_for(x.q, x.k, impl), Keys(x.k, x.v)
    if kind.anchor is not None:
        kind.anchor.plan(x.q, x.k, geometry, softmax, plans, impl=impl)

    def call() -> Tensor:
        plan = kind.layer.plan(x.q, x.k, geometry, softmax, plans, impl=impl)
        run, _ = prepare(x.q, keys, plan, softmax, impl=impl)
        return run(x.q, keys, plan, softmax, False, None)[0].transpose(1, 2).contiguous()

    return call


def dense_calls(x: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Dense causal attention: PyTorch's as it chooses (what a model's `sdpa` runs), cuDNN's where there is one, ours.

    The last one is ours.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def plain() -> Tensor:
        out: Tensor = scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return plain()

    calls: dict[str, Callable[[], Tensor]] = {"sdpa": plain}
    if x.q.device.type == "cuda":
        with suppress(RuntimeError):
            cudnn()
            calls["sdpa-cudnn"] = cudnn
    dense = parse_pattern("dense")
    ours = Kind(LayerPatterns(0, (dense,), (0,) * x.q.shape[1]))
    plan: Any = dense_plan(geometry_for(x.q, x.k))
    calls[choose_call(x.q, x.k, x.v, plan, Softmax(x.q.shape[-1] ** -0.5)).impl] = attends(ours, x)
    return calls
