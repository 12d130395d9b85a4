"""What weighting changes in the model's own values, where their tails are not those of the coordinates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_flows.verdict.deciding import resample
from pyro_flows.verdict.weighing import heavy_tails

ERRORS = 3.0  # standard errors that a change exceeds
CHANGED = 0.1  # of a mean, in sds, and of the log of an sd
FOURTH_INDEX = 0.25  # of a tail from which fourth moments may not exist, and errors of sds with them


def changed_values(values: Mapping[str, Tensor], log_weights: Tensor) -> list[str]:
    """Say which mean or sd of the model's own values weighting changes most, if it is more than chance explains.

    A scale or a bound is the exponential of its coordinate. Its draws may have a tail that is too heavy by far, where
    the coordinate's hardly differ. Values that have no fourth moment under the weights are left out.

    Args:
        values: by site, each (S, ...).
        log_weights: of the draws (S,), normalized.
    """
    weights = log_weights.double().exp()
    effective = float(1.0 / weights.square().sum())
    chosen = resample(log_weights.double(), len(weights), seed=0)
    worst, said = 0.0, list[str]()
    for name, value in values.items():
        if not value.is_floating_point():
            continue
        flat = value.reshape(len(value), -1).double()
        excess, shift, ratio = _excess(flat, weights, effective, chosen)
        place = int(excess.argmax()) if excess.numel() else 0
        if excess.numel() and float(excess[place]) > worst:
            worst = float(excess[place])
            index = next(itertools.islice(itertools.product(*map(range, value.shape[1:])), place, None))
            label = element(name, index)
            if float(shift[place]) > abs(float(ratio[place])):
                said = [
                    f"importance weighting changes the mean of the values of {label} by {float(shift[place]):.2f} sd"
                ]
            else:
                factor = math.exp(-float(ratio[place]))
                said = [f"importance weighting changes the sd of the values of {label} by a factor {factor:.2f}"]
    return said


def _excess(values: Tensor, weights: Tensor, effective: float, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return by how much changes (V,) exceed errors and limit, shifts of means in sds, and log ratios of sds."""
    weight = weights[:, None]
    mean, middle = (weight * values).sum(0), values.mean(0)
    variance = (weight * (values - mean).square()).sum(0)
    raw = (values - middle).square().mean(0)
    kurtosis = (weight * (values - mean).pow(4)).sum(0) / variance.square()
    chance = 1.0 / effective + 1.0 / len(values)  # of the weighted draws, and of draws that are right
    error = (0.25 * (kurtosis - 1.0).clamp_min(0.0) * chance).sqrt()
    ratio, shift = 0.5 * (raw / variance).log(), (middle - mean).abs() / variance.sqrt()
    excess = torch.maximum(shift - ERRORS * math.sqrt(chance), ratio.abs() - ERRORS * error) - CHANGED
    usable = torch.isfinite(excess) & ~heavy_tails(values[chosen], index=FOURTH_INDEX)
    return torch.where(usable, excess, -torch.inf), shift, ratio


def element(name: str, index: Sequence[int]) -> str:
    """Return what an element of a site is called."""
    return f"{name}[{','.join(map(str, index))}]" if index else name
