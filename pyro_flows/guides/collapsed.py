"""Where a guide with structure starts: at a mode of the globals, latents in plates integrated out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flows.guides.conditional import Conditional, Rows
from pyro_flows.guides.crossed_marginal import CrossedMarginal
from pyro_flows.guides.marginal import Marginal
from pyro_flows.guides.runs import Start

FEW_PARTS, MOST_PARTS = 8, 256  # minibatches by which a mode is found, and mended
STEPS, TURNS = 40, 3  # of L-BFGS; that find the length of difference quotients
MENDING, NEAR_ENOUGH = 12, 1e-3  # steps of BFGS; gain of a step in nats at which they end
RUNS = 512  # of the model, for the covariance
FULL_UP_TO = 200  # dimensions of a full covariance
PROBES = 16  # random directions, for a diagonal one
SETTLED = 0.3  # log ratio of lengths, below which they are not mended
LENGTH = 0.3  # of difference quotients, in standard deviations
DRAWS = 8  # of a row

Density = Marginal | CrossedMarginal


def start_of_globals(few: Density, z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a mode (D,) and the scale there, (D, D) triangular or (D,); None if there is no finite density.

    The log density is given by ``FEW_PARTS`` parts, and z is a point (D,).
    """
    mode = climb(few, z)
    if mode is None:
        return None
    wide = few.adapt(mode.unsqueeze(0))
    if wide:
        mode = _climbed(few, mode)
    covariance = _covariance(few, mode)
    if wide and _has_more_draws(few, mode, covariance):
        mode = _climbed(few, mode)
    if few.first.at.drawn or isinstance(few, CrossedMarginal):
        mode = _mend(few.with_parts(MOST_PARTS), mode, covariance)
        some = few.with_parts(max(FEW_PARTS, RUNS // (2 * len(mode))))
        covariance = _covariance(some, mode, _diagonal(covariance).sqrt())
    if not bool(torch.isfinite(covariance).all()):
        return None
    if covariance.dim() == 1:
        return mode, covariance.sqrt()
    root, failed = torch.linalg.cholesky_ex(covariance)
    return mode, torch.diag(covariance.diagonal().sqrt()) if bool(failed) else root


def few_parts(
    rows: Rows, z: Tensor, start: Start, seed: int = 0, *, remember: Callable[[Conditional], None] = lambda now: None,
    most: int = FEW_PARTS,
) -> Marginal:  # fmt: skip
    """Return the log density by a few parts, with some draws of each row; the arguments are those of Marginal."""
    few = Marginal(rows, z, start, seed, remember=remember, most=most)
    few.count = DRAWS
    return few


def _at(density: Density, z: Tensor) -> tuple[Tensor, Tensor]:
    value, gradient = density.value_and_grad(z.unsqueeze(0))
    return value[0], gradient[0].to(z)


def climb(density: Density, z: Tensor) -> Tensor | None:
    """Return the best point of a climb by L-BFGS; None if no density is finite."""
    point = z.clone()
    best: tuple[float, Tensor | None] = -math.inf, None
    optimizer = torch.optim.LBFGS([point], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        nonlocal best
        value, gradient = _at(density, point.detach())
        fine = bool(torch.isfinite(value) & torch.isfinite(gradient).all())
        if fine and float(value) > best[0]:
            best = float(value), point.detach().clone()
        point.grad = -gradient if fine else torch.zeros_like(gradient)
        return -value if fine else torch.full_like(value, 1e30)

    optimizer.step(closure)
    return best[1]


def _climbed(density: Density, mode: Tensor) -> Tensor:
    again = climb(density, mode)
    return mode if again is None else again


def _has_more_draws(density: Density, mode: Tensor, covariance: Tensor) -> bool:
    """Whether rows get more draws for their differences between points one standard deviation from the mode."""
    before, steps = density.count, torch.diag(_diagonal(covariance).sqrt())[:PROBES]
    density.choose_count(torch.cat([mode + steps, mode - steps]))
    return density.count > before


def _mend(density: Density, mode: Tensor, covariance: Tensor) -> Tensor:
    """Climb a density of more rows by BFGS, whose first metric is the covariance."""
    metric = torch.diag(covariance) if covariance.dim() == 1 else covariance
    value, gradient = _at(density, mode)
    for _ in range(MENDING):
        step = metric @ gradient
        if float(gradient @ step) < NEAR_ENOUGH:
            break
        share = 1.0
        while share > 1e-3:
            there, slope = _at(density, mode + share * step)
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
            metric = bent @ metric @ bent.mT + torch.outer(moved, moved) / along
    return mode


def _diagonal(covariance: Tensor) -> Tensor:
    return covariance if covariance.dim() == 1 else covariance.diagonal()


def _covariance(density: Density, mode: Tensor, sds: Tensor | None = None) -> Tensor:
    """Return the inverse of the negative Hessian, or of its diagonal, with the sizes of its eigenvalues."""
    full = len(mode) <= FULL_UP_TO
    lengths, turns = (torch.ones_like(mode), TURNS) if sds is None else (sds, 1)
    for turn in range(turns):
        dense = full and (turn == turns - 1 or len(mode) <= PROBES)  # the last one, or all if they cost less
        curvature = _curvature(density, mode, LENGTH * lengths, dense)
        diagonal = _diagonal(curvature)
        sds = torch.where(diagonal > 0, diagonal.clamp_min(1e-12).rsqrt(), lengths).clamp(1e-6, 10.0)
        if dense and bool(((sds / lengths).log().abs() < SETTLED).all()):
            break
        lengths = sds
    assert sds is not None
    if not full:
        return sds.square()
    values, vectors = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
    return (vectors / values.abs().clamp_min(1e-6)) @ vectors.mT


def _curvature(density: Density, at: Tensor, lengths: Tensor, dense: bool) -> Tensor:
    """Return the negative Hessian by differences of gradients, or its diagonal along vectors of random signs."""
    signs = torch.eye(len(at)).to(at)
    if not dense:
        generator = torch.Generator().manual_seed(0)
        signs = (2.0 * torch.randint(2, (PROBES, len(at)), generator=generator) - 1.0).to(at)
    _, gradients = density.value_and_grad(torch.cat([at - signs * lengths, at + signs * lengths]))
    before, after = gradients.to(at).chunk(2)
    if dense:
        return (before - after) / (2.0 * lengths.unsqueeze(1))
    return ((before - after) * signs / (2.0 * lengths)).mean(0)
