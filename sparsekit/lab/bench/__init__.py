"""What runs here, timed, correctness first.

`bench_kernel`: the kernels on static plans. `bench_dynamic`: the dynamic methods. `bench_overhead`: an applied config
where nothing runs sparse. `bench_prefill`: a whole model's time to the first token.
"""

from collections.abc import Callable

from sparsekit.lab.bench import dynamic_command, kernel, overhead, prefill
from sparsekit.lab.bench.dynamic import bench_dynamic
from sparsekit.lab.bench.inputs import captured, structured
from sparsekit.lab.bench.kernel import CASES, PEERS, bench_kernel
from sparsekit.lab.bench.overhead import bench_overhead
from sparsekit.lab.bench.prefill import bench_prefill
from sparsekit.lab.bench.quality import output_error, recall

# What `sparsekit bench` has: a bench is a file with a command, and a line here.
BENCHES: dict[str, Callable[..., None]] = {
    "kernel": kernel.command,
    "dynamic": dynamic_command.command,
    "overhead": overhead.command,
    "prefill": prefill.command,
}

__all__ = [
    "BENCHES",
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
