"""Models run on batches: without argument checks, and past points where a factorization fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

Result = TypeVar("Result")


@contextmanager
def quiet() -> Iterator[None]:
    """Switch validation off for a while: it branches on values, which neither vmap nor recording can do."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because")  # vmap, in Pyro's samplers
        yield


def where_possible(
    function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, *widths: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Apply a function to the rows of ``z``, with NaN at rows where a factorization fails.

    ``widths`` are the shapes of its results at one row.
    """
    pieces = list(_pieces(function, z))
    if len(pieces) == 1 and len(pieces[0][1][0]) == len(z):
        return pieces[0][1]
    whole = tuple(z.new_full((len(z), *width), torch.nan) for width in widths)
    for first, piece in pieces:
        rows = torch.arange(first, first + len(piece[0]), device=z.device)
        whole = tuple(all_.index_copy(0, rows, part.to(z)) for all_, part in zip(whole, piece, strict=True))
    return whole


def _pieces(
    function: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor, first: int = 0
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield where a piece of the rows begins and the function of it, halving where a factorization fails."""
    try:
        yield first, function(z)
    except torch.linalg.LinAlgError:
        if len(z) > 1:
            half = len(z) // 2
            yield from _pieces(function, z[:half], first)
            yield from _pieces(function, z[half:], first + half)


def nearer(run: Callable[[float], Result]) -> Result:
    """Call ``run`` with 1, or with less where a factorization fails: sizes of a test point around zero."""
    for size in (1.0, 0.3):
        try:
            return run(size)
        except torch.linalg.LinAlgError:
            continue
    return run(0.1)


def join(parts: list[Any], how: Callable[[list[Tensor]], Tensor]) -> Any:
    if isinstance(parts[0], dict):
        return {name: how([part[name] for part in parts]) for name in parts[0]}
    return how(parts)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
