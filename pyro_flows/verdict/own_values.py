"""What weighting changes in the model's own values, where their tails are not those of the coordinates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.verdict.deciding import resample
from pyro_flows.verdict.weighing import heavy_tails

ERRORS = 3.0  # standard errors that a change exceeds
CHANGED = 0.1  # of a mean, in sds, and of the log of an sd
FOURTH_INDEX = 0.25  # of a tail from which fourth moments may not exist, and errors of sds with them
LEVELS = 0.05, 0.25, 0.5, 0.75, 0.95  # of quantiles that are compared there


def changed_values(values: Mapping[str, Tensor], log_weights: Tensor, draws: int | None = None) -> list[str]:
    """Say which mean or sd of the model's own values weighting changes most, if it is more than chance explains.

    A scale or a bound is the exponential of its coordinate. Its draws may have a tail that is too heavy by far, where
    the coordinate's hardly differ. Of values that have no fourth moment under the weights, quantiles are compared, and
    those of the draws to use: in a long tail, an unlucky sample is as far off as a poor guide.

    Args:
        values: by site, each (S, ...).
        log_weights: of the draws (S,), normalized.
        draws: the first of these are the draws to use; all of them by default.
    """
    weights = log_weights.double().exp()
    effective = float(1.0 / weights.square().sum())
    chosen = resample(log_weights.double(), len(weights), seed=0)
    worst, said = 0.0, list[str]()
    for name, value in values.items():
        flat = value.reshape(len(value), -1).double()
        if not value.is_floating_point() or not flat.shape[1]:
            continue
        heavy = heavy_tails(flat[chosen], index=FOURTH_INDEX)
        for columns, compared in ((~heavy, _moments), (heavy, _quantiles)):
            among = columns.nonzero()[:, 0]
            if not len(among):
                continue
            found = compared(flat[:, among], weights, effective, len(flat) if draws is None else draws)
            place = int(found.excess.argmax())
            if float(found.excess[place]) > worst:
                worst = float(found.excess[place])
                index = next(itertools.islice(itertools.product(*map(range, value.shape[1:])), int(among[place]), None))
                said = [found.sentence(place, element(name, index))]
    return said


@dataclass(frozen=True)
class _Moments:
    """By how much changes (V,) exceed errors and limit, shifts of means in sds, and log ratios of sds."""

    excess: Tensor
    shift: Tensor
    ratio: Tensor

    def sentence(self, place: int, label: str) -> str:
        shift, ratio = float(self.shift[place]), float(self.ratio[place])
        if shift > abs(ratio):
            return f"importance weighting changes the mean of the values of {label} by {shift:.2f} sd"
        return f"importance weighting changes the sd of the values of {label} by a factor {math.exp(-ratio):.2f}"


@dataclass(frozen=True)
class _Quantiles:
    """By how much changes (V,) exceed errors and limit, which quantile's, and by how many sds it changes."""

    excess: Tensor
    level: Tensor
    shift: Tensor

    def sentence(self, place: int, label: str) -> str:
        level, shift = LEVELS[int(self.level[place])], float(self.shift[place])
        return (
            f"importance weighting changes the {100 * level:.0f} % quantile of the values of {label} by {shift:.2f} sd"
        )


def _moments(values: Tensor, weights: Tensor, effective: float, draws: int) -> _Moments:
    weight = weights[:, None]
    mean, middle = (weight * values).sum(0), values.mean(0)
    variance = (weight * (values - mean).square()).sum(0)
    raw = (values - middle).square().mean(0)
    kurtosis = (weight * (values - mean).pow(4)).sum(0) / variance.square()
    chance = 1.0 / effective + 1.0 / len(values)  # of the weighted draws, and of draws that are right
    error = (0.25 * (kurtosis - 1.0).clamp_min(0.0) * chance).sqrt()
    ratio, shift = 0.5 * (raw / variance).log(), (middle - mean).abs() / variance.sqrt()
    excess = torch.maximum(shift - ERRORS * math.sqrt(chance), ratio.abs() - ERRORS * error) - CHANGED
    return _Moments(torch.where(torch.isfinite(excess), excess, -torch.inf), shift, ratio)


def _quantiles(values: Tensor, weights: Tensor, effective: float, draws: int) -> _Quantiles:
    levels = torch.tensor(LEVELS, dtype=values.dtype, device=values.device)
    errors = ERRORS * (levels * (1.0 - levels) * (1.0 / effective + 1.0 / draws)).sqrt()
    ordered, order = values.sort(0)
    mass = weights[order].cumsum(0).mT.contiguous()

    def weighted(at: Tensor) -> Tensor:
        place = torch.searchsorted(mass, at.clamp(0.0, 1.0).expand(len(mass), -1).contiguous())
        return ordered.gather(0, place.mT.clamp_max(len(values) - 1))

    below, middle, above = (weighted(levels + sign * errors) for sign in (-1.0, 0.0, 1.0))
    used = torch.stack([values[:draws].quantile(level, dim=0) for level in levels])
    sd = ((middle[3] - middle[1]) / 1.349).clamp_min(torch.finfo(values.dtype).tiny)  # of a normal distribution
    excess, level = (torch.maximum(used - above, below - used) / sd).max(0)
    shift = (used - middle).abs().gather(0, level[None])[0] / sd
    return _Quantiles(torch.where(torch.isfinite(excess), excess - CHANGED, -torch.inf), level, shift)


def element(name: str, index: Sequence[int]) -> str:
    """Return what an element of a site is called."""
    return f"{name}[{','.join(map(str, index))}]" if index else name
