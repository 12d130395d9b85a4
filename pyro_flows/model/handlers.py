"""Handlers under which a model runs: latents from one vector, observed sites anew, parameters as they were."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TypeVar, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, transform_to
from torch.distributions.constraints import Constraint

from pyro_flows.model.batching import apart
from pyro_flows.model.sites import Latent, Model, Placed, Site, Structure, is_data, is_open, messages
from pyro_flows.model.supports import guarded, missing
from pyro_flows.support.numbers.tensors import broadcast

Fn = TypeVar("Fn", bound=Distribution)


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
        self.placed: dict[str, Placed] = {}
        self.last: str | None = None  # the site that the model came to last

    def _pyro_sample(self, msg: Site) -> None:
        self.last = msg["name"]
        msg["fn"] = _unchecked(msg["fn"])
        latent = self.latents.get(msg["name"])
        if latent is not None and not msg["is_observed"]:
            placed = self.placed[msg["name"]] = self._place(latent, msg["fn"])
            msg["value"], msg["fn"] = placed.value, placed.prior
        elif msg["is_observed"] and is_data(msg):
            for mask, axes in masks_over(msg):
                msg["value"] = _fill(msg["value"], mask, msg["fn"].event_dim - axes)
        if msg["name"] in self.guards:
            msg["fn"] = guarded(msg["fn"])

    def _place(self, latent: Latent, fn: TorchDistribution) -> Placed:
        return latent.place(self.z, fn)


class _AllPlaced(BaseException):
    """Ends a run of the model after its last latent; ``except Exception`` in a model does not catch it."""


class _PlaceOnly(Place):
    """A :class:`Place` that ends the run with the last latent, since a likelihood may take long."""

    def _pyro_post_sample(self, msg: Site) -> None:
        if len(self.placed) == len(self.latents):
            raise _AllPlaced


def masks_over(site: Site) -> list[tuple[Tensor, int]]:
    """The masks over a site's entries (False: left out), each with the number of axes of one event it has."""
    own = missing(site["fn"])
    return ([(site["mask"], 0)] if isinstance(site["mask"], Tensor) else []) + ([] if own is None else [own])


def _fill(value: Tensor, mask: Tensor, event_dim: int) -> Tensor:
    """Put the first observed event where ``mask`` is False: NaN there would make the gradient NaN, masked or not."""
    batch = broadcast(mask.shape, value.shape[: value.dim() - event_dim])
    event = value.shape[value.dim() - event_dim :]
    first = mask.expand(batch).reshape(-1).int().argmax().reshape(1)
    filler = value.expand(batch + event).reshape(-1, *event).index_select(0, first)[0]
    if value.is_floating_point():
        filler = torch.nan_to_num(filler, nan=0.5)  # if nothing is observed
    return torch.where(mask.reshape(mask.shape + (1,) * event_dim), value, filler)


def _unchecked(fn: Fn) -> Fn:
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


class Given(Messenger):
    """Give sites that are not observed these values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if is_open(msg) and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class Resample(Messenger):
    """Draw the observed sites anew (posterior and prior predictive), one draw for each observed value."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] and is_data(msg):
            fn, value = msg["fn"], msg["value"]
            batch = broadcast(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            msg["fn"] = fn if batch == fn.batch_shape else fn.expand(batch)
            msg["is_observed"], msg["value"] = False, cast(Tensor, None)


class _Hold(Messenger):
    """Give a model's parameters values made from leaf tensors of ours, whatever Pyro's store holds by now."""

    def __init__(self, held: Mapping[str, tuple[Tensor, Constraint]]) -> None:
        super().__init__()
        self.held = held

    def _pyro_param(self, msg: Site) -> None:
        if msg["name"] in self.held:
            leaf, constraint = self.held[msg["name"]]
            msg["value"] = transform_to(constraint)(leaf)


def within(model: Model, context: Callable[[], AbstractContextManager[object]]) -> Model:
    """Return the model, run inside of a context that is made for each run."""

    @functools.wraps(model, updated=())
    def run(*args: object, **kwargs: object) -> object:
        with context():
            return model(*args, **kwargs)

    return run


def hold(model: Model, trace: poutine.Trace) -> tuple[Callable[..., object], dict[str, Tensor]]:
    """Return the model, tied to the parameters that it had in ``trace``, and their unconstrained leaves by name.

    Without this, a cleared or reloaded parameter store would silently turn it into another model.
    """
    constraints = pyro.get_param_store()._constraints
    held = {}
    for name, site in messages(trace).items():
        if site["type"] == "param":
            leaf = getattr(site["value"], "unconstrained", lambda site=site: site["value"])()
            held[name] = (leaf, constraints.get(name, site["kwargs"]["constraint"]))

    return within(model, lambda: _Hold(held)), {name: leaf for name, (leaf, _) in held.items()}


def place_all(structure: Structure, z: Tensor, run: Callable[[], object], *, moving: bool = False) -> dict[str, Placed]:
    """Put each latent at ``z``.

    ``run`` calls the model, only if supports depend on it, or on parameters that may move.
    """
    if not (structure.dependent or moving):
        nodes = messages(structure.trace)
        return {latent.name: latent.place(z, nodes[latent.name]["fn"]) for latent in structure.latents}
    place = _PlaceOnly(structure.latents, z)
    with apart(), suppress(_AllPlaced), place:
        run()
    for latent in structure.latents:
        if latent.name not in place.placed:
            raise ValueError(
                f"site {latent.name!r}: expected a latent, as in the first run, got data or no such site. Make a new "
                "guide or density, and run it first with the arguments that it is for."
            )
    return place.placed


def flatten_all(
    structure: Structure, values: Mapping[str, Tensor], run: Callable[[], object], *, moving: bool = False
) -> Tensor:  # fmt: skip
    """Return the unconstrained vector (D,) of one constrained value of each latent; ``run`` as in :func:`place_all`."""
    trace = structure.trace
    if structure.dependent or moving:
        with apart(), poutine.condition(data=dict(values)):
            trace = poutine.trace(run).get_trace()
    priors = {latent.name: messages(trace)[latent.name]["fn"] for latent in structure.latents}
    return torch.cat([latent.flatten(values[latent.name], priors[latent.name]) for latent in structure.latents])
