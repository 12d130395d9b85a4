"""Data sets of one model; which argument holds which observed site, and arguments with other data in their place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten, tree_flatten_with_path, tree_unflatten

from pyro_flows.model.arguments import usable
from pyro_flows.model.batching import apart, quiet
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Keywords, Model, messages
from pyro_flows.model.start import at_some_draw
from pyro_flows.model.unchanged import own as owned
from pyro_flows.support.arguments import signature_of
from pyro_flows.support.process.fallbacks import Tried

Names = Mapping[str, str | int] | None  # of the arguments that hold the data of sites, or their positions
HOW = "Say which argument holds it: data={'site': 'argument'}"


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Let errors of a data set tell its number."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"data[{number}]: {error}") from error


@dataclass(frozen=True)
class Case:
    """The arguments of a model for one data set."""

    args: tuple[object, ...]
    kwargs: dict[str, object]

    def density(self, model: Model, number: int, lead: LogDensity | None = None) -> LogDensity:
        """Return the model's log density: how the model runs is taken from ``lead``, that of data of equal shapes."""
        with numbered(number):
            if lead is not None and lead.batched and not lead.parameters():
                return lead.beside(self.args, self.kwargs)
            return LogDensity(model, self.args, self.kwargs)

    @property
    def shapes(self) -> tuple[object, ...]:
        """What data sets that go side by side have in common: the form of the arguments, and their shapes."""
        leaves, form = tree_flatten((self.args, self.kwargs))
        parts = [(tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        return (str(form), *parts)


def cases_of(model: Model, data: object, model_kwargs: Keywords | None) -> list[Case]:
    """Return the arguments of each data set: a tuple, a dict of keyword arguments, or a single argument."""
    if isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Sequence):
        raise ValueError(
            "data: expected a list with the arguments of each data set (a tuple, a dict of keyword arguments, or one "
            f"argument), got a {type(data).__name__}. To fit a single data set, call fit."
        )
    shared = dict(model_kwargs or {})
    found = []
    for number, own in enumerate(data):
        args: tuple[object, ...] = tuple(own) if isinstance(own, tuple) else () if isinstance(own, Mapping) else (own,)
        kwargs = {**shared, **own} if isinstance(own, Mapping) else shared
        with numbered(number):
            found.append(Case(*usable(model, *owned(args, kwargs))))
    return found


def grouped(cases: Sequence[Case]) -> list[list[int]]:
    """Return the numbers of the data sets, those with equal shapes together, in the order in which they come."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(case.shapes, []).append(number)
    return list(groups.values())


@dataclass(frozen=True)
class Place:
    """Where an observed site stands: a leaf of the arguments, and the part of it, as ``as_strided`` takes it."""

    site: str
    leaf: int
    part: tuple[tuple[int, ...], tuple[int, ...], int] | None


@dataclass(frozen=True)
class Wiring:
    """The places of all observed sites of a model, given its arguments."""

    case: Case
    places: tuple[Place, ...]

    def __call__(self, values: Mapping[str, Tensor]) -> Case:
        """Return the arguments with other data; entries that are missing (NaN) stay so."""
        leaves, form = tree_flatten((self.case.args, self.case.kwargs))
        for leaf in {place.leaf for place in self.places}:
            leaves[leaf] = leaves[leaf].clone()
        for place in self.places:
            whole = leaves[place.leaf]
            part = whole if place.part is None else torch.as_strided(whole, *place.part)
            value = values[place.site].reshape(part.shape).to(part)
            part.copy_(torch.where(part.isnan(), part, value) if part.is_floating_point() else value)
        args, kwargs = tree_unflatten(leaves, form)
        return Case(tuple(args), dict(kwargs))


def wire(density: LogDensity, case: Case, data: Names) -> Wiring:
    """Find out which argument holds which observed site: by the caller's word, by memory, or by equal values."""
    names, positions = _leaf_names(density, case)
    leaves = tree_flatten((case.args, case.kwargs))[0]
    observed = density.structure.observed
    unknown = [site for site in data or {} if site not in observed]
    if unknown:
        known = ", ".join(map(repr, observed))
        raise ValueError(f"data: expected observed sites of the model ({known}), got {unknown[0]!r}.")
    found = []
    for site, value in observed.items():
        if data is not None and site in data:
            found.append(_told(site, value, data[site], names, positions, leaves))
        else:
            found.append(_found(site, value, names, leaves))
    return Wiring(case, tuple(found))


def _told(
    site: str, value: Tensor, argument: str | int, names: list[str], positions: Mapping[int, str], leaves: list[object]
) -> Place:
    """Return the place that the caller named: an argument's name, or the number of a positional one."""
    wanted = positions.get(argument) if isinstance(argument, int) else str(argument)
    leaf = names.index(wanted) if wanted in names else -1
    target = leaves[leaf] if leaf >= 0 else None
    if not isinstance(target, Tensor):
        known = ", ".join(repr(name) for name, part in zip(names, leaves, strict=True) if isinstance(part, Tensor))
        raise ValueError(f"data[{site!r}]: expected an argument that is a tensor ({known}), got {argument!r}.")
    if target.numel() == value.numel():
        return Place(site, leaf, None)
    part = _shared(value, target)
    if part is None:
        raise ValueError(
            f"data[{site!r}]: the site has shape {tuple(value.shape)}, argument {names[leaf]!r} has "
            f"{tuple(target.shape)}, and the site is not a part of it."
        )
    return Place(site, leaf, part)


def _found(site: str, value: Tensor, names: list[str], leaves: list[object]) -> Place:
    """Return the place of a site by memory that it shares with an argument, or by equal values."""
    for number, leaf in enumerate(leaves):
        if leaf is value:
            return Place(site, number, None)
    for number, leaf in enumerate(leaves):
        part = _shared(value, leaf) if isinstance(leaf, Tensor) else None
        if part is not None:
            return Place(site, number, part)
    equal = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _equal(leaf, value)]
    if len(equal) == 1:
        return Place(site, equal[0], None)
    if equal:
        several = " and ".join(repr(names[number]) for number in equal)
        raise ValueError(f"site {site!r}: arguments {several} both have its values. {HOW}.")
    raise ValueError(
        f"site {site!r}: none of the arguments holds its values as they are, so simulated data cannot be put in their "
        f"place. Let the model take them as an argument and pass that to obs= unchanged. {HOW}, if they are equal in "
        "number."
    )


def _equal(leaf: Tensor, value: Tensor) -> bool:
    same = leaf.shape == value.shape and leaf.numel() > 0
    return same and torch.allclose(leaf.double(), value.double(), rtol=0.0, atol=0.0, equal_nan=True)


def _shared(value: Tensor, leaf: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Return which part of the memory of ``leaf`` a value is, as a copy of the leaf has it; None if it is none."""
    if value.dtype != leaf.dtype or value.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr():
        return None
    copy = leaf.clone()
    overlaps = any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))
    if overlaps or copy.stride() != leaf.stride() or not value.numel():
        return None
    offset = int(value.storage_offset()) - int(leaf.storage_offset())
    reach = offset + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (tuple(value.shape), value.stride(), offset) if offset >= 0 and reach < leaf.numel() else None


def _leaf_names(density: LogDensity, case: Case) -> tuple[list[str], dict[int, str]]:
    """Return the name of each leaf of the arguments, ``y``, ``batch['y']``, ``argument 0``, and those by position."""
    signature: list[str] = []
    with suppress(TypeError, ValueError):
        bound = signature_of(density.model).bind_partial(*case.args)
        kinds = signature_of(density.model).parameters
        for name, value in bound.arguments.items():
            many = kinds[name].kind is inspect.Parameter.VAR_POSITIONAL
            signature += [f"argument {len(signature) + number}" for number in range(len(value))] if many else [name]
    signature = signature or [f"argument {number}" for number in range(len(case.args))]
    found, positions = [], {}
    for path, _ in tree_flatten_with_path((case.args, case.kwargs))[0]:
        _, first, *rest = path
        place = first.idx if isinstance(first, SequenceKey) else -1  # of a positional argument
        name = str(first.key) if isinstance(first, MappingKey) else signature[place]
        found.append(name + "".join(map(str, rest)))
        if place >= 0 and not rest:
            positions[place] = found[-1]
    return found, positions


# obs=None -------------------------------------------------------------------------------------------------------------


def filled(model: Model, case: Case, data: Names) -> Case:
    """Return the arguments, with drawn data for those arguments that are None and would hold data.

    Models are often written ``def model(x, y=None): ... obs=y``. Each argument that is None is tried with a draw of
    each site: where the site is then observed, it is the one.
    """
    try:
        bound = signature_of(model).bind(*case.args, **case.kwargs)
    except (TypeError, ValueError):
        return case
    bound.apply_defaults()
    empty = [name for name, value in bound.arguments.items() if value is None]
    if not empty:
        return case
    with apart(), torch.no_grad():
        drawn = messages(at_some_draw(lambda: poutine.trace(model).get_trace(*case.args, **case.kwargs)))
    sites = {
        name: site["value"] for name, site in drawn.items() if site["type"] == "sample" and not site["is_observed"]
    }
    told = {argument: site for site, argument in (data or {}).items()}
    for name in empty:
        order = sorted(sites, key=lambda site: (site != told.get(name), site != name))
        for site in order:
            if isinstance(sites[site], Tensor) and _observes(model, bound, name, site, sites[site]):
                bound.arguments[name] = sites.pop(site)
                break
    return Case(bound.args, bound.kwargs)


def _observes(model: Model, bound: inspect.BoundArguments, name: str, site: str, value: Tensor) -> bool:
    """Whether a site is observed, with this value, once an argument holds it."""
    tried = inspect.BoundArguments(bound.signature, type(bound.arguments)(bound.arguments))
    tried.arguments[name] = value
    with Tried() as run, apart(), quiet(), torch.no_grad():
        found = messages(at_some_draw(lambda: poutine.trace(model).get_trace(*tried.args, **tried.kwargs)))
    if run.error is not None:  # at data that do not fit
        return False
    return site in found and found[site]["is_observed"] and found[site]["value"] is value


# check ----------------------------------------------------------------------------------------------------------------


def check_wiring(density: LogDensity, wiring: Wiring, values: Mapping[str, Tensor]) -> None:
    """Check, with one simulation, that the model sees the new data, and that it draws these given its latents."""
    case = wiring(values)
    latents = {name: values[name] for name in density.names}
    observed = {name: values[name] for name in density.structure.observed}
    with apart(), quiet(), torch.no_grad(), density.precisely():
        with poutine.condition(data={**latents, **observed}):
            run = poutine.trace(density.model).get_trace
            before = messages(at_some_draw(lambda: run(*density.args, **density.kwargs)))
        with poutine.condition(data=latents):
            after = messages(at_some_draw(lambda: run(*case.args, **case.kwargs)))
        for name, value in observed.items():
            seen = after[name]["value"]
            kept = seen.isnan() if seen.is_floating_point() else torch.zeros_like(seen, dtype=torch.bool)
            if not torch.equal(seen[~kept], value.expand(seen.shape).to(seen)[~kept]):
                raise ValueError(f"site {name!r}: the model still sees other data than those simulated. {HOW}.")
            one, other = (found[name]["fn"].log_prob(value.to(seen)) for found in (before, after))
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise ValueError(
                    f"site {name!r}: its distribution depends on the argument that holds its own data. Write the model "
                    "with what pyro.sample returns in place of that argument, so that data can be simulated."
                )
