"""What a Pyro model consists of, read from one run: latent sites, their supports, plates, observations."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform, NanMaskedMultivariateNormal, NanMaskedNormal, Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, transform_to
from torch.distributions.constraints import Constraint
from torch.utils._pytree import tree_leaves

from pyro_flows.model.batching import apart, nearer, quiet
from pyro_flows.model.bijections import bijection
from pyro_flows.model.centring import Information, moves, spread, standardise
from pyro_flows.model.charts import Chart, read_chart, write_chart
from pyro_flows.model.supports import WRAPPERS, guarded, missing

MEDIAN_DRAWS = 15
CHARTS = {"turn_about", "heavy_about", "heavy_scale"}

Noncentred = bool | Sequence[str] | Mapping[str, Any]  # all or none, names, or numbers


@dataclass(frozen=True)
class Plate:
    """One batch axis of a site: the plate's name, its (negative) axis among the batch axes, its size."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Latent:
    """One latent site and its place in the unconstrained vector.

    The coordinates of a site that is ``noncentred`` have its location and scale taken out, and with ``data`` what the
    data say of it too: see :mod:`pyro_flows.model.centring`. For ``chart``, see :mod:`pyro_flows.model.charts`.
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
    noncentred: bool = False
    data: Information | None = field(default=None, repr=False)
    chart: Chart | None = field(default=None, repr=False)

    def unconstrained(self, z: Tensor) -> Tensor:
        """Cut this site out of ``z`` (..., D) and give it its unconstrained shape; masked-out entries are 0."""
        flat = z[..., self.offset : self.offset + self.size]
        if self.free is not None:
            full = flat.new_zeros(*flat.shape[:-1], math.prod(self.unconstrained_shape))
            flat = full.index_copy(-1, self.free.to(flat.device), flat)
        lifted = self.event_dim + len(self.unconstrained_shape) - len(self.shape)
        shape = torch.broadcast_shapes(self.unconstrained_shape, z.shape[:-1] + (1,) * lifted)
        return flat.reshape(shape)

    def place(self, z: Tensor, fn: Any) -> tuple[Tensor, Tensor]:
        """Return the constrained value at ``z`` and its log Jacobian, one number for each batch element of the site."""
        unconstrained, charted, spreading = self.unconstrained(z), None, None
        if self.chart is not None:
            unconstrained, charted = self.chart.forward(unconstrained)
        if self.noncentred:
            unconstrained, spreading = spread(fn, unconstrained, self.data)
        transform = bijection(fn)
        value = transform(unconstrained)
        ladj = transform.log_abs_det_jacobian(unconstrained, value)
        ladj = _by_event(ladj, value.dim() - self.event_dim)
        ladj = ladj if charted is None else ladj + _by_event(charted, value.dim() - self.event_dim)
        ladj = ladj if spreading is None else ladj + spreading
        return value, ladj if self.mask is None else torch.where(self.mask.to(ladj.device), ladj, 0.0)

    def flatten(self, value: Tensor, fn: Any) -> Tensor:
        """Return the unconstrained coordinates of one constrained value (no batch axes), shape ``(size,)``."""
        unconstrained = bijection(fn).inv(value)
        unconstrained = standardise(fn, unconstrained, self.data) if self.noncentred else unconstrained
        flat = (unconstrained if self.chart is None else self.chart.inverse(unconstrained)).reshape(-1)
        return flat if self.free is None else flat[self.free.to(flat.device)]


def _by_event(ladj: Tensor, batch: int) -> Tensor:
    """Sum log derivatives to one number for each of the ``batch`` leading axes' entries."""
    extra = ladj.dim() - batch
    return ladj.flatten(-extra).sum(-1) if extra > 0 else ladj


@dataclass(frozen=True)
class Structure:
    """The static structure of a model: what never changes from run to run."""

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

    @property
    def dim(self) -> int:
        """Number of unconstrained coordinates."""
        return sum(latent.size for latent in self.latents)

    def noncentre(self, chosen: Noncentred) -> Structure:
        """Return this structure with other coordinates of sites, see :class:`LogDensity`; True: non-centred all over.

        Raises:
            ValueError: for non-centred coordinates of a site whose location and scale do not depend on other latents,
                or that has none; for numbers that do not fit the site.
        """
        if isinstance(chosen, bool):
            chosen = self.hierarchical if chosen else ()
        wanted = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen)
        for name, options in wanted.items():
            charted = isinstance(options, Mapping) and set(options) <= CHARTS and name in {x.name for x in self.latents}
            if name not in self.hierarchical and not charted:
                known = ", ".join(map(repr, self.hierarchical)) or "none here"
                raise ValueError(
                    f"noncentred: expected sites whose location or scale depends on other latents ({known}), "
                    f"got {name!r}."
                )
        like = torch.zeros((), dtype=self.dtype, device=self.device)
        bare = {"noncentred": False, "data": None, "chart": None}
        latents = tuple(
            replace(
                latent, **{**bare, **(_coordinates(latent, wanted[latent.name], like) if latent.name in wanted else {})}
            )
            for latent in self.latents
        )
        moved = any(latent.noncentred for latent in latents)
        return replace(self, latents=latents, dependent=self.dependent or moved)

    @property
    def noncentred(self) -> dict[str, Any]:
        """The sites with coordinates of their own, as :meth:`noncentre` takes them: plain numbers, or None."""
        found: dict[str, Any] = {}
        for latent in self.latents:
            options = write_chart(latent.chart)
            if latent.noncentred:
                data = latent.data
                options["noncentred"] = True
                if data is not None:
                    options |= {"precision": data.precision.tolist(), "centre": data.centre.tolist()}
            if options:
                found[latent.name] = None if options == {"noncentred": True} else options
        return found


def _coordinates(latent: Latent, given: Any, like: Tensor) -> dict[str, Any]:
    """Return the fields of :class:`Latent` that plain numbers stand for."""
    if given is None:
        return {"noncentred": True}
    try:
        chart, data = read_chart(given, latent.unconstrained_shape, like), None
        if "precision" in given:
            parts = [
                torch.as_tensor(given[name], dtype=like.dtype, device=like.device) for name in ("precision", "centre")
            ]
            data = Information(*(part.expand(latent.unconstrained_shape).clone() for part in parts))
    except (KeyError, TypeError, RuntimeError, ValueError):
        raise ValueError(
            f"noncentred: expected None or {{'precision': ..., 'centre': ...}} of shape "
            f"{tuple(latent.unconstrained_shape)} for site {latent.name!r}, got {given!r}."
        ) from None
    if data is not None and not bool(torch.isfinite(data.centre).all() & (data.precision >= 0.0).all()):
        raise ValueError(f"noncentred: expected finite centres and precisions of 0 or more for site {latent.name!r}.")
    return {"noncentred": bool(given.get("noncentred")) or data is not None, "data": data, "chart": chart}


class Place(Messenger):
    """Give each latent site its value from one unconstrained vector and keep the log Jacobians.

    Supports are taken from the run itself, so that a bound may depend on latents drawn before it. Masked-out data are
    replaced by data, and distributions that were made with argument checks are freed of them (see below). Sites in
    ``guards`` get a density of zero outside of their supports.
    """

    def __init__(self, latents: Sequence[Latent], z: Tensor, guards: Collection[str] = ()) -> None:
        super().__init__()
        self.latents = {latent.name: latent for latent in latents}
        self.z = z
        self.guards = guards
        self.placed: dict[str, tuple[Tensor, Tensor]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unchecked(msg["fn"])
        latent = self.latents.get(msg["name"])
        if latent is not None and not msg["is_observed"]:
            self.placed[msg["name"]] = self._place(latent, msg["fn"])
            msg["value"] = self.placed[msg["name"]][0]
        elif msg["is_observed"] and is_data(msg):
            for mask, axes in _masks(msg):
                msg["value"] = _fill(msg["value"], mask, msg["fn"].event_dim - axes)
        if msg["name"] in self.guards:
            msg["fn"] = guarded(msg["fn"])

    def _place(self, latent: Latent, fn: Any) -> tuple[Tensor, Tensor]:
        return latent.place(self.z, fn)


def _masks(site: Any) -> list[tuple[Tensor, int]]:
    """The masks over an observed site's entries (False: left out), each with the number of axes of one event it has."""
    own = missing(site["fn"])
    return ([(site["mask"], 0)] if isinstance(site["mask"], Tensor) else []) + ([] if own is None else [own])


def _fill(value: Tensor, mask: Tensor, event_dim: int) -> Tensor:
    """Put the first observed event where ``mask`` is False: NaN there would make the gradient NaN, masked or not."""
    batch = torch.broadcast_shapes(mask.shape, value.shape[: value.dim() - event_dim])
    event = value.shape[value.dim() - event_dim :]
    first = mask.expand(batch).reshape(-1).int().argmax().reshape(1)
    filler = value.expand(batch + event).reshape(-1, *event).index_select(0, first)[0]
    if value.is_floating_point():
        filler = torch.nan_to_num(filler, nan=0.5)  # if nothing is observed
    return torch.where(mask.reshape(mask.shape + (1,) * event_dim), value, filler)


def _unchecked(fn: Any) -> Any:
    """Return the distribution without argument checks, which branch on values; the model's own object stays as it is.

    Under :func:`quiet`, only distributions that were made before the run have any, such as the priors of a
    ``PyroSample``. Values are checked once, by ``observations.py``.
    """
    inner = {key: part for key, part in vars(fn).items() if isinstance(part, Distribution)}
    freed = {key: _unchecked(part) for key, part in inner.items()}
    if not getattr(fn, "_validate_args", False) and all(freed[key] is inner[key] for key in inner):
        return fn
    new = copy.copy(fn)
    vars(new).update(freed, _validate_args=False)
    return new


class Resample(Messenger):
    """Draw the observed sites anew (posterior and prior predictive), one draw for each observed value."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and is_data(msg):
            fn, value = msg["fn"], msg["value"]
            batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            msg["fn"] = fn if batch == fn.batch_shape else fn.expand(batch)
            msg["is_observed"], msg["value"] = False, None


class _Hold(Messenger):
    """Give a model's parameters values made from leaf tensors of ours, whatever Pyro's store holds by now."""

    def __init__(self, held: Mapping[str, tuple[Tensor, Constraint]]) -> None:
        super().__init__()
        self.held = held

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.held:
            leaf, constraint = self.held[msg["name"]]
            msg["value"] = transform_to(constraint)(leaf)


def hold(model: Callable[..., Any], trace: poutine.Trace) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Return the model, tied to the parameters that it had in ``trace``, and their unconstrained leaves by name.

    Without this, a cleared or reloaded parameter store would silently turn it into another model.
    """
    constraints = pyro.get_param_store()._constraints
    held = {}
    for name, site in messages(trace).items():
        if site["type"] == "param":
            leaf = getattr(site["value"], "unconstrained", lambda site=site: site["value"])()
            held[name] = (leaf, constraints.get(name, site["kwargs"]["constraint"]))

    @functools.wraps(model, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Hold(held):
            return model(*args, **kwargs)

    return run, {name: leaf for name, (leaf, _) in held.items()}


def place_all(structure: Structure, z: Tensor, run: Callable[[], Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return value and log Jacobian of each latent at ``z``; ``run`` calls the model, only if supports depend on it."""
    if not structure.dependent:
        nodes = messages(structure.trace)
        return {latent.name: latent.place(z, nodes[latent.name]["fn"]) for latent in structure.latents}
    place = Place(structure.latents, z)
    with apart(), place:
        run()
    return place.placed


def flatten_all(structure: Structure, values: Mapping[str, Tensor], run: Callable[[], Any]) -> Tensor:
    """Return the unconstrained vector (D,) of one constrained value of each latent; ``run`` as in :func:`place_all`."""
    trace = structure.trace
    if structure.dependent:
        with apart(), poutine.condition(data=dict(values)):
            trace = poutine.trace(run).get_trace()
    priors = {latent.name: messages(trace)[latent.name]["fn"] for latent in structure.latents}
    return torch.cat([latent.flatten(values[latent.name], priors[latent.name]) for latent in structure.latents])


def messages(trace: Any) -> dict[str, Any]:
    """Return the sites of a trace by name, free of Pyro's loose types."""
    return trace.nodes


def is_data(site: Any) -> bool:
    """Whether a sample site holds data: neither a factor nor a deterministic value nor a subsample."""
    return (
        site["type"] == "sample"
        and not site["infer"].get("_deterministic")
        and _innermost(site["fn"]) not in (Unit, Delta)
        and not site_is_subsample(site)
    )


def is_deterministic(site: Any) -> bool:
    """Whether a site holds a computed value: ``pyro.deterministic``, or a site that was reparametrised."""
    return site["is_observed"] and _innermost(site["fn"]) is Delta


def is_enumerated(site: Any) -> bool:
    """Whether a latent site is discrete and marked for parallel enumeration."""
    return site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support


def initial_value(site: Any = None) -> Any:
    """Pyro ``init_loc_fn``: the prior's median where it can be sampled, the middle of the support otherwise."""
    if site is None:
        return initial_value
    fn = site["fn"]
    transform = _transform(site)
    draws = _prior_draws(fn)
    if draws is None:
        shape = transform.inverse_shape(fn.shape())
        return transform(torch.zeros(shape, **_like(fn.support)))
    middle = transform.inv(draws).median(0).values
    return transform(torch.where(torch.isfinite(middle), middle, torch.zeros_like(middle)))


def _prior_draws(fn: Any) -> Tensor | None:
    """Draws to start from, or None where there are none; samplers that cannot draw several at once are called often."""
    try:
        # some of Pyro's samplers ignore the shape that is asked for, or stumble on it
        with quiet(), suppress(RuntimeError, TypeError):
            draws: Tensor = fn.sample((MEDIAN_DRAWS,))
            if draws.shape == (MEDIAN_DRAWS, *fn.shape()):
                return draws
        with quiet():
            return torch.stack([fn.sample() for _ in range(MEDIAN_DRAWS)])
    except NotImplementedError:
        return None


def _like(support: Constraint) -> dict[str, Any]:
    """Dtype and device of a support's bounds, where it has tensor bounds."""
    for bound in vars(getattr(support, "base_constraint", support)).values():
        if isinstance(bound, Tensor) and bound.is_floating_point():
            return {"dtype": bound.dtype, "device": bound.device}
    return {}


def _transform(site: Any) -> Any:
    """Return the bijection onto a latent site's support, or say which site has none."""
    name, support = site["name"], site["fn"].support
    if _innermost(site["fn"]) is Delta:
        raise ValueError(f"site {name!r}: a Delta is a fixed value, no latent. Use pyro.deterministic({name!r}, ...).")
    if support.is_discrete:
        raise ValueError(
            f"site {name!r}: expected a continuous latent, got the discrete {type(site['fn']).__name__}. Enumerate it "
            f"(pyro.infer.config_enumerate, or infer={{'enumerate': 'parallel'}}) or hide it from the guide "
            f"(poutine.block(model, hide=[{name!r}]))."
        )
    try:
        return bijection(site["fn"])
    except NotImplementedError:
        raise ValueError(
            f"site {name!r}: no bijection from real numbers to its support {support}. Use a distribution with another "
            "support, or reparametrise the site (poutine.reparam)."
        ) from None


class _Start(Messenger):
    """Give latent sites their starting values; flat priors, which have no dtype of their own, take that of ``like``."""

    def __init__(self, start: Callable[[Any], Tensor], like: Tensor) -> None:
        super().__init__()
        self.start = start
        self.like = like

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not site_is_subsample(msg) and not is_enumerated(msg):
            with torch.no_grad():
                value = self.start(msg)
            msg["value"] = value.to(self.like) if _innermost(msg["fn"]) is ImproperUniform else value


def _innermost(fn: Any) -> type:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn)


def _first_run(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], start: Callable[[Any], Tensor]
) -> poutine.Trace:
    """Run the model once at starting values of the arguments' floating dtype (or, failing that, of another one)."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    dtypes = [leaf.dtype for leaf in given if leaf.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()
    device = given[0].device if given else None
    other = torch.float32 if dtype == torch.float64 else torch.float64
    with apart(), torch.no_grad():
        try:
            with _Start(start, torch.zeros((), dtype=dtype, device=device)):
                return poutine.trace(model).get_trace(*args, **kwargs)
        except RuntimeError as error:
            if not _is_about_dtypes(error):
                raise
        with _Start(start, torch.zeros((), dtype=other, device=device)):
            return poutine.trace(model).get_trace(*args, **kwargs)


def _is_about_dtypes(error: RuntimeError) -> bool:
    return "dtype" in str(error) or "scalar type" in str(error)


def read_structure(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    start: Callable[[Any], Tensor] = initial_value,
) -> Structure:
    """Run ``model`` once at a starting value (``start`` of each latent site's message) and read its structure.

    Raises:
        ValueError: if there is no latent site; a latent is discrete and not enumerated, a Delta, has a support without
            a bijection, or sits in a subsampled or sequential plate; or observed values are NaN or no tensor. The site
            is named.
    """
    trace = _first_run(model, args, kwargs, start)
    sites = [site for site in messages(trace).values() if site["type"] == "sample" and not site_is_subsample(site)]
    stochastic = [site for site in sites if not site["is_observed"]]
    latents: list[Latent] = []
    for site in stochastic:
        if not is_enumerated(site):
            latents.append(_read_latent(site, sum(latent.size for latent in latents)))
    if not sum(latent.size for latent in latents):
        raise ValueError(
            "model: expected at least one continuous latent site (pyro.sample without obs=), got none. "
            f"Sites seen: {', '.join(repr(site['name']) for site in sites) or 'none'}."
        )
    data = {site["name"]: site for site in sites if site["is_observed"] and is_data(site)}
    for site in data.values():
        _check_data(site)
    seen = [site["value"] for site in (*stochastic, *data.values())]
    seen += [site["fn"].log_factor for site in sites if isinstance(site["fn"], Unit)]
    floats = [value for value in seen if value.is_floating_point()]
    structure = Structure(
        latents=tuple(latents),
        observed={name: site["value"] for name, site in data.items()},
        observed_plates={name: _plates(site) for name, site in data.items()},
        deterministic={site["name"]: _plates(site) for site in sites if is_deterministic(site)},
        enumerated=tuple(site["name"] for site in stochastic if is_enumerated(site)),
        subsampled=tuple(sorted({name for site in sites for name in _subsampled(site)})),
        hierarchical=(),
        dependent=False,
        plate_nesting=max((-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.dim), default=0),
        dtype=functools.reduce(torch.promote_types, [value.dtype for value in floats]),
        device=next((value.device for value in floats if value.device.type != "cpu"), floats[0].device),
        trace=trace,
    )
    try:
        return _dependence(model, args, kwargs, structure)
    except RuntimeError as error:
        own = functools.reduce(torch.promote_types, [messages(trace)[latent.name]["value"].dtype for latent in latents])
        if own == structure.dtype or not _is_about_dtypes(error):
            raise
    structure = replace(structure, dtype=own)  # wider data, and a model that does not mix
    return _dependence(model, args, kwargs, structure)


def _read_latent(site: Any, offset: int) -> Latent:
    name = site["name"]
    transform = _transform(site)
    for plate in _subsampled(site):
        raise ValueError(
            f"site {name!r}: a latent in the subsampled plate {plate!r}; a guide over one vector would learn only as "
            f"many latents as one subsample holds. Give {plate!r} its full size, or write the local latents' guide "
            "by hand (amortised)."
        )
    if site["value"].shape != site["fn"].shape():
        raise ValueError(
            f"site {name!r}: expected a starting value of shape {tuple(site['fn'].shape())}, got "
            f"{tuple(site['value'].shape)}. Give init_loc_fn one number for each entry."
        )
    if any(frame.dim is None for frame in site["cond_indep_stack"]):
        raise ValueError(f"site {name!r}: a latent in a sequential plate. Use a vectorised one (with pyro.plate(...)).")
    unconstrained = transform.inv(site["value"])
    event_dim = site["fn"].event_dim
    shape, lifted = site["value"].shape, event_dim + unconstrained.dim() - site["value"].dim()
    mask, free, size = site["mask"], None, unconstrained.numel()
    mask = unconstrained.new_zeros((), dtype=torch.bool) if mask is False else mask
    if isinstance(mask, Tensor) and not bool(mask.all()):
        mask = mask.expand(shape[: len(shape) - event_dim])
        inside = mask.reshape(mask.shape + (1,) * lifted).expand(unconstrained.shape)
        free = inside.reshape(-1).nonzero().flatten()
        size = len(free)
    else:
        mask = None
    return Latent(name, shape, unconstrained.shape, event_dim, _plates(site), offset, size, mask, free)


def _plates(site: Any) -> tuple[Plate, ...]:
    frames = [frame for frame in site["cond_indep_stack"] if frame.dim is not None]
    return tuple(Plate(frame.name, frame.dim, frame.size) for frame in frames)


def _subsampled(site: Any) -> list[str]:
    return [frame.name for frame in site["cond_indep_stack"] if frame.full_size not in (None, frame.size)]


def _check_data(site: Any) -> None:
    name, value = site["name"], site["value"]
    if not isinstance(value, Tensor):
        raise ValueError(
            f"site {name!r}: expected a tensor as obs=, got a {type(value).__name__}. Use torch.as_tensor."
        )
    if not value.is_floating_point() or site["mask"] is False:
        return
    fn = site["fn"]
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    if isinstance(fn, (NanMaskedNormal, NanMaskedMultivariateNormal)):
        return
    bad = torch.isnan(value)
    for mask, axes in _masks(site):
        bad = bad & mask.reshape(mask.shape + (1,) * (site["fn"].event_dim - axes))
    bad = bad.reshape(*bad.shape[: bad.dim() - site["fn"].event_dim], -1).any(-1)
    if bool(bad.any()):
        raise ValueError(
            f"site {name!r}: {int(bad.sum())} of {bad.numel()} observed values are NaN. "
            "Drop them, or mark them as missing with obs_mask=."
        )


def _dependence(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], structure: Structure
) -> Structure:
    """Find out, from a second run, whether supports move with the latents, and which locations and scales do."""

    def run(size: float) -> tuple[Tensor, poutine.Trace]:
        point = size * torch.linspace(-1.0, 1.0, structure.dim, dtype=structure.dtype, device=structure.device)
        with apart(), torch.no_grad(), pyro.validation_enabled(False), Place(structure.latents, point):
            return point, poutine.trace(model).get_trace(*args, **kwargs)

    point, second = nearer(run)
    hierarchical, dependent = [], False
    for latent in structure.latents:
        priors = [messages(trace)[latent.name]["fn"] for trace in (structure.trace, second)]
        first, other = (latent.place(point, prior)[0] for prior in priors)
        dependent = dependent or not torch.equal(first, other)
        # where discrete latents are summed out, a location may have one value for each of theirs
        if latent.mask is None and not structure.enumerated and moves(*priors):
            hierarchical.append(latent.name)
    return replace(structure, dependent=dependent, hierarchical=tuple(hierarchical))
