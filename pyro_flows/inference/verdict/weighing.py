"""Draws weighed by both densities: PSIS, effective sample size, what weighting would change, and the optimal bridge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_flows.inference.verdict.psis import largest_k, psis
from pyro_flows.support.process.seeding import derive
from pyro_flows.support.thresholds import (
    ESS_SHARE_LEAST,
    LOG_WEIGHT_EVEN,
    SHIFT_ERRORS,
    SHIFT_MOST,
    TAIL_INDEX_FOURTH,
    TAIL_INDEX_HEAVY,
)

UNTOLD = 1000  # times an sd, or by that factor: larger changes are all alike to a reader
LEVELS = 0.05, 0.25, 0.5, 0.75, 0.95  # of quantiles that stand for moments


def in_words(figure: float) -> str:
    """Return a shift or a factor with two decimals; of what is too large to mean anything, only that it is.

    >>> in_words(0.1234), in_words(1e30)
    ('0.12', 'more than 1000')
    """
    return f"more than {UNTOLD}" if figure > UNTOLD else f"{figure:.2f}"


@dataclass(frozen=True)
class Weighing:
    """Draws scored by both densities: smoothed weights and what they imply."""

    log_weights: Tensor
    k_hat: float
    ess: float
    elbo: float
    log_evidence: float
    mean_shift: Tensor
    sd_shift: Tensor
    widening: float
    distance: float  # the largest shift of a mean, of the draws that are possible under p
    broken: int
    heavy: Tensor | None = None  # (D,): quantiles were compared in place of moments
    quantile_shift: float | None = None  # largest, of a quartile in sds or of a log distance between two
    farthest: int = 0  # the coordinate of the distance, and that of the widening
    widest: int = 0

    @property
    def share(self) -> float:
        """The effective share of the draws."""
        return self.ess / len(self.log_weights)

    @property
    def threshold(self) -> float:
        """Largest admissible k-hat for this many draws."""
        return largest_k(len(self.log_weights))


def has_no_tail(ratio: Tensor) -> bool:
    """Whether no weight is far above their mean, by log ratios (S,): k-hat of such weights tells nothing."""
    return float(ratio.max() - torch.logsumexp(ratio, 0)) + math.log(len(ratio)) < LOG_WEIGHT_EVEN


def weigh(z: Tensor, log_p: Tensor, log_q: Tensor, *, quantiles: bool = False) -> Weighing:
    """Compare draws ``z`` (S, D) from q with their log densities under p and q; ``quantiles`` too, if asked for."""
    ratio = (log_p - log_q).double()
    broken = int((~torch.isfinite(ratio)).sum())
    ratio = torch.where(torch.isfinite(ratio), ratio, -torch.inf)
    if broken == len(ratio):
        nothing = torch.full((z.shape[1],), torch.nan)
        return Weighing(ratio, math.inf, 0.0, -math.inf, -math.inf, nothing, nothing, 0.0, math.inf, broken)
    log_weights, k_hat = psis(ratio)
    log_evidence = float(torch.logsumexp(ratio, 0) - math.log(len(ratio)))
    k_hat = min(k_hat, 0.0) if has_no_tail(ratio) else k_hat
    weights, points = log_weights.exp().unsqueeze(-1), z.double()
    mean, weighted, possible = points.mean(0), (weights * points).sum(0), torch.isfinite(ratio)
    weighted_spread = (weights * (points - weighted).square()).sum(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    narrowing = (points.std(0) / weighted_spread).log()
    mean_shift = (mean - weighted).abs() / weighted_spread
    usable = points[possible] if broken else points
    distance = (usable.mean(0) - weighted).abs() / weighted_spread
    heavy = heavy_tails(usable)
    if bool(heavy.any()):  # a guide may have far draws of no weight where the posterior has light tails
        heavy &= heavy_tails(points[resample(log_weights, len(points), seed=0)])
    if bool(heavy.any()):  # moments that do not exist are noise
        moved, narrowed = _quantile_shifts(points[:, heavy], weights[:, 0])
        mean_shift[heavy], distance[heavy], narrowing[heavy] = moved, moved, narrowed
    shifts = [part.abs().max() for part in _quantile_shifts(points, weights[:, 0])] if quantiles else []
    return Weighing(
        log_weights=log_weights,
        k_hat=k_hat,
        ess=float(1.0 / weights.square().sum()),
        elbo=float(ratio[possible].mean()),
        log_evidence=log_evidence,
        mean_shift=mean_shift,
        sd_shift=narrowing.abs(),
        widening=float(-narrowing.min()),
        distance=float(distance.max()),
        broken=broken,
        heavy=heavy,
        quantile_shift=float(max(shifts)) if shifts else None,
        farthest=int(distance.argmax()),
        widest=int(narrowing.argmin()),
    )


def heavy_tails(points: Tensor, *, index: float = TAIL_INDEX_HEAVY) -> Tensor:
    """Return which columns (D,) of draws (S, D) have tails so heavy that their variance may not exist.

    The tail index of each side is estimated from the 3 sqrt(S) draws that are farthest from the median. From an index
    of 0.5 on there is no variance; what counts as heavy begins a little below, or at ``index``.

    Reference: Dekkers, Einmahl and de Haan 1989, "A moment estimator for the index of an extreme-value distribution".
    """
    count = len(points)
    tail = int(3.0 * math.sqrt(count))
    if tail < 30 or tail >= count // 2:
        return torch.zeros(points.shape[1], dtype=torch.bool, device=points.device)
    rows = torch.nan_to_num(points.mT)
    ordered = torch.from_numpy(np.sort(rows.numpy(), axis=1)) if rows.device.type == "cpu" else rows.sort(1).values
    middle = ordered[:, (count - 1) // 2, None]
    heavy = torch.zeros(points.shape[1], dtype=torch.bool, device=points.device)
    for largest in ((ordered[:, -tail - 1 :] - middle).flip(1), middle - ordered[:, : tail + 1]):
        largest = largest.clamp_min(torch.finfo(points.dtype).tiny).log()
        excess = largest[:, :-1] - largest[:, -1:]
        first, second = excess.mean(1), excess.square().mean(1)
        found = first + 1.0 - 0.5 / (1.0 - first.square() / second.clamp_min(torch.finfo(points.dtype).tiny))
        heavy = heavy | (found > index)
    return heavy


def resample(log_weights: Tensor, draws: int, *, seed: int) -> Tensor:
    """Return ``draws`` indices drawn by systematic resampling of normalized log weights (S,), in random order."""
    generator = torch.Generator().manual_seed(derive(seed, "resampling"))
    cumulative = log_weights.double().cpu().exp().cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(draws, dtype=torch.float64) + offset) / draws
    index = torch.searchsorted(cumulative, points * cumulative[-1]).clamp_max(len(cumulative) - 1)
    return index[torch.randperm(draws, generator=generator)].to(log_weights.device)


def _quantile_shifts(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return shifts of quartiles in weighted sds (by the quartiles), and log ratios of spreads, raw over weighted."""
    columns = points.mT.contiguous()
    places = in_order(columns)
    levels = torch.tensor(LEVELS, dtype=points.dtype, device=points.device)
    weighted = weighted_quantiles(columns, places, weights, levels)
    raw = quantiles(columns, places, levels)
    ratios = torch.stack([(raw[j] - raw[i]) / (weighted[j] - weighted[i]) for i, j in ((0, 4), (1, 3))])
    widest = ratios.log().abs().argmax(0)
    shifts = (raw - weighted)[1:4].abs() / sd_of(weighted)
    return shifts.amax(0), ratios.log().gather(0, widest[None])[0]


def sd_of(quantiles: Tensor) -> Tensor:
    """Return the sds (D,) of normal distributions with these quartiles, given quantiles at ``LEVELS`` (5, D)."""
    return ((quantiles[3] - quantiles[1]) / 1.349).clamp_min(torch.finfo(quantiles.dtype).tiny)


def weighted_quantiles(rows: Tensor, places: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Return quantiles (L, D) of rows (D, S) with normalized weights (S,), by their order, linear between neighbors.

    A value stands at the middle of its weight, the first one at 0 and the last one at 1. So equal weights give
    :func:`quantiles`: a difference is one of weights, and not of two definitions. Values of weight 0 do not count.
    """
    if not bool((weights > 0.0).all()):
        places = places[weights[places] > 0.0].reshape(len(rows), -1)
    if places.shape[1] == 1:
        return rows.gather(1, places).expand(-1, levels.shape[-1]).mT
    ordered = weights[places]
    middles = ordered.cumsum(1) - 0.5 * ordered
    middles = (middles - middles[:, :1]) / (middles[:, -1:] - middles[:, :1])
    wanted = levels.expand(len(rows), -1).contiguous()
    above = torch.searchsorted(middles, wanted).clamp(1, places.shape[1] - 1)
    (start, low), (end, high) = (
        (middles.gather(1, at), rows.gather(1, places.gather(1, at))) for at in (above - 1, above)
    )
    share = ((wanted - start) / (end - start).clamp_min(torch.finfo(weights.dtype).tiny)).clamp(0.0, 1.0)
    return torch.lerp(low, high, share.to(rows)).mT


def in_order(rows: Tensor) -> Tensor:
    """Return the order of each row (D, S); on the processor NumPy's, which is several times as fast as torch's."""
    if rows.device.type != "cpu":
        return rows.argsort(1)
    return torch.from_numpy(np.argsort(rows.numpy(), axis=1))


def quantiles(rows: Tensor, places: Tensor, levels: Tensor) -> Tensor:
    """Return quantiles (L, D) of rows (D, S) by their order, linear between two neighbors."""
    at = levels * (rows.shape[1] - 1)
    below = at.floor()
    low, high = (rows.gather(1, places[:, part.long()]) for part in (below, at.ceil()))
    return torch.lerp(low, high, at - below).mT


def bridge_value(at_p: Tensor, at_q: Tensor, share: float) -> tuple[float, bool]:
    r"""Return :math:`\log Z` and whether the iteration settled, from log ratios :math:`\log \tilde p - \log q`.

    .. math:: Z = \frac{\frac 1{N_q} \sum_{z \sim q} e^\ell / (s e^\ell + (1 - s) Z)}
                       {\frac 1{N_p} \sum_{z \sim p} 1 / (s e^\ell + (1 - s) Z)}

    Ratios are at draws of p (N_p,) and of q (N_q,), in double precision; s is the share of those of p.

    Reference: Meng and Wong 1996, "Simulating ratios of normalizing constants via a simple identity".
    """
    value, settled = 0.0, False
    for _ in range(1000):
        above, below = bridge_terms(at_p, at_q, value, share)
        new = float(log_mean(above) - log_mean(below))
        settled = abs(new - value) < 1e-10  # nats
        value = new
        if settled or not math.isfinite(value):
            break
    return value, settled


def bridge_terms(at_p: Tensor, at_q: Tensor, value: float, share: float) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the terms of numerator (N_q,) and denominator (N_p,), at log Z = ``value``."""
    log_p_share, log_q_share = math.log(share), math.log1p(-share)
    other_q, other_p = (torch.full_like(at, log_q_share + value) for at in (at_q, at_p))
    return at_q - torch.logaddexp(log_p_share + at_q, other_q), -torch.logaddexp(log_p_share + at_p, other_p)


def log_mean(log_weights: Tensor) -> Tensor:
    """Return the log of the mean weight, weights that are not finite being zero: a log mass."""
    usable = torch.where(torch.isfinite(log_weights), log_weights, -torch.inf)
    return torch.logsumexp(usable, -1) - math.log(usable.shape[-1])


def tempered(log_weights: Tensor) -> float:
    """Return the power of weights (S,), up to 1, that leaves a tenth of the draws effective."""

    def share(power: float) -> float:
        return float(1.0 / torch.softmax(power * log_weights, 0).square().sum()) / len(log_weights)

    low, high = 0.0, 1.0
    if share(high) >= ESS_SHARE_LEAST:
        return high
    for _ in range(30):  # bisection
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) > ESS_SHARE_LEAST else (low, middle)
    return low


# by how much changes (V,) exceed errors, which only make an sd smaller (V,), and what is changed at a place, in words
Compared = tuple[Tensor, Tensor, Callable[[int], tuple[str, str]]]


def changed_values(values: Mapping[str, Tensor], log_weights: Tensor, draws: int | None = None) -> list[str]:
    """Say which mean or sd of the model's own values weighting changes most, if it is more than chance explains.

    An sd that becomes smaller is named only if nothing else changes, since the verdict minds it less.
    A scale or a bound is the exponential of its coordinate. Its draws may have a tail that is too heavy by far, where
    the coordinate's hardly differ. Of values that have no fourth moment under the weights, quantiles are compared, and
    those of the draws to use, the first ``draws`` of all. Where a fourth moment exists, their mean and sd are compared
    too, with the error of as many exact draws: a few draws of hardly any weight can double an sd. ``log_weights`` (S,)
    are normalized.
    """
    weights = log_weights.double().exp()
    chosen = resample(log_weights.double(), len(weights), seed=0)
    worst, said = (False, 0.0), list[str]()
    for name, value in values.items():
        flat = value.reshape(len(value), -1).double()
        if not value.is_floating_point() or not flat.shape[1]:
            continue
        heavy = heavy_tails(flat[chosen], index=TAIL_INDEX_FOURTH)
        for columns, compare in ((~heavy, _moments), (heavy, _quantiles)):
            among = columns.nonzero()[:, 0]
            if not len(among):
                continue
            beyond, narrows, about = compare(flat[:, among], weights, draws or len(flat))
            excess = torch.where(torch.isfinite(beyond), beyond - SHIFT_MOST, -torch.inf)
            for kind in (narrows, ~narrows):
                place = int(torch.where(kind, excess, -torch.inf).argmax())
                rank = not bool(narrows[place]), float(excess[place])
                if rank[1] > 0.0 and rank > worst:
                    worst, places = rank, itertools.product(*map(range, value.shape[1:]))
                    index = next(itertools.islice(places, int(among[place]), None))
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
    by_sd, by_log_factor = shift.gather(0, among[None])[0], ratio.gather(0, among[None])[0]

    def said(place: int) -> tuple[str, str]:
        by, log_factor = float(by_sd[place]), float(by_log_factor[place])
        if by > abs(log_factor):
            return "mean", f"by {in_words(by)} sd"
        return "sd", f"by a factor {in_words(math.exp(-log_factor))}"

    return excess, by_log_factor >= by_sd, said


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

    return excess, torch.zeros_like(excess, dtype=torch.bool), said


def element(name: str, index: Sequence[int]) -> str:
    """Return what an element of a site is called."""
    return f"{name}[{','.join(map(str, index))}]" if index else name
