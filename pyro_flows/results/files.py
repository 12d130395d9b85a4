"""Posteriors as files: a directory with tensors, JSON and netCDF. Reading them runs no code."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from pyro_flows import _arrays
from pyro_flows._bundles import Bundle, Entries, plain
from pyro_flows._seeding import seeded
from pyro_flows._untrusted import packed, reading, require, unpacked
from pyro_flows.flows.recipe_json import not_rebuilt, restored, to_json
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.digits import ALLOWED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Keywords, Model, Positional
from pyro_flows.model.unchanged import own
from pyro_flows.results.consistent import (
    CHECKED,
    ROUNDED,
    ROUNDED_AT_LEAST,
    check_flow,
    check_groups,
    check_tensors,
    check_texts,
)
from pyro_flows.results.dims import Labeling, coordinate_names
from pyro_flows.results.methods import guide_method
from pyro_flows.results.record import Record
from pyro_flows.verdict.chains import McmcDiagnostics, McmcDraws
from pyro_flows.verdict.mcmc import OF_WEIGHTS
from pyro_flows.verdict.methods import MCMC
from pyro_flows.verdict.verdict import Verdict

NETCDF, TENSORS, TEXT = "posterior.nc", "guide.pt", "posterior.json"
FIELDS = ("z", "log_p", "log_q", "log_weights", "_used", "_used_log_p", "_used_log_q", "losses")
TENSOR_FIELDS = {field.removeprefix("_"): field for field in FIELDS}  # nothing is private in files
NUMBER_FIELDS = ("k_hat", "ess", "elbo", "log_evidence")
FILES = Bundle("posterior", "pyro_flows posterior", TEXT, (NETCDF, TENSORS))


def write(posterior: Record, groups: Entries, attrs: Mapping[str, str | float], path: Path) -> None:
    """Write the three files, all or none: a run that breaks off leaves the earlier ones whole.

    A flow that could not be rebuilt from what is written is left out, with the reason.
    """
    flow, reason = posterior.flow, posterior.missing.get("flow")
    if flow is not None:
        reason = not_rebuilt(flow)
    description = {
        "numbers": {name: getattr(posterior, name) for name in NUMBER_FIELDS},
        "verdict": dataclasses.asdict(posterior.verdict),
        "settings": posterior.settings,
        "history": posterior.history,
        "guide": {
            "class": posterior.guide_name,
            "flow": None if flow is None or reason else to_json(flow),
            "reason": reason,
        },
        "coordinates": posterior.coordinates,
        "without": posterior.missing.get("groups"),
        "labels": dataclasses.asdict(posterior._labeling),
    }
    # copies, since views would be written with all that they are cut from
    tensors: dict[str, object] = {
        name: getattr(posterior, field).detach().cpu().clone() for name, field in TENSOR_FIELDS.items()
    }
    tensors["samples"] = {name: value.detach().cpu().clone() for name, value in posterior.samples.items()}
    state = {} if flow is None or reason else flow.state_dict()
    tensors["flow"] = {name: value.detach().cpu() for name, value in state.items()}
    if posterior.chains is not None:
        tensors["chains"] = posterior.chains.stored()
    FILES.write(path, plain(description), {NETCDF: _arrays.write(groups, attrs), TENSORS: packed(tensors)})


def read(path: str | os.PathLike[str], model: Model | None, args: Positional, kwargs: Keywords) -> dict[str, Any]:
    """Read a saved posterior: the fields of a :class:`Posterior`."""
    source = Path(path)
    description, contents = FILES.read(source)
    with seeded(0):  # parameters are made before they are read
        return _read(source, description, contents, model, args, kwargs)


def _read(
    source: Path,
    description: Entries,
    contents: Mapping[str, bytes],
    model: Model | None,
    args: Positional,
    kwargs: Keywords,
) -> dict[str, Any]:
    with reading(source, TENSORS):
        tensors = unpacked(contents[TENSORS])
        require(isinstance(tensors, dict), "it holds no tensors by name")
    with reading(source, TEXT, TENSORS):
        description, tensors = present(description, tensors)
        check_texts(description)
        check_tensors(tensors, len(description["coordinates"]), description["verdict"])
        flow, guide, density = None, None, None
        if description["guide"]["flow"] is not None:
            flow = restored(description["guide"]["flow"], tensors["flow"])
            check_flow(flow, tensors)
        settings = cast("Entries", _revived(description["settings"]))
        verdict = _verdict(description["verdict"], guide_method(flow, settings))
        history = tuple(cast("list[object]", _revived(description["history"])))
        numbers = {name: float(description["numbers"][name]) for name in NUMBER_FIELDS}
    with reading(source, NETCDF):
        groups, attrs = _arrays.read(contents[NETCDF])
        attrs = attributes(attrs, description)
        check_groups(groups, tensors)
    stored: tuple[object, object] | None = groups, {**attrs, "method": attrs.get("method", verdict.method)}
    if model is not None:
        fitted = LogDensity(model, *own(args, kwargs), noncentered=settings.get("noncentered", []))
        density = _density(like(fitted, tensors["z"]), description["coordinates"], tensors)
        tensors = tree_map_only(Tensor, lambda value: value.to(fitted.device), tensors)
        stored = None if description.get("without") else stored  # with the model all can be made
        if flow is not None:
            flow = flow.to(density.device)
            guide = AutoFlow.of(flow, density.structure, model, density.args, density.kwargs)
    return {
        "samples": tensors["samples"],
        **{field: tensors[name] for name, field in TENSOR_FIELDS.items()},
        **numbers,
        "settings": settings,
        "verdict": verdict,
        "history": history,
        "_labeling": Labeling(**description.get("labels", {})),
        "coordinates": tuple(description["coordinates"]),
        "guide": guide,
        "guide_name": description["guide"]["class"],
        "flow": flow,
        "density": density,
        "missing": _missing(description, model is not None),
        "_stored": stored,
        "chains": McmcDraws(**tensors["chains"]) if "chains" in tensors else None,
    }


def _missing(description: Entries, with_model: bool) -> dict[str, str]:
    """Say of each part that is not there why it is not."""
    about = description["guide"]
    found = {} if with_model else dict.fromkeys(("guide", "density"), "loaded without a model")
    if about["flow"] is None:
        found["flow"] = about["reason"]
        if with_model:
            found["guide"] = about["reason"]
    if description.get("without") and not with_model:
        found["groups"] = description["without"]
    return found


def _revived(value: object) -> object:
    """Make numbers again of those that JSON does not have; :func:`plain` turned them into strings."""
    return tree_map(lambda item: float(item) if item in ("nan", "inf", "-inf") else item, value)


def _verdict(stored: Entries, method: str) -> Verdict:
    """Make a verdict again; earlier files do not say the method."""
    make: Callable[..., Verdict] = Verdict
    said = {name: float(stored[name]) for name in OF_WEIGHTS} | {name: stored[name] for name in ("status", "where")}
    reasons, notes = (tuple(stored.get(name, ())) for name in ("reasons", "notes"))
    chains = None if stored.get("chains") is None else McmcDiagnostics.of(stored["chains"])
    told = stored.get("guide_method", MCMC if chains is not None and chains.elsewhere else method)
    return make(reasons=reasons, notes=notes, chains=chains, guide_method=told, **said)


def like(density: LogDensity, z: Tensor) -> LogDensity:
    """Return the log density in the precision that it had in the fit that gave draws ``z`` (S, D)."""
    wider = z.dtype == torch.float64 and (density.dtype != z.dtype or density.rounding(z) > ALLOWED)
    return density.in_double() if wider else density


def _density(density: LogDensity, coordinates: Sequence[str], tensors: Entries) -> LogDensity:
    """Check that the log density, made again, is the one that was fitted."""
    found = coordinate_names(density.structure)
    if list(coordinates) != found:
        raise ValueError(f"model: expected the unconstrained coordinates {list(coordinates)}, got {found}.")
    z, saved = (tensors[name][:CHECKED].to(density.device) for name in ("z", "log_p"))
    with torch.no_grad():
        now = density(z)
    if not torch.allclose(now.double(), saved.double(), rtol=ROUNDED, atol=ROUNDED_AT_LEAST, equal_nan=True):
        off = float((now - saved).abs().max())
        raise ValueError(
            f"model: its log density differs by up to {off:.3g} nats from the saved one. Pass the same model, the same "
            "data and, if it has parameters of its own, the same values of these."
        )
    return density


# files of earlier formats, brought to the words of the present one ----------------------------------------------------
# Up to format 2, names had British spelling. Names of sites, which are keys too, stay as they are. Chains of other
# samplers were a class of their own, with figures of their own.

THIRD = 3  # the first format with American spelling
WORDS = {"noncentred": "noncentered", "elbo_centred": "elbo_centered", "elbo_noncentred": "elbo_noncentered"}
OPTIONS = {"noncentred": "noncentered", "centre": "center"}  # of a site's coordinates


def present(description: Entries, tensors: Entries) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file says and its tensors, as the present format has them."""
    found = dict(description)
    if description["version"] >= THIRD:
        return found, dict(tensors)
    found["settings"] = _renamed(description["settings"])
    found["history"] = [_stage(entry) for entry in description["history"]]
    found["coordinates"] = [_spelled(name) for name in description["coordinates"]]
    found["verdict"] = {name: _spelled(value) for name, value in description["verdict"].items()}
    return _with_chains(found, tensors) if found.get("kind") == "Chains" else (found, dict(tensors))


def _with_chains(found: dict[str, Any], tensors: Entries) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the chains of another sampler where those of our own are."""
    extra, z = tensors["extra"], tensors["z"]
    count, old = extra["count"], extra["figures"]
    stats = {name: value.reshape(count, -1) for name, value in extra["stats"].items()}
    figures = McmcDiagnostics.of_mcmc(
        chains=count,
        draws=len(z) // count,
        **{name: old[name] for name in ("r_hat", "ess_bulk", "ess_tail")},
        where=old["r_hat_where"],
        divergences=math.nan if old["divergences"] < 0 else old["divergences"] / len(z),
    )
    found["verdict"]["chains"] = asdict(figures)
    chains = {"z": z.reshape(count, -1, z.shape[1]), "stats": stats, "state": {}, "numbers": {"method": "mcmc"}}
    return found, {**tensors, "chains": chains}


def attributes(attrs: Mapping[str, str | float], description: Entries) -> dict[str, str | float]:
    """Return the attributes of stored groups in the words of the present format."""
    if description["version"] >= THIRD:
        return dict(attrs)
    return {**attrs, "settings": json.dumps(description["settings"]), "verdict": _spelled(attrs["verdict"])}


def _stage(entry: Entries) -> dict[str, Any]:
    found = _renamed(entry)
    return {**found, "details": _renamed(found["details"])} if isinstance(found.get("details"), Mapping) else found


def _renamed(entry: Entries) -> dict[str, Any]:
    return {WORDS.get(name, name): _sites(value) if name == "noncentred" else value for name, value in entry.items()}


def _sites(chosen: object) -> object:
    """Rename the options of each site; the first formats had a list of sites."""
    if not isinstance(chosen, Mapping):
        return chosen
    return {
        site: {OPTIONS.get(name, name): value for name, value in options.items()} if options else options
        for site, options in chosen.items()
    }


def _spelled(value: Any) -> Any:
    """Spell the marks of coordinates, such as ``theta[0] (partly non-centred)``, in a sentence or a list of them."""
    if isinstance(value, list):
        return [_spelled(part) for part in value]
    return value.replace("non-centred)", "non-centered)") if isinstance(value, str) else value
