"""Which kernels a load asks Triton to compile that the profiling run of the same layer did not; nothing is compiled.

`test_warm.py` runs it in a process of its own. It makes the process take the meta device for a GPU of the given compute
capability: tensors have shapes, strides and addresses there, and no memory. Triton itself says what it would compile.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from types import SimpleNamespace
from typing import Any

import torch
from test_compile import Driver
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import sparsekit.kernels
from sparsekit.call.caches import clear_caches
from sparsekit.call.keys import Keys, pages_of
from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns
from sparsekit.patterns import DynamicPattern, parse_pattern
from sparsekit.serve.prompts import Chunk, attend_part, part_of, read_e4m3
from sparsekit.serve.vllm import backend
from sparsekit.serve.vllm.layers import Bound
from sparsekit.serve.vllm.meter import METER, LayerCounts

GPU = torch.device("meta")
HEADS, KEY_HEADS, DIM, PAGE = 32, 8, 128, 16
LONGEST, BUDGET, CLIENTS = 40_448, 8192, 16
PATTERNS: dict[str, Any] = {
    "triangle": {"name": "triangle", "sink_tokens": 8, "window_tokens": 512, "last_tokens": 128},
    "block_topk": {"name": "block_topk", "top_k": 100, "block_tokens": 64},
    "vertical_slash": {"name": "vertical_slash", "vertical_tokens": 1000, "slash_tokens": 6096},
}
ASKED: list[str] = []


class Kernel:
    """What Triton would have compiled. It does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        """Asked for where Triton itself launches."""

    def run(self, *_: object) -> None:
        """Where Triton itself launches."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: None


def _note(self: Any, key: object, signature: object, device: int, constexprs: Any, *_: object) -> Kernel:
    """In place of `JITFunction._do_compile`."""
    values = {self.params[place[0]].name: value for place, value in constexprs.items()}
    ASKED.append(f"{self.__name__} {dict(sorted(values.items()))}")
    made = self.device_caches[device][0][key] = Kernel()
    return made


def forget() -> None:
    """As in a process that has just begun."""
    clear_caches()
    for name in ("launch._COMPILED", "attend.hopper.host._FORMS"):
        module, _, held = name.rpartition(".")
        getattr(import_module(f"sparsekit.kernels.{module}"), held).clear()
    for module in [x for name, x in sys.modules.items() if name.startswith("sparsekit.kernels")]:
        for kernel in [x for x in vars(module).values() if isinstance(x, JITFunction)]:
            kernel.device_caches.clear()


def pretend(capability: tuple[int, int], processors: int) -> None:
    """The meta device is such a GPU."""
    for found in walk_packages(sparsekit.kernels.__path__, "sparsekit.kernels."):
        import_module(found.name)
    told = {
        "capability_of": lambda _: capability,
        "processors_of": lambda _: processors,
        "_processors": lambda _: processors,
        "check_apart": lambda *_: None,  # all addresses are counted from 0
    }
    for name, module in list(sys.modules.items()):
        for what in told.keys() & vars(module).keys() if name.startswith("sparsekit") else ():
            setattr(module, what, told[what])
    choose: Any = import_module("sparsekit.kernels.choose")
    runs = [row for row in choose.TABLE if row.name != "hopper" or capability == (9, 0)]
    choose.TABLE = tuple(row._replace(missing=lambda *_: "") for row in runs)
    Driver.capability = capability[0] * 10 + capability[1]
    driver.set_active(Driver())
    torch.Tensor.is_cuda = property(lambda self: self.device == GPU)  # type: ignore[assignment]
    torch.cuda.current_device = lambda: None  # type: ignore[assignment, return-value]
    torch.cuda.Event = lambda: SimpleNamespace(record=lambda: None)  # type: ignore[assignment, misc]
    DynamicPattern.dense_below = lambda self, _: dense_below(self, torch.device("cuda"))  # type: ignore[method-assign]
    JITFunction._do_compile = _note


dense_below = DynamicPattern.dense_below


def load(count: int, fewest: int) -> Iterator[tuple[Chunk, int]]:
    """Chunks of prompts beside decodes, and where in their step they begin: first, middle and last ones, most of them
    of what decodes leave of the budget, and many of any length."""
    draw = random.Random(1)
    for _ in range(count):
        prompt = min(int(512 * 100 ** max(draw.random(), draw.random())), LONGEST)
        long = draw.random() < 0.3
        rows = BUDGET - draw.randrange(CLIENTS) if long else int(fewest * (BUDGET // fewest) ** draw.random())
        rows = min(rows, prompt)
        end = draw.choice((prompt, rows, draw.randrange(rows, prompt + 1), max(prompt // 1024 * 1024, rows)))
        yield Chunk(end - rows, end, prompt), draw.randrange(CLIENTS)


def missed(names: list[str], chunks: int) -> dict[str, Any]:
    """Of a layer whose heads run these patterns in turns; over a cache of e4m3 numbers where `e4m3` is the first."""
    forget()
    e4m3 = names[0] == "e4m3"
    names = names[e4m3:]
    patterns = tuple(parse_pattern(PATTERNS.get(name, name)) for name in names)
    layer = LayerPatterns(0, patterns, tuple(i % len(patterns) for i in range(HEADS)))
    here = frozenset(["a"]) if "dense" in names else frozenset[str]()
    softmax = Softmax(DIM**-0.5)

    def queries(tokens: int) -> Tensor:
        return torch.empty(tokens, HEADS, DIM, dtype=torch.bfloat16, device=GPU)

    before = len(ASKED)
    bound = Bound(0, {"a": layer}, 0, here, longest=LONGEST, page=PAGE)
    backend.take_scratch(bound, queries(BUDGET), KEY_HEADS, softmax, e4m3=e4m3)
    warm = len(ASKED)
    looked_up = len(import_module("sparsekit.kernels.launch")._COMPILED)
    stored = torch.uint8 if e4m3 else torch.bfloat16
    cache = torch.empty(4000, PAGE, KEY_HEADS, 2 * DIM, dtype=stored, device=GPU).transpose(1, 2)
    table = torch.zeros(CLIENTS, LONGEST // PAGE, dtype=torch.int32, device=GPU)
    ran = 0
    fewest = 64 if any(isinstance(x, DynamicPattern) for x in patterns) else 1
    for chunk, begin in load(chunks, fewest):
        part = part_of(layer, chunk, GPU, page=PAGE, dense_here=bool(here))
        if part is not None:
            ran += 1
            step = queries(BUDGET + CLIENTS)
            at = slice(begin, begin + part.geometry.q_len)
            keys = Keys(*cache.chunk(2, -1), pages_of(table[begin][None], PAGE, part.reads))
            if e4m3:
                keys = read_e4m3(keys, part.geometry, (0.5, 2.0), torch.bfloat16)
            plan = attend_part(part, layer, step[at], keys, softmax, torch.empty_like(step)[at])
            METER.keep(LayerCounts(), plan, part.pairs, HEADS)
    return {
        "warm": warm - before, "ran": ran, "late": ASKED[warm:],
        "looked up late": len(import_module("sparsekit.kernels.launch")._COMPILED) - looked_up,
    }  # fmt: skip


def main() -> None:
    capability, processors, layers, chunks = json.loads(sys.argv[1])
    pretend(tuple(capability), processors)
    print(json.dumps([missed(names, chunks) for names in layers]))


if __name__ == "__main__":
    main()
