r"""Moves of many chains at once that leave the posterior as it is: Hamiltonian ones, independent ones, changes of part.

All act on :class:`~pyro_flows.inference.modes.under_covered.Points`. Hamiltonian and independent ones are tempered by
:math:`\beta`: their target is :math:`\pi_\beta \propto q_0^{1 - \beta}\, \pi^\beta` in latent space, the posterior at
:math:`\beta = 1`.

Where the posterior is the same at all images of a point under exact symmetries, a chain that stands for y in part k
stands for y in any other part with the same chance. So the part is drawn anew for each draw. How fast chains move is
seen in y alone.

References: Neal 2011, "MCMC using Hamiltonian dynamics" (arXiv 1206.1901); Hoffman et al. 2019, "NeuTra-lizing bad
geometry" (arXiv 1903.03704); Tierney 1994 (independence chains); Robnik, Cohn-Gordon and Seljak 2025, "Metropolis
adjusted microcanonical Hamiltonian Monte Carlo" (arXiv 2503.01707).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from pyro_flows.flows.stacked import Images
from pyro_flows.inference.chains.adaptation import Kernel, Metric, Moved, scale_of
from pyro_flows.inference.chains.latent import Latent, only_finite
from pyro_flows.inference.modes.symmetries import are_the_same
from pyro_flows.inference.modes.under_covered import Points
from pyro_flows.model.graphs import Runner, record
from pyro_flows.support.process.seeding import derive
from pyro_flows.support.thresholds import ESS_SHARE_PROMISING, EVIDENCE_GAP_NEGLIGIBLE


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


def tempered(points: Points, beta: float) -> tuple[Tensor, Tensor]:
    """Return the log density (C,) of the tempered target and its gradient (C, D)."""
    if beta == 1.0:
        return points.log_pi, points.slope
    value = beta * points.log_pi + (1.0 - beta) * points.log_ref
    return value, beta * points.slope + (1.0 - beta) * points.ref_slope


@torch.no_grad()
def hamiltonian(latent: Latent, points: Points, *, step: float, leaps: int, metric: Metric, beta: float = 1.0) -> Moved:
    """Move all chains once, by ``leaps`` leapfrog steps of ``step`` in units of ``metric``; cost: a gradient a leap."""
    velocity = torch.randn_like(points.x)
    value, slope = tempered(points, beta)
    start = 0.5 * velocity.square().sum(1) - value
    new = points
    velocity = velocity + 0.5 * step * metric.back(slope)
    for number in range(leaps):
        new = latent.look(new.x + step * metric.out(velocity), points.k)
        value, slope = tempered(new, beta)
        velocity = velocity + (0.5 if number == leaps - 1 else 1.0) * step * metric.back(slope)
    end = 0.5 * velocity.square().sum(1) - value
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
def independent(latent: Latent, points: Points, *, beta: float = 1.0) -> tuple[Points, Tensor]:
    """Propose a draw of the flow or mixture to each chain; return the points and which were taken. Cost: a gradient."""
    new = latent.look(*latent.draw(len(points.x)))
    gain = beta * (new.log_weight - points.log_weight)
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


# annealing from the flow to the posterior -----------------------------------------------------------------------------

# Particles are drawn from the flow or mixture q and go through q^(1 - b) p^b, beta = b. Each step takes it as far as
# weights keep a given share of the effective particles; then they are resampled, and moved until they have forgotten
# where they came from. The product of the mean weights is an unbiased estimate of the evidence. Several populations
# side by side give its standard error. Reference: Del Moral, Doucet and Jasra 2006, "Sequential Monte Carlo samplers".


@dataclass
class Annealed:
    """Equally weighted particles (P,), their log evidence and its error in nats, and each beta, 1 the last."""

    points: Points
    log_evidence: float = math.nan
    standard_error: float = math.nan
    temperatures: list[float] = field(default_factory=list)


@torch.no_grad()
def anneal(
    latent: Latent, particles: int, populations: int, *, seed: int,
    report: Callable[[str], None] = lambda text: None,
) -> Annealed:  # fmt: skip
    """Anneal ``particles`` in some populations, which share temperatures and the kernel.

    Cost: about ten gradients for each particle and temperature.
    """
    torch.manual_seed(derive(seed, "annealing"))
    found = Annealed(latent.look(*latent.draw(particles)))
    log_sums = torch.zeros(populations, dtype=torch.float64, device=found.points.x.device)
    kernel, beta, number = Kernel.start(latent.dim), 0.0, 0
    metric = Metric.of(torch.ones_like(found.points.x[0]))
    while beta < 1.0 and len(found.temperatures) < 200:  # at most
        ahead = _next(found.points.log_weight.double(), beta)
        increments = ((ahead - beta) * found.points.log_weight.double()).nan_to_num(nan=-math.inf)
        parts = increments.reshape(populations, -1)
        log_sums += torch.logsumexp(parts, 1) - math.log(parts.shape[1])
        beta = ahead
        found.temperatures.append(beta)
        report(f"temperature {beta:.3g}")
        found.points = _resampled(found.points, parts)
        for _ in range(12 if beta == 1.0 else 4):  # more moves at the last temperature
            found.points = _moved(latent, found.points, kernel, metric, beta, number)
            number += 1
        metric = Metric.of(scale_of(found.points.x))
    if beta == 1.0:
        found.log_evidence = float(torch.logsumexp(log_sums, 0)) - math.log(populations)
        ratios = (log_sums - found.log_evidence).exp()
        found.standard_error = float(ratios.std() / math.sqrt(populations))
    return found


def _next(log_weights: Tensor, beta: float) -> float:
    """Return the next temperature: the farthest at which half of the particles are effective."""

    def share(ahead: float) -> float:
        weights = torch.softmax(((ahead - beta) * log_weights).nan_to_num(nan=-math.inf), 0)
        return float(1.0 / (weights.square().sum() * len(weights)))

    if share(1.0) >= ESS_SHARE_PROMISING:
        return 1.0
    low, high = beta, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= ESS_SHARE_PROMISING else (low, middle)
        if high - low < 0.1 * (low - beta):  # the last digits do not matter
            break
    return max(low, beta + 1e-6)


def _resampled(points: Points, increments: Tensor) -> Points:
    """Resample each population (rows of ``increments``) systematically by its weights."""
    size = increments.shape[1]
    chosen = []
    for number, row in enumerate(increments):
        cumulative = torch.softmax(row, 0).cumsum(0)
        offset = torch.rand((), dtype=row.dtype, device=row.device)
        places = (torch.arange(size, dtype=row.dtype, device=row.device) + offset) / size
        index = torch.searchsorted(cumulative, places * cumulative[-1]).clamp_max(size - 1)
        chosen.append(number * size + index)
    index = torch.cat(chosen)
    return Points(*(part[index] for part in points))


def _moved(latent: Latent, points: Points, kernel: Kernel, metric: Metric, beta: float, number: int) -> Points:
    """Move all particles once, by each kind of move; the step size follows."""
    points, _ = independent(latent, points, beta=beta)
    points = relabel(latent, points)
    moved = hamiltonian(latent, points, step=kernel.step, leaps=kernel.leaps(number), metric=metric, beta=beta)
    kernel.adapt(points, moved, metric, number)
    return moved.points
