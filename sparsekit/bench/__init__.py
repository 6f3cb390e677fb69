"""What runs here, timed, correctness first.

`bench_kernel`: the kernels on static plans. `bench_dynamic`: the dynamic methods. `bench_overhead`: an applied config
where nothing runs sparse. `bench_prefill`: a whole model's time to the first token.
"""

from sparsekit.bench.dynamic import bench_dynamic
from sparsekit.bench.inputs import captured, structured
from sparsekit.bench.kernel import CASES, PEERS, bench_kernel
from sparsekit.bench.overhead import bench_overhead
from sparsekit.bench.prefill import bench_prefill
from sparsekit.bench.quality import output_error, recall

__all__ = [
    "CASES",
    "PEERS",
    "bench_dynamic",
    "bench_kernel",
    "bench_overhead",
    "bench_prefill",
    "captured",
    "output_error",
    "recall",
    "structured",
]
