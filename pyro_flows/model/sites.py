"""What a Pyro model consists of, read from one run: latent sites, their supports, plates, observations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypedDict, cast

import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution, Unit
from pyro.distributions.util import broadcast_shape
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows.model.bijections import bijection
from pyro_flows.model.charts import Chart, read_chart, write_chart
from pyro_flows.model.faults import Refused
from pyro_flows.model.noncentered import Information, exact, spread, standardize

ROWS = "For data of another size, make a new guide. In an AutoHierarchicalFlow, rows of a plate may come and go."
CHARTS = {"turn_about", "heavy_about", "heavy_scale", "wall_below", "wall_above"}

Model = Callable[..., object]
Positional = Sequence[object]
Keywords = Mapping[str, object]  # arguments of a model
Options = Mapping[str, object] | None  # of one site's coordinates: plain numbers by name
Noncentered = bool | Sequence[str] | Mapping[str, Options]  # all or none, names, or numbers


class Site(TypedDict):
    """What is read of Pyro's message about a site, and changed in it."""

    name: str
    type: str
    fn: TorchDistribution
    value: Tensor
    is_observed: bool
    mask: Tensor | bool | None
    scale: Tensor | float
    infer: dict[str, object]
    cond_indep_stack: tuple[CondIndepStackFrame, ...]
    kwargs: dict[str, object]
    stop: bool
    done: bool


class Frame(Protocol):
    """What Pyro says of a vectorized plate of a site."""

    name: str
    dim: int
    size: int  # rows of this run,
    full_size: int  # and of the plate


@dataclass(frozen=True)
class Plate:
    """One batch axis of a site: the plate's name, its (negative) axis among the batch axes, its size."""

    name: str
    dim: int
    size: int


class Placed(NamedTuple):
    """A site at a point: its constrained value, log Jacobian (of each batch element), and its prior, exact there."""

    value: Tensor
    ladj: Tensor
    prior: TorchDistribution


@dataclass(frozen=True)
class Latent:
    """One latent site and its place in the unconstrained vector.

    The coordinates of a site that is ``noncentered`` have its location and scale taken out, and with ``data`` what the
    data say of it too: see :mod:`pyro_flows.model.noncentered`. For ``chart``, see :mod:`pyro_flows.model.charts`.
    ``improper`` are those of its coordinates that have no proper prior: of an ``ImproperUniform``, or left by a mask.
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    event_dim: int
    plates: tuple[Plate, ...]
    offset: int
    size: int
    mask: Tensor | None = field(default=None, repr=False)
    free: Tensor | None = field(default=None, repr=False)
    noncentered: bool = False
    data: Information | None = field(default=None, repr=False)
    chart: Chart | None = field(default=None, repr=False)
    improper: tuple[int, ...] = field(default=(), repr=False)

    def unconstrained(self, z: Tensor) -> Tensor:
        """Cut this site out of ``z`` (..., D) and give it its unconstrained shape; masked-out entries are 0."""
        flat = z[..., self.offset : self.offset + self.size]
        if self.free is not None:
            full = flat.new_zeros(*flat.shape[:-1], math.prod(self.unconstrained_shape))
            flat = full.index_copy(-1, self.free.to(flat.device), flat)
        lifted = self.event_dim + len(self.unconstrained_shape) - len(self.shape)
        shape = broadcast_shape(self.unconstrained_shape, z.shape[:-1] + (1,) * lifted)
        return flat.reshape(shape)

    def place(self, z: Tensor, fn: TorchDistribution) -> Placed:
        """Put the site at ``z``; ``fn`` is its prior.

        Raises:
            ValueError: for a prior of another shape than in the first run.
        """
        sizes = zip(reversed(self.shape), reversed(fn.shape()), strict=False)
        if any(mine != other for mine, other in sizes):
            expected, got = tuple(self.shape), tuple(fn.shape()[-len(self.shape) :])
            raise ValueError(f"site {self.name!r}: expected shape {expected}, as in the first run, got {got}. {ROWS}")
        unconstrained, charted, spreading = self.unconstrained(z), None, None
        if self.chart is not None:
            unconstrained, charted = self.chart.forward(unconstrained)
        if self.noncentered:
            spreading = spread(fn, unconstrained, self.data)
            unconstrained = spreading.value
        transform = bijection(fn)
        value = transform(unconstrained)
        batch = value.dim() - self.event_dim
        ladj = by_event(transform.log_abs_det_jacobian(unconstrained, value), batch)
        ladj = ladj if charted is None else ladj + by_event(charted, batch)
        if spreading is not None:
            ladj, fn = ladj + spreading.ladj, exact(fn, value, spreading)
        return Placed(value, ladj if self.mask is None else torch.where(self.mask.to(ladj.device), ladj, 0.0), fn)

    def flatten(self, value: Tensor, fn: TorchDistribution) -> Tensor:
        """Return the unconstrained coordinates of one constrained value (no batch axes), shape ``(size,)``."""
        unconstrained = bijection(fn).inv(value)
        unconstrained = standardize(fn, unconstrained, self.data) if self.noncentered else unconstrained
        flat = (unconstrained if self.chart is None else self.chart.inverse(unconstrained)).reshape(-1)
        return flat if self.free is None else flat[self.free.to(flat.device)]


def by_event(ladj: Tensor, batch: int) -> Tensor:
    """Sum log derivatives to one number for each of the ``batch`` leading axes' entries."""
    extra = ladj.dim() - batch
    return ladj.flatten(-extra).sum(-1) if extra > 0 else ladj


@dataclass(frozen=True)
class Structure:
    """The static structure of a model: what never changes from run to run.

    ``trace`` is that of the first run, and ``drawn`` are the latent sites at a draw of the prior, if there is one.
    """

    latents: tuple[Latent, ...]
    observed: dict[str, Tensor]
    observed_plates: dict[str, tuple[Plate, ...]]
    deterministic: dict[str, tuple[Plate, ...]]
    enumerated: tuple[str, ...]
    subsampled: tuple[str, ...]
    hierarchical: tuple[str, ...]
    dependent: bool
    plate_nesting: int
    dtype: torch.dtype
    device: torch.device
    trace: poutine.Trace = field(repr=False)
    drawn: Mapping[str, Site] | None = field(default=None, repr=False)

    def points(self, size: float) -> Tensor:
        """Return two points (2, D) at which to try the model, on either side of the values of its first run.

        They are so much of the way from there to a draw of the prior, and as far the other way; unit steps, if there is
        no draw.
        """
        start = self._flat(messages(self.trace))
        start = torch.where(torch.isfinite(start), start, 0.0)
        step = torch.ones_like(start) if self.drawn is None else self._flat(self.drawn) - start
        step = size * torch.where(torch.isfinite(step), step, 1.0)
        return torch.stack([start + step, start - step])

    def _flat(self, nodes: Mapping[str, Site]) -> Tensor:
        """Return the coordinates (D,) of the latents among the sites of a run."""
        parts = [latent.flatten(nodes[latent.name]["value"], nodes[latent.name]["fn"]) for latent in self.latents]
        return torch.cat([part.to(self.device, self.dtype) for part in parts]).detach()

    @property
    def layout(self) -> list[tuple[str, int]]:
        """Names and numbers of coordinates of the latents, in their order."""
        return [(latent.name, latent.size) for latent in self.latents]

    @property
    def dim(self) -> int:
        """Number of unconstrained coordinates."""
        return sum(latent.size for latent in self.latents)

    def noncenter(self, chosen: Noncentered) -> Structure:
        """Return this structure with other coordinates of sites, see :class:`LogDensity`; True: all non-centered."""
        if isinstance(chosen, bool):
            chosen = self.hierarchical if chosen else ()
        wanted = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen)
        for name, options in wanted.items():
            charted = isinstance(options, Mapping) and set(options) <= CHARTS and name in {x.name for x in self.latents}
            if name not in self.hierarchical and not charted:
                known = ", ".join(map(repr, self.hierarchical)) or "none here"
                raise ValueError(
                    f"noncentered: expected sites whose location or scale depends on other latents ({known}), "
                    f"got {name!r}."
                )
        like = torch.zeros((), dtype=self.dtype, device=self.device)
        bare = [replace(latent, noncentered=False, data=None, chart=None) for latent in self.latents]
        latents = tuple(_in_coordinates(own, wanted[own.name], like) if own.name in wanted else own for own in bare)
        moved = any(latent.noncentered for latent in latents)
        return replace(self, latents=latents, dependent=self.dependent or moved)

    @property
    def centering(self) -> Tensor:
        """Precisions and centers (2, K) of all elements of hierarchical sites; a precision of -1 says centered."""
        parts = [_centering(latent) for latent in self.latents if latent.name in self.hierarchical]
        return torch.cat([torch.zeros(2, 0), *parts], 1).to(self.device, self.dtype)

    def with_centering(self, centering: Tensor) -> Structure:
        """Return this structure in the coordinates that :attr:`centering` of another one tells; charts stay."""
        latents, numbers = list(self.latents), centering.detach().to(self.device, self.dtype).clone()
        for place, latent in enumerate(latents):
            if latent.name in self.hierarchical:
                own, numbers = numbers.tensor_split([latent.unconstrained_shape.numel()], 1)
                data = Information(*(part.reshape(latent.unconstrained_shape) for part in own))
                free = bool((data.precision >= 0.0).all())
                known = data if free and bool(data.precision.any()) else None
                latents[place] = replace(latent, noncentered=free, data=known)
        moved = any(latent.noncentered for latent in latents)
        return replace(self, latents=tuple(latents), dependent=self.dependent or moved)

    @property
    def improper(self) -> list[str]:
        """The latent sites with an improper prior: all real numbers alike, or all of another support."""
        return [latent.name for latent in self.latents if latent.improper]

    @property
    def noncentered(self) -> dict[str, Options]:
        """The sites with coordinates of their own, as :meth:`noncenter` takes them: plain numbers, or None."""
        return coordinates_of(self.latents)


def coordinates_of(latents: Sequence[Latent]) -> dict[str, Options]:
    """Return the sites with coordinates of their own, see :attr:`Structure.noncentered`."""
    found: dict[str, Options] = {}
    for latent in latents:
        options, data = write_chart(latent.chart), latent.data
        if latent.noncentered:
            options["noncentered"] = True
            if data is not None:
                options |= {"precision": data.precision.tolist(), "center": data.center.tolist()}
        if options:
            found[latent.name] = None if options == {"noncentered": True} else options
    return found


def _centering(latent: Latent) -> Tensor:
    """Return the coordinates of a hierarchical site as numbers (2, K), see :attr:`Structure.centering`."""
    if latent.data is not None:
        return torch.stack([latent.data.precision.flatten(), latent.data.center.flatten()])
    return torch.full((2, latent.unconstrained_shape.numel()), 0.0 if latent.noncentered else -1.0)


def _in_coordinates(latent: Latent, given: Options, like: Tensor) -> Latent:
    """Return a site in the coordinates that plain numbers stand for."""
    if given is None:
        return replace(latent, noncentered=True)
    shape, parts = latent.unconstrained_shape, list[Tensor]()
    try:
        chart = read_chart(given, shape, like)
        if "precision" in given:
            numbers = given["precision"], given["center"]
            parts = [torch.as_tensor(part, dtype=like.dtype, device=like.device) for part in numbers]
    except (KeyError, TypeError, RuntimeError, ValueError):
        raise ValueError(
            f"noncentered: expected None or {{'precision': ..., 'center': ...}} of shape {tuple(shape)} for site "
            f"{latent.name!r}, got {given!r}."
        ) from None
    try:
        data = Information(*(part.expand(shape).clone() for part in parts)) if parts else None
    except RuntimeError:
        got = next(tuple(part.shape) for part in parts if part.shape != shape)
        raise ValueError(
            f"noncentered: expected numbers of shape {tuple(shape)} for site {latent.name!r}, got shape {got}. {ROWS}"
        ) from None
    if data is not None and not bool(torch.isfinite(data.center).all() & (data.precision >= 0.0).all()):
        raise ValueError(f"noncentered: expected finite centers and precisions of 0 or more for site {latent.name!r}.")
    noncentered = bool(given.get("noncentered")) or data is not None
    return replace(latent, noncentered=noncentered, data=data, chart=chart)


def messages(trace: poutine.Trace | None) -> dict[str, Any]:
    """Return the sites of a trace by name, free of Pyro's loose types."""
    assert trace is not None
    return trace.nodes


def vectorized(site: Site) -> list[Frame]:
    """Return the plates of a site that are axes; a sequential plate is a loop, which needs nothing."""
    return [cast(Frame, frame) for frame in site["cond_indep_stack"] if frame.dim is not None]


def is_open(site: Site) -> bool:
    """Whether a site has no value yet."""
    return cast(object, site["value"]) is None


def is_subsample(site: Site) -> bool:
    """Whether a site holds the indices of a subsample."""
    return site_is_subsample(cast(Message, site))


def draws_rows(subsample: Site) -> bool:
    """Whether the model draws the rows of a plate, and is not given them."""
    return cast(Any, subsample["fn"]).subsample_size is not None


def is_factor(site: Site) -> bool:
    """Whether a site is a ``pyro.factor``."""
    return isinstance(site.get("fn"), Unit)


def is_data(site: Site) -> bool:
    """Whether a sample site holds data: neither a factor nor a deterministic value nor a subsample."""
    return (
        site["type"] == "sample"
        and not site["infer"].get("_deterministic")
        and innermost(site["fn"]) not in (Unit, Delta)
        and not is_subsample(site)
    )


def is_deterministic(site: Site) -> bool:
    """Whether a site holds a computed value: ``pyro.deterministic``, or a site that was reparametrized."""
    return site["is_observed"] and innermost(site["fn"]) is Delta


def is_enumerated(site: Site) -> bool:
    """Whether a latent site is discrete and marked for parallel enumeration."""
    return site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support


def comes_and_goes(name: str) -> Refused:
    """Return the error for a latent that is there for some values of the others only."""
    return Refused(
        f"site {name!r}: a latent that is there for some values of the others only. A flow needs one and the "
        "same set of latents everywhere; write the choice as a mixture."
    )


def check_latents(trace: poutine.Trace, placed: Mapping[str, Placed], structure: Structure) -> None:
    """Refuse models whose latents come and go: a new one would be drawn at random, a lost one have no density."""
    known = {*placed, *structure.observed, *structure.enumerated}
    new = [
        name
        for name, site in messages(trace).items()
        if site["type"] == "sample" and not site["is_observed"] and name not in known
        if not is_subsample(site)
    ]
    for name in (*new, *(latent.name for latent in structure.latents if latent.name not in placed)):
        raise comes_and_goes(name)


def innermost(fn: object) -> type:
    """Return the class of the distribution inside of all others."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn)
