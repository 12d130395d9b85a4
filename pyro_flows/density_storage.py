"""Fitted densities and training states as files of tensors and JSON. Reading them runs no code."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_flows.density_data import Levels
from pyro_flows.density_schedule import Plan
from pyro_flows.density_training import Ascent
from pyro_flows.export import plain
from pyro_flows.flows import Flow
from pyro_flows.guides import rebuild
from pyro_flows.preprocess import Preprocess
from pyro_flows.randomness import seeded
from pyro_flows.transforms import Chain

FORMAT, CHECKPOINT = "pyro_flows density", "pyro_flows density checkpoint"
VERSION = 1
TENSORS, TEXT = "density.pt", "density.json"


def append(flow: Flow, layer: Preprocess) -> Flow:
    """Make ``layer`` the last one of the flow."""
    inner = flow.bijection
    layers = list(inner.layers) if isinstance(inner, Chain) else [inner]
    flow.bijection = Chain([*layers, layer])  # type: ignore[list-item]
    return flow


def write(
    path: str | os.PathLike[str],
    flow: Flow,
    curves: Mapping[str, Tensor],
    description: Mapping[str, Any],
    levels: Levels | None,
) -> None:
    """Write a fitted density.

    Raises:
        ValueError: if the flow was not made by a builder, or ``path`` holds other files.
    """
    target = Path(path)
    if flow.settings is None:
        raise ValueError(
            "flow: expected one that a builder made, such as pf.realnvp; others are not rebuilt from JSON."
        )
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not _is_ours(target))):
        raise ValueError(f"path: {str(target)!r} is not a new or empty directory, and no saved density.")
    target.mkdir(parents=True, exist_ok=True)
    text = {
        "format": FORMAT,
        "version": VERSION,
        **description,
        "builder": flow.settings,
        "levels": None if levels is None else [levels.count, levels.step],
    }
    tensors = {"flow": {name: value.detach().cpu() for name, value in flow.state_dict().items()}, **curves}
    with _replacing(target / TENSORS) as file:
        torch.save(tensors, file.path)
    with _replacing(target / TEXT) as file:
        file.path.write_text(json.dumps(plain(text), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a fitted density: the fields of a :class:`~pyro_flows.DensityFit`.

    Raises:
        ValueError: if it is no saved density, of another format version, or by a release that makes flows otherwise.
    """
    source = Path(path)
    if not _is_ours(source) or not (source / TENSORS).is_file():
        raise ValueError(f"path: expected the directory of a saved density, got {str(source)!r}.")
    text = json.loads((source / TEXT).read_text(encoding="utf-8"))
    if text["version"] != VERSION:
        raise ValueError(
            f"path: {str(source)!r} has format version {text['version']!r}, this release reads version {VERSION}."
        )
    tensors = torch.load(source / TENSORS, map_location="cpu", weights_only=True)
    return {
        "flow": _rebuild(text["builder"], tensors["flow"]),
        "losses": tensors["losses"],
        "checks": tensors["checks"],
        "validation": float(text["validation"]),
        "levels": None if text["levels"] is None else Levels(*text["levels"]),
        "settings": text["settings"],
        "why": text["why"],
    }


def _rebuild(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> Flow:
    try:
        with seeded(0):
            flow = rebuild(settings)
        found = [name.removesuffix("inverse_scale") for name in state if name.endswith(".inverse_scale")]
        if found:
            loc, scale, slope = (state.get(f"{found[0]}{part}") for part in ("loc", "scale", "slope"))
            append(flow, Preprocess(loc, scale, slope))  # type: ignore[arg-type]
        flow.to(next(value.dtype for value in state.values() if value.is_floating_point()))
        flow.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"path: the tensors are not those of pf.{settings.get('builder')} as this release makes it; "
            "read them by the release that wrote them, or fit anew."
        ) from error
    return flow


def _is_ours(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / TEXT).read_text(encoding="utf-8")).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


class _replacing:
    """A new file beside the old one, which takes its place only when it is whole."""

    def __init__(self, target: Path) -> None:
        self.target, self.path = target, target.with_name(target.name + ".unfinished")

    def __enter__(self) -> _replacing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.path.replace(self.target)
        self.path.unlink(missing_ok=True)


class Keeper:
    """Writes checkpoints of a training, and goes on from one."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        ascent: Ascent,
        plan: Plan,
        every: float,
        options: Mapping[str, Any],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.ascent, self.plan, self.every, self.last = ascent, plan, every, time.monotonic()
        shapes = [list(parameter.shape) for parameter in ascent.parameters]
        points = len(ascent.source) if hasattr(ascent.source, "__len__") else None
        epoch = None if path is None else ascent.source.steps(ascent.batch)  # a DataLoader does not tell its points
        builder = None if ascent.flow.settings is None else json.loads(json.dumps(plain(ascent.flow.settings)))
        self.about = {**options, "flow": builder, "shapes": shapes, "points": points, "epoch": epoch}

    def resume(self) -> bool:
        """Restore the state in the file, if there is one.

        Raises:
            ValueError: if the file is no checkpoint, or one of another run.
        """
        if self.path is None or not self.path.exists():
            return False
        saved = torch.load(self.path, map_location=self.ascent.parameters[0].device, weights_only=True)
        if not isinstance(saved, dict) or saved.get("format") != CHECKPOINT or saved.get("version") != VERSION:
            raise ValueError(f"checkpoint: {str(self.path)!r} is no checkpoint of this release. Name a new file.")
        different = [name for name, value in self.about.items() if saved["about"].get(name) != value]
        if different:
            raise ValueError(
                f"checkpoint: {str(self.path)!r} is of another run (different: {', '.join(different)}). "
                "Name a new file, or pass the same flow, data and options."
            )
        self.ascent.restore(saved)
        self.plan = replace(self.plan, began=self.plan.clock() - self.ascent.state.seconds)
        return True

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint if it is time for one, or if this is the end."""
        now = time.monotonic()
        if self.path is None or (now - self.last < self.every and not final):
            return
        self.ascent.state.seconds = self.plan.clock() - self.plan.began
        self.last = now
        with _replacing(self.path) as file:
            torch.save(
                {"format": CHECKPOINT, "version": VERSION, "about": self.about, **self.ascent.checkpoint()}, file.path
            )
