"""What each layer did in the last prefill, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sparsekit.patch.state import Layer
from sparsekit.plan import PlanTotals


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in the last prefill.

    Attributes:
        ran: sparse, dense, own (kept its own attention), or "not run".
        why: of all but sparse; and of a sparse layer whose pattern kept every pair, so that it did what dense does.
        density, tile_density: shares of the causal pairs and tiles; None where a layer kept its own attention.
        plan_bytes: of the plan's tensors.
        ms, plan_ms: plan and kernel together; the plan alone (a static pattern's is made once, and found again).
        impl_why: why `impl`.
        plan_of: the layer that made the plan, where this one reused it.
    """

    layer: int
    ran: str
    why: str
    pattern: str
    impl: str = "model"
    density: float | None = 1.0
    tile_density: float | None = 1.0
    plan_bytes: int = 0
    ms: float | None = None
    plan_ms: float | None = None
    impl_why: str = ""
    plan_of: int | None = None

    @property
    def sparse(self) -> bool:
        """Whether it left pairs out."""
        return self.ran == "sparse" and not self.why


@dataclass(frozen=True)
class Report:
    """One `LayerReport` a layer; printing it gives a table.

    Attributes:
        warning: why sparsekit does not run, or empty.
        check: what `apply(check=)` found, in lines; empty without.
        settled: of each `dense_below_tokens: auto`, what it is here and where that comes from.
    """

    layers: tuple[LayerReport, ...]
    warning: str = ""
    check: tuple[str, ...] = ()
    settled: tuple[str, ...] = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]

    def __str__(self) -> str:
        lines = [self.warning] if self.warning else []
        lines.append(
            f"{'layer':>5}  {'ran':8}{'density':>8}{'tiles':>8}{'plan':>10}{'ms':>9}{'of plan':>9}  {'by':12}pattern"
        )
        for row in self.layers:
            ms, plan_ms = ("" if value is None else f"{value:.2f}" for value in (row.ms, row.plan_ms))
            pairs, tiles = ("" if value is None else f"{value:.3f}" for value in (row.density, row.tile_density))
            what = row.pattern + (f" ({row.why})" if row.why else "")
            lines.append(
                f"{row.layer:>5}  {row.ran:8}{pairs:>8}{tiles:>8}{row.plan_bytes:>8} B{ms:>9}"
                f"{plan_ms:>9}  {row.impl:12}{what}"
            )
        reasons = dict.fromkeys((row.impl, row.impl_why) for row in self.layers if row.impl_why)
        lines += [f"{impl}: {why}" for impl, why in reasons]
        return "\n".join([*lines, *self.settled, *self.check])


def report_layer(layer: Layer) -> LayerReport:
    index, pattern, reused = layer.patterns.layer, str(layer.patterns), layer.patterns.reused
    plan_of = None if reused is None else reused.layer
    if layer.plan is None or layer.choice is None:
        share = None if layer.ran == "own" else 1.0
        return LayerReport(index, layer.ran, layer.why, pattern, density=share, tile_density=share, plan_of=plan_of)
    begun, planned, done = layer.times
    if isinstance(done, float):
        plan_ms, ms = (planned - begun) * 1e3, (done - begun) * 1e3
    else:
        done.synchronize()
        plan_ms, ms = begun.elapsed_time(planned), begun.elapsed_time(done)
    totals = layer.plan if isinstance(layer.plan, PlanTotals) else layer.plan.totals()
    kept_all = layer.ran == "sparse" and totals.keeps_all()
    return LayerReport(
        index,
        layer.ran,
        f"the {'pattern' if reused is None else 'plan'} kept every pair" if kept_all else layer.why,
        pattern,
        layer.choice.impl,
        totals.density(),
        totals.tile_density(),
        totals.nbytes,
        ms,
        plan_ms,
        layer.choice.why,
        plan_of,
    )
