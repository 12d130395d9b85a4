"""Posteriors as files: a directory with tensors, JSON and netCDF. Reading them runs no code."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows.export import plain
from pyro_flows.flows import Flow
from pyro_flows.guides import AutoFlow, rebuild
from pyro_flows.labels import coordinate_names
from pyro_flows.log_density import LogDensity
from pyro_flows.mixture import FlowMixture
from pyro_flows.randomness import seeded
from pyro_flows.verdict import Verdict

if TYPE_CHECKING:
    from pyro_flows.posterior import Posterior

FORMAT = "pyro_flows posterior"
VERSION = 1
NETCDF, TENSORS, TEXT = "posterior.nc", "guide.pt", "posterior.json"
TENSOR_FIELDS = ("z", "log_p", "log_q", "log_weights", "used", "used_log_p", "used_log_q", "losses")
NUMBER_FIELDS = ("k_hat", "ess", "elbo", "log_evidence")
CHECKED_DRAWS = 8


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the directory to write to, or say why it cannot be written.

    Raises:
        ValueError: if it is a file, or a directory with content that is not a saved posterior.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"path: expected a directory, {str(target)!r} is a file.")
    if target.is_dir() and any(target.iterdir()) and not _is_ours(target / TEXT):
        raise ValueError(
            f"path: {str(target)!r} holds other files and no saved posterior. Name a new or empty directory."
        )
    return target


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def write(posterior: Posterior, groups: Mapping[str, Any], attrs: Mapping[str, str | float], path: Path) -> None:
    """Write the three files, first under other names, so that a run that breaks off leaves the earlier ones whole."""
    flow, reason = posterior.flow, posterior.missing.get("flow")
    if flow is not None and flow.settings is None:
        reason = "its bijection is not one of the builders', so it cannot be rebuilt from settings"
    description = {
        "format": FORMAT,
        "version": VERSION,
        "numbers": {name: getattr(posterior, name) for name in NUMBER_FIELDS},
        "verdict": dataclasses.asdict(posterior.verdict),
        "settings": posterior.settings,
        "history": posterior.history,
        "guide": {
            "class": posterior.guide_name,
            "flow": None if flow is None or reason else flow.settings,
            "reason": reason,
        },
        "coordinates": posterior.coordinates,
    }
    tensors: dict[str, Any] = {name: getattr(posterior, name).detach().cpu() for name in TENSOR_FIELDS}
    tensors["samples"] = {name: value.detach().cpu() for name, value in posterior.samples.items()}
    state = {} if flow is None or reason else flow.state_dict()
    tensors["flow"] = {name: value.detach().cpu() for name, value in state.items()}
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(description), indent=1, allow_nan=False) + "\n"
    unfinished = {name: path / f"{name}.unfinished" for name in (NETCDF, TENSORS, TEXT)}
    try:
        _arviz.write(groups, attrs, unfinished[NETCDF])
        torch.save(tensors, unfinished[TENSORS])
        unfinished[TEXT].write_text(text, encoding="utf-8")
        for name, file in unfinished.items():
            file.replace(path / name)
    finally:
        for file in unfinished.values():
            file.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], model: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Read a saved posterior: the fields of a :class:`Posterior`.

    Raises:
        ValueError: if the directory is not a saved posterior, was written in another format version, or if the model
            with these arguments is not the one that was fitted.
    """
    source = Path(path)
    with seeded(0):  # parameters are made before they are read
        return _read(source, _describe(source), model, args, kwargs)


def _read(
    source: Path,
    description: Mapping[str, Any],
    model: Callable[..., Any] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    tensors = torch.load(source / TENSORS, map_location="cpu", weights_only=True)
    groups, attrs = _arviz.read(source / NETCDF)
    recipe = description["guide"]
    missing = {"guide": "loaded without a model", "density": "loaded without a model"}
    flow = None
    if recipe["flow"] is None:
        missing["flow"] = recipe["reason"]
    else:
        state = tensors["flow"]
        flow = rebuild(recipe["flow"]).to(next(value.dtype for value in state.values() if value.is_floating_point()))
        flow.load_state_dict(state)
    guide = density = None
    if model is not None:
        noncentred = description["settings"].get("noncentred", [])
        density = _density(LogDensity(model, args, kwargs, noncentred=noncentred), description["coordinates"], tensors)
        tensors = _move(tensors, density.device)
        del missing["density"]
        if flow is None:
            missing["guide"] = missing["flow"]
        else:
            guide, flow = _guide(density, model, recipe["flow"], flow)
            del missing["guide"]
    return {
        **{name: tensors[name] for name in (*TENSOR_FIELDS, "samples")},
        **{name: float(value) for name, value in description["numbers"].items()},
        "verdict": _verdict(description["verdict"]),
        "history": tuple(description["history"]),
        "settings": description["settings"],
        "coordinates": tuple(description["coordinates"]),
        "guide": guide,
        "guide_name": recipe["class"],
        "flow": flow,
        "density": density,
        "missing": missing,
        "stored": (groups, attrs),
    }


def _describe(source: Path) -> dict[str, Any]:
    lacking = [name for name in (NETCDF, TENSORS, TEXT) if not (source / name).is_file()]
    if lacking or not _is_ours(source / TEXT):
        why = f"{', '.join(lacking)} missing" if lacking else f"{TEXT} was not written by pyro_flows"
        raise ValueError(f"path: expected the directory of a saved posterior, got {str(source)!r}: {why}.")
    description: dict[str, Any] = json.loads((source / TEXT).read_text(encoding="utf-8"))
    if description.get("version") != VERSION:
        raise ValueError(
            f"path: {str(source)!r} has format version {description.get('version')!r}, this release of pyro_flows "
            f"reads version {VERSION}. Read it with the release that wrote it, or fit and save anew."
        )
    return description


def _verdict(stored: Mapping[str, Any]) -> Verdict:
    numbers = {name: float(stored[name]) for name in ("k_hat", "k_threshold", "ess_ratio", "mean_shift", "sd_shift")}
    return Verdict(status=stored["status"], where=stored["where"], reasons=tuple(stored["reasons"]), notes=tuple(stored.get("notes", ())), **numbers)


def _density(density: LogDensity, coordinates: Sequence[str], tensors: Mapping[str, Any]) -> LogDensity:
    """Check that the log density, made again, is the one that was fitted."""
    found = coordinate_names(density.structure)
    if list(coordinates) != found:
        raise ValueError(f"model: expected the unconstrained coordinates {list(coordinates)}, got {found}.")
    z, saved = tensors["z"][:CHECKED_DRAWS].to(density.device), tensors["log_p"][:CHECKED_DRAWS].to(density.device)
    with torch.no_grad():
        now = density(z)
    if not torch.allclose(now.double(), saved.double(), rtol=1e-3, atol=1e-2, equal_nan=True):
        off = float((now - saved).abs().max())
        raise ValueError(
            f"model: its log density differs by up to {off:.3g} nats from the saved one. Pass the same model, the same "
            "data and, if it has parameters of its own, the same values of these."
        )
    return density


def _guide(
    density: LogDensity, model: Callable[..., Any], settings: Mapping[str, Any], flow: Flow | FlowMixture
) -> tuple[AutoFlow, Flow | FlowMixture]:
    single = settings["flows"][0] if isinstance(flow, FlowMixture) else settings
    affine = single.get("affine")
    bare = rebuild({name: value for name, value in single.items() if name != "affine"})
    guide = AutoFlow(model, bare, affine=affine or "none", noncentred=density.structure.noncentred)
    guide.initialize(*density.args, **density.kwargs)
    if isinstance(flow, FlowMixture):
        guide.adopt(flow.to(guide._like))
    else:
        guide._flow.load_state_dict(flow.state_dict())
    return guide, guide._flow


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: _move(item, device) for name, item in value.items()}
