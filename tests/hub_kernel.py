"""Runs the packaged kernel, or sparsekit itself, and saves what came out. `test_kernel_hub.py` starts each in a process
of its own, in Triton's interpreter; the packaged one where sparsekit cannot be imported."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def from_file(folder: Path) -> ModuleType:
    """As the importer of `kernels` does it: under a name that is in no path."""
    file = folder / "build" / "torch-cpu" / "__init__.py"
    spec = importlib.util.spec_from_file_location("_kernel_of_the_test", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_kernels(folder: Path) -> ModuleType:
    import kernels

    module: ModuleType = kernels.get_local_kernel(folder, backend="cpu")
    return module


def run(attend: Callable[..., Any], plan: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Prefills of triangles: a whole prompt, a chunk of one, no dense rows; in torch, and in portable Triton."""
    made = {}
    for impl, tokens, batch, heads in (("torch", 700, 2, 4), ("triton", 200, 1, 2)):
        torch.manual_seed(0)
        q = torch.randn(batch, heads, tokens, 16)
        k, v = torch.randn(2, batch, heads // 2, tokens, 16)
        for name, rows, last in (("whole", tokens, 20), ("chunk", 70, 20), ("streaming", 70, 0)):
            part = q[:, :, tokens - rows :]
            fields = {"sink_tokens": 8, "window_tokens": 40, "last_tokens": last}
            out, lse = attend(part, k, v, plan(part, k, **fields), impl=impl, return_lse=True)
            made |= {f"{impl} {name}": out, f"{impl} {name} lse": lse}
    return made


def _refused(call: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "not refused"


def main(way: str, folder: Path, saved: Path) -> None:
    if way == "sparsekit":
        from sparsekit.kernels import attend, geometry_for
        from sparsekit.patterns import AShape, Triangle, static_plan

        def plan(q: torch.Tensor, k: torch.Tensor, last_tokens: int, **fields: int) -> Any:
            pattern = Triangle(**fields, last_tokens=last_tokens) if last_tokens else AShape(**fields)
            return static_plan(pattern, geometry_for(q, k), q.device)

        torch.save(run(attend, plan), saved)
        return
    sys.modules["sparsekit"] = None  # type: ignore[assignment]
    sparse: Any = {"file": from_file, "kernels": by_kernels}[way](folder)
    torch.save(run(sparse.attend, sparse.triangle_plan), saved)
    for module in pkgutil.walk_packages(sparse.__path__, f"{sparse.__name__}."):
        importlib.import_module(module.name)
    [_, example] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(example, {"sparse": sparse})
    q = torch.randn(1, 2, 64, 16)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: sparse.triangle_plan(q, q, window_tokens=0),
        lambda: sparse.triangle_plan(q, q, last_tokens=-1),
        lambda: sparse.attend(q, q, q, sparse.triangle_plan(q, q), impl="trition"),
    )
    refused = [_refused(call, sparse.SparsekitError) for call in calls]
    print(json.dumps({"heavy": sorted({"pydantic", "yaml", "transformers"} & set(sys.modules)), "refused": refused}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
