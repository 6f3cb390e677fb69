"""Layers x heads as text: which head of which layer runs which pattern, a letter each."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

__all__ = ["draw_heads"]

Groups = Sequence[tuple[str, Sequence[int]]]  # pattern as text -> its heads


def draw_heads(layers: Sequence[tuple[str, Groups]], group: int = 0) -> list[str]:
    """A legend and a line for each layer, `.` for a dense head; nothing where no layer mixes patterns.

    >>> layers = [("0", [("dense", [0, 3]), ("triangle", [1, 2])]), ("1", [("triangle", range(4))])]
    >>> for line in draw_heads(layers, group=2):
    ...     print(line)
    heads: . dense, a triangle
    layer 0  .a a.
    layer 1  aa aa

    Args:
        layers: (label, patterns with their heads) of each layer.
        group: query heads of a key head, which stand together; 0: not known.
    """
    if all(len(groups) < 2 for _, groups in layers):
        return []
    others = [name for name in dict.fromkeys(name for _, groups in layers for name, _ in groups) if name != "dense"]
    letter = {name: ascii_letters[i] if i < len(ascii_letters) else "?" for i, name in enumerate(others)}
    letter = {"dense": "."} | letter
    wide = max(len(label) for label, _ in layers)
    lines = [f"heads: {', '.join(f'{sign} {name}' for name, sign in letter.items())}"]
    for label, groups in layers:
        signs = {head: letter[name] for name, heads in groups for head in heads}
        text = "".join(signs[head] for head in sorted(signs))
        parts = [text[at : at + group] for at in range(0, len(text), group)] if group else [text]
        lines.append(f"layer {label:>{wide}}  {' '.join(parts)}")
    return lines
