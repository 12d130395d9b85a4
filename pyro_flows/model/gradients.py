"""Gradients and Hessians of a function of one point, for many points at once, by autograd around ``vmap``.

``torch.func.grad`` gives the same numbers, but imports torch's compiler at its first call (0.6 s), and writes down
what second derivatives would need, which takes as long as the gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch

from pyro_flows._tensors import filled, pull
from pyro_flows.model.batching import batch


def values_and_grads(function: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (S,) of a function of one point, and its gradients (S, D), at ``points`` (S, D)."""
    if _functorch.peek_interpreter_stack() is not None:  # a transform around this one would not let autograd through
        grads, values = batch(torch.func.grad_and_value(function))(points)
        return values, grads
    return batch_and_grads(batch(function), points)


def batch_and_grads(whole: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for a function of all points (S, D) to their values (S,), each of which is of its point only."""
    values, leaf = _values(whole, points)
    (grads,) = pull(values, torch.ones_like(values), [leaf])
    return values.detach(), grads


def hessians(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the second derivatives (K, D, D) of a function of one point at ``points`` (K, D).

    A RuntimeError says that an operation cannot be differentiated twice, or not for many directions at once.
    """
    return batch_hessians(batch(function), points)


def batch_hessians(whole: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the same for a function of all points (K, D) to their values (K,)."""
    row, units = _rows(whole, points)
    with filled():
        return torch.func.vmap(row)(units).transpose(0, 1)


def hessian_diagonals(function: Callable[[Tensor], Tensor], points: Tensor, *, chunk: int) -> Tensor:
    """Return the diagonals (K, D) of the same, with ``chunk`` rows in memory at a time."""
    row, units = _rows(batch(function), points)
    with filled():
        return torch.func.vmap(lambda unit: torch.where(unit != 0.0, row(unit), 0.0).sum(1), chunk_size=chunk)(units).mT


def _rows(whole: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return what gives a row of each Hessian (K, D) for a unit vector (1, D), and these vectors (D, 1, D)."""
    values, leaf = _values(whole, points)
    with torch.enable_grad():
        (grads,) = pull(values, torch.ones_like(values), [leaf], further=True)
    units = torch.eye(leaf.shape[1], dtype=grads.dtype, device=grads.device)[:, None]
    return lambda unit: pull(grads, unit.expand(leaf.shape), [leaf], retain_graph=True)[0], units


def _values(whole: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (S,) with a graph that leads to the points, and the points as its leaf."""
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        values = whole(leaf)
    if values.shape != points.shape[:1]:
        raise RuntimeError(f"expected one number for each point, got shape {tuple(values.shape[1:])}")
    return values, leaf
