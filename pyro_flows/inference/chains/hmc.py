r"""Moves of many chains at once that leave the posterior as it is: Hamiltonian ones, independent ones, changes of part.

All act on :class:`~pyro_flows.inference.modes.under_covered.Points`.

Where the posterior is the same at all images of a point under exact symmetries, a chain that stands for y in part k
stands for y in any other part with the same chance. So the part is drawn anew for each draw. How fast chains move is
seen in y alone.

References: Neal 2011, "MCMC using Hamiltonian dynamics" (arXiv 1206.1901); Hoffman et al. 2019, "NeuTra-lizing bad
geometry" (arXiv 1903.03704); Tierney 1994 (independence chains); Robnik, Cohn-Gordon and Seljak 2025, "Metropolis
adjusted microcanonical Hamiltonian Monte Carlo" (arXiv 2503.01707).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from pyro_flows.flows.stacked import Images
from pyro_flows.inference.chains.adaptation import Metric, Moved
from pyro_flows.inference.chains.latent import Latent, only_finite
from pyro_flows.inference.modes.symmetries import are_the_same
from pyro_flows.inference.modes.under_covered import Points
from pyro_flows.model.graphs import Runner, record
from pyro_flows.support.thresholds import EVIDENCE_GAP_NEGLIGIBLE


def turned(u: Tensor, slope: Tensor, step: float | Tensor) -> tuple[Tensor, Tensor]:
    """Turn directions u (C, D) for a time by the slope of log p (C, D); return them and the kinetic energy gained (C,).

    With delta = step |slope| / (D - 1) and the cosine c of u and the slope, all is written in exp(-delta), which does
    not overflow.
    """
    size = slope.square().sum(1, keepdim=True).sqrt()
    towards = slope / size.clamp_min(torch.finfo(slope.dtype).tiny)
    dim = u.shape[1]
    delta = step * size / (dim - 1)
    cosine = (towards * u).sum(1, keepdim=True)
    shrink = torch.exp(-delta)
    both = 0.5 * (1.0 + cosine + (1.0 - cosine) * shrink.square())  # exp(-delta) (cosh delta + cosine sinh delta)
    along = 0.5 * (1.0 - shrink.square()) + cosine * (0.5 * (1.0 + shrink.square()) - shrink)
    new = shrink * u + along * towards
    gained = (dim - 1) * (delta + both.clamp_min(torch.finfo(u.dtype).tiny).log())[:, 0]
    return new / new.square().sum(1, keepdim=True).sqrt(), gained


def leap(
    latent: Latent, points: Points, u: Tensor, metric: Metric, step: float, turn: float
) -> tuple[Points, Tensor, Tensor]:  # fmt: skip
    """Go one ``step`` along u, and turn u for the time ``turn``; return points, u and kinetic energy gained (C,)."""
    given = latent.joined(points.x, points.k)
    runner = _runner(latent, given, metric)
    if runner is not None:
        latent.density.clock.look()
        latent.density.spend(len(u))
        scalars = torch.tensor([step, turn], dtype=u.dtype, device=u.device)
        try:
            u, gained, x, *seen = runner(given, u, *metric, scalars)
            return Points(x, points.k, *seen), u, gained
        except torch.linalg.LinAlgError:
            latent.density.spend(-len(u))  # at some of these points: they are -inf, the others count
    new = latent.look(points.x + step * metric.out(u), points.k)
    return new, *turned(u, metric.back(new.slope), turn)


def _runner(latent: Latent, points: Tensor, metric: Metric) -> Runner | None:
    """Return the recorded step for such points and units; None if the density has no graph for these."""
    key = points.shape, points.dtype, points.device, metric.axes.shape
    if key not in latent.leaps:
        graph = latent.graph(points)
        made = None if graph is None else Runner(_recorded(graph, points, metric), alike=True)
        latent.leaps.put(key, made)
    return latent.leaps[key]


def _recorded(graph: fx.GraphModule, points: Tensor, metric: Metric) -> fx.GraphModule:
    dim = len(metric.scale)

    def step(
        points: Tensor, u: Tensor, scale: Tensor, axes: Tensor, roots: Tensor, scalars: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        units = Metric(scale, axes, roots)
        x, parts = points[:, :dim], points[:, dim:]
        x = (x + scalars[0] * units.out(u)).double().to(x.dtype)  # what is evaluated is what is returned, if rounded
        seen = only_finite(*(part.to(x.dtype) for part in graph(torch.cat([x, parts], 1) if parts.shape[1] else x)))
        u, gained = turned(u, units.back(seen[3]), scalars[1])
        return u, gained, x, *seen

    unit = points.new_full((len(points), dim), dim**-0.5)
    return record(step, points.clone(), unit, *(part.clone() for part in metric), unit.new_ones(2))


@torch.no_grad()
def hamiltonian(latent: Latent, points: Points, *, step: float, leaps: int, metric: Metric) -> Moved:
    """Move all chains once, by ``leaps`` leapfrog steps of ``step`` in units of ``metric``; cost: a gradient a leap."""
    velocity = torch.randn_like(points.x)
    start = 0.5 * velocity.square().sum(1) - points.log_pi
    new = points
    velocity = velocity + 0.5 * step * metric.back(points.slope)
    for number in range(leaps):
        new = latent.look(new.x + step * metric.out(velocity), points.k)
        velocity = velocity + (0.5 if number == leaps - 1 else 1.0) * step * metric.back(new.slope)
    end = 0.5 * velocity.square().sum(1) - new.log_pi
    return _landed(points, new, velocity, torch.where(torch.isfinite(end), end - start, torch.inf), start, end)


def _landed(points: Points, new: Points, velocity: Tensor, error: Tensor, start: Tensor, end: Tensor) -> Moved:
    """Accept the ends of trajectories by the errors (C,) of their energies, which were ``start`` and are ``end``.

    An error of 1000 nats is a divergence.
    """
    chance = torch.exp(-error).clamp(max=1.0).nan_to_num(nan=0.0)
    accepted = torch.rand_like(chance) < chance
    energy = torch.where(accepted, end, start)
    return Moved(new.where(accepted, points), new.x, velocity, chance, error, energy, ~(error < 1000.0))


@torch.no_grad()
def independent(latent: Latent, points: Points) -> tuple[Points, Tensor]:
    """Propose a draw of the flow or mixture to each chain; return the points and which were taken. Cost: a gradient."""
    new = latent.look(*latent.draw(len(points.x)))
    gain = new.log_weight - points.log_weight
    taken = torch.rand_like(gain).log() < gain.nan_to_num(nan=-torch.inf)
    return new.where(taken, points), taken


@torch.no_grad()
def relabel(latent: Latent, points: Points) -> Points:
    """Draw the part of each chain anew, given z: a Gibbs step. Cost: an inverse pass, a gradient if any part changes.

    All points are looked at then: a graph is recorded for each number of points.
    """
    if latent.mixture is None:
        return points
    x, k = latent.place(points.z)
    changed = k != points.k
    if not bool(changed.any()):
        return points
    new = latent.look(torch.where(changed[:, None], x, points.x), k)
    return new.where(changed & torch.isfinite(new.log_pi), points)  # an inverse may overflow


@torch.no_grad()
def microcanonical(latent: Latent, points: Points, *, step: float, leaps: int, metric: Metric) -> Moved:
    r"""Move all chains of two or more coordinates once, by ``leaps`` steps of ``step``; cost: a gradient a leap.

    A velocity has length one and turns with the gradient of L = -log p,

    .. math:: \dot x = u, \qquad \dot u = -(I - u u^T)\, \nabla L(x) / (D - 1).

    Leapfrog steps conserve L plus a kinetic energy up to an error by which the end is accepted or not. Trajectories
    begin with new directions. Here x moves by :math:`\epsilon \sqrt D u`, so that steps and lengths have the units of
    Hamiltonian ones, whose velocities have length :math:`\sqrt D`. Half turns at the same point are made as one.
    """
    root = math.sqrt(points.x.shape[1])
    u = torch.randn_like(points.x)
    u = u / u.norm(dim=1, keepdim=True)
    new = points
    u, error = turned(u, metric.back(new.slope), 0.5 * step * root)
    for number in range(leaps):
        part = 0.5 if number == leaps - 1 else 1.0
        new, u, gained = leap(latent, new, u, metric, step * root, part * step * root)
        error = error + gained
    error = error + points.log_pi - new.log_pi
    error = torch.where(torch.isfinite(error), error, torch.inf)
    return _landed(points, new, root * u, error, -points.log_pi, -new.log_pi)


def exchanged(images: Images, points: Points) -> Points:
    """Return the points, each in a part that is drawn by torch's global generator."""
    k = torch.randint(len(images.orders), points.k.shape, device=points.k.device)
    return points._replace(k=k, z=images.image(images.home(points.z, points.k), k))


@torch.no_grad()
def swapped(latent: Latent, points: Points) -> Points:
    """Propose another part to each chain, at the same x, all with the same chance. Cost: a gradient for each point."""
    many = len(latent.parts)
    k = (points.k + torch.randint(1, many, points.k.shape, device=points.k.device)) % many
    new = latent.look(points.x, k)
    gain = new.log_pi - points.log_pi
    taken = torch.rand_like(gain).log() < gain.nan_to_num(nan=-torch.inf)
    return new.where(taken & torch.isfinite(new.log_pi), points)


def are_copies(latent: Latent) -> bool:
    return len(latent.parts) > 1 and len({part.flow for part in latent.parts}) == 1


def exchange_of(latent: Latent, points: Points, decided: bool | None) -> Images | None:
    """Return the images that chains at some points may change between freely; None for a mixture of another kind.

    Parts have to be copies of one flow, all as likely, and the target the same at the points in other parts. Chains
    that go on keep what was ``decided``; None is for chains that begin. Cost of these: a gradient for each point.
    """
    mixture = latent.mixture
    if decided is False or mixture is None or not are_copies(latent):
        return None
    even = float(latent.log_w.max() - latent.log_w.min()) <= EVIDENCE_GAP_NEGLIGIBLE
    if not even or not (decided or _is_symmetric(latent, points)):
        return None
    return Images.of(mixture.orders, mixture.signs)


@torch.no_grad()
def _is_symmetric(latent: Latent, points: Points) -> bool:
    """Whether the target is the same at some points in other parts."""
    many = len(latent.parts)
    steps = 1 + torch.arange(len(points.k), device=points.k.device) % (many - 1)
    there = latent.look(points.x, (points.k + steps) % many).log_pi
    usable = torch.isfinite(points.log_pi)
    return bool(usable.any()) and bool(are_the_same(there, points.log_pi)[usable].all())
