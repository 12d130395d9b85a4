r"""The log density of a model's global latents, those in plates integrated out by importance sampling, row by row.

.. math:: \log \hat p(\theta, x) = \log p(\theta) + \sum_i \log \frac 1K \sum_{k=1}^K
          \frac{p(x_i, y_{ik} \mid \theta)}{q(y_{ik} \mid \theta, x_i)}, \qquad y_{ik} \sim q(\cdot \mid \theta, x_i)

Each factor is an unbiased estimate of a row's likelihood, and so is their product. Weights by it are those of the
pseudo-marginal method. The random numbers of a row are the same for all :math:`\theta`, which makes differences exact
to more digits. Two halves of them tell the error.

Source: Andrieu and Roberts 2009, doi:10.1214/07-AOS574 (the pseudo-marginal method); Tran, Scharth, Pitt and Kohn 2013
(arXiv 1309.3339) for importance weights by an estimated likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.guides.collapsed import parts_of
from pyro_flows.guides.conditional import Conditional, Number, Rows, Start, at_values, vectorized
from pyro_flows.model.bijections import bijection
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import messages
from pyro_flows.verdict.psis import psis
from pyro_flows.verdict.thresholds import K_HAT_MOST

DRAWS_LEAST, DRAWS_MOST = 4, 64  # of a row, K
NOISE = 0.1  # nats: error of differences of the log density, from which on K is doubled
AT_ONCE = 1_000_000  # numbers: draws of rows at once
POINTS = 64  # at which K is chosen, and rows are looked at
LOOKED_AT = 200  # rows whose k-hat is estimated: those with the most uneven weights
UNEVEN = 0.01  # relative variance of an estimate of a row: below it, its k-hat does not matter

Shape = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # of a number's noise: the shaped noise, log derivative


@dataclass(frozen=True)
class WorstRow:
    """A row whose conditional distribution is poor: its plate, its index there, k-hat of its weights."""

    plate: str
    index: int
    k_hat: float


@dataclass
class _Terms:
    """What one part of the data says at points: sums, and the log weights of the draws of rows."""

    total: Tensor  # (S,)
    weights: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by plate: (K, S, rows), which rows


class MarginalDensity(LogDensity):
    """The log density of the globals; see the module.

    Args:
        rows: the model with its data.
        z: a point (D,) in the bulk of the guide.
        shape: what the guide's trained maps make of noise.
        start: where rows start.
        seed: of the random numbers of rows.

    Attributes:
        draws_of_rows: K.

    Raises:
        ValueError: if rows are not independent given the globals, or the model is given a subsample of them.
    """

    def __init__(self, rows: Rows, z: Tensor, shape: Shape, start: Start, seed: int) -> None:
        self.rows, self._shape, self._start, self._seed = rows, shape, start, seed
        first = rows.near_mode(z, start, {})
        self._groups = _groups(first)
        self._most_numbers = max((site.value.numel() for site in first.sites), default=1)
        sites = [site for site in messages(first.at.trace).values() if site["type"] == "sample"]
        self._nesting = max((-frame.dim for site in sites for frame in vectorized(site)), default=0)
        with seeded(derive(seed, "rows of parts")):
            self._parts = parts_of(first, None)
        self.draws_of_rows = DRAWS_LEAST
        nodes = messages(first.at.trace)
        values = {name: bijection(nodes[name]["fn"])(value) for name, value in first.base.items()}
        super().__init__(_globals_alone(rows, first.at.chosen, values), rows.args, rows.kwargs)

    def affordable(self, draws: int) -> int:
        """Return how many of so many draws a check may evaluate."""
        return min(draws, 1000)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density (S,) at ``z`` (S, D), without gradients.

        Raises:
            ValueError: if gradients are asked for.
        """
        z = self._check(z)
        if z.requires_grad:
            raise ValueError(NO_GRADIENTS)
        return self._sums(z, self.draws_of_rows).to(z.dtype)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Raise an error: there are no gradients.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_GRADIENTS)

    def choose_draws(self, z: Tensor) -> float:
        """Double the draws of a row until the error of differences at ``z`` (S, D) is small; return that error."""
        while True:
            halves = self._sums(z, self.draws_of_rows, halves=True)
            apart = halves[0] - halves[1]
            noise = float(0.5 * apart[torch.isfinite(apart)].std())
            if noise <= NOISE or self.draws_of_rows >= DRAWS_MOST:
                return noise
            self.draws_of_rows *= 2

    def worst_rows(self, z: Tensor) -> tuple[list[WorstRow], int]:
        """Return the rows whose weights have a k-hat above 0.7, the worst first, and how many rows there are."""
        found: list[WorstRow] = []
        count = 0
        for chosen, fresh in self._parts:
            terms = self._terms(z, chosen, fresh, DRAWS_MOST // 2, first=chosen is self._parts[0][0])
            for plate, (weights, kept) in terms.weights.items():
                index = chosen.get(plate, torch.arange(weights.shape[2]))
                relative = torch.log_softmax(weights.double(), 0) + math.log(len(weights))
                uneven = relative.exp().var(0).mean(0) * kept
                count += int(kept.sum())
                order = uneven.argsort(descending=True)[: max(1, LOOKED_AT // len(self._parts))]
                for row in order[uneven[order] > UNEVEN * len(weights)].tolist():
                    _, k_hat = psis(relative[:, :, row].reshape(-1))
                    if not k_hat < K_HAT_MOST:
                        found.append(WorstRow(plate, int(index[row]), float(k_hat)))
        return sorted(found, key=lambda row: -row.k_hat), count

    def _sums(self, z: Tensor, count: int, *, halves: bool = False) -> Tensor:
        """Return the log density (S,); with ``halves``, by each half of the draws of rows (2, S)."""
        pieces = []
        size = max(1, AT_ONCE // (count * self._most_numbers))
        for piece in z.split(size):
            total = torch.zeros(2 if halves else 1, len(piece), dtype=torch.float64, device=z.device)
            for number, (chosen, fresh) in enumerate(self._parts):
                terms = self._terms(piece, chosen, fresh, count, first=number == 0)
                total += terms.total
                for weights, kept in terms.weights.values():
                    for half, own in enumerate(weights.double().chunk(len(total))):
                        estimate = torch.logsumexp(own, 0) - math.log(len(own))
                        total[half] += (estimate * kept).sum(-1)
            pieces.append(total)
        found = torch.cat(pieces, 1)
        return found if halves else found[0]

    @torch.no_grad()
    def _terms(
        self, z: Tensor, chosen: Mapping[str, Tensor], fresh: Mapping[str, Tensor], count: int, *, first: bool
    ) -> _Terms:  # fmt: skip
        """Return what a part of the data says at points ``z`` (S, D); ``fresh`` rows of it have not come before."""
        nest = self._nesting
        points = z.reshape(len(z), *[1] * nest, z.shape[-1])
        now = self.rows.near_mode(points, self._start, chosen)
        with seeded(
            derive(self._seed, f"rows {sorted((name, int(rows[0])) for name, rows in chosen.items())}"), z.device
        ):
            steps, densities = self._draw(now, count)
        at = self.rows.run(points.unsqueeze(0), at_values(now.moved(now.base, steps)), now.at.chosen)
        found = _Terms(z.new_zeros(len(z), dtype=torch.float64))
        joint: dict[str, Tensor] = {}
        for name, density in at.densities().items():
            site = messages(at.trace)[name]
            if name in at.placed:
                found.total += _spread(density, nest).double().sum(tuple(range(2, 2 + nest)))[0] if first else 0.0
                continue
            group = self._groups.get(name)
            drawn = [frame for frame in vectorized(site) if frame.name in fresh]
            if not first and not drawn:
                continue  # outside of the plates whose rows are drawn: it counts once
            ratio = math.prod(frame.full_size / frame.size for frame in drawn)
            own = _spread(density, nest) / ratio
            if group is None:
                for frame in drawn:
                    shape = [1] * own.dim()
                    shape[frame.dim] = -1
                    own = own * fresh[frame.name].to(own).reshape(shape)
                found.total += own.double().sum(tuple(range(2, 2 + nest)))[0]
                continue
            axis = next(frame.dim for frame in vectorized(site) if frame.name == group)
            joint[group] = joint.get(group, torch.zeros(())) + _of_rows(own, axis, nest)
        for name, log_q in densities.items():
            group = self._groups.get(name)
            if group is not None and group in joint:
                site = messages(at.trace)[name]
                axis = at.locals[name].plates[group]
                own = scale_and_mask(log_q, 1.0, site["mask"])
                joint[group] = joint[group] - _of_rows(_spread(own, nest), axis, nest)
        for group, weights in joint.items():
            kept = fresh.get(group, torch.ones(weights.shape[2], dtype=torch.bool)).to(weights.device)
            found.weights[group] = weights, kept
        return found

    def _draw(self, now: Conditional, count: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return steps of the numbers (K, S, *rows), and the log densities of the sites."""
        densities: list[Tensor] = []

        def noise(index: int, _: torch.Size) -> Tensor:
            number: Number = now.numbers[index]
            eps = torch.randn(count, 1, *number.own.shape[1:]).to(number.own)
            shaped, ladj = self._shape(index, eps)
            densities.append(torch.distributions.Normal(0.0, 1.0).log_prob(eps) - ladj - number.sd.log())
            return shaped

        return now.draw(noise), {name: torch.stack(parts).sum(0) for name, parts in now.by_site(densities).items()}


NO_GRADIENTS = (
    "posterior: latents in plates are integrated out by importance sampling, which has no gradients. Train the guide "
    "for longer, or diagnose a model without subsampling."
)


def _spread(values: Tensor, nest: int) -> Tensor:
    """Return values with one axis for draws of rows, one for points, and all axes of plates."""
    return values.reshape(*[1] * (2 + nest - values.dim()), *values.shape)


def _of_rows(values: Tensor, axis: int, nest: int) -> Tensor:
    """Add up what belongs to one row: (K, S, *plates) -> (K, S, rows)."""
    others = [dim for dim in range(-nest, 0) if dim != axis]
    found = values.sum(others, keepdim=True) if others else values
    return found.reshape(*found.shape[:2], -1)


def _groups(first: Conditional) -> dict[str, str]:
    """Return the plate whose rows are integrated out, for each site in plates and the data that depend on it.

    Raises:
        ValueError: if there is no such plate for a site.
    """
    nodes, parts = messages(first.at.trace), first.at.densities()
    for name, site in nodes.items():
        if site["type"] == "sample":
            subsampled = [frame.name for frame in vectorized(site) if frame.full_size not in (None, frame.size)]
            if given := [plate for plate in subsampled if plate not in first.at.drawn]:
                raise ValueError(
                    f"plate {given[0]!r}: the model is given a subsample, and a verdict takes all rows. Pass all of "
                    "them, for example subsample=torch.arange(size)."
                )
            if len(subsampled) > 1:
                raise ValueError(f"site {name!r}: expected one subsampled plate for a verdict, got {subsampled}.")
    groups: dict[str, str] = {}
    for site in first.sites:
        plates = sorted(site.plates, key=lambda name: (name in first.at.drawn, site.batch[site.plates[name]]))
        outer = [other for other in first.sites if other is not site and site.inside(other)]
        groups[site.name] = next((groups[other.name] for other in outer if other.name in groups), plates[-1])
    for name, part in parts.items():
        if name in groups or name in first.at.placed or not part.requires_grad:
            continue
        values = [site.value for site in first.sites]
        slopes = torch.autograd.grad(part.sum(), values, retain_graph=True, allow_unused=True)
        needed = {groups[site.name] for site, slope in zip(first.sites, slopes, strict=True) if slope is not None}
        plates = [frame.name for frame in vectorized(nodes[name])]
        if len(needed) > 1 or not needed <= set(plates):
            raise ValueError(
                f"site {name!r}: expected data in the plate of the latents that they depend on "
                f"({', '.join(sorted(needed))}), got plates {plates}. Rows cannot be judged one by one."
            )
        groups |= dict.fromkeys([name], *needed) if needed else {}
    return groups


class _Fixed(Messenger):
    """Run a model with these rows and latents in plates."""

    def __init__(self, chosen: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.fixed = {**chosen, **values}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and msg["name"] in self.fixed:
            msg["value"] = self.fixed[msg["name"]].detach()


def _globals_alone(rows: Rows, chosen: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return the model without data and latents in plates."""
    names = [latent.name for latent in rows.latents]

    def model(*args: Any, **kwargs: Any) -> None:
        with poutine.block(expose=names), _Fixed(chosen, values):
            rows.model(*args, **kwargs)

    return model
