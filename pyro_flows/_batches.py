"""Batches of points: how many points to take at once, and other points close by."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**17  # numbers in the largest intermediate result of a piece: 1 MiB in float64
ROWS_AT_LEAST, ROWS_AT_MOST = 16, 1024
LARGEST = 2**20  # numbers for which the least rows are still taken: memory above is mapped anew by each operation
SHARING = 4  # rows that share the data of a model, if memory is mapped anew even for one row,
MOST_MAPPED = 2**23  # and numbers of all of them, at most


def rows_for(numbers: int, budget: int = PIECE) -> int:
    """Return how many points to take at once where each takes ``numbers``: a power of two."""
    rows, most = (max(1, count // max(numbers, 1)) for count in (budget, LARGEST))
    if most == 1:
        most = max(1, min(SHARING, MOST_MAPPED // max(numbers, 1)))
    return min(max(1 << (rows.bit_length() - 1), min(1 << (most.bit_length() - 1), ROWS_AT_LEAST)), ROWS_AT_MOST)


def nearby(x: Tensor) -> Tensor:
    """Return other points close to ``x``, for a graph to be checked at; no random numbers are used."""
    return x + 0.1 * torch.sin(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)
