"""What weighting changes in the model's own values, where their tails are not those of the coordinates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_flows.verdict.thresholds import SHIFT_ERRORS, SHIFT_MOST, TAIL_INDEX_FOURTH
from pyro_flows.verdict.weighing import (
    LEVELS,
    heavy_tails,
    in_order,
    in_words,
    quantiles,
    resample,
    sd_of,
    weighted_quantiles,
)

# by how much changes (V,) exceed errors, and what is changed at one place, and by how much, in words
Compared = tuple[Tensor, Callable[[int], tuple[str, str]]]


def changed_values(values: Mapping[str, Tensor], log_weights: Tensor, draws: int | None = None) -> list[str]:
    """Say which mean or sd of the model's own values weighting changes most, if it is more than chance explains.

    A scale or a bound is the exponential of its coordinate. Its draws may have a tail that is too heavy by far, where
    the coordinate's hardly differ. Of values that have no fourth moment under the weights, quantiles are compared, and
    those of the draws to use, the first ``draws`` of all. Where a fourth moment exists, their mean and sd are compared
    too, with the error of as many exact draws: a few draws of hardly any weight can double an sd. ``log_weights`` (S,)
    are normalized.
    """
    weights = log_weights.double().exp()
    chosen = resample(log_weights.double(), len(weights), seed=0)
    worst, said = 0.0, list[str]()
    for name, value in values.items():
        flat = value.reshape(len(value), -1).double()
        if not value.is_floating_point() or not flat.shape[1]:
            continue
        heavy = heavy_tails(flat[chosen], index=TAIL_INDEX_FOURTH)
        for columns, compare in ((~heavy, _moments), (heavy, _quantiles)):
            among = columns.nonzero()[:, 0]
            if not len(among):
                continue
            beyond, about = compare(flat[:, among], weights, draws or len(flat))
            excess = torch.where(torch.isfinite(beyond), beyond - SHIFT_MOST, -torch.inf)
            place = int(excess.argmax())
            if float(excess[place]) > worst:
                worst = float(excess[place])
                index = next(itertools.islice(itertools.product(*map(range, value.shape[1:])), int(among[place]), None))
                what, by = about(place)
                said = [f"importance weighting changes the {what} of the values of {element(name, index)} {by}"]
    return said


def _moments(values: Tensor, weights: Tensor, draws: int) -> Compared:
    """Compare means and sds of all draws, and of the draws to use.

    The errors of the first are those of differences, since raw and weighted draws are the same ones. Those of the
    second are the errors of exact draws, from the weighted kurtosis.
    """
    weight, even = weights[:, None], 1.0 / len(values)
    mean, middle, own = (weight * values).sum(0), values.mean(0), values[:draws].mean(0)
    apart, raw_apart = (values - mean).square(), (values - middle).square()
    variance, raw, used = (weight * apart).sum(0), raw_apart.mean(0), (values[:draws] - own).square().mean(0)
    in_shift = (weight * (values - mean) - even * (values - middle)) / variance.sqrt()
    in_ratio = 0.5 * (weight * (apart / variance - 1.0) - even * (raw_apart / raw - 1.0))
    by_chance = (1.0 / draws + float(weights.square().sum())) ** 0.5
    spread = (weight * (apart / variance - 1.0).square()).sum(0)
    shift = torch.stack([(middle - mean).abs(), (own - mean).abs()]) / variance.sqrt()
    ratio = 0.5 * torch.stack([raw / variance, used / variance]).log()
    shift_error = torch.stack([in_shift.square().sum(0).sqrt(), torch.full_like(mean, by_chance)])
    ratio_error = torch.stack([in_ratio.square().sum(0).sqrt(), 0.5 * spread.sqrt() * by_chance])
    changes, errors = torch.stack([shift, ratio.abs()]), SHIFT_ERRORS * torch.stack([shift_error, ratio_error])
    beyond = (changes.square() - errors.square()).clamp_min(0.0).sqrt().amax(0)  # as variances, chance adds up so
    excess, among = beyond.nan_to_num(nan=-torch.inf, posinf=-torch.inf).max(0)

    def said(place: int) -> tuple[str, str]:
        by, log_factor = float(shift[among[place], place]), float(ratio[among[place], place])
        if by > abs(log_factor):
            return "mean", f"by {in_words(by)} sd"
        return "sd", f"by a factor {in_words(math.exp(-log_factor))}"

    return excess, said


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
