"""What dynamic patterns are measured on: queries, keys and values with the structure of real heads, or real ones.

On plain random tensors attention is flat, and every estimator rightly keeps everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError, writing

__all__ = ["Inputs", "captured", "load_inputs", "save_inputs", "structured"]

HEAVY_COLUMNS = 256  # heavy key columns of each key head
ROTARY_BASE = 10_000.0
# Amplitudes at a head size of 128, so that heads differ from nearly local to nearly all columns: scaled by head size,
# q.k is about 9.5 at the sink, 7.4 at a heavy column, and 4 to 13 at distance 0.
NOISE, PLACE, TOPIC, SINK, COLUMN = 0.5, 1.6, 6.0, 18.0, 14.0
STRENGTH = (0.6, 1.8)  # of the local peak, drawn for each query head


@dataclass(frozen=True)
class Inputs:
    """One attention call to measure on: q (1, H, N, D), k and v (1, G, N, D), each (1, N, heads, D) in memory.

    Attributes:
        name: "structured", or the model that they were captured from.
        layer: of that model.
        prompt: what it was reading.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    layer: int | None = None
    prompt: str | None = None

    @property
    def tokens(self) -> int:
        return self.q.shape[2]

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        q, k, v = (x.to(device, dtype) for x in (self.q, self.k, self.v))
        return Inputs(self.name, q, k, v, self.layer, self.prompt)


def structured(
    tokens: int,
    *,
    heads: int = 32,
    key_heads: int = 8,
    dim: int = 128,
    columns: int = HEAVY_COLUMNS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Synthetic heads with a sink, heavy columns and a local peak.

    The first half of the features says where a token stands, as rotary embedding does: cosine and sine of the position
    at falling frequencies, so that q.k peaks at distance 0 and fades; a query head's own strength makes its peak sharp
    or dull. The second half holds a topic, one direction for each key head, that every query asks for: key 0, the
    sink, answers loudest, and `columns` keys anywhere answer loudly. Over all lies Gaussian noise; values are noise.

    Amplitudes follow `dim` such that scores do not. Built head by head, so that no float32 copy of the whole is held.
    """
    if heads % key_heads or dim % 4 or tokens < 1:
        raise SparsekitError(
            f"structured inputs of tokens={tokens}, heads={heads}, key_heads={key_heads}, dim={dim}: at least 1 token, "
            "heads a multiple of key_heads, dim a multiple of 4."
        )
    if not -(2**63) <= seed < 2**64:
        raise SparsekitError(f"seed={seed}: a number of 64 bits is needed.")
    g = torch.Generator(device).manual_seed(seed)
    half, grow = dim // 2, (dim / 128) ** 0.25

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=g)

    frequency = ROTARY_BASE ** -(torch.arange(half // 2, device=device) / (half // 2))
    angle = torch.arange(tokens, device=device)[:, None] * frequency
    place = torch.cat([angle.cos(), angle.sin()], -1) * (PLACE / grow)
    topic = torch.nn.functional.normalize(noise(key_heads, dim - half), dim=-1) * grow
    q, k, v = (torch.empty(1, tokens, n, dim, device=device, dtype=dtype) for n in (heads, key_heads, key_heads))
    for h in range(heads):
        strength = STRENGTH[0] + (STRENGTH[1] - STRENGTH[0]) * torch.rand((), device=device, generator=g)
        one = noise(tokens, dim) * NOISE
        one[:, :half] += place * strength
        one[:, half:] += topic[h * key_heads // heads] * TOPIC
        q[0, :, h] = one.to(dtype)
    for h in range(key_heads):
        one = noise(tokens, dim) * NOISE
        one[:, :half] += place
        one[0, half:] += topic[h] * SINK
        heavy = torch.randperm(tokens, device=device, generator=g)[:columns]
        one[heavy, half:] += topic[h] * COLUMN
        k[0, :, h] = one.to(dtype)
        v[0, :, h] = noise(tokens, dim).to(dtype)
    return Inputs("structured", q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def captured(
    model: str | os.PathLike[str],
    tokens: int,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    prompt: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> list[Inputs]:
    """q, k and v of a model's attention layers while it reads a prompt of `tokens` tokens.

    Args:
        model: as `sparsekit.models.load` takes it.
        layers: which; default all.
        prompt: a text file, of which the first `tokens` tokens are read; default a four-key needle prompt that fits.
        seed: of that needle prompt.
        dtype: of the model; default the faster one on `device`.
    """
    from sparsekit.lab.tasks import prompt_ids, task
    from sparsekit.models import fast_dtype, load
    from sparsekit.patch.capture import capture_attention
    from sparsekit.patch.model import check_positions

    loaded, tokenizer = load(model, dtype=dtype or fast_dtype(device), device=device)
    check_positions(loaded, tokens)
    if prompt is None:
        what = f"needle4, seed {seed}"
        ids = prompt_ids(tokenizer, task("needle4").samples(tokenizer, tokens=tokens, count=1, seed=seed)[0])
    else:
        what = Path(prompt).name
        ids = torch.tensor([tokenizer(_read(prompt), truncation=True, max_length=tokens)["input_ids"]])
        if ids.shape[1] < tokens:
            raise SparsekitError(f"prompt {str(prompt)!r} has {ids.shape[1]} tokens, fewer than {tokens}.")
    found = capture_attention(loaded, ids, layers)
    return [Inputs(str(model), *found[layer], layer=layer, prompt=what) for layer in sorted(found)]


def save_inputs(path: Path | str, inputs: Sequence[Inputs]) -> None:
    """Write captured inputs to a safetensors file, for a machine that has no room for the model."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    facts: dict[str, str] = {"name": inputs[0].name, "prompt": inputs[0].prompt or ""}
    for number, one in enumerate(inputs):
        layer = "" if one.layer is None else str(one.layer)
        tensors |= {f"{number}.{layer}.{name}": getattr(one, name).transpose(1, 2).contiguous() for name in "qkv"}
    with writing(path, folders=True) as part:
        save_file(tensors, part, metadata=facts)


def load_inputs(path: Path | str) -> list[Inputs]:
    """What `save_inputs` wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts: Mapping[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key).transpose(1, 2) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SparsekitError(f"inputs {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    return list(_unpack(path, facts, tensors))


def _unpack(path: Path | str, facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Iterator[Inputs]:
    stems = {tuple(key.split(".")[:2]) for key in tensors if key.count(".") == 2}
    if not stems or any(f"{n}.{layer}.{name}" not in tensors for n, layer in stems for name in "qkv"):
        raise SparsekitError(f"inputs {str(path)!r} hold {sorted(tensors)[:3]}: not a file of captured q, k and v.")
    for number, layer in sorted(stems, key=lambda stem: int(stem[0])):
        q, k, v = (tensors[f"{number}.{layer}.{name}"] for name in "qkv")
        at = int(layer) if layer else None
        yield Inputs(facts.get("name", Path(path).stem), q, k, v, layer=at, prompt=facts.get("prompt") or None)


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SparsekitError(f"prompt {str(path)!r} cannot be read: {error}") from error
