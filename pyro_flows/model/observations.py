"""What a model observes: values that its likelihood allows, and whether there are any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import cast

import pyro
import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.utils._pytree import tree_flatten_with_path

from pyro_flows.model.batching import apart
from pyro_flows.model.faults import at_a_point, where_it_runs
from pyro_flows.model.sites import Latent, Model, Positional, Site, Structure, is_factor, messages
from pyro_flows.model.supports import (
    WRAPPERS,
    elementary,
    family,
    inside,
    is_narrower,
    is_whole,
    needs_guard,
    signature,
    support_of,
)
from pyro_flows.support.arguments import signature_of
from pyro_flows.support.numbers.tensors import broadcast
from pyro_flows.support.process.warnings import outside

SHOWN = 3  # entries, or names, in a message
NUMBERS = 4  # of one event in a message
BOUNDS = "lower_bound", "upper_bound"  # of an interval
Run = Callable[[Tensor], poutine.Trace]


class NothingObservedWarning(UserWarning):
    """A model without any observation was fitted or diagnosed, so that its posterior is its prior.

    A guide of a model inside of ``poutine.block`` warns too, if it cannot start by the model without the block.

    >>> import warnings, pyro_flows as pf
    >>> issubclass(pf.NothingObservedWarning, UserWarning)
    True
    """


# values ---------------------------------------------------------------------------------------------------------------


def check_values(structure: Structure, run: Run, model: Callable[[], object]) -> frozenset[str]:
    """Check observed values against the supports of their likelihoods, and return the sites that need a guard.

    A support that is the same for all latents decides here. One that moves with latents (or a value that does) decides
    anew at each of them: such a site has to get a density of zero outside of its support, and so has a mixture whose
    components have supports of their own. Masked-out entries may be anything, and a distribution made with
    ``validate_args=False`` is left alone. ``run`` gives the trace at one unconstrained point, ``model`` runs once more.
    """
    nodes = messages(structure.trace)
    guards = {latent.name for latent in structure.latents if needs_guard(nodes[latent.name]["fn"])}
    kept = [name for name in structure.observed if nodes[name]["mask"] is not False]
    asked = [name for name in kept if not is_whole(nodes[name]["fn"])]
    if asked:
        alone = left_alone(nodes, model)
        asked = [name for name in asked if name not in alone]
    if asked:
        with torch.no_grad(), pyro.validation_enabled(False):
            first, *others = [messages(trace) for trace in where_it_runs(run, structure.points, 2)] or [{}]
        for name in asked:
            if not others or support_moves(first[name], others[0][name]):
                guards.add(name)
                continue
            # between values of enumerated latents, which lie along axes left of all plates
            found, axes = inside(first[name]["fn"], first[name]["value"])
            varies = found.dim() - axes > max(structure.plate_nesting, _batch_dim(first[name]))
            if structure.enumerated and varies:
                guards.add(name)
            else:
                refuse_outside(first[name])
                guards |= {name} if needs_guard(first[name]["fn"]) else set()
    return frozenset(guards)


def left_alone(nodes: Mapping[str, Site], model: Callable[[], object]) -> set[str]:
    """The observed sites of a run whose distributions were made with ``validate_args=False``."""
    if not Distribution._validate_args:  # plates hand the global setting on as if it were a distribution's own
        values = {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}
        values = {name: value for name, value in values.items() if not nodes[name]["is_observed"]}
        given = poutine.condition(data=values)
        with at_a_point() as tried, apart(), torch.no_grad(), pyro.validation_enabled(True), given:
            nodes = messages(poutine.trace(model).get_trace())
        if tried.error is not None:  # from a check of arguments, or of the model's own at values that it has run at
            return set()
    sites = {name: site for name, site in nodes.items() if site["type"] == "sample" and site["is_observed"]}
    return {name for name, site in sites.items() if _is_unchecked(site["fn"])}


def _is_unchecked(fn: Distribution) -> bool:
    own = vars(fn).get("_validate_args") is False
    return own or (isinstance(fn, WRAPPERS) and _is_unchecked(fn.base_dist))


def support_moves(one: Site, other: Site) -> bool:
    """Whether the support of an observed site, or its value, differs between two runs."""
    pairs = [[*signature(site["fn"]), site["value"]] for site in (one, other)]
    return len(pairs[0]) != len(pairs[1]) or any(not same(a, b) for a, b in zip(*pairs, strict=True))


def same(one: object, other: object) -> bool:
    """Whether two numbers, or all numbers of two tensors, are equal, or both NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    return type(one) is type(other) and bool(one == other)


def _batch_dim(site: Site) -> int:
    return int(site["value"].dim()) - len(site["fn"].event_shape)


def refuse_outside(site: Site) -> None:
    """Raise an error if observed values lie outside of the support, whatever the latents are."""
    name, fn, value = site["name"], site["fn"], site["value"]
    found, axes = inside(fn, value)
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=found.device)
        found = found | ~mask.reshape(mask.shape + (1,) * axes)
    if bool(found.all()):
        return
    kind = family(fn)
    entries = _entries(name, value, ~found, len(fn.event_shape) - axes, _distances(kind, value))
    raise ValueError(
        f"site {name!r}: expected observed values in the support of {type(kind).__name__} ({_stated(kind)}), got "
        f"{int((~found).sum())} of {found.numel()} outside of it: {entries}. Correct them, use another likelihood, or "
        "mark them as missing with obs_mask=. If they are meant, make the distribution with validate_args=False."
    )


def _entries(name: str, value: Tensor, bad: Tensor, depth: int, distance: Tensor | None) -> str:
    """The first few bad entries, the farthest ones first, as ``name[index] = value``; ``depth`` axes make one entry."""
    whole = value.expand(broadcast(bad.shape + (1,) * depth, value.shape))
    bad = bad.expand(whole.shape[: whole.dim() - depth])
    where = bad.nonzero()
    if distance is not None and depth == 0:
        far = distance.expand(bad.shape)[bad].nan_to_num(nan=torch.inf)
        where = where[far.argsort(descending=True, stable=True)]
    shown = []
    for index in where[:SHOWN].tolist():
        label = f"{name}[{', '.join(map(str, index))}]" if index else name
        shown.append(f"{label} = {_number(whole[tuple(index)])}")
    return ", ".join(shown) + (", ..." if len(where) > SHOWN else "")


def _number(value: Tensor) -> str:
    if value.dim() == 0:
        return f"{value.item():.6g}"
    listed = [f"{number:.6g}" for number in value.flatten()[:NUMBERS].tolist()]
    return f"[{', '.join(listed)}{', ...' if value.numel() > NUMBERS else ''}]"


def _distances(fn: Distribution, value: Tensor) -> Tensor | None:
    """How far numbers lie outside of the bounds of an interval, or from a whole number; None for other supports."""
    support = cast(Constraint, elementary(support_of(fn)))
    number = value.double()
    lower, upper = (getattr(support, name, None) for name in BOUNDS)
    if (lower is None and upper is None) or support.event_dim:
        return None
    low = torch.zeros_like(number) if lower is None else lower - number
    high = torch.zeros_like(number) if upper is None else number - upper
    return torch.maximum(torch.maximum(low, high), (number - number.round()).abs() if support.is_discrete else low)


def _stated(fn: Distribution) -> str:
    """A support in words: its name and its bounds."""
    if is_narrower(fn):
        base = family(fn.base_dist)
        return f"what its transforms make of {type(base).__name__}, {_stated(base)}"
    support = cast(Constraint, elementary(support_of(fn)))
    bounds = {key: getattr(support, key) for key in BOUNDS if hasattr(support, key)}
    name = type(support).__name__.lstrip("_")
    return f"{name}: {', '.join(f'{key} {_range(bound)}' for key, bound in bounds.items())}" if bounds else name


def _range(bound: object) -> str:
    values = torch.as_tensor(bound, dtype=torch.float64)
    low, high = float(values.min()), float(values.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def not_finite(site: Site, density: Tensor) -> str:
    """Say which entries of a site have a log density that is not finite, and, for data, what values they have."""
    name, bad = site["name"], ~torch.isfinite(density)
    said = f"site {name!r} has log density {float(density.sum())}"
    if not site["is_observed"] or is_factor(site) or bad.dim() > _batch_dim(site):
        return said
    entries = _entries(name, site["value"], bad, len(site["fn"].event_shape), None)
    return f"{said}, from {int(bad.sum())} of {bad.numel()} values: {entries}"


# nothing observed -----------------------------------------------------------------------------------------------------


def warn_if_nothing_observed(
    structure: Structure, run: Run, model: Model, args: Positional, kwargs: dict[str, object]
) -> None:
    """Warn, at the line outside of this package that called, if a model has neither data nor factors.

    Latent sites that look like data whose ``obs=`` was forgotten are named: no other site depends on them, and they
    depend on others or have the length of an argument.
    """
    if not _observes_nothing(structure):
        return
    looks = list[str]()
    with suppress(torch.linalg.LinAlgError):  # the model raises an error at such a point
        looks = _forgotten(structure, run, _arguments(model, args, kwargs))
    hint = f" These look like data whose obs= was forgotten: {'; '.join(looks)}." if looks else ""
    warnings.warn(
        f"model: nothing is observed (no obs= with values, no pyro.factor), so the posterior is the prior.{hint} If "
        "that is meant, say so: warnings.simplefilter('ignore', pyro_flows.NothingObservedWarning).",
        NothingObservedWarning,
        stacklevel=outside(),
    )


def hides_data(structure: Structure, model: Model) -> bool:
    """Whether a model inside of ``poutine.block``, which may hide them, has neither data nor factors.

    Pyro's tutorials expose some latents only, where others are enumerated.
    """
    return without_block(model) is not model and _observes_nothing(structure)


def warn_of_hidden() -> None:
    """Warn that a guide starts at the prior, since its model inside of ``poutine.block`` shows no data."""
    warnings.warn(
        "guide: its model is inside of poutine.block, and nothing is observed there, so the guide starts at the prior, "
        "and not by the data. If the model has data, give the guide the model itself, without the handler: the guide "
        "leaves enumerated sites out. Or name what to hide: poutine.block(model, hide=[...]).",
        NothingObservedWarning,
        stacklevel=outside(),
    )


def without_block(model: Model) -> Model:
    """Return a model without ``poutine.block`` around it. Handlers are ``partial(_, handler, model)``; others stay."""
    around = getattr(model, "func", None)
    if not isinstance(around, partial) or len(around.args) != 2 or not isinstance(around.args[0], Messenger):
        return model
    handler, inside = around.args
    found = without_block(inside)
    if isinstance(handler, BlockMessenger):
        return found
    return model if found is inside else handler(found)


def _observes_nothing(structure: Structure) -> bool:
    return not structure.observed and not any(map(is_factor, messages(structure.trace).values()))


def _forgotten(structure: Structure, run: Run, arguments: dict[str, Tensor]) -> list[str]:
    """Name the latents that look like data, with the argument that fits, the likeliest kind only."""
    here, there = structure.points(0.1)
    kinds: dict[tuple[bool, bool], list[str]] = {}
    with torch.no_grad(), pyro.validation_enabled(False):
        base = messages(run(here))
        for latent in structure.latents:
            own = slice(latent.offset, latent.offset + latent.size)
            moved, others = here.clone(), there.clone()
            moved[own], others[own] = there[own], here[own]
            after = messages(run(moved))
            rest = [other.name for other in structure.latents if other.name != latent.name]
            if any(_changes(base[name], after[name]) for name in rest):
                continue
            depends = bool(rest) and _changes(base[latent.name], messages(run(others))[latent.name])
            fitting = next((name for name, value in arguments.items() if _fits(latent, value)), None)
            said = f"{latent.name!r}" + (f" (of the length of {fitting})" if fitting else "")
            kinds.setdefault((depends, fitting is not None), []).append(said)
    best = next((kinds[kind] for kind in ((True, True), (True, False), (False, True)) if kind in kinds), [])
    return best[:SHOWN] + ([f"and {len(best) - SHOWN} more"] if len(best) > SHOWN else [])


def _changes(one: Site, other: Site) -> bool:
    """Whether a site's distribution differs between two runs."""
    before, after = (site["fn"].log_prob(one["value"]) for site in (one, other))
    return not torch.allclose(before, after, equal_nan=True)


def _fits(latent: Latent, value: Tensor) -> bool:
    event = latent.shape[len(latent.shape) - latent.event_dim :]
    lengths = {*(plate.size for plate in latent.plates), *event}
    return value.dim() > 0 and len(value) > 1 and len(value) in lengths


def _arguments(model: Model, args: Positional, kwargs: dict[str, object]) -> dict[str, Tensor]:
    """The tensors among a model's arguments, by name where names can be found."""
    given: dict[str, object] = {**{f"argument {position}": value for position, value in enumerate(args)}, **kwargs}
    with suppress(TypeError, ValueError):
        given = dict(signature_of(model).bind(*args, **kwargs).arguments)
    found = {}
    for name, value in given.items():
        for path, leaf in tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                found[f"{name}{''.join(map(str, path))}"] = leaf
    return found
