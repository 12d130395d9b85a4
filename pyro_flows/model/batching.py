"""Models run on batches: without argument checks, past points where a factorization fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.poutine import runtime
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pyro_flows._seeding import BatchedDraws
from pyro_flows._turns import turn

Result = TypeVar("Result")


def usable(value: Any) -> Any:
    """Return arguments with tensors that were made in inference mode, of which there are no gradients, copied."""
    if not any(isinstance(part, Tensor) and part.is_inference() for part in tree_leaves(value)):
        return value
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) and part.is_inference() else part, value)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch validation off for a while: it branches on values, which neither vmap nor recording can do."""
    with turn(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because")  # vmap, in Pyro's samplers
        warnings.filterwarnings("ignore", message="Singular sample detected")  # torch's Wishart, which draws again
        yield


def batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of one point as a function of many.

    Random numbers are the same at all of them: what is batched does not depend on any, though a model may draw some,
    as one does that makes a module with priors.
    """
    return torch.func.vmap(function, randomness="same")


def over_rows(
    function: Callable[..., Any],
    rows: Any,
    *,
    batched: bool = True,
    randomness: str = "same",
    size: int | None = None,
    look: Callable[[], None] = lambda: None,
    otherwise: Callable[[Exception], object] | None = None,
) -> Any:
    """Apply a function of one row to all rows of a tensor or a dict of tensors, and stack what it returns, of the same.

    Args:
        function: of one row.
        rows: tensors with as many rows each.
        batched: whether ``torch.func.vmap`` is tried; without, rows go one by one.
        randomness: as in ``vmap``: random numbers are the ``"same"`` at all rows, or ``"different"``.
        size: rows at once; None for all.
        look: called before each piece.
        otherwise: called with the error where ``vmap`` fails, before rows go one by one; without, the error is raised.
    """
    count = len(tree_leaves(rows)[0])
    if batched:
        try:
            run = torch.func.vmap(function, randomness=randomness)
            with BatchedDraws() if randomness == "different" else nullcontext():
                return join((run(part) for part in pieces(rows, count if size is None else size, look)), count)
        except (torch.linalg.LinAlgError, NotImplementedError):
            raise  # of these points, and of a distribution without a sampler: no better one by one
        except RuntimeError as error:
            if otherwise is None:
                raise
            otherwise(error)
    return join((tree_map(lambda part: part[None], function(row)) for row in pieces(rows, None, look)), count)


def pieces(rows: Any, size: int | None, look: Callable[[], None]) -> Iterator[Any]:
    """Yield rows in pieces of ``size``, or one by one, without their axis, for None; ``look`` is called before each."""
    leaves, form = tree_flatten(rows)
    for parts in zip(*(leaf.unbind() if size is None else leaf.split(size) for leaf in leaves), strict=True):
        look()
        yield tree_unflatten(list(parts), form)


def advice(reason: str) -> str:
    """Say what it costs that a model cannot be batched for some reason, and what to change in it."""
    cost = "It is run draw by draw, which takes about as many times longer as there are draws (40 times, with 64)"
    for word, remedy in REMEDIES.items():
        if word in reason:
            return f"{cost}; {remedy}."
    return f"{cost}; write it with tensor operations that torch.func.vmap can batch."


REMEDIES = {
    "data-dependent control flow": "it takes a number out of a latent (.item(), float()) or branches on one: keep it a "
    "tensor, and write `if` as torch.where, or as a mixture",
    ".item()": "it takes a number out of a latent (.item(), float()): keep it a tensor",
    "in-place": "x[t] = ... writes into a tensor from outside of the model: make it in the model, or build a list and "
    "torch.stack it",
    "inplace": "x[t] = ... writes into a tensor from outside of the model: make it in the model, or build a list and "
    "torch.stack it",
    "numpy": "it hands a latent to numpy: use the torch functions of the same name",
    "storage": "it hands a latent to numpy: use the torch functions of the same name",
    "dynamic shape": "the shape of a value depends on a latent: use torch.where, or a mask, in place of an index",
    "random operation": "it draws random numbers: take them out of the model",
}


@contextmanager
def apart() -> Iterator[None]:
    """Run a model apart from a Pyro program that may be running around it: unseen by its handlers, and with all plate
    dimensions free. A plate around would move the model's own ones aside, and multiply its density.
    """
    with turn():
        dims = runtime._DIM_ALLOCATOR
        taken, dims._stack = dims._stack, []
        try:
            with poutine.block():
                yield
        finally:
            dims._stack = taken


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


def join(parts: Iterable[Any], rows: int) -> Any:
    """Put pieces of ``rows`` rows in all, tensors or dicts of tensors, one after the other.

    Without autograd they are copied as they come, so that results never take twice their memory.

    Raises:
        RuntimeError: if the pieces differ in more than their number of rows.
    """
    pieces = iter(parts)
    first = next(pieces)
    if isinstance(first, dict):
        return _filled(chain([first], pieces), first, rows)
    return _filled(({"": piece} for piece in chain([first], pieces)), {"": first}, rows)[""]


def _filled(pieces: Iterable[dict[str, Tensor]], first: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    if any(part.requires_grad for part in first.values()):
        listed = list(pieces)
        return {name: torch.cat([piece[name] for piece in listed]) for name in first}
    whole = {name: part.new_empty(rows, *part.shape[1:]) for name, part in first.items()}
    done = 0
    for piece in pieces:
        for name, part in piece.items():
            if part.shape[1:] != whole[name].shape[1:] or part.dtype != whole[name].dtype:
                raise RuntimeError(f"{name}: {part.shape[1:]}, {part.dtype} after {first[name].shape[1:]} in one batch")
            whole[name][done : done + len(part)] = part
        done += max(map(len, piece.values()), default=0)
    return whole
