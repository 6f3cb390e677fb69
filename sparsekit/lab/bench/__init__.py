"""What runs here, timed, correctness first.

`bench_kernel`: the kernels on static plans. `bench_dynamic`: the dynamic methods. `bench_crossover`: from
which length either pays. `bench_overhead`: an applied config
where nothing runs sparse. `bench_prefill`: a whole model's time to the first token. `bench_serve`: two vLLM
servers, stock and with sparsekit.
"""

from collections.abc import Callable

from sparsekit.lab.bench import crossover, dynamic_command, kernel, overhead, prefill, serve
from sparsekit.lab.bench.crossover import bench_crossover
from sparsekit.lab.bench.dynamic import bench_dynamic
from sparsekit.lab.bench.inputs import captured, structured
from sparsekit.lab.bench.kernel import CASES, PEERS, bench_kernel
from sparsekit.lab.bench.overhead import bench_overhead
from sparsekit.lab.bench.prefill import bench_prefill
from sparsekit.lab.bench.quality import output_error, recall
from sparsekit.lab.bench.serve import bench_serve

# What `sparsekit bench` has: a bench is a file with a command, and a line here.
BENCHES: dict[str, Callable[..., None]] = {
    "kernel": kernel.command,
    "dynamic": dynamic_command.command,
    "crossover": crossover.command,
    "overhead": overhead.command,
    "prefill": prefill.command,
    "serve": serve.command,
}

__all__ = [
    "BENCHES",
    "CASES",
    "PEERS",
    "bench_crossover",
    "bench_dynamic",
    "bench_kernel",
    "bench_overhead",
    "bench_prefill",
    "bench_serve",
    "captured",
    "output_error",
    "recall",
    "structured",
]
