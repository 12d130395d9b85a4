"""Descriptions of saved posteriors of earlier formats, brought to the words of the present one.

Up to format 2, names had British spelling: ``noncentred``, ``centre``, ``elbo_centred``. Names of sites, which are keys
too, stay as they are. Chains of other samplers were a class of their own, with figures of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pyro_flows._bundles import Entries
from pyro_flows.verdict.chains import McmcDiagnostics

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
