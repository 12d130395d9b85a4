r"""How far a fitted prior may be from the posterior that it stands for: what each link of a chain adds, and what stays.

The flow q of a link is moved to the means and sds of the draws of the posterior p, so these have the errors of the
draws; but not if that makes draws less likely, as of narrow modes whose masses are a little off. To them comes what
other differences of shape do to the posteriors of further data. If draws of q have weights, their size is

.. math:: \epsilon^2 = \operatorname{E}_q (p / q)^2 - 1 = S / \text{ESS} - 1 = \sum_n \epsilon_n^2

with the parts of p / q - 1 by Hermite polynomials of degree n, for a posterior that is about normal. Further data leave
a share s of the variances, alike in all directions, as batches of one kind do. The difference of means in sds, in
length over all coordinates, then has the mean square over data

.. math:: \sum_{n \ge 2} n (1 - s)^{n - 1} s\, \epsilon_n^2 \le \epsilon^2 / 2

where n = 1 is missing, since means agree; that of log sds is at most half of it. So :math:`\epsilon / \sqrt 2` is a
standard error over further data, and 1.96 of it are stated: a length of normal errors with this mean square exceeds
them with at most 5 % (Szekely and Bakirov 2003). Where draws come from no flow over the sites, both are compared under
further data. Errors of links add up in squares. Data of later batches make an error of a mean smaller, and bring out
errors of shape, so none is taken to fade.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import ending, with_preprocess
from pyro_flows.support.numbers import mixing
from pyro_flows.transforms.fixed import Preprocess

CONFIDENCE = 0.95  # that all coordinates are within the stated error
FAR = 6.0  # sds beyond which a draw counts as that far off: moments of heavy tails are noise
MIDDLE = 0.15865  # the quantile one sd below the mean of a normal distribution
DRAWN = 50_000  # draws of a flow, for its moments
DIRECTIONS = 8  # at most, along which further data are tried
NODES, NODE_WEIGHTS = hermegauss(5)  # of these data, in sqrt(2) sds: far ones bring out most, though they are rare
TINY = torch.finfo(torch.float64).tiny

Errors = tuple[float, float, float]  # of a link, see :func:`matched`


class PriorError(NamedTuple):
    """The accumulated error of a prior: bounds that hold for all coordinates, with 95 %."""

    mean: float  # of a mean, in sds
    sd: float  # of a log sd
    links: int  # posteriors, one after the other, that the prior comes from


UNKNOWN = PriorError(math.inf, math.inf, 1)


class Sample(NamedTuple):
    """Draws of a distribution."""

    z: Tensor  # (S, D)
    weights: Tensor  # (S,), their sum is one
    inflation: tuple[Tensor, Tensor] | None = None  # (D,): of errors of means and of log sds, if draws are of chains

    @classmethod
    def of(cls, z: Tensor, weights: Tensor, chains: int = 1) -> Sample:
        """Make a sample of draws of chains, one after the other, or of independent draws, whose copies are joined."""
        if chains == 1:
            distinct, place = torch.unique(z, dim=0, return_inverse=True)
            return cls(distinct, weights.new_zeros(len(distinct)).index_add(0, place, weights))
        by_chain = z.unflatten(0, (chains, -1))
        own = moments(cls(z, weights), box(z))
        mean, sd = mixing.effective(by_chain).rsqrt().to(z.device), mixing.sd_errors(by_chain).to(z.device)
        inflation = (mean / own.mean_error).nan_to_num(math.inf), (sd / own.sd_error).nan_to_num(math.inf)
        return cls(z, weights, inflation)

    def weighted(self, log_factor: Tensor) -> Sample:
        """Return the sample with weights multiplied by the exponentials of (S,) numbers."""
        return self._replace(weights=torch.softmax(self.weights.log() + log_factor, 0))


class Moments(NamedTuple):
    """Means and sds, and their standard errors, of a mean in sds and of a log sd: (D,) each."""

    mean: Tensor
    sd: Tensor
    mean_error: Tensor
    sd_error: Tensor


def equal(z: Tensor) -> Tensor:
    return torch.full((len(z),), 1.0 / len(z), dtype=torch.float64, device=z.device)


def box(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value (D,) that a draw counts with."""
    ordered = z.double().sort(0).values
    low, middle, high = (ordered[round(level * (len(z) - 1))] for level in (MIDDLE, 0.5, 1.0 - MIDDLE))
    reach = 0.5 * FAR * (high - low)
    return middle - reach, middle + reach


def moments(sample: Sample, within: tuple[Tensor, Tensor]) -> Moments:
    mean, sd, influences = _influences(sample, within)
    errors = [part.square().sum(0).sqrt() for part in influences]
    if sample.inflation is not None:
        errors = [error * factor for error, factor in zip(errors, sample.inflation, strict=True)]
    return Moments(mean, sd, *errors)


def _influences(sample: Sample, within: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return means and sds (D,), and what each draw (S, D) adds to a mean, in sds, and to a log sd."""
    z, weights = sample.z.double().clamp(*within), sample.weights[:, None]
    mean = (weights * z).sum(0)
    away = z - mean
    sd = (weights * away.square()).sum(0).sqrt().clamp_min(TINY)
    scaled = away / sd
    return mean, sd, [weights * scaled, 0.5 * weights * (scaled.square() - 1.0)]


def compared(wanted: Sample, has: Sample, within: tuple[Tensor, Tensor], *, same: bool) -> Moments:
    """Return the differences of means, in sds, and of log sds, and their standard errors.

    Most errors cancel if both samples are the ``same`` draws but for weights and small moves.
    """
    one, other = moments(wanted, within), moments(has, within)
    errors = [torch.hypot(*pair) for pair in zip(one[2:], other[2:], strict=True)]
    if same:
        pairs = zip(_influences(wanted, within)[2], _influences(has, within)[2], strict=True)
        errors = [(part - known).square().sum(0).sqrt() for part, known in pairs]
    return Moments((one.mean - other.mean) / one.sd, (one.sd / other.sd).log(), *errors)


@torch.no_grad()
def matched(flow: Flow, sample: Sample, *, own: bool) -> Errors:
    """Move a flow to the means and sds of a sample; return the standard errors of means and of log sds that stay.

    A difference d with the standard error e is taken off by d^2 / (d^2 + e^2) of itself, so that noise changes little.
    The flow is moved only if that makes the draws likelier: where its modes have masses that are a little off, the
    moments tell of these, and a move would put each narrow mode at the wrong place.
    To what is left comes what other differences of shape would do to the posterior of further data: in these errors,
    or in a third number, the epsilon above, if the sample's draws are the flow's ``own``. The flow is changed in place.
    """
    within = box(sample.z)
    drawn = sample.z if own else flow.draw(DRAWN)[0]
    has = Sample(drawn, equal(drawn))
    apart, at = compared(sample, has, within, same=own), moments(has, within)
    pairs = ((apart.mean, apart.mean_error), (apart.sd, apart.sd_error))
    shifts = [_share(difference, error) * difference for difference, error in pairs]
    to, factor = at.mean + moments(sample, within).sd * shifts[0], shifts[1].exp()
    if _gain(flow, sample, at.mean, to, factor) > 0.0:
        _move(flow, at.mean, to, factor)
    else:
        to, factor, shifts = at.mean, torch.ones_like(factor), [torch.zeros_like(shift) for shift in shifts]
    left = [error.square() + (d - shift).square() for (d, error), shift in zip(pairs, shifts, strict=True)]
    bound = 0.0
    if own:
        bound = math.sqrt(max(len(drawn) * float(sample.weights.square().sum()) - 1.0, 0.0))
    else:
        moved_draws = (to + factor * (drawn.double() - at.mean)).to(drawn)
        shape = shape_errors(sample, has._replace(z=moved_draws), left[0])
        left = [one + other for one, other in zip(left, shape, strict=True)]
    mean, sd = (float(part.sqrt().max()) for part in left)
    return mean, sd, bound


def _share(difference: Tensor, error: Tensor) -> Tensor:
    """Return which part of differences (D,) is taken off, given their standard errors."""
    share = difference.square() / (difference.square() + error.square()).clamp_min(TINY)
    return torch.where(torch.isfinite(error), share, 0.0)


def _gain(flow: Flow, sample: Sample, center: Tensor, to: Tensor, factor: Tensor) -> float:
    """Return how many nats likelier a draw of a sample is, on average, after :func:`_move`."""
    before = center + (sample.z.double() - to) / factor
    terms = flow.log_prob(before.to(sample.z)) - factor.log().sum() - flow.log_prob(sample.z)
    return float(sample.weights @ terms.double())


def shape_errors(wanted: Sample, has: Sample, mean_error: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return mean squared differences (D,) of means and of log sds that further data bring out.

    Further data about a direction, as informative as those so far, weight the draws by a normal density of it. Its
    center is drawn as such data would be. What then differs between both samples, beyond its standard error, is
    averaged over centers, and summed over directions: one along each principal axis.

    An error e of a mean, in sds, becomes one of a log sd as well. The least change of the density that moves the mean,
    :math:`1 + e (z - m) / s`, makes this :math:`e\, \gamma_c s_c / 2 s`, with the sd and the skewness given such data.
    Of two modes alike, the sd does not tell how much mass each has, but it does once data prefer one.

    The draws ``wanted`` are those of the posterior; the flow ``has`` the others, which are independent of them. Errors
    of means, squared, are ``mean_error`` (D,).
    """
    weights = wanted.weights[:, None]
    within = box(wanted.z)
    (center, spread, *_), z = moments(wanted, within), wanted.z.double().clamp(*within)
    variances, axes = torch.linalg.eigh((weights * (z - center)).mT @ (z - center))
    chosen = torch.randperm(len(variances))[:DIRECTIONS].to(z.device)
    scaled = (axes / variances.clamp_min(TINY).sqrt())[:, chosen]
    places = [(sample.z.double().clamp(*within) - center) @ scaled for sample in (wanted, has)]
    total = torch.zeros(2, z.shape[1], dtype=torch.float64, device=z.device)
    for one, other in zip(places[0].unbind(1), places[1].unbind(1), strict=True):
        for node, weight in zip(NODES, NODE_WEIGHTS / NODE_WEIGHTS.sum(), strict=True):
            to = math.sqrt(2.0) * node
            tilted = [sample.weighted(-0.5 * (place - to).square()) for sample, place in ((wanted, one), (has, other))]
            apart = compared(tilted[0], tilted[1], within, same=False)
            total[0] += weight * (apart.mean.square() - apart.mean_error.square())
            total[1] += weight * (apart.sd.square() - apart.sd_error.square())
            mean, sd, *_ = moments(tilted[0], within)
            skewness = tilted[0].weights @ ((z - mean) / sd) ** 3
            total[1] += weight * mean_error * (0.5 * skewness * sd / spread).square()
    total = (total * (len(variances) / len(chosen))).clamp_min(0.0)
    return total[0], total[1]


def _move(flow: Flow, center: Tensor, to: Tensor, factor: Tensor) -> None:
    """Let the flow end in y -> to + factor (y - center)."""
    last, like = ending(flow), next(flow.parameters(), flow._like)
    if last is None:
        loc, scale = to - factor * center, factor
    else:
        loc = to + factor * (last.loc.double() - center)
        scale = (factor[:, None] if last.full else factor) * last.scale.double()
    with_preprocess(flow, Preprocess(loc.to(like), scale.to(like)))


def accumulated(own: Errors, dim: int, earlier: list[PriorError]) -> PriorError:
    """Return the error of a prior: its own, see :func:`matched`, and those of earlier priors."""
    times, once = (two_sided((1.0 - CONFIDENCE) / parts) for parts in (2 * dim, 1))  # the third is of all coordinates
    mean = math.hypot(times * own[0], once * own[2] / math.sqrt(2.0), *(error.mean for error in earlier))
    sd = math.hypot(times * own[1], once * own[2] / 2.0, *(error.sd for error in earlier))
    return PriorError(mean, sd, 1 + max((error.links for error in earlier), default=0))


def two_sided(tail: float) -> float:
    """Return how many sds a normal number is off by, on either side, with this probability."""
    return float(-torch.special.ndtri(torch.tensor(0.5 * tail, dtype=torch.float64)))
