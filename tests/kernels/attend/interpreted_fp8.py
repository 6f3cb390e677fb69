"""The FP8 form's quantising kernel in Triton's interpreter; `test_hopper_fp8.py` runs this file in a process of its
own."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import in_pages
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.kernels.attend.hopper import fp8 as host

ORDER = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])  # of the keys of each 16 in V
WHOLE = Geometry.of(300, block_q=128, block_kv=128)
PADDED = Geometry.of(300, batch=3, kv_start=(0, 37, 290), block_q=128, block_kv=128)
RAGGED = Geometry.of(300, batch=2, kv_end=(300, 130), block_q=128, block_kv=128)
CASES = [(WHOLE, 0), (WHOLE, 48), (PADDED, 0), (RAGGED, 0), (RAGGED, 16), (Geometry.of(128, block_q=128), 0)]


def _exact(geometry: Geometry, gain: float, seed: int) -> Tensor:
    """(B, 2, K, 128) in (B, K, 2, 128) memory, where scales are powers of 2 and e4m3 holds every number: integers to 15
    and a 448 for each key, times `gain`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-15, 16, (geometry.batch, geometry.kv_len, 2, 128), generator=g).float()
    x[..., seed] = 448.0
    return (x * gain).half().transpose(1, 2)


def _valid(x: Tensor, geometry: Geometry, tokens: int) -> Tensor:
    """(B, 2, tokens, 128): each sample's valid rows, then zeros."""
    made = torch.zeros(geometry.batch, 2, tokens, 128)
    for b, (start, end) in enumerate(zip(geometry.kv_start, geometry.kv_end, strict=True)):
        made[b, :, : end - start] = x[b, :, start:end]
    return made


@pytest.mark.parametrize(("geometry", "page"), CASES, ids=str)
def test_quantised(geometry: Geometry, page: int) -> None:
    """Exactly the numbers, each where the products look for it, whatever lies behind a sample's last key."""
    k, v = _exact(geometry, 0.25, 1), _exact(geometry, 2.0, 2)
    keys = Keys(k, v)
    if page:
        keys = in_pages(k, v, geometry, page)
    else:
        for b, end in enumerate(geometry.kv_end):
            k[b, :, end:] = v[b, :, end:] = float("nan")
    k8, v8, scales = host._quantised(keys, geometry)
    tokens = k8.shape[2]
    longest = max(end - start for start, end in zip(geometry.kv_start, geometry.kv_end, strict=True))
    assert tokens == -(-longest // 128) * 128
    assert scales.shape == (geometry.batch, 2, tokens // 128, 2)
    factor = scales[..., 0].repeat_interleave(128, 2)[..., None]
    assert torch.equal(k8.float() * factor, _valid(k, geometry, tokens))
    back = torch.empty_like(v8, dtype=torch.float32)
    back[..., (torch.arange(tokens) // 16 * 16) + ORDER.repeat(tokens // 16)] = v8.float()
    factor = scales[..., 1].exp2().repeat_interleave(128, 2)[..., None]
    assert torch.equal(back.transpose(2, 3) * factor, _valid(v, geometry, tokens))
