"""Runs of a model with its data, at values of the latents outside of plates, and of those in plates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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

OFF_CENTER = 0.3  # of the way to a draw of the prior

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

    def __init__(self, rows: ModelWithData, z: Tensor, start: Start, chosen: Chosen, through: bool) -> None:
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

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return what differs between points that are mapped: what runs give, and masks that depend on latents."""
        sites = {name: site for name, site in messages(self.trace).items() if site["type"] == "sample"}
        latent: dict[str, Placed | Local] = {**self.placed, **self.locals}
        masks = {name: site["mask"] for name, site in sites.items() if isinstance(site["mask"], Tensor)}
        return {
            "log_prob": {name: site["log_prob"] for name, site in sites.items() if not is_subsample(site)},
            "mask": {name: mask for name, mask in masks.items() if _functorch.is_batchedtensor(mask)},
            "value": {name: sites[name]["value"] for name in latent},
            "ladj": {name: own.ladj for name, own in latent.items()},
        }

    def take(
        self,
        inside: At,
        found: Mapping[str, Mapping[str, Tensor]],
        leaves: Mapping[str, Tensor],
        spread: Callable[..., Tensor],
    ) -> None:
        """Take the sites of a run that was mapped, with the results of all points, ``spread`` over their axes."""
        self.chosen, self.drawn = inside.chosen, inside.drawn
        for name, site in messages(inside.trace).items():
            if site["type"] != "sample":
                continue
            known = {key: spread(found[key][name]) for key in ("log_prob", "mask") if name in found[key]}
            if name in found["value"]:
                known["value"] = spread(found["value"][name], site["fn"].event_dim)
            self.trace.add_node(name, **{**site, **known})
        for name, placed in inside.placed.items():
            self.placed[name] = placed._replace(value=found["value"][name], ladj=spread(found["ladj"][name]))
        for name, own in inside.locals.items():
            self.locals[name] = replace(own, value=leaves[name], ladj=spread(found["ladj"][name]))

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
class ModelWithData:
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

    def has_data_of(self, other: ModelWithData) -> bool:
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
            runs.append(replace(self, axes=None).run(point, Values(values), chosen, through=True))
            return runs[-1].results()

        def spread(value: Tensor, event_dim: int = 0) -> Tensor:
            return value.reshape(*lead, *[1] * (axes.nest + 1 + event_dim - value.dim()), *value.shape[1:])

        flat = {name: value.reshape(-1, *axes.own(name, value)) for name, value in leaves.items()}
        found = batch(one)(of_points.expand(*lead, z.shape[-1]).reshape(-1, z.shape[-1]), flat)
        at = At(self, z, start, chosen, through)
        at.take(runs[0], found, leaves, spread)
        return at


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
