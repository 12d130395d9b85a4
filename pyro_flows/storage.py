"""Posteriors as files: a directory with tensors, JSON and netCDF. Reading them runs no code."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows._fallbacks import first_line
from pyro_flows._files import Bundle, damaged
from pyro_flows.export import plain
from pyro_flows.flows import Flow
from pyro_flows.guides import AutoFlow, not_rebuilt, rebuild
from pyro_flows.labels import coordinate_names
from pyro_flows.log_density import LogDensity
from pyro_flows.mixture import FlowMixture
from pyro_flows.randomness import seeded
from pyro_flows.verdict import Verdict

if TYPE_CHECKING:
    from pyro_flows.posterior import Posterior

NETCDF, TENSORS, TEXT = "posterior.nc", "guide.pt", "posterior.json"
TENSOR_FIELDS = ("z", "log_p", "log_q", "log_weights", "used", "used_log_p", "used_log_q", "losses")
NUMBER_FIELDS = ("k_hat", "ess", "elbo", "log_evidence")
CHECKED_DRAWS = 8
FILES = Bundle("posterior", "pyro_flows posterior", TEXT, (NETCDF, TENSORS))
DAMAGE = (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError)


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the directory to write to, or say why it cannot be written.

    Raises:
        ValueError: if it is a file, a directory with content that is not a saved posterior, or one that cannot be
            replaced as a whole.
    """
    return FILES.check_target(path)


def write(posterior: Posterior, groups: Mapping[str, Any], attrs: Mapping[str, str | float], path: Path) -> None:
    """Write the three files, all or none: a run that breaks off leaves the earlier ones whole.

    A flow that could not be rebuilt from what is written is left out, with the reason.
    """
    flow, reason = posterior.flow, posterior.missing.get("flow")
    if flow is not None:
        reason = not_rebuilt(flow)
    description = {
        "kind": type(posterior).__name__,
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
        "without": posterior.missing.get("groups"),
    }
    # copies, since views would be written with all that they are cut from
    tensors: dict[str, Any] = {name: getattr(posterior, name).detach().cpu().clone() for name in TENSOR_FIELDS}
    tensors["samples"] = {name: value.detach().cpu().clone() for name, value in posterior.samples.items()}
    if extra := posterior._extra():
        tensors["extra"] = extra
    state = {} if flow is None or reason else flow.state_dict()
    tensors["flow"] = {name: value.detach().cpu() for name, value in state.items()}
    stored = io.BytesIO()
    torch.save(tensors, stored)
    FILES.write(path, plain(description), {NETCDF: _arviz.write(groups, attrs), TENSORS: stored.getvalue()})


def read(
    path: str | os.PathLike[str], model: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Read a saved posterior: the fields of a :class:`Posterior`, its class (``kind``), what that adds (``extra``).

    Raises:
        ValueError: if the directory is not a saved posterior, is damaged, was written in another format version, or if
            the model with these arguments is not the one that was fitted.
    """
    source = Path(path)
    description, contents = FILES.read(source)
    with seeded(0):  # parameters are made before they are read
        return _read(source, description, contents, model, args, kwargs)


def _read(
    source: Path,
    description: Mapping[str, Any],
    contents: Mapping[str, bytes],
    model: Callable[..., Any] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    with _reading(source, TENSORS):
        tensors = torch.load(io.BytesIO(contents[TENSORS]), map_location="cpu", weights_only=True)
    with _reading(source, NETCDF):
        stored: tuple[Any, Any] | None = _arviz.read(contents[NETCDF])
    with _reading(source, TEXT):
        settings, history = _revived(description["settings"]), tuple(_revived(description["history"]))
        verdict = _verdict(description["verdict"])
        numbers = {name: float(description["numbers"][name]) for name in NUMBER_FIELDS}
    recipe = description["guide"]
    missing = {"guide": "loaded without a model", "density": "loaded without a model"}
    flow = None
    if recipe["flow"] is None:
        missing["flow"] = recipe["reason"]
    else:
        with _reading(source, TENSORS, TEXT):
            state = tensors["flow"]
            dtype = next(value.dtype for value in state.values() if value.is_floating_point())
            flow = rebuild(recipe["flow"]).to(dtype)
            flow.load_state_dict(state)
    guide = density = None
    if model is not None:
        noncentred = settings.get("noncentred", [])
        density = _density(LogDensity(model, args, kwargs, noncentred=noncentred), description["coordinates"], tensors)
        tensors = _move(tensors, density.device)
        del missing["density"]
        stored = None if description.get("without") else stored  # with the model all can be made
        if flow is None:
            missing["guide"] = missing["flow"]
        else:
            guide, flow = _guide(density, model, recipe["flow"], flow)
            del missing["guide"]
    elif description.get("without"):
        missing["groups"] = description["without"]
    return {
        **{name: tensors[name] for name in (*TENSOR_FIELDS, "samples")},
        **numbers,
        "verdict": verdict,
        "history": history,
        "settings": settings,
        "coordinates": tuple(description["coordinates"]),
        "guide": guide,
        "guide_name": recipe["class"],
        "flow": flow,
        "density": density,
        "missing": missing,
        "stored": stored,
        "kind": description.get("kind", "Posterior"),
        "extra": tensors.get("extra", {}),
    }


@contextmanager
def _reading(source: Path, *names: str) -> Iterator[None]:
    """Turn what a damaged file raises into one line that names it."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(damaged(source, list(names), f"cannot be read: {first_line(error)}")) from error


def _revived(value: Any) -> Any:
    """Make numbers again of those that JSON does not have; :func:`plain` turned them into strings."""
    if isinstance(value, dict):
        return {name: _revived(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_revived(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _verdict(stored: Mapping[str, Any]) -> Verdict:
    numbers = {name: float(stored[name]) for name in ("k_hat", "k_threshold", "ess_ratio", "mean_shift", "sd_shift")}
    reasons, notes = (tuple(stored.get(name, ())) for name in ("reasons", "notes"))
    return Verdict(status=stored["status"], where=stored["where"], reasons=reasons, notes=notes, **numbers)


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
    noncentred = density.structure.noncentred
    guide = AutoFlow(model, bare, affine=affine or "none", noncentred=noncentred, cautious=False)
    guide.to(next(flow.parameters()).dtype).initialize(*density.args, **density.kwargs)
    if isinstance(flow, FlowMixture):
        guide.adopt(flow.to(guide._like))
    else:
        guide._flow.load_state_dict(flow.state_dict())
    return guide, guide._flow


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if not isinstance(value, dict):
        return value
    return {name: _move(item, device) for name, item in value.items()}
