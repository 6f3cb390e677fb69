"""`python -m sparsekit.lab.bench kernel | dynamic | overhead | prefill`: the benches alone."""

import sys

from sparsekit.lab.bench import (
    dynamic_command,
    kernel,
    overhead,
    prefill,
)

BENCHES = {"kernel": kernel.main, "dynamic": dynamic_command.main, "overhead": overhead.main, "prefill": prefill.main}

if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHES:
        sys.exit(
            f"usage: python -m sparsekit.lab.bench {{{','.join(BENCHES)}}} [options]; --help after the name lists them"
        )
    sys.exit(BENCHES[name](sys.argv[2:]))
