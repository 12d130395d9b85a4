"""Boolean masks of coupling layers: ``True`` marks the coordinates that a layer keeps and conditions on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks

KINDS = ("alternating", "mixed")


def half(dim: int, *, flip: bool = False) -> Tensor:
    """Keep the first ``dim // 2`` coordinates, move the rest (``flip=True``: the other way round).

    With ``dim = 1`` nothing is kept and the one coordinate moves, flipped or not.

    Booleans of shape ``(dim,)``. Cost: O(their number).

    Raises:
        ValueError: for a ``dim`` below 1.

    >>> half(5).tolist()
    [True, True, False, False, False]
    """
    checks.integer("dim", dim, 1)
    kept = torch.arange(dim) < dim // 2
    return ~kept if flip and dim > 1 else kept


def alternating(dim: int, *, flip: bool = False) -> Tensor:
    """Keep every other coordinate, from the second one on (``flip=True``: from the first).

    Booleans of shape ``(dim,)``. Cost: O(their number).

    Raises:
        ValueError: for a ``dim`` below 1.

    >>> alternating(5).tolist()
    [False, True, False, True, False]
    """
    checks.integer("dim", dim, 1)
    kept = torch.arange(dim) % 2 == 1
    return ~kept if flip and dim > 1 else kept


def random(dim: int, *, seed: int, flip: bool = False) -> Tensor:
    """Keep ``dim // 2`` coordinates drawn by a generator of its own: one seed, one mask, on any machine.

    Booleans of shape ``(dim,)``. Cost: O(their number).

    Raises:
        ValueError: for a ``dim`` below 1.

    >>> random(4, seed=1).sum().item()
    2
    """
    checks.integer("dim", dim, 1)
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return half(dim, flip=flip)[order]


def sequence(dim: int, layers: int, *, kind: str = "mixed", seed: int = 0) -> list[Tensor]:
    """Masks for a stack of couplings: pairs of a mask and its complement, so that every coordinate moves.

    ``kind="mixed"``: the pairs are halves, then alternating, then seeded random ones, so that any two coordinates soon
    stand on opposite sides of a mask and can depend on each other directly. ``kind="alternating"``: all pairs are
    alternating, as in NICE.

    Booleans of shape ``(dim,)`` each. Cost: O(their number).

    Raises:
        ValueError: for an unknown ``kind``, or ``layers`` below 1.

    >>> [mask.tolist() for mask in sequence(2, 2)]
    [[True, False], [False, True]]
    """
    checks.choice("mask", kind, KINDS)
    masks = []
    for layer in range(checks.integer("layers", layers, 1)):
        pair, flip = layer // 2, layer % 2 == 1
        if kind == "alternating" or pair == 1:
            masks.append(alternating(dim, flip=flip))
        elif pair == 0:
            masks.append(half(dim, flip=flip))
        else:
            masks.append(random(dim, seed=seed + pair, flip=flip))
    return masks


def checkerboard(shape: Sequence[int], *, flip: bool = False) -> Tensor:
    """Keep every other pixel of an image (C, H, W), in all of its channels; the top left one moves (or stays).

    Booleans of shape ``(C, H, W)``. Cost: O(their number).

    Raises:
        ValueError: for another shape.

    >>> checkerboard((1, 2, 3)).tolist()
    [[[False, True, False], [True, False, True]]]
    """
    _, height, width = checks.image("shape", shape)
    kept = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 1
    return (~kept if flip else kept).expand(tuple(shape)).clone()


def channels(shape: Sequence[int], *, flip: bool = False) -> Tensor:
    """Keep the first half of the channels, two at least, of a signal or an image (``flip=True``: the second half).

    Booleans of shape ``(C, T)`` or ``(C, H, W)``. Cost: O(their number).

    Raises:
        ValueError: for another shape, or one channel.

    >>> channels((2, 1, 1)).flatten().tolist()
    [True, False]
    """
    count, *sides = checks.grid("shape", shape)
    if count < 2:
        raise ValueError(f"shape: expected at least 2 channels to choose from, got {tuple(shape)}.")
    return half(count, flip=flip).reshape(-1, *[1] * len(sides)).expand(tuple(shape)).clone()
