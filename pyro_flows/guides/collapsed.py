"""Where a guide with structure starts: the mode of the globals, latents in plates integrated out approximately."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_flows.guides.conditional import Conditional, Rows, Start, at_values, beginning

FEW_PARTS, MOST_PARTS = 8, 256  # subsamples over which the density is averaged: to find a mode, and to mend it
STEPS, TURNS = 40, 3  # of L-BFGS; that find the length of difference quotients
MENDING = 12  # steps of BFGS with most of the rows
NEAR_ENOUGH = 1e-3  # of a mode: gain of a step in nats
RUNS = 512  # of the model, for the covariance
LENGTH = 0.3  # of difference quotients, in standard deviations


class Collapsed:
    """The log density of the globals, latents in plates integrated out, averaged over subsamples; with its gradient.

    Subsamples of plates whose rows the model draws have no row in common, as long as there are rows.

    Args:
        rows: the model with its data.
        z: a point (D,) at which it is run first.
        most: subsamples, at most.
        remember: is told of each approximation of the rows.
    """

    def __init__(self, rows: Rows, z: Tensor, most: int, remember: Callable[[Conditional], None]) -> None:
        self.rows, self.remember = rows, remember
        self.parts = [chosen for chosen, _ in parts_of(rows.conditional(z, beginning, {}), most)]
        self.starts: list[Start] = [beginning] * len(self.parts)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and gradient at ``z`` (D,)."""
        value, gradient = z.new_zeros(()), torch.zeros_like(z)
        for index, chosen in enumerate(self.parts):
            leaf = z.clone().requires_grad_()
            with torch.enable_grad():
                now = self.rows.near_mode(leaf, self.starts[index], chosen, graph=True)
                part = now.log_integral + now.alone
                (slope,) = torch.autograd.grad(part, leaf)
            self.starts[index] = at_values(now.moved(now.base, now.steps()))
            self.remember(now)
            value, gradient = value + part.detach(), gradient + slope
        return value / len(self.parts), gradient / len(self.parts)

    def keep(self, most: int) -> None:
        """Keep so many parts at most."""
        del self.parts[most:], self.starts[most:]


def parts_of(first: Conditional, most: int | None) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return the rows of several runs of the model, and which of them are in no run before; of one, if it draws none.

    Args:
        first: a run.
        most: runs, at most; None for as many as have all rows.
    """
    drawn, device = first.at.drawn, first.total.device
    count = max((-(-size // rows) for size, rows in drawn.values()), default=1)
    count = count if most is None else min(count, most)
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [({}, {}) for _ in range(count)]
    for name, (size, rows) in drawn.items():
        order = torch.cat([torch.randperm(size, device=device) for _ in range(-(-count * rows // size))])
        fresh = torch.arange(len(order), device=device) < size
        for part in range(count):
            own = slice(part * rows, (part + 1) * rows)
            parts[part][0][name], parts[part][1][name] = order[own], fresh[own]
    return parts


def start_of_globals(
    rows: Rows, z: Tensor, remember: Callable[[Conditional], None]
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Return a mode (D,) and a triangular root of the covariance there (D, D); None if there is no finite density."""
    few = Collapsed(rows, z, FEW_PARTS, remember)
    mode = _climb(few, z)
    if mode is None:
        return None
    covariance = _covariance(few, mode)
    if len(few.parts) > 1:
        many = Collapsed(rows, mode, MOST_PARTS, remember)
        mode = _mend(many, mode, covariance)
        many.keep(max(FEW_PARTS, RUNS // (2 * len(mode))))
        covariance = _covariance(many, mode, covariance.diagonal().sqrt())
    root, failed = torch.linalg.cholesky_ex(covariance)
    return mode, torch.diag(covariance.diagonal().sqrt()) if bool(failed) else root


def _climb(density: Collapsed, z: Tensor) -> Tensor | None:
    """Return the best point of a climb by L-BFGS; None if no density is finite."""
    point = z.clone()
    best: list[Any] = [-math.inf, None]
    optimizer = torch.optim.LBFGS([point], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        value, gradient = density(point.detach())
        fine = bool(torch.isfinite(value) & torch.isfinite(gradient).all())
        if fine and float(value) > best[0]:
            best[:] = [float(value), point.detach().clone()]
        point.grad = -gradient if fine else torch.zeros_like(gradient)
        return -value if fine else torch.full_like(value, 1e30)

    optimizer.step(closure)
    return best[1]


def _mend(density: Collapsed, mode: Tensor, covariance: Tensor) -> Tensor:
    """Climb a density of more rows by BFGS, whose first metric is the covariance."""
    value, gradient = density(mode)
    for _ in range(MENDING):
        step = covariance @ gradient
        if float(gradient @ step) < NEAR_ENOUGH:
            break
        share = 1.0
        while share > 1e-3:
            there, slope = density(mode + share * step)
            if bool(there >= value) and bool(torch.isfinite(slope).all()):
                break
            share *= 0.5
        else:
            break
        moved, turned = share * step, gradient - slope
        mode, value, gradient = mode + moved, there, slope
        along = float(moved @ turned)
        if along > 0.0:
            bent = torch.eye(len(mode)).to(mode) - torch.outer(moved, turned) / along
            covariance = bent @ covariance @ bent.mT + torch.outer(moved, moved) / along
    return mode


def _covariance(density: Collapsed, mode: Tensor, sds: Tensor | None = None) -> Tensor:
    """Return the inverse of the negative Hessian, with the sizes of its eigenvalues."""
    for _ in range(TURNS if sds is None else 1):
        sds = torch.ones_like(mode) if sds is None else sds
        curvature = _curvature(density, mode, LENGTH * sds)
        diagonal = curvature.diagonal()
        sds = torch.where(diagonal > 0, diagonal.clamp_min(1e-12).rsqrt(), sds).clamp(1e-6, 10.0)
    values, vectors = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
    return (vectors / values.abs().clamp_min(1e-6)) @ vectors.mT


def _curvature(density: Collapsed, at: Tensor, lengths: Tensor) -> Tensor:
    """Return the negative Hessian by differences of gradients."""
    columns = []
    for index, length in enumerate(lengths):
        step = torch.zeros_like(at)
        step[index] = length
        columns.append((density(at - step)[1] - density(at + step)[1]) / (2.0 * length))
    return torch.stack(columns)
