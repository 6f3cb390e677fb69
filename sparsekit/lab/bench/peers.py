"""Other people's code, timed beside ours. It stays in a folder of its own, outside this repository.

The folder holds `peers.py` with `PEERS`, a mapping from a name to a function of (q, k, v) that prepares one run. q is
(1, H, N, D), k and v are (1, G, N, D), all on the device; the function may copy them into the layout its code wants,
outside the clock. It returns a mapping:

    total         callable without arguments: select and attend; gives out (1, H, N, D). None: only `index` runs here.
    index         callable: the selection alone. None or left out: not timed apart.
    method        the pattern that it is a peer of.
    parameters    mapping of what it was set to, in the pattern's names: rows with the same are compared.
    source        repository and commit.
    tile_density  callable: share of the causal tiles that it visits. Optional.
    note          one line, optional: what was changed to make it run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekit.errors import SparsekitError, nearest

__all__ = ["PeerRun", "load_peers", "prepare"]

Prepare = Callable[[Tensor, Tensor, Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class PeerRun:
    """One peer on one input, ready to run; fields as the module says."""

    total: Callable[[], Tensor] | None = None
    index: Callable[[], Any] | None = None
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    tile_density: Callable[[], float] | None = None
    note: str = ""


def load_peers(folder: Path | str) -> dict[str, Prepare]:
    """`PEERS` of the folder's peers.py.

    Raises:
        SparsekitError: there is no such file, it cannot be imported, or it has no `PEERS`.
    """
    file = Path(folder) / "peers.py"
    if not file.is_file():
        raise SparsekitError(f"peers={str(folder)!r}: a folder with a peers.py is wanted; {file} is not there.")
    spec = importlib.util.spec_from_file_location("sparsekit_peers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))  # for as long as the process: its functions may import when called
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SparsekitError(f"peers={str(folder)!r}: {type(error).__name__} in peers.py: {_line(error)}") from error
    peers = getattr(module, "PEERS", None)
    if not isinstance(peers, Mapping) or not peers or not all(callable(peer) for peer in peers.values()):
        raise SparsekitError(f"peers={str(folder)!r}: peers.py wants PEERS, a mapping from names to functions.")
    return dict(peers)


def prepare(peer: Prepare, q: Tensor, k: Tensor, v: Tensor) -> PeerRun:
    """Call a peer's function and check what it returns."""
    given = peer(q, k, v)
    for name in given:
        if name not in PeerRun.__dataclass_fields__:
            known = tuple(PeerRun.__dataclass_fields__)
            raise SparsekitError(f"a peer returned {name!r}: out of {', '.join(known)}.{nearest(name, known)}")
    run = PeerRun(**given)
    if run.total is None and run.index is None:
        raise SparsekitError("a peer returned neither `total` nor `index`: nothing to time.")
    return run


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
