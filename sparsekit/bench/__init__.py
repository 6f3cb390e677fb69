"""What runs here, timed, correctness first: `bench_kernel` the kernels on static plans, `bench_dynamic` the methods."""

from sparsekit.bench.dynamic import bench_dynamic
from sparsekit.bench.inputs import captured, structured
from sparsekit.bench.kernel import CASES, PEERS, bench_kernel
from sparsekit.bench.quality import output_error, recall

__all__ = [
    "CASES",
    "PEERS",
    "bench_dynamic",
    "bench_kernel",
    "captured",
    "output_error",
    "recall",
    "structured",
]
