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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pyro_flows.guides.runs import At, Chosen, Local, ModelWithData, Start, at_values, axes_of
from pyro_flows.model.sites import messages

MOST_STEPS = 60  # Newton steps to a mode
NEAR = 0.3  # of a standard deviation of a number: how far from the mode the curvature may be taken
SMALLEST = 1e-12  # curvature
STUCK = 1e-3  # nats that a step promises by its slope, below which it ends a climb
FARTHER = 4.0  # times as long as steps before; also what a step is divided by
ROUNDING = 1e-3  # of curvatures, as a part of the largest one


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


class Rows(ModelWithData):
    """A model with its data, and the approximation of its latents in plates."""

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
