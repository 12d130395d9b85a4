"""What weighting changes in the model's own values, where their tails are not those of the coordinates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pyro_flows.verdict.deciding import resample
from pyro_flows.verdict.thresholds import SHIFT_ERRORS, SHIFT_MOST, TAIL_INDEX_FOURTH
from pyro_flows.verdict.weighing import LEVELS, heavy_tails, in_order, in_words, quantiles, sd_of, weighted_quantiles

# by how much changes (V,) exceed errors, and what is changed at one place, and by how much, in words
Compared = tuple[Tensor, Callable[[int], tuple[str, str]]]


def changed_values(values: Mapping[str, Tensor], log_weights: Tensor, draws: int | None = None) -> list[str]:
    """Say which mean or sd of the model's own values weighting changes most, if it is more than chance explains.

    A scale or a bound is the exponential of its coordinate. Its draws may have a tail that is too heavy by far, where
    the coordinate's hardly differ. Of values that have no fourth moment under the weights, quantiles are compared, and
    those of the draws to use, the first ``draws`` of all: in a long tail, an unlucky sample is as far off as a poor
    guide. ``log_weights`` (S,) are normalized.
    """
    weights = log_weights.double().exp()
    chosen = resample(log_weights.double(), len(weights), seed=0)
    worst, said = 0.0, list[str]()
    for name, value in values.items():
        flat = value.reshape(len(value), -1).double()
        if not value.is_floating_point() or not flat.shape[1]:
            continue
        heavy = heavy_tails(flat[chosen], index=TAIL_INDEX_FOURTH)
        for columns, compared in ((~heavy, _moments), (heavy, partial(_quantiles, draws=draws or len(flat)))):
            among = columns.nonzero()[:, 0]
            if not len(among):
                continue
            beyond, about = compared(flat[:, among], weights)
            excess = torch.where(torch.isfinite(beyond), beyond - SHIFT_MOST, -torch.inf)
            place = int(excess.argmax())
            if float(excess[place]) > worst:
                worst = float(excess[place])
                index = next(itertools.islice(itertools.product(*map(range, value.shape[1:])), int(among[place]), None))
                what, by = about(place)
                said = [f"importance weighting changes the {what} of the values of {element(name, index)} {by}"]
    return said


def _moments(values: Tensor, weights: Tensor) -> Compared:
    """Compare means and sds; their errors are those of differences, since raw and weighted draws are the same ones."""
    weight, even = weights[:, None], 1.0 / len(values)
    mean, middle = (weight * values).sum(0), values.mean(0)
    apart, raw_apart = (values - mean).square(), (values - middle).square()
    variance, raw = (weight * apart).sum(0), raw_apart.mean(0)
    ratio, shift = 0.5 * (raw / variance).log(), (middle - mean).abs() / variance.sqrt()
    in_shift = (weight * (values - mean) - even * (values - middle)) / variance.sqrt()
    in_ratio = 0.5 * (weight * (apart / variance - 1.0) - even * (raw_apart / raw - 1.0))
    shift_error, ratio_error = (SHIFT_ERRORS * part.square().sum(0).sqrt() for part in (in_shift, in_ratio))

    def said(place: int) -> tuple[str, str]:
        by, log_factor = float(shift[place]), float(ratio[place])
        if by > abs(log_factor):
            return "mean", f"by {in_words(by)} sd"
        return "sd", f"by a factor {in_words(math.exp(-log_factor))}"

    return torch.maximum(shift - shift_error, ratio.abs() - ratio_error), said


def _quantiles(values: Tensor, weights: Tensor, draws: int) -> Compared:
    effective = float(1.0 / weights.square().sum())
    levels = torch.tensor(LEVELS, dtype=values.dtype, device=values.device)
    errors = SHIFT_ERRORS * (levels * (1.0 - levels) * (1.0 / effective + 1.0 / draws)).sqrt()
    rows = values.mT.contiguous()
    first, places = rows[:, :draws].contiguous(), in_order(rows)
    below, middle, above = (
        weighted_quantiles(rows, places, weights, (levels + sign * errors).clamp(0.0, 1.0)) for sign in (-1.0, 0.0, 1.0)
    )
    used = quantiles(first, in_order(first), levels)
    excess, level = (torch.maximum(used - above, below - used) / sd_of(middle)).max(0)
    shift = (used - middle).abs() / sd_of(middle)

    def said(place: int) -> tuple[str, str]:
        number = int(level[place])
        return f"{100 * LEVELS[number]:.0f} % quantile", f"by {in_words(float(shift[number, place]))} sd"

    return excess, said


def element(name: str, index: Sequence[int]) -> str:
    """Return what an element of a site is called."""
    return f"{name}[{','.join(map(str, index))}]" if index else name
