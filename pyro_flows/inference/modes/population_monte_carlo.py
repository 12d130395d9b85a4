r"""Population Monte Carlo: a mixture of Student-t distributions, fitted by importance-weighted draws of its own.

Each generation draws from the mixture, weights the draws, and moves weights, places and scales of all parts at once to
where the weighted draws are, by a step of EM:

.. math:: \alpha_k = \sum_i w_i \rho_{ik}, \qquad m_k = \sum_i \frac{w_i \rho_{ik}}{\alpha_k} z_i, \qquad
    \rho_{ik} = \frac{\alpha_k q_k(z_i)}{\sum_l \alpha_l q_l(z_i)},

and so for covariances. Parts with few effective draws keep what they had. Where weights stay uneven, parts are added at
the draws with the largest weights. Two wide parts always stay, so that weights in tails are bounded (Hesterberg 1995,
"Weighted average importance sampling and defensive mixture distributions"). No gradient is taken.

Reference: Cappé, Douc, Guillin, Marin and Robert 2008, "Adaptive importance sampling in general mixture classes" (arXiv
0710.4242).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.inference.modes.hyperparameter_marginal import DF
from pyro_flows.inference.modes.survey import IN_VAIN, ROUNDS
from pyro_flows.inference.starts.prior import prior_draws
from pyro_flows.inference.verdict.deciding import LOOKED_AT_DRAWS
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.inference.verdict.weighing import resample, tempered
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import ESS_SHARE_COLLAPSED, ESS_SHARE_GOOD, K_HAT_GOOD, TAIL_SHARE

GENERATIONS = 4  # between two additions of parts
# times the scales of a mixture: its wide parts, `TAIL_SHARE` of the draws. They never move, so no tail is without draws
WIDE = 2.0, 4.0
MOST_PARTS = 64  # half of them at tempered draws: as many may be added


@dataclass(frozen=True)
class Parts:
    """Places (K, D), lower triangular scales (K, D, D), log weights (K,) and degrees of freedom of a mixture."""

    loc: Tensor
    roots: Tensor
    log_weights: Tensor
    df: float

    def __len__(self) -> int:
        return len(self.loc)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log weight and log density (K, S) of each part at points (S, D)."""
        x = torch.linalg.solve_triangular(self.roots, (z - self.loc[:, None]).mT, upper=False).double()
        constant = math.lgamma(0.5 * (self.df + 1.0)) - math.lgamma(0.5 * self.df) - 0.5 * math.log(self.df * math.pi)
        terms = constant * x.shape[1] - 0.5 * (self.df + 1.0) * torch.log1p(x.square() / self.df).sum(1)
        size = self.roots.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        return terms + (self.log_weights.double() - size)[:, None]

    def draw(self, count: int) -> Tensor:
        k = torch.multinomial(self.log_weights.double().exp(), count, replacement=True)
        x = torch.randn(count, self.loc.shape[1], dtype=self.loc.dtype, device=self.loc.device)
        chi = torch.distributions.Chi2(torch.full_like(x, self.df)).sample()
        x = x * (self.df / chi).sqrt()
        return self.loc[k] + (self.roots[k] @ x[..., None])[..., 0]

    def even(self, share: float) -> Parts:
        """Return the mixture with a share of its weight given to all parts alike."""
        weights = (1.0 - share) * self.log_weights.double().exp() + share / len(self)
        return Parts(self.loc, self.roots, weights.log().to(self.loc), self.df)

    def with_wide(self) -> Parts:
        """Return the mixture with a wide part more for each of ``WIDE``, the last ones: at its mean, with its shape."""
        weights, roots = self.log_weights.double().exp(), self.roots.double()
        mean = weights @ self.loc.double()
        inner = (self.df / (self.df - 2.0)) ** 0.5 * roots.mT
        rows = torch.cat([inner, (self.loc.double() - mean)[:, None]], 1) * weights.sqrt()[:, None, None]
        upper = torch.linalg.qr(rows.flatten(0, 1)).R
        wide = weights.new_tensor(WIDE)[:, None, None] * (upper.mT * upper.diagonal().sign())
        loc, roots = torch.cat([self.loc.double(), mean.expand(len(WIDE), -1)]), torch.cat([roots, wide])
        shares = weights.new_full((len(WIDE),), TAIL_SHARE / len(WIDE))
        log_weights = torch.cat([(1.0 - TAIL_SHARE) * weights, shares]).log()
        return Parts(loc.to(self.loc), roots.to(self.loc), log_weights.to(self.loc), self.df)

    def __getitem__(self, kept: Tensor | slice) -> Parts:
        weights = torch.log_softmax(self.log_weights[kept], 0)
        return Parts(self.loc[kept], self.roots[kept], weights, self.df)


@dataclass(frozen=True)
class Generation:
    """Draws of a mixture (S, D), its parts' densities there (K, S), normalized weights (S,), and what these are worth.

    ``share`` is the effective share of the draws.
    """

    parts: Parts
    z: Tensor
    log_parts: Tensor
    weights: Tensor
    k_hat: float
    share: float

    @property
    def worth(self) -> float:
        """The effective share, less what k-hat plus its standard error is above the threshold."""
        error = (1.0 + max(self.k_hat, 0.0)) / math.sqrt(3.0 * math.sqrt(len(self.z)))
        return self.share - max(0.0, self.k_hat + error - K_HAT_GOOD)


def begun(modes: Tensor, roots: Tensor, evidence: Tensor) -> Parts:
    """Return a part for each mode, with Laplace's scale and weight."""
    weights = torch.log_softmax(evidence.double(), 0).to(modes)
    return Parts(modes, roots, weights, max(15.0, 2.0 * modes.shape[1]))


def can_be_tempered(density: LogDensity) -> bool:
    """Whether a mixture that comes from the prior is cheap, and may find all modes, edges and ridges.

    In up to six dimensions, draws of the prior find all of a posterior. Half a million evaluations have to be cheap.
    """
    return density.batched and density.dim <= 6 and density.written <= 6000


@torch.no_grad()
def tempered_mixture(density: LogDensity, *, seed: int) -> Parts | None:
    """Return a mixture about draws that went from the prior to the posterior; None where there is no way.

    At each temperature, draws of the last mixture are weighted, so that a tenth of them is effective, and drawn anew;
    the next mixture has a part at some of them, with their covariance less what so many parts share. No top has to be
    smooth, nor has there to be one.

    Cost: 8000 densities for each of up to 12 temperatures.
    """
    with seeded(derive(seed, "from the prior"), density.device):
        draws = prior_draws(density, 1000, seed=seed)
        parts = about(draws[torch.isfinite(draws).all(1)], 1)
        for _ in range(ROUNDS):  # temperatures, at most
            if parts is None:
                return None
            z = parts.draw(2 * LOOKED_AT_DRAWS)
            ratios = density(z).double() - torch.logsumexp(parts.log_prob(z), 0)
            usable = torch.isfinite(ratios)
            z, ratios = z[usable], ratios[usable]
            if len(z) < MOST_PARTS // 2:
                return None
            power = tempered(ratios)
            chosen = resample(torch.log_softmax(power * ratios, 0), 2 * LOOKED_AT_DRAWS, seed=0)
            parts = about(z[chosen], MOST_PARTS // 2)
            if power == 1.0:
                break
    return parts


def about(draws: Tensor, count: int) -> Parts | None:
    """Return a mixture of so many parts at draws (S, D), or of one at their mean; None where they have no spread.

    Half of the parts are at any draws, half where these are far apart; each has the weight of the draws next to it. One
    alone has one and a half times the variances.
    """
    dim = draws.shape[1]
    if len(draws) <= dim:
        return None
    covariance = torch.cov(draws.double().mT).reshape(dim, dim) * (count ** (-2.0 / dim) if count > 1 else 1.5)
    root, fault = torch.linalg.cholesky_ex(covariance)
    if int(fault) or not bool(torch.isfinite(root).all()):
        return None
    if count == 1:
        return Parts(draws.mean(0, keepdim=True), root.to(draws)[None], draws.new_zeros(1), DF)
    x = torch.linalg.solve_triangular(root, draws.double().mT, upper=False).mT
    chosen = torch.randperm(len(draws))[: count // 2].to(draws.device)
    away, nearest = torch.cdist(x, x[chosen]).min(1)
    for number in range(len(chosen), count):  # the farthest draw of all that are left: small modes are far from others
        chosen = torch.cat([chosen, away.argmax()[None]])
        to_new = (x - x[chosen[-1]]).norm(dim=1)
        nearest = torch.where(to_new < away, number, nearest)
        away = torch.minimum(away, to_new)
    mass = torch.bincount(nearest, minlength=count).to(draws) + 1.0
    return Parts(draws[chosen], root.to(draws).expand(count, -1, -1).clone(), (mass / mass.sum()).log(), DF)


@torch.no_grad()
def fitted(
    density: LogDensity, parts: Parts, *, seed: int, draws: int = LOOKED_AT_DRAWS,
    report: Callable[[str], None] = lambda text: None,
) -> Generation | None:  # fmt: skip
    """Fit a mixture to the density; return the best generation, judged by draws of its own; None if none has weight.

    Cost: ``draws`` densities, and four times as many for many parts, for each of up to 40 generations.
    """
    with seeded(derive(seed, "a population"), density.device):
        best = last = _evolved(density, parts, draws)
        in_vain = 0
        while in_vain < IN_VAIN:
            if best is None or last is None or best.share < ESS_SHARE_COLLAPSED or best.worth >= ESS_SHARE_GOOD:
                break
            if len(last.parts) >= MOST_PARTS:
                break
            report(f"{len(last.parts)} parts, {last.share:.2f} of the draws effective")
            last = _evolved(density, _joined(last), draws)
            in_vain = 0 if last is not None and last.worth >= best.worth + ESS_SHARE_COLLAPSED else in_vain + 1
            best = last if last is not None and last.worth > best.worth else best
    return best


def _evolved(density: LogDensity, parts: Parts, draws: int) -> Generation | None:
    best: Generation | None = None
    for _ in range(GENERATIONS):
        now = generation(density, parts, draws)
        if now is None:
            break
        best = now if best is None or now.worth > best.worth else best
        parts = _moved(now)
    last = generation(density, parts, draws)
    return last if best is None or (last is not None and last.worth > best.worth) else best


def generation(density: LogDensity, parts: Parts, draws: int = LOOKED_AT_DRAWS) -> Generation | None:
    """Draw from a mixture, and weight the draws; None if no draw has any weight."""
    parts = parts.even(0.1).with_wide()  # so that no part is left without draws
    z = parts.draw(min(max(draws, 200 * len(parts)), 4 * draws))
    log_parts = parts.log_prob(z)
    ratios = density(z).double() - torch.logsumexp(log_parts, 0)
    ratios = torch.where(torch.isfinite(ratios), ratios, -torch.inf)
    if not bool(torch.isfinite(ratios).any()):
        return None
    log_weights, k_hat = psis(ratios)
    weights = log_weights.exp()
    return Generation(parts, z, log_parts, weights, k_hat, float(1.0 / weights.square().sum()) / len(z))


def _moved(now: Generation) -> Parts:
    """Return the parts where the weighted draws are; wide ones only if no other has any weight."""
    parts, z = now.parts, now.z.double()
    shares = torch.softmax(now.log_parts, 0).nan_to_num(nan=0.0) * now.weights
    mass = shares.sum(1)
    known = mass.square() / shares.square().sum(1).clamp_min(1e-300)  # effective draws of each part
    trust = (known / (known + 2.0 * z.shape[1])).clamp_max(1.0).nan_to_num(nan=0.0)
    own = shares / mass.clamp_min(1e-300)[:, None]
    loc = torch.lerp(parts.loc.double(), own @ z, trust[:, None])
    roots = parts.roots.double().clone()
    before = roots @ roots.mT
    narrower = (parts.df - 2.0) / parts.df  # the variance of the base is above 1
    for number in (trust > 0.0).nonzero()[:, 0].tolist():
        away = z - loc[number]
        covariance = narrower * (own[number][:, None] * away).mT @ away
        root, fault = torch.linalg.cholesky_ex(torch.lerp(before[number], covariance, trust[number]))
        if int(fault) == 0 and bool(torch.isfinite(root).all()):
            roots[number] = root
    moved = Parts(loc.to(now.z), roots.to(now.z), mass.clamp_min(1e-300).log().to(now.z), parts.df)
    kept = mass > 1e-5  # parts with less weight are left out
    kept[-len(WIDE) :] &= not bool(kept[: -len(WIDE)].any())
    return moved[kept]


def _joined(now: Generation) -> Parts:
    """Return all parts but the wide ones, with new ones at draws of large weight, a quarter as large as theirs."""
    parts = now.parts[: -len(WIDE)]
    many = min(max(2, len(parts)), MOST_PARTS - len(parts))
    excess = (now.weights * len(now.weights) - 1.0).clamp_min(0.0) * now.weights
    if not bool(excess.sum() > 0.0):
        return parts
    chosen = resample(torch.log(excess / excess.sum()), many, seed=0)
    of = now.log_parts[:, chosen].argmax(0)
    weights = torch.cat([parts.log_weights, parts.log_weights.new_full((many,), math.log(0.5 / many))])
    loc = torch.cat([parts.loc, now.z[chosen]])
    roots = torch.cat([parts.roots, 0.25 ** (1.0 / now.z.shape[1]) * now.parts.roots[of]])
    return Parts(loc, roots, torch.log_softmax(weights, 0), now.parts.df)
