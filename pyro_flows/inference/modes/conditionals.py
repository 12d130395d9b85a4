r"""The normal distribution of all coordinates but a few, given these: its precision as a sum of known functions.

Where the log density is quadratic in :math:`z_I` given :math:`\theta`, its precision :math:`H(\theta)` and its gradient
:math:`h(\theta)` at :math:`z_I = 0` are the same functions of :math:`\theta`, entry by entry, with other coefficients:
a scale comes in by powers of its exponential, a slope by its powers, a correlation by powers of a logistic function.
Along each held coordinate, the fewest functions that fit are found; their products are fitted by least squares. These
numbers have no noise, so that a residual shows whether a function is missing. Then the marginal of :math:`\theta` costs
a density and a factorization,

.. math:: \log p(\theta) = \log p(\theta, m(\theta)) - \tfrac12 \log\det H(\theta) + \text{const},
    \qquad m = H^{-1} h.

Reference: Rue, Martino and Chopin 2009 (doi:10.1111/j.1467-9868.2008.00700.x).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.gaussian_conditionals import nested
from pyro_flows.flows.gaussian_conditionals import nested_of as map_of
from pyro_flows.inference.modes.tops import hessians
from pyro_flows.inference.starts.curvature import FULL_HESSIAN_UP_TO, second_derivatives
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.numbers.tensors import least_squares
from pyro_flows.transforms.nested import Terms

MOST_HELD = 6  # coordinates
RATES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # of exponentials: powers of a scale, a variance or a precision
MOST_FUNCTIONS = 4  # along one coordinate: exponentials, or powers of a polynomial
REACH = 2.0  # spreads to either side that points along a held coordinate reach
UNCHANGED = {torch.float64: 1e-7, torch.float32: 3e-3}  # change of an entry of a scaled Hessian that is rounding
ERROR_MOST = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative, of an entry by the functions
MOST_TERMS = 160  # products of functions of all held coordinates


def can_have_conditionals(density: LogDensity) -> bool:
    """Whether a hundred Hessians can be had: one may write thirty million numbers."""
    cheap = density.dim * density.written <= 3e7
    return density.batched and 2 < density.dim <= FULL_HESSIAN_UP_TO and density.dtype in UNCHANGED and cheap


@torch.no_grad()
def hyperparameters_of(density: LogDensity, points: Tensor) -> list[int]:
    r"""Return the coordinates to hold, rising; none if there are more than a few, or if all others are not normal.

    In a latent Gaussian model the log density is quadratic in all coordinates but a few, :math:`\theta`: scales, and
    slopes of what is latent itself. Then the Hessian over the others does not depend on them. So the others are moved
    at random, and a coordinate whose row of the Hessian changes most is held, until nothing changes.

    The others are moved near points (N, D). Randomness is torch's global one. Cost: up to 14 times 4 N Hessians.
    """
    before = -second_derivatives(density, points, exact=True).double()
    if not bool(torch.isfinite(before).all()):
        return []
    units = before.diagonal(dim1=1, dim2=2).abs().sqrt()
    units = torch.maximum(units, 1e-6 * units.amax(1, keepdim=True))
    held = list[int]()
    while True:
        change = _change(density, points, before, units, held)
        if float(change.max()) <= UNCHANGED[density.dtype]:
            break
        held.append(int(change.square().sum(1).argmax()))
        if len(held) > MOST_HELD or len(held) > density.dim - 2:
            return []
    for one in held[:-1]:
        fewer = [number for number in held if number != one]
        if float(_change(density, points, before, units, fewer).max()) <= UNCHANGED[density.dtype]:
            held = fewer
    return sorted(held)


def _change(density: LogDensity, points: Tensor, before: Tensor, units: Tensor, held: list[int]) -> Tensor:
    """Return the largest change (D, D) of entries of Hessians in units, with others than those held moved at random.

    Each point is moved three times, by half a unit. The change is infinite where a Hessian is not finite.
    """
    noise = torch.randn(3, *points.shape, dtype=torch.float64, device=points.device)
    noise[..., held] = 0.0
    moved = points + (0.5 * noise / units.clamp_min(1e-3)).to(points)
    after = -second_derivatives(density, moved.flatten(0, 1), exact=True).double().unflatten(0, moved.shape[:2])
    change = (after - before).abs() / (units[:, :, None] * units[:, None, :])
    change = change.nan_to_num(nan=torch.inf).amax((0, 1))
    change[held] = 0.0
    change[:, held] = 0.0
    return change


class Function(NamedTuple):
    """A function of one held coordinate, the constant by default: see :class:`~pyro_flows.transforms.nested.Terms`."""

    rate: float = 0.0
    power: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Conditional:
    """The distribution of all coordinates but the held ones, given these: coefficients (T, E + D - k) of T functions.

    ``order`` is that of the others in the precision, whose root has few entries that are not zero. ``entries`` are rows
    and columns (E,) of its lower half.
    """

    density: LogDensity = field(repr=False)
    held: list[int]
    order: Tensor
    terms: Terms
    coefficients: Tensor
    entries: tuple[Tensor, Tensor]

    def flow(self, layers: int) -> Flow:
        """Return a flow of these conditionals, its held coordinates at the identity."""
        options = {"terms": len(self.terms.rates), "entries": len(self.entries[0]), "layers": layers}
        flow = nested(self.density.dim, held=self.held, **options).to(self.order.device, torch.float64)
        zero = torch.zeros(len(self.order), dtype=torch.float64, device=self.order.device)
        map_of(flow).set(self.terms, self.coefficients, self.entries, self.order, zero)
        return flow

    @torch.no_grad()
    def marginal(self, theta: Tensor) -> Tensor:
        """Return the log density (N,) of held coordinates (N, k), -inf where the others have no normal distribution."""
        return torch.cat([self._marginal(part) for part in theta.split(256)])

    def _marginal(self, theta: Tensor) -> Tensor:
        found, size = self.terms.at(theta) @ self.coefficients, len(self.order)
        lower = found.new_zeros(len(theta), size, size)
        lower[:, self.entries[0], self.entries[1]] = found[:, : len(self.entries[0])]
        root, faults = torch.linalg.cholesky_ex(lower.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0))
        usable = (faults == 0) & torch.isfinite(found).all(1)
        root = torch.where(usable[:, None, None], root, torch.eye(size).to(root))
        z = theta.new_zeros(len(theta), self.density.dim)
        z[:, self.held] = theta
        gradients = torch.where(usable[:, None], found[:, len(self.entries[0]) :], 0.0)
        z[:, self.order] = torch.cholesky_solve(gradients[..., None], root)[..., 0]
        value = self.density(z.to(self.density.dtype)).double() - root.diagonal(dim1=1, dim2=2).log().sum(1)
        value = value + 0.5 * size * math.log(2.0 * math.pi)
        return torch.where(usable & torch.isfinite(value), value, -math.inf)

    @torch.no_grad()
    def holds(self, theta: Tensor) -> bool:
        """Whether precisions and gradients at held coordinates (N, k) are what the functions say."""
        said, own = self.terms.at(theta) @ self.coefficients, _numbers(self.density, self.held, self.order, theta)
        rows, columns = self.entries
        lower = own[0].new_zeros(own[0].shape)
        lower[:, rows, columns] = said[:, : len(rows)]
        pairs = (lower, own[0].tril()), (said[:, len(rows) :], own[1])
        exact = ERROR_MOST[self.density.dtype]
        return all(bool(((one - other).abs() <= exact * _sizes(other)).all()) for one, other in pairs)


def _sizes(values: Tensor) -> Tensor:
    """Return what errors of matrices (N, I, I) or vectors (N, I) are small against."""
    if values.dim() == 2:
        return values.abs().amax(1, keepdim=True)
    units = values.diagonal(dim1=1, dim2=2).abs().sqrt()
    return units[:, :, None] * units[:, None, :]


def _numbers(density: LogDensity, held: list[int], order: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return precisions (N, I, I) of the others in an order, and gradients (N, I) where they are zero."""
    z = theta.new_zeros(len(theta), density.dim)
    z[:, held] = theta
    z = z.to(density.dtype)
    return hessians(density, z, exact=True)[:, order[:, None], order], density.value_and_grad(z)[1].double()[:, order]


@torch.no_grad()
def conditional(density: LogDensity, held: list[int], center: Tensor, spread: Tensor) -> Conditional | None:
    """Return the distribution of all coordinates but the k held ones; None if no functions describe it.

    Functions are fitted about ``center`` (k,), in units of ``spread`` (k,). Cost: 13 k Hessians, and three for
    each function; up to 160 functions.
    """
    plain = torch.tensor([number for number in range(density.dim) if number not in held], device=center.device)
    sets = list[list[Function]]()
    for number in range(len(held)):
        theta = center + 0.3 * spread * torch.randn_like(center)  # others are not in the middle
        theta = theta.repeat(3 * MOST_FUNCTIONS + 1, 1)  # three for each function that there may be, and the constant
        theta[:, number] = center[number] + spread[number] * torch.linspace(-REACH, REACH, len(theta)).to(center)
        values = torch.cat([part.flatten(1) for part in _numbers(density, held, plain, theta)], 1)
        found = _functions(theta, values, number, center, spread, ERROR_MOST[density.dtype])
        if found is None:
            return None
        sets.append(found)
    products = list(itertools.product(*sets))
    if len(products) > MOST_TERMS:
        return None
    return _fitted(density, held, plain, center, spread, products)


def _functions(
    theta: Tensor, values: Tensor, number: int, center: Tensor, spread: Tensor, exact: float
) -> list[Function] | None:  # fmt: skip
    """Return the fewest functions of one held coordinate of which values (N, V) are sums; None if there are none."""
    if not bool(torch.isfinite(values).all()):
        return None
    size = values.abs().amax(0)
    values = values[:, size > 1e-10 * size.max()] / size[size > 1e-10 * size.max()]
    rates = (some for count in range(MOST_FUNCTIONS + 1) for some in itertools.combinations(RATES, count))
    sets = [[Function(rate=rate) for rate in some] for some in rates]
    powers = [[float(power) for power in range(1, last + 1)] for last in range(1, MOST_FUNCTIONS + 1)]
    sets += [[Function(power=power) for power in some] for some in powers]
    sets += [[Function(share=power) for power in some] for some in powers]
    for some in sorted(sets, key=len):
        chosen = [Function(), *some]
        products = [tuple(one if j == number else Function() for j in range(len(center))) for one in chosen]
        terms = _terms(products, center, spread)
        basis = torch.linalg.qr(terms.at(theta))[0]
        if float((values - basis @ (basis.mT @ values)).abs().max()) < exact:
            return chosen
    return None


def _terms(products: list[tuple[Function, ...]], center: Tensor, spread: Tensor) -> Terms:
    numbers = torch.tensor(products, dtype=torch.float64, device=center.device)
    return Terms(center, spread, numbers[..., 0], numbers[..., 1], numbers[..., 2])


def _fitted(
    density: LogDensity, held: list[int], plain: Tensor, center: Tensor, spread: Tensor,
    products: list[tuple[Function, ...]],
) -> Conditional | None:  # fmt: skip
    """Fit the coefficients of products of functions, and drop those that contribute nothing."""
    terms = _terms(products, center, spread)
    noise = torch.rand(2 * len(products) + 10, len(held), dtype=torch.float64, device=center.device)
    theta = center + REACH * spread * (2.0 * noise - 1.0)
    precisions, pulls = _numbers(density, held, plain, theta)
    if not bool(torch.isfinite(precisions).all() and torch.isfinite(pulls).all()):
        return None
    order = _order((precisions.abs() > 1e-10 * _sizes(precisions)).any(0))
    precisions, pulls = precisions[:, order[:, None], order], pulls[:, order]
    rows, columns = (precisions.abs() > 1e-10 * _sizes(precisions)).any(0).tril().nonzero(as_tuple=True)
    values = torch.cat([precisions[:, rows, columns], pulls], 1)
    size = values.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    units = terms.at(theta).abs().amax(0)
    solved = least_squares(terms.at(theta) / units, values / size)
    kept = solved.abs().amax(1) > ERROR_MOST[density.dtype] / 100.0  # all that is left out together is no error
    terms = terms._replace(rates=terms.rates[kept], powers=terms.powers[kept], shares=terms.shares[kept])
    solved = least_squares(terms.at(theta) / units[kept], values / size)
    found = Conditional(density, held, plain[order], terms, solved * size / units[kept, None], (rows, columns))
    return found if found.holds(theta) else None


def _order(linked: Tensor) -> Tensor:
    """Return an order (I,) of coordinates, whose pairs are linked (I, I), so that the root of their matrix is sparse.

    The coordinate with the fewest neighbors is next, and its neighbors become linked (Tinney and Walker 1967).
    """
    near = [set(row.nonzero()[:, 0].tolist()) - {number} for number, row in enumerate(linked.cpu())]
    left, order = set(range(len(near))), list[int]()
    while left:
        chosen = min(left, key=lambda number: (len(near[number]), number))
        for other in near[chosen]:
            near[other] = (near[other] | near[chosen]) - {other, chosen}
        left.remove(chosen)
        order.append(chosen)
    return torch.tensor(order, device=linked.device)
