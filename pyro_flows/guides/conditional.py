r"""The latents of plates given the others: a normal approximation whose cost is linear in the rows.

Write y for the unconstrained values of all latents in plates, and :math:`\theta` for the other ones. At a point y0,

.. math:: \log p(y, x \mid \theta) \approx \text{const} + g^\top (y - y_0) - \tfrac12 (y - y_0)^\top H (y - y_0).

Rows of a plate are independent given what stands outside of it. So H couples an element with those of its own row, of
plates inside, and of plates around it. It is eliminated from the innermost plates outwards, as in a tree of normal
distributions, and y is drawn from the outermost inwards, each number given those before it. This is the conditional
distribution itself where everything is linear and normal, and Laplace's approximation elsewhere. y0 is a mode, found by
Newton steps.

Sources: Tierney and Kadane 1986, doi:10.1080/01621459.1986.10478240 (the approximation of the integral); Rue, Martino
and Chopin 2009, doi:10.1111/j.1467-9868.2008.00700.x (latents given parameters).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch._C import _functorch

from pyro_flows.model.batching import batch
from pyro_flows.model.bijections import bijection, real_log_prob, real_shape
from pyro_flows.model.handlers import Place
from pyro_flows.model.noncentered import location_scale
from pyro_flows.model.precision import in_double
from pyro_flows.model.sites import (
    Frame,
    Keywords,
    Latent,
    Model,
    Placed,
    Positional,
    Site,
    by_event,
    is_open,
    is_subsample,
    messages,
    vectorized,
)
from pyro_flows.model.start import FromPrior, initial_value
from pyro_flows.support.process.seeding import derive, seeded

MOST_STEPS = 60  # Newton steps to a mode
NEAR = 0.3  # of a standard deviation of a number: how far from the mode the curvature may be taken
SMALLEST = 1e-12  # curvature
STUCK = 1e-3  # nats that a step promises by its slope, below which it ends a climb
FARTHER = 4.0  # times as long as steps before; also what a step is divided by
ROUNDING = 1e-3  # of curvatures, as a part of the largest one
OFF_CENTER = 0.3  # of the way to a draw of the prior
OF_THESE_ROWS = "Write `with pyro.plate(...) as rows:`, and pass the data of these rows, as in `obs=y[rows]`."

Chosen = Mapping[str, Tensor]  # rows of plates, by the plates' names
Start = Callable[[Site, "At"], Tensor]  # unconstrained value of a site, from its message


@dataclass
class Local:
    """A latent site in plates, in one run of the model."""

    name: str
    value: Tensor  # unconstrained (*batch, *event), a leaf
    plates: dict[str, int]  # their axes among the batch axes, negative
    event_dim: int  # of the unconstrained value
    ladj: Tensor  # log derivative of the map to the constrained value, of each row
    scale: float | Tensor = 1.0  # of the site's log density, see ``poutine.scale``

    @property
    def batch(self) -> torch.Size:
        return self.value.shape[: self.value.dim() - self.event_dim]

    @property
    def size(self) -> int:
        return math.prod(self.value.shape[self.value.dim() - self.event_dim :])

    def rows(self, value: Tensor) -> Tensor:
        """Return values with one axis for the numbers of a row."""
        return value.reshape(*self.batch, self.size)

    def inside(self, other: Local) -> bool:
        """Whether its rows are rows of the other's plates, or of plates inside of these."""
        return other.plates.items() <= self.plates.items()


class At(Place):
    """Run a model with global latents at ``z`` (*batch, D), and those in plates at values that ``start`` gives.

    Batch axes are added to the values, which are leaves, unless gradients go ``through`` them. Rows of subsampled
    plates that are not ``chosen`` are drawn. ``without_local_parents`` are latents of the flow whose priors depend on
    none in plates.
    """

    def __init__(self, rows: Rows, z: Tensor, start: Start, chosen: Chosen, through: bool) -> None:
        super().__init__(rows.latents, z)
        self.names, self.start, self.through = set(rows.local), start, through
        self.without_local_parents = {latent.name for latent in rows.latents} - set(rows.children)
        self.trace = poutine.Trace()  # of the run, with log densities
        self.chosen = dict(chosen)  # the rows of all plates of the run
        self.drawn: dict[str, tuple[int, int]] = {}  # size, and rows of a run, of plates whose rows the model draws
        self.locals: dict[str, Local] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if not is_subsample(msg):
            super()._pyro_sample(msg)
            if msg["name"] in self.names and not msg["is_observed"]:
                self._put(msg)
        elif is_open(msg):
            name, (size, rows) = msg["name"], rows_in(msg)
            if rows < size:
                self.drawn[name] = size, rows
            if name in self.chosen:
                msg["value"] = self.chosen[name]

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            self.chosen[msg["name"]] = torch.as_tensor(msg["value"])  # the caller may give a list

    def densities(self, *, exact: bool = False) -> dict[str, Tensor]:
        """Return log densities of all sites in unconstrained coordinates (*batch), scaled and masked.

        ``poutine.scale`` raises the density of a value to a power, and an ELBO has the guide's density to this power,
        too. So the log derivatives of maps to constrained values are scaled as the site is. In the model's own density,
        which is ``exact``, they are scaled by plates alone.
        """
        found = {}
        for name, site in messages(self.trace).items():
            if site["type"] != "sample" or is_subsample(site):
                continue
            found[name] = site["log_prob"]
            if (own := self.locals.get(name, self.placed.get(name))) is not None:
                scale = math.prod(f.full_size / f.size for f in vectorized(site)) if exact else site["scale"]
                found[name] = found[name] + scale_and_mask(own.ladj, scale, site["mask"])
        return found

    @property
    def given(self) -> dict[str, tuple[int, int]]:
        """Size, and rows of the run, of the subsampled plates whose rows the caller gives."""
        frames = [frame for frame in all_frames(self.trace) if is_part(frame)]
        return {frame.name: (frame.full_size, frame.size) for frame in frames if frame.name not in self.drawn}

    def _put(self, msg: Site) -> None:
        fn, transform = msg["fn"], bijection(msg["fn"])
        event_dim = transform.domain.event_dim + fn.event_dim - transform.codomain.event_dim
        start = self.start(msg, self)
        batch = torch.broadcast_shapes(start.shape[: start.dim() - event_dim], fn.batch_shape, self.z.shape[:-1])
        value = start.expand(*batch, *start.shape[start.dim() - event_dim :])
        value = value if self.through else value.detach().clone().requires_grad_()
        msg["value"] = transform(value)
        ladj = by_event(transform.log_abs_det_jacobian(value, msg["value"]), len(batch))
        self.locals[msg["name"]] = Local(msg["name"], value, axes_of(msg), event_dim, ladj)


@dataclass
class Number:
    """One number of each row of a site."""

    site: Local
    place: int  # among the numbers of a row
    raw: Tensor  # derivative of the log density
    curvature: Tensor  # negative second derivative
    gradient: Tensor  # these two, once the numbers after it are eliminated
    own: Tensor
    couplings: dict[int, Tensor] = field(default_factory=dict)  # negative mixed derivatives with numbers before it
    flat: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))  # where ``own`` is a stand-in

    @property
    def sd(self) -> Tensor:
        """Standard deviations, given the numbers before it."""
        return (torch.as_tensor(self.site.scale).to(self.own) / self.own).sqrt()


@dataclass
class Conditional:
    """The normal approximation."""

    sites: list[Local]  # those in plates, the outermost first
    numbers: list[Number]  # of their rows, in the same order, after elimination
    at: At  # the run

    def draw(self, noise: Callable[[int, torch.Size], Tensor]) -> list[Tensor]:
        """Return y - y0 of each number, for standardized draws of the numbers."""
        steps: list[Tensor] = []
        for index, number in enumerate(self.numbers):
            step = self.step(number, steps)
            steps.append(step + number.sd * noise(index, step.shape))
        return steps

    def step(self, number: Number, before: Sequence[Tensor]) -> Tensor:
        """Return the mean of y - y0 of a number, given those before it."""
        pull = number.gradient
        for other, coupling in number.couplings.items():
            pull = pull - coupling * before[other]
        return pull / number.own

    @cached_property
    def steps(self) -> list[Tensor]:
        """The Newton step of each number."""
        return [step.detach() for step in self.draw(lambda index, shape: torch.zeros(()))]

    @property
    def decrement(self) -> list[Tensor]:
        """The Newton step of each number, in its standard deviations; infinite on a slope without curvature."""
        pairs = zip(self.steps, self.numbers, strict=True)
        return [torch.where(own.flat & (step != 0.0), torch.inf, step / own.sd.detach()) for step, own in pairs]

    @cached_property
    @torch.enable_grad()  # else sums of densities do not say what they depend on
    def _together(self) -> list[tuple[str, Tensor]]:
        """Name for each number the rows that stand or fall together, and give their log density.

        These are the rows of its outermost plate: an outer row, and what is inside of it; all rows if need be.
        """
        nodes, parts = messages(self.at.trace), self.at.densities()
        frames = {name: axes_of(nodes[name]).items() for name in parts}
        roots = [next(other for other in self.sites if number.site.inside(other)) for number in self.numbers]
        moved = {
            name: part.detach()
            for name, part in parts.items()
            if name not in self.at.without_local_parents and part.requires_grad
        }
        if any(not any(root.plates.items() <= frames[name] for root in roots) for name in moved):
            return [("", _summed(moved.values(), self.at.z.shape[:-1]))] * len(self.numbers)
        inside = [[part for name, part in moved.items() if root.plates.items() <= frames[name]] for root in roots]
        return [(root.name, _summed(own, root.batch)) for own, root in zip(inside, roots, strict=True)]

    def heights(self) -> list[Tensor]:
        """Return for each number the log density of the rows that are moved together.

        It is NaN where derivatives are: no step leads on from there.
        """
        known = self.least([torch.isfinite(step) for step in self.steps])
        return [torch.where(fine, own, torch.nan) for fine, (_, own) in zip(known, self._together, strict=True)]

    def least(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return for each number the least value among the numbers that are moved together with it."""
        found: dict[str, Tensor] = {}
        for value, (group, height) in zip(values, self._together, strict=True):
            own = _least(value, height.shape)
            found[group] = torch.minimum(found[group], own) if group in found else own
        return [found[group] for group, _ in self._together]

    def shortened(self, steps: Sequence[Tensor], most: Sequence[Tensor]) -> list[Tensor]:
        """Return steps no longer than ``most`` of each number, in the same direction for all that move together."""
        shares = self.least([(length / step.abs()).clamp_max(1.0) for step, length in zip(steps, most, strict=True)])
        return [step * share for step, share in zip(steps, shares, strict=True)]

    def uphill(self, reach: Sequence[Tensor]) -> list[Tensor]:
        """Return the Newton steps; those on a slope without curvature are as long as a climb may go."""
        tried = zip(self.steps, self.numbers, reach, strict=True)
        return [torch.where(own.flat, step.sign() * FARTHER * most, step) for step, own, most in tried]

    @property
    def near(self) -> bool:
        return all(bool((length.abs() <= NEAR).all()) for length in self.decrement)

    @property
    def base(self) -> dict[str, Tensor]:
        """y0, site by site."""
        return {site.name: site.value.detach() for site in self.sites}

    def by_site(self, of_numbers: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Sort what the numbers have by their sites."""
        found: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        for number, own in zip(self.numbers, of_numbers, strict=True):
            found[number.site.name].append(own)
        return found

    def by_number(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        return [part for site in self.sites for part in site.rows(values[site.name]).unbind(-1)]

    def moved(self, base: Mapping[str, Tensor], steps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return unconstrained values of the sites, moved by the steps of their numbers."""
        found = {}
        for site, own in zip(self.sites, self.by_site(steps).values(), strict=True):
            step = torch.stack(own, -1)  # with more batch axes than the site has, if there are more draws
            found[site.name] = base[site.name] + step.reshape(*step.shape[:-1], *site.value.shape[len(site.batch) :])
        return found


@dataclass(frozen=True)
class Axes:
    """The axes of a run at one point: those of plates, of any site, and those of sites in plates.

    ``sites`` has the axes of a batch, and of an unconstrained event.
    """

    nest: int
    sites: Mapping[str, tuple[int, int]]

    def left(self, name: str) -> int:
        """Return how many axes stand between those of points and those of a site."""
        return self.nest - self.sites[name][0]

    def own(self, name: str, value: Tensor) -> torch.Size:
        return value.shape[value.dim() - sum(self.sites[name]) :]

    def lead(self, name: str, value: Tensor) -> torch.Size:
        """Return the axes of points that values of a site have."""
        return value.shape[: max(value.dim() - self.nest - self.sites[name][1], 0)]


@dataclass(frozen=True)
class Rows:
    """A model with its data: the latents of the flow, and the names of those in plates.

    ``children`` are the latents of the flow whose priors depend on latents in plates. A ``doubled`` model was written
    for single precision, and runs at points in double. With ``axes``, many points are mapped: each run has one.
    """

    model: Model
    latents: Sequence[Latent]
    local: Sequence[str]
    args: Positional
    kwargs: Keywords
    children: Sequence[str] = ()
    doubled: bool = False
    axes: Axes | None = None

    def has_data_of(self, other: Rows) -> bool:
        """Whether the model gets the same objects."""
        own, others = ({**rows.kwargs, **{str(at): arg for at, arg in enumerate(rows.args)}} for rows in (self, other))
        return own.keys() == others.keys() and all(own[name] is others[name] for name in own)

    def find_children(self, z: Tensor) -> list[str]:
        """Return the latents of the flow whose priors depend on latents in plates; ``z`` (D,) has no graph."""
        with seeded(0, z.device):  # rows of a subsample are drawn
            at = self.run(z, beginning, {})
        return [name for name, part in at.densities().items() if name in at.placed and part.requires_grad]

    @torch.enable_grad()
    def run(self, z: Tensor, start: Start, chosen: Chosen, *, through: bool = False) -> At:
        """Run the model, and take the log densities of its sites."""
        if self.axes is not None and z.dim() > 1:
            return self._mapped(self.axes, z, start, chosen, through)
        at = At(self, z, start, chosen, through)
        precisely = in_double() if self.doubled else nullcontext()
        with poutine.block(), precisely, pyro.validation_enabled(False), at:
            at.trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            at.trace.compute_log_prob()
        for name, local in at.locals.items():
            site = messages(at.trace)[name]
            local.scale = site["scale"]
            if (precise := real_log_prob(site["fn"], local.value)) is not None:
                site["log_prob"] = scale_and_mask(precise - local.ladj, site["scale"], site["mask"])
        return at

    def _mapped(self, axes: Axes, z: Tensor, start: Start, chosen: Chosen, through: bool) -> At:
        """Run the model at each point alone, by ``vmap``, and put what it gives into axes left of its plates.

        A start that is no value for each point is that of the first point.
        """
        if not isinstance(start, Values):
            first = self.run(z.reshape(-1, z.shape[-1])[0], start, chosen)
            start = Values({name: local.value.detach() for name, local in first.locals.items()})
        of_points = z.reshape(*z.shape[: z.dim() - 1 - axes.nest], z.shape[-1])
        lead = torch.broadcast_shapes(of_points.shape[:-1], *(axes.lead(*item) for item in start.values.items()))
        leaves = {}
        for name, value in start.values.items():
            whole = value.expand(*lead, *[1] * axes.left(name), *axes.own(name, value))
            leaves[name] = whole if through else whole.detach().clone().requires_grad_()
        runs: list[At] = []

        def one(point: Tensor, values: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
            at = replace(self, axes=None).run(point, Values(values), chosen, through=True)
            runs.append(at)
            sites = {name: site for name, site in messages(at.trace).items() if site["type"] == "sample"}
            latent: dict[str, Placed | Local] = {**at.placed, **at.locals}
            masks = {name: site["mask"] for name, site in sites.items() if isinstance(site["mask"], Tensor)}
            return {
                "log_prob": {name: site["log_prob"] for name, site in sites.items() if not is_subsample(site)},
                "mask": {name: mask for name, mask in masks.items() if _functorch.is_batchedtensor(mask)},
                "value": {name: sites[name]["value"] for name in latent},
                "ladj": {name: own.ladj for name, own in latent.items()},
            }

        flat = {name: value.reshape(-1, *axes.own(name, value)) for name, value in leaves.items()}
        found = batch(one)(of_points.expand(*lead, z.shape[-1]).reshape(-1, z.shape[-1]), flat)

        def spread(value: Tensor, event_dim: int = 0) -> Tensor:
            return value.reshape(*lead, *[1] * (axes.nest + 1 + event_dim - value.dim()), *value.shape[1:])

        inside, at = runs[0], At(self, z, start, chosen, through)
        at.chosen, at.drawn = inside.chosen, inside.drawn
        for name, site in messages(inside.trace).items():
            if site["type"] != "sample":
                continue
            known = {key: spread(found[key][name]) for key in ("log_prob", "mask") if name in found[key]}
            if name in found["value"]:
                known["value"] = spread(found["value"][name], site["fn"].event_dim)
            at.trace.add_node(name, **{**site, **known})
        for name, placed in inside.placed.items():
            at.placed[name] = placed._replace(value=found["value"][name], ladj=spread(found["ladj"][name]))
        for name, own in inside.locals.items():
            at.locals[name] = replace(own, value=leaves[name], ladj=spread(found["ladj"][name]))
        return at

    def conditional(self, z: Tensor, start: Start, chosen: Chosen, *, graph: bool = False) -> Conditional:
        """Return the approximation at values that ``start`` gives; differentiable in ``z`` with ``graph``."""
        at = self.run(z, start, chosen)
        sites = sorted(at.locals.values(), key=lambda site: len(site.plates))
        with torch.enable_grad():
            parts = [part.sum() for name, part in at.densities().items() if name not in at.without_local_parents]
            numbers = _numbers(sites, sum(parts, z.new_zeros(())), graph)
        _eliminate(numbers)
        return Conditional(sites, numbers, at)

    def near_mode(
        self, z: Tensor, start: Start, chosen: Chosen, *, graph: bool = False, patient: bool = True
    ) -> Conditional:
        """Return the approximation near a mode. Most often, rows are near one at once, or after one step.

        Unless ``patient``, a step upwards is enough: the next run of a guide in training goes on from there.
        """
        first = self.conditional(z, start, chosen, graph=graph)
        if first.near:
            return first
        now = self.conditional(z, at_values(first.moved(first.base, first.steps)), first.at.chosen, graph=graph)
        above = (_above(new, old) for new, old in zip(now.heights(), first.heights(), strict=True))
        if (now.near or not patient) and all(bool(fine.all()) for fine in above):
            return now
        return self.conditional(z, at_values(self.mode(z.detach(), first)), first.at.chosen, graph=graph)

    def mode(self, z: Tensor, first: Conditional) -> dict[str, Tensor]:
        """Return unconstrained values near a mode, by Newton steps from where ``first`` was taken.

        Rows whose log density would fall go a quarter of their way from where they were. Steps are four times as long
        as the longest one before at most: all numbers of a row are shortened by one factor, else its direction might
        lead down. Rows that step back and forth, no higher than before, are at a kink.
        """
        base, lengths, heights = first.base, first.decrement, first.heights()
        reach = [number.sd.detach() for number in first.numbers]
        steps = first.uphill(reach)
        slopes = [number.raw.detach() for number in first.numbers]
        at_kink = [torch.zeros_like(most, dtype=torch.bool) for most in reach]
        for _ in range(MOST_STEPS):
            now = self.conditional(z, at_values(first.moved(base, steps)), first.at.chosen)
            reached = now.heights()
            good = [_above(new, old) for new, old in zip(reached, heights, strict=True)]
            base = first.moved(base, [torch.where(fine, step, 0.0) for fine, step in zip(good, steps, strict=True)])
            tried = list(zip(good, steps, reach, strict=True))
            risen = zip(good, now.numbers, slopes, strict=True)
            slopes = [torch.where(fine, number.raw.detach(), old) for fine, number, old in risen]
            reach = [torch.where(fine, most.maximum(old.abs()), most) for fine, old, most in tried]
            new = now.shortened(now.uphill(reach), [FARTHER * length for length in reach])
            steps = [torch.where(fine, step, old / FARTHER) for (fine, old, _), step in zip(tried, new, strict=True)]
            at_kink = [
                kink | (fine & (fresh * old < 0.0) & _above(before, new))
                for kink, (fine, old, _), fresh, before, new in zip(
                    at_kink, tried, now.steps, heights, reached, strict=True
                )
            ]
            lengths = [torch.where(fine, new, old) for fine, new, old in zip(good, now.decrement, lengths, strict=True)]
            heights = [torch.where(fine, new, old) for fine, new, old in zip(good, reached, heights, strict=True)]
            left = zip(lengths, steps, slopes, at_kink, strict=True)
            going = (~kink & (far.abs() > NEAR) & ((step * slope).abs() > STUCK) for far, step, slope, kink in left)
            if not any(bool(rows.any()) for rows in going):
                break
        return base


def _summed(parts: Iterable[Tensor], shape: torch.Size) -> Tensor:
    spread = [part.expand(torch.broadcast_shapes(part.shape, shape)) for part in parts]
    return torch.as_tensor(sum(part.sum_to_size(shape) for part in spread))


def _least(value: Tensor, shape: torch.Size) -> Tensor:
    """Return the least values along the axes that a shape does not have."""
    axes = [axis for axis in range(-value.dim(), 0) if axis < -len(shape) or shape[axis] == 1]
    found = value.amin(axes, keepdim=True) if axes else value
    return found.reshape(found.shape[found.dim() - len(shape) :])


def _above(new: Tensor, old: Tensor) -> Tensor:
    """Whether log densities are finite, and as high as others but for rounding, if these are finite."""
    return torch.isfinite(new) & ((new >= old - ROUNDING * (1.0 + ROUNDING * old.abs())) | ~torch.isfinite(old))


def _numbers(sites: Sequence[Local], total: Tensor, graph: bool) -> list[Number]:
    """Return gradients and curvatures of the log density, number by number."""
    if not sites:
        return []
    gradients = torch.autograd.grad(total, [site.value for site in sites], create_graph=True, materialize_grads=True)
    numbers: list[Number] = []
    for site, gradient in zip(sites, gradients, strict=True):
        parts = enumerate(site.rows(gradient).unbind(-1))
        numbers += [Number(site, place, raw, torch.zeros_like(raw), raw, raw) for place, raw in parts]
    for index, number in enumerate(numbers):
        curved = _curvatures(number, [site for site in sites if site.inside(number.site)], graph)
        number.curvature = number.own = curved[number.site.name][..., number.place]
        for after in numbers[index + 1 :]:
            if after.site.name in curved:
                after.couplings[index] = curved[after.site.name][..., after.place]
    if not graph:
        for number in numbers:
            number.gradient, number.own = number.gradient.detach(), number.own.detach()
            number.couplings = {other: coupling.detach() for other, coupling in number.couplings.items()}
    return numbers


def _curvatures(number: Number, sites: Sequence[Local], graph: bool) -> dict[str, Tensor]:
    """Return the negative derivatives of a number's gradient with respect to sites in its rows: (*rows, numbers)."""
    if not number.raw.requires_grad:
        return {site.name: torch.zeros_like(site.rows(site.value)) for site in sites}
    values, total = [site.value for site in sites], number.raw.sum()
    found = torch.autograd.grad(total, values, create_graph=graph, retain_graph=True, materialize_grads=True)
    return {site.name: -site.rows(part) for site, part in zip(sites, found, strict=True)}


def slope(total: Tensor, site: Local) -> Tensor:
    """Return the derivative of a number by the values of a site (*batch, numbers); its graph is kept."""
    (found,) = torch.autograd.grad(total, [site.value], retain_graph=True, materialize_grads=True)
    return site.rows(found)


def _eliminate(numbers: list[Number]) -> None:
    """Take the innermost numbers out of the equations of the others.

    Where a number and one before it have no maximum together, such as at a saddle, the curvature of the later one is
    raised to twice the least with which they would have one. Divided by a curvature near zero, steps would be endless.
    """
    for number in reversed(numbers):
        size = number.own.abs()
        for other, coupling in number.couplings.items():
            least = coupling.square() / torch.maximum(numbers[other].own.abs(), coupling.abs()).clamp_min(SMALLEST)
            size = torch.where(number.own > least, size, torch.maximum(size, 2.0 * least))
        number.flat = ~(size > SMALLEST)
        number.own = torch.where(number.flat, torch.as_tensor(number.site.scale).to(size), size)
        for other, coupling in number.couplings.items():
            share, target = coupling / number.own, numbers[other]
            batch = target.site.batch
            target.gradient = target.gradient - (share * number.gradient).sum_to_size(batch)
            target.own = target.own - (share * coupling).sum_to_size(batch)
            for third, further in number.couplings.items():
                if third < other and target.site.inside(numbers[third].site):
                    before = target.couplings.get(third, torch.zeros(()).to(further))
                    target.couplings[third] = before - (share * further).sum_to_size(batch)


# which rows are independent -------------------------------------------------------------------------------------------


def coupled(first: Conditional) -> list[Local]:
    """Return the sites whose rows are not independent given all other latents, or are read in other rows.

    The products of the curvature with a vector of random signs are those signs times the curvature of each number, if
    the rows are independent.
    """
    found = [site for site in first.sites if _read_in_other_rows(first, site)]
    for index, number in enumerate(first.numbers):
        if number.raw.requires_grad and number.site not in found:
            signs = _signs(number.raw, index)
            column = -slope((signs * number.raw).sum(), number.site)[..., number.place]
            if not _close(column, signs * number.curvature, number.curvature):
                found.append(number.site)
    return found


def _read_in_other_rows(first: Conditional, site: Local) -> bool:
    """Whether a log density in the plates of a site depends on other rows of the site than its own.

    If not, the gradient of the densities times random signs of their rows is the gradient times these signs.
    """
    for index, (name, part) in enumerate(first.at.densities().items()):
        axes = axes_of(messages(first.at.trace)[name])
        shape = [1] * len(site.batch)
        for plate, axis in site.plates.items():
            shape[axis] = site.batch[axis] if plate in axes else 1
        if not part.requires_grad or name in first.at.without_local_parents or math.prod(shape) == 1:
            continue
        signs = _signs(site.value.new_zeros(shape), index)
        own = slope(part.sum(), site)
        if not _close(slope((signs * part).sum(), site), signs.unsqueeze(-1) * own, own):
            return True
    return False


def crossed(first: Conditional) -> list[tuple[Local, Local]]:
    """Return the pairs of sites that depend on each other given all else, and of which none is inside of the other."""

    def depends(number: Number, other: Local) -> bool:
        product = slope((_signs(number.raw, number.place) * number.raw).sum(), other)
        return not _close(product, torch.zeros_like(product), number.curvature)

    pairs = [(one, other) for one, other in itertools.combinations(first.sites, 2) if not other.inside(one)]
    bent = [number for number in first.numbers if number.raw.requires_grad]
    return [(one, other) for one, other in pairs if any(depends(own, other) for own in bent if own.site is one)]


def read_elsewhere(first: Conditional) -> list[Local]:
    """Return the sites outside of subsampled plates on which log densities inside of such plates depend.

    A subsample says too little of them for a conditional distribution.
    """
    nodes, found = messages(first.at.trace), []
    for site in first.sites:
        frames = {name: vectorized(nodes[name]) for name in first.at.densities()}
        noisy = {name for name, own in frames.items() if any(is_part(f) and f.name not in site.plates for f in own)}
        found += [site] if _read_by(first, site, noisy) else []
    return found


def shared(first: Conditional) -> list[Local]:
    """Return the sites that priors of other latents depend on, or log densities outside of their plates.

    These stand for the latents outside of plates in a model that has none.
    """
    plates = {name: axes_of(messages(first.at.trace)[name]).items() for name in first.at.densities()}
    found = []
    for site in first.sites:
        outside = {name for name, own in plates.items() if not site.plates.items() <= own}
        found += [site] if _read_by(first, site, outside | (first.at.locals.keys() - {site.name})) else []
    return found


def parents(first: Conditional) -> list[Local]:
    """Return the sites on which priors of latents of the flow depend."""
    children = first.at.placed.keys() - first.at.without_local_parents
    return [site for site in first.sites if _read_by(first, site, children)]


def _read_by(first: Conditional, site: Local, names: Collection[str]) -> bool:
    """Whether the log densities of sites of these names depend on a site."""
    parts = [part.sum() for name, part in first.at.densities().items() if name in names and part.requires_grad]
    return bool(parts) and bool((slope(torch.stack(parts).sum(), site) != 0.0).any())


def rows_in(subsample: Site) -> tuple[int, int]:
    """Return how many rows a plate has, and how many of them the model draws."""
    fn: Any = subsample["fn"]
    return fn.size, min(fn.subsample_size or fn.size, fn.size)


def axes_of(site: Site) -> dict[str, int]:
    """Return the vectorized plates of a site, with their axes."""
    return {frame.name: frame.dim for frame in vectorized(site)}


def all_frames(trace: poutine.Trace) -> list[Frame]:
    """Return the vectorized plates of all sites of a run."""
    return [frame for site in messages(trace).values() if site["type"] == "sample" for frame in vectorized(site)]


def is_part(frame: Frame | CondIndepStackFrame) -> bool:
    """Whether a plate has a part of its rows."""
    return frame.full_size not in (None, frame.size)


def _signs(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(2, like.shape, generator=generator) - 1.0).to(like)


def _close(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    sizes = torch.nan_to_num(scale.detach()).abs()  # NaN among the data is named later
    least = ROUNDING * float(sizes.median()) + 1e-6 * float(sizes.max())
    return torch.allclose(one, other, rtol=ROUNDING, atol=least, equal_nan=True)


def check_plates(site: Site) -> None:
    """Refuse a loop over a subsampled plate, and data of other rows than those of the plate."""
    for frame in site["cond_indep_stack"]:
        if not is_part(frame):
            continue
        if frame.dim is None:
            raise ValueError(
                f"site {site['name']!r}: expected a vectorized plate, got a loop over the subsampled plate "
                f"{frame.name!r}. {OF_THESE_ROWS}"
            )
        shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        got = shape[frame.dim] if len(shape) >= -frame.dim else 1
        if site["is_observed"] and got not in (1, frame.size):
            raise ValueError(
                f"site {site['name']!r}: expected data of the {frame.size} rows that plate {frame.name!r} takes of "
                f"{frame.full_size}, got data of {got} rows. {OF_THESE_ROWS}"
            )


# where rows start -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """Unconstrained values of sites, from which rows start."""

    values: Mapping[str, Tensor]

    def __call__(self, msg: Site, at: At) -> Tensor:
        return self.values[msg["name"]]


def at_values(values: Mapping[str, Tensor]) -> Start:
    return Values(values)


def beginning(msg: Site, at: At) -> Tensor:
    """Return unconstrained values in the middle of a site's prior."""
    transform, known = bijection(msg["fn"]), location_scale(msg["fn"])
    if known is not None:
        return known[0].detach().expand(real_shape(transform, msg["fn"].shape()))
    with torch.no_grad(), seeded(0, at.z.device):
        return transform.inv(initial_value(msg))


def off_center(msg: Site, at: At) -> Tensor:
    """Return unconstrained values beside the middle of a site's prior, where few derivatives vanish by symmetry."""
    middle = beginning(msg, at)
    with torch.no_grad(), seeded(derive(0, msg["name"]), at.z.device):
        return middle + OFF_CENTER * (of_prior(msg, at) - middle)


def of_prior(msg: Site, at: At) -> Tensor:
    """Return unconstrained values that are drawn from a site's prior."""
    drawn = bijection(msg["fn"]).inv(FromPrior(at.z).value(msg))
    return torch.where(torch.isfinite(drawn), drawn, torch.zeros_like(drawn))
