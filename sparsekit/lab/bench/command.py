"""What the benches' command lines share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from sparsekit.errors import SparsekitError
from sparsekit.lab.bench.shapes import SHAPES

__all__ = ["add_model_arguments", "finished"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and where its rows go."""
    parser.add_argument("--model", help="as for `explain`, with weights; default: random weights")
    parser.add_argument("--shape", help=f"of random weights: {', '.join(SHAPES)}")
    parser.add_argument("--dtype", help="default bfloat16 on a CUDA device, else float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default cuda where there is one")
    parser.add_argument("--out", metavar="FILE", help="JSONL file for the rows")


def finished(bench: Callable[[], object]) -> int:
    """Exit code of a bench; an error of ours is one line on stderr."""
    try:
        bench()
    except SparsekitError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
