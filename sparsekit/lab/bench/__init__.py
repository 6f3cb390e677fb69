"""What runs here, timed, correctness first.

`bench_kernel`: the kernels on static plans. `bench_dynamic`: the dynamic methods. `bench_overhead`: an applied config
where nothing runs sparse. `bench_prefill`: a whole model's time to the first token.
"""

from sparsekit.lab.bench.dynamic import bench_dynamic
from sparsekit.lab.bench.inputs import captured, structured
from sparsekit.lab.bench.kernel import CASES, PEERS, bench_kernel
from sparsekit.lab.bench.overhead import bench_overhead
from sparsekit.lab.bench.prefill import bench_prefill
from sparsekit.lab.bench.quality import output_error, recall

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
