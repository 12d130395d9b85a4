"""Posteriors as files: a directory with tensors, JSON and netCDF. Reading them runs no code.

What a file says has to fit together: shapes, names, and densities that can be computed anew.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe_json import not_rebuilt, restored, to_json
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.guides.integrated import DRAWS_MOST
from pyro_flows.guides.marginal_density import INTEGRATED, MarginalDensity
from pyro_flows.inference.record import Record
from pyro_flows.inference.verdict.chains import McmcDiagnostics, McmcDraws
from pyro_flows.inference.verdict.deciding import OF_WEIGHTS
from pyro_flows.inference.verdict.verdict import Verdict
from pyro_flows.model.arguments import usable
from pyro_flows.model.digits import ALLOWED
from pyro_flows.model.dims import Labeling, coordinate_names
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Keywords, Model, Positional
from pyro_flows.model.unchanged import own
from pyro_flows.support.figures import STATUS_COLORS
from pyro_flows.support.files.bundles import Bundle, Entries, plain
from pyro_flows.support.files.untrusted import check_tensor, packed, reading, require, unpacked
from pyro_flows.support.numbers import arrays
from pyro_flows.support.process.seeding import seeded

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
    FILES.write(path, plain(description), {NETCDF: arrays.write(groups, attrs), TENSORS: packed(tensors)})


def read(path: str | os.PathLike[str], model: Model | None, args: Positional, kwargs: Keywords) -> dict[str, Any]:
    """Read a saved posterior: the fields of a :class:`Posterior`."""
    source = Path(path)
    description, contents = FILES.read(source)
    with seeded(0):  # parameters are made before they are read
        found, tensors = _read(source, description, contents)
        density, settings = None, found["settings"]
        if model is not None:
            density = _density(_made(model, args, kwargs, settings, tensors["z"]), description["coordinates"], tensors)
            tensors = tree_map_only(Tensor, lambda value: value.to(density.device), tensors)
            if description.get("without"):
                found["_stored"] = None  # with the model all can be made
            if (flow := found["flow"]) is not None:
                flow = found["flow"] = flow.to(density.device)
                found["guide"] = AutoFlow.of(flow, density.structure, model, density.args, density.kwargs)
    return {
        **found,
        **{field: tensors[name] for name, field in TENSOR_FIELDS.items()},
        "samples": tensors["samples"],
        "chains": McmcDraws(**tensors["chains"]) if "chains" in tensors else None,
        "density": density,
        "missing": _missing(description, model is not None),
    }


def _read(source: Path, description: Entries, contents: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that take no model, and all tensors."""
    with reading(source, TENSORS):
        tensors = unpacked(contents[TENSORS])
        require(isinstance(tensors, dict), "it holds no tensors by name")
    with reading(source, TEXT, TENSORS):
        check_texts(description)
        check_tensors(tensors, len(description["coordinates"]), description["verdict"])
        about, flow = description["guide"], None
        if about["flow"] is not None:
            flow = restored(about["flow"], tensors["flow"])
            check_flow(flow, tensors)
        found = {
            **{name: float(description["numbers"][name]) for name in NUMBER_FIELDS},
            "settings": _revived(description["settings"]),
            "verdict": _verdict(description["verdict"]),
            "history": tuple(cast("list[object]", _revived(description["history"]))),
            "_labeling": Labeling(**description.get("labels", {})),
            "coordinates": tuple(description["coordinates"]),
            "guide": None,
            "guide_name": about["class"],
            "flow": flow,
        }
    with reading(source, NETCDF):
        groups, attrs = arrays.read(contents[NETCDF])
        check_groups(groups, tensors)
    return {**found, "_stored": (groups, attrs)}, tensors


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


def _verdict(stored: Entries) -> Verdict:
    """Make a verdict again."""
    make: Callable[..., Verdict] = Verdict
    said = {name: float(stored[name]) for name in OF_WEIGHTS} | {name: stored[name] for name in ("status", "where")}
    reasons, notes = (tuple(stored.get(name, ())) for name in ("reasons", "notes"))
    chains = None if stored.get("chains") is None else McmcDiagnostics.of(stored["chains"])
    return make(reasons=reasons, notes=notes, chains=chains, guide_method=stored["guide_method"], **said)


def like(density: LogDensity, z: Tensor) -> LogDensity:
    """Return the log density in the precision that it had in the fit that gave draws ``z`` (S, D)."""
    wider = z.dtype == torch.float64 and (density.dtype != z.dtype or density.rounding(z) > ALLOWED)
    return density.in_double() if wider else density


def _made(model: Model, args: Positional, kwargs: Keywords, settings: Entries, z: Tensor) -> LogDensity:
    """Make the log density of the fit that gave draws ``z`` (S, D), latents of rows integrated out if they were."""
    given = own(args, kwargs)
    if INTEGRATED in settings:
        return MarginalDensity.made_of(settings[INTEGRATED], model, *usable(model, *given), z)
    return like(LogDensity(model, *given, noncentered=settings.get("noncentered", [])), z)


def _density(density: LogDensity, coordinates: Sequence[str], tensors: Entries) -> LogDensity:
    """Check that the log density, made again, is the one that was fitted."""
    found = coordinate_names(density.structure)
    if list(coordinates) != found:
        raise ValueError(f"model: expected the unconstrained coordinates {list(coordinates)}, got {found}.")
    z, saved = (tensors[name][:CHECKED].to(density.device) for name in ("z", "log_p"))
    with torch.no_grad():
        now = density(z)
    least = ROUNDED_AT_LEAST + STANDARD_ERRORS * density.level_error
    if not torch.allclose(now.double(), saved.double(), rtol=ROUNDED, atol=least, equal_nan=True):
        off = float((now - saved).abs().max())
        raise ValueError(
            f"model: its log density differs by up to {off:.3g} nats from the saved one. Pass the same model, the same "
            "data and, if it has parameters of its own, the same values of these."
        )
    return density


# whether what a file says fits together -------------------------------------------------------------------------------

CHECKED = 8  # draws whose density is computed anew
ROUNDED, ROUNDED_AT_LEAST = 1e-3, 1e-2  # relative, and nats: between machines and precisions
STANDARD_ERRORS = 6.0  # of a level, by which two estimates of it may differ: four of their difference


def check_tensors(tensors: Entries, dim: int, verdict: Entries) -> None:
    """Refuse tensors of a posterior with D = ``dim`` coordinates that are of other shapes, or miss draws."""
    z, used = tensors["z"], tensors["used"]
    check_tensor("z", z, (None, dim))
    check_tensor("used", used, (None, dim))
    require(len(z) and len(used), "there are no draws")
    for name, like in {"log_p": z, "log_q": z, "log_weights": z, "used_log_p": used, "used_log_q": used}.items():
        check_tensor(name, tensors[name], (len(like),))
    check_tensor("losses", tensors["losses"], (None,))
    samples = tensors["samples"]
    require(isinstance(samples, dict) and samples, "there are no samples")
    for name, value in samples.items():
        fits = isinstance(name, str) and isinstance(value, Tensor) and value.dim() and len(value) == len(used)
        require(fits, f"samples of {name} are not {len(used)} draws")
    require(isinstance(tensors["flow"], dict), "the flow has no tensors")
    if "chains" in tensors:
        _check_chains(tensors["chains"], dim)
        kept = tensors["chains"]["z"][..., 0].numel()
        of_chains = verdict["status"] == "refined" or (verdict.get("chains") or {}).get("elsewhere")
        require(kept == len(used) or not of_chains, f"chains have {kept} draws, and not {len(used)}")
    _check_weights(tensors)


def _check_chains(chains: Any, dim: int) -> None:
    require(isinstance(chains, dict) and set(chains) == {"z", "stats", "state", "numbers"}, "chains lack entries")
    check_tensor("z of chains", chains["z"], (None, None, dim))
    require(all(isinstance(chains[name], dict) for name in ("stats", "state", "numbers")), "chains lack entries")
    for name, value in chains["stats"].items():
        require(value.shape == chains["z"].shape[:2], f"{name} of chains has shape {tuple(value.shape)}")
    require(isinstance(chains["numbers"].get("method"), str), "chains have no method")


def _check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not rise with p / q, as smoothed ones do; the largest may be equal."""
    ratio = tensors["log_p"].double() - tensors["log_q"].double()
    weights = tensors["log_weights"].double()
    finite = torch.isfinite(ratio) & torch.isfinite(weights)
    ratio, order = ratio[finite].sort()
    weights = weights[finite][order]
    ratio = ratio[weights.argsort(stable=True)]
    if len(ratio) < 2 or not bool(weights.max() - weights.min() > ROUNDED_AT_LEAST):  # even weights have no order
        return
    scale = tensors["log_p"][finite].double().abs().max() + ratio.abs().max()
    rises = bool((ratio.cummax(0).values - ratio <= ROUNDED_AT_LEAST + ROUNDED * scale).all())
    require(rises, "log_weights are not those of log_p - log_q")


def check_texts(description: Entries) -> None:
    """Refuse texts, numbers and lists of other kinds than a posterior has."""
    verdict, coordinates = description["verdict"], description["coordinates"]
    require(isinstance(verdict, dict) and verdict.get("status") in STATUS_COLORS, "the verdict has no known status")
    texts = [verdict["where"], *verdict.get("reasons", ()), *verdict.get("notes", ()), *coordinates]
    require(isinstance(coordinates, list) and all(isinstance(text, str) for text in texts), "a text is no text")
    require(all(_is_number(value) for value in description["numbers"].values()), "a number is no number")
    settings, history = description["settings"], description["history"]
    require(isinstance(settings, dict) and isinstance(history, list), "settings or history are missing")
    require(_is_seed(settings.get("seed", 0)), "the seed is none")
    require(INTEGRATED not in settings or _is_recipe(settings[INTEGRATED]), "how rows were integrated out is not told")
    stages = all(isinstance(entry, dict) and isinstance(entry.get("stage"), str) for entry in history)
    require(stages, "an entry of the history has no stage")
    guide, labels = description["guide"], description.get("labels", {})
    require(isinstance(guide, dict) and isinstance(guide["class"], str), "the guide has no class")
    require(isinstance(guide.get("reason"), (str, type(None))), "the reason is no text")
    parts = [labels.get(name, {}) for name in ("coords", "dims")]
    lists = all(isinstance(part, dict) and all(isinstance(one, list) for one in part.values()) for part in parts)
    require(lists, "labels are no lists")


def _is_seed(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_recipe(value: object) -> bool:
    """Whether a value is a recipe of :class:`MarginalDensity`."""
    if not (isinstance(value, dict) and isinstance(value.get("joint"), list) and _is_seed(value.get("seed"))):
        return False
    texts = all(isinstance(name, str) for name in value["joint"]) and isinstance(value.get("noncentered"), dict)
    count = value.get("count")
    numbers = type(count) is int and 1 <= count <= DRAWS_MOST and _is_number(value.get("level_error"))
    return texts and numbers and isinstance(value.get("wide"), bool)


def _is_number(value: object) -> bool:
    return value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool))


def check_groups(groups: Entries, tensors: Entries) -> None:
    """Refuse groups whose posterior is not that of the samples."""
    require("posterior" in groups, "there is no group 'posterior'")
    group = groups["posterior"]
    require({"chain", "draw"} <= set(group.sizes), "the posterior has no draws")
    count = group.sizes["chain"] * group.sizes["draw"]
    require(count == len(tensors["used"]), f"the posterior has {count} draws, and not {len(tensors['used'])}")
    for name, value in tensors["samples"].items():
        if name in group.data_vars and group[name].size == value.numel():  # "draw" is a coordinate, and a site "draw_"
            stored = group[name].transpose("chain", "draw", ...).to_numpy().reshape(-1)
            same = np.allclose(stored.astype(float), value.reshape(-1).double().numpy(), rtol=1e-5, equal_nan=True)
            require(same, f"{name} of the posterior is not that of the samples")


@torch.no_grad()
def check_flow(flow: Flow | FlowMixture, tensors: Entries) -> None:
    """Refuse a flow that gives draws another density than they have."""
    z, saved = tensors["z"][:CHECKED], tensors["log_q"][:CHECKED].double()
    require(flow.dim == z.shape[1], f"the flow has {flow.dim} coordinates, and not {z.shape[1]}")
    now = flow.log_prob(z.to(flow._like)).double()
    off = (now - saved).abs() - ROUNDED * saved.abs()
    off = off[torch.isfinite(saved)]
    worst = float(off.max()) if len(off) else 0.0
    require(worst <= ROUNDED_AT_LEAST and not math.isnan(worst), f"the flow's log density is off by {worst:.3g} nats")
