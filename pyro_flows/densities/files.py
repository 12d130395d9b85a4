"""Fitted densities and training states as files of tensors and JSON. Reading them runs no code."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset, TensorDataset

from pyro_flows.densities.ascent import Ascent
from pyro_flows.densities.encoding import Encoding
from pyro_flows.densities.points import CHUNK, Levels, Rows, Source, like
from pyro_flows.densities.training import Plan
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.flows.recipe_json import not_rebuilt, restored, to_json
from pyro_flows.support.files.bundles import Bundle, Entries, plain
from pyro_flows.support.files.checkpoints import Checkpoint
from pyro_flows.support.files.untrusted import check_tensor, packed, reading, require, unpacked
from pyro_flows.support.process.seeding import seeded

TENSORS, TEXT = "density.pt", "density.json"
FILES = Bundle("density", "pyro_flows density", TEXT, (TENSORS,))
PROBED = 16  # items of a data set of a loader
VALUES = 8  # points at which flows are compared

logger = logging.getLogger("pyro_flows")


def write(
    path: str | os.PathLike[str], flow: Flow, curves: Mapping[str, Tensor], description: Entries, levels: Levels | None
) -> None:
    """Write a fitted density, all of it or nothing: what was saved there before is as it was if that fails."""
    target = FILES.check_target(path)
    reason = not_rebuilt(flow)
    if reason is not None:
        raise ValueError(
            f"flow: expected one as a builder made it, such as pf.realnvp, for this one could not be loaded: {reason}. "
            "torch.save(flow.state_dict(), ...) keeps its tensors."
        )
    text = {**description, "builder": to_json(flow), "levels": None if levels is None else [levels.count, levels.step]}
    tensors = {"flow": {name: value.detach().cpu() for name, value in flow.state_dict().items()}, **curves}
    FILES.write(target, plain(text), {TENSORS: packed(tensors)})


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a fitted density: the fields of a :class:`~pyro_flows.DensityFit`."""
    text, contents = FILES.read(path)
    with reading(path, TENSORS, TEXT):
        tensors = unpacked(contents[TENSORS])
        flow = restored(text["builder"], tensors["flow"])
        require(isinstance(flow, Flow), "it describes a mixture of flows")
        check_tensor("losses", tensors["losses"], (None,))
        check_tensor("checks", tensors["checks"], (None, 2))
        require(isinstance(text["settings"], dict) and isinstance(text["why"], str), "settings or reason are missing")
        return {
            "flow": flow,
            "losses": tensors["losses"],
            "checks": tensors["checks"],
            "validation": float(text["validation"]),
            "levels": None if text["levels"] is None else _levels(*text["levels"]),
            "settings": text["settings"],
            "why": text["why"],
            "encoding": _encoding(text.get("context"), flow),
        }


def _encoding(text: object, flow: Flow) -> Encoding | None:
    if text is None:
        return None
    found = Encoding.from_json(text)
    require(found.width == flow.context_dim, f"the context has {found.width} numbers, the flow's {flow.context_dim}")
    return found


def _levels(count: Any, step: Any) -> Levels:
    require(type(count) is int and count >= 2, f"levels are {count}")
    require(isinstance(step, (int, float)) and math.isfinite(step) and step > 0.0, f"levels are {step} apart")
    return Levels(count, float(step))


# checkpoints ----------------------------------------------------------------------------------------------------------


def values_of(flow: Flow) -> list[float]:
    """Return what the flow makes of some points: the same for any two that are new, however their networks differ.

    A flow that was made anew for a resumed run may have other hidden weights, which the checkpoint replaces.
    """
    with seeded(0), torch.no_grad():
        x = torch.randn(VALUES, *flow.base_shape)
        context = torch.randn(VALUES, flow.context_dim) if flow.context_dim else None
        quiet = copy.deepcopy(flow.bijection).eval()
        x, context = x.to(like(flow)), None if context is None else context.to(like(flow))
        y, ladj = quiet.forward_and_ladj(x, context)
        values = [y.flatten()[:VALUES], y.flatten(1).double().norm(dim=1).to(y), ladj]
        if flow.mixture is not None:
            values.append(flow.base_distribution(context).log_prob(x))
    return [float(value) for value in torch.cat(values)]


def _digest(*parts: object) -> str:
    """Digest tensors, arrays (memory maps, piece by piece) and what has a repr."""
    total = hashlib.sha256()
    for part in parts:
        if not isinstance(part, (Tensor, np.ndarray)):
            total.update(repr(part).encode())
            continue
        total.update(f"{part.dtype} {tuple(part.shape)}".encode())
        for piece in [part] if len(part.shape) == 0 else (part[i : i + CHUNK] for i in range(0, len(part), CHUNK)):
            tensor = piece.detach().cpu() if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def data_digest(source: Source | None) -> str | None:
    """Tell data apart: all numbers of rows, of a loader those of its tensors or of a few items, if they stay the same.

    None for what cannot be looked at without going through it: a loader of a stream or of random changes.
    """
    if source is None:
        return "none"
    if isinstance(source, Rows):
        return _digest(source.values, source.context, source.levels)
    return _set_digest(source.loader.dataset)


def _set_digest(found: Any) -> str | None:
    if isinstance(found, TensorDataset):
        return _digest(*found.tensors)
    if isinstance(found, Subset):
        inner = _set_digest(found.dataset)
        return None if inner is None else _digest(inner, torch.as_tensor(list(found.indices)))
    try:
        count = len(found)
        places = sorted({i * (count - 1) // (PROBED - 1) for i in range(PROBED)})
        digests = set()
        for seed in (0, 1):
            with seeded(seed):
                digests.add(_digest(count, *(leaf for place in places for leaf in tree_leaves(found[place]))))
    except Exception as error:  # code of the user's, which may want to be called in its own way
        logger.debug("the data of a loader are not compared with those of the checkpoint: %s", error)
        return None
    return digests.pop() if len(digests) == 1 else None


def _same(saved: object, now: object) -> bool:
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return all(_same(one, other) for one, other in zip(saved, now, strict=True))
    if isinstance(saved, float) and isinstance(now, float):
        return math.isclose(saved, now, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(saved) and math.isnan(now))
    return bool(saved == now)


class Keeper:
    """Writes checkpoints of a training, and goes on from one; without a path it does neither."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        ascent: Ascent,
        plan: Plan,
        every: float,
        options: Entries,
        start: Entries,
        fixed: MixtureBase | None,
    ) -> None:
        self.ascent, self.plan, self.file = ascent, plan, None
        self.fixed = fixed  # what is mixed in at the end; a search under a clock may end elsewhere
        if path is not None:
            shapes = [list(parameter.shape) for parameter in ascent.parameters]
            points = len(ascent.source) if hasattr(ascent.source, "__len__") else None
            epoch = ascent.source.steps(ascent.batch)  # a DataLoader does not tell its points
            built = {"flow": plain(to_json(ascent.flow)), "shapes": shapes, "points": points, "epoch": epoch}
            self.file = Checkpoint(path, {**options, **built, **start}, every=every, alike=_same)

    def resume(self) -> bool:
        """Restore the state in the file, if there is one; refuse a file that is damaged, or of another run."""
        saved = None if self.file is None else self.file.read(self.ascent.parameters[0].device)
        if self.file is None or saved is None:
            return False
        with self.file.reading():
            self.ascent.restore(saved)
            if self.fixed is not None and saved.get("fixed") is not None:
                fixed = MixtureBase(self.fixed.dim, len(saved["fixed"]["logits"])).to(self.fixed.loc)
                fixed.load_state_dict(saved["fixed"])
                self.fixed = fixed
        self.plan = replace(self.plan, began=self.plan.clock() - self.ascent.state.seconds)
        return True

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint if it is time for one, or if this is the end."""
        if self.file is None or not (final or self.file.due()):
            return
        self.ascent.state.seconds = self.plan.clock() - self.plan.began
        fixed = None if self.fixed is None else dict(self.fixed.state_dict())
        self.file.write({"fixed": fixed, **self.ascent.checkpoint()})
