"""What a fit begins with: the flow, the points it learns from and is checked on, and the scale of the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from pyro_flows import _checks
from pyro_flows.density_estimation import files
from pyro_flows.density_estimation.fitted import points_for
from pyro_flows.density_estimation.points import CHUNK, Batch, Rows, Source, Stream, rows
from pyro_flows.density_estimation.standardizing import is_fresh, preprocess
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import BUILDERS, ending, with_preprocess
from pyro_flows.transforms import Compose, Logit
from pyro_flows.transforms.fixed import Preprocess

CHECKED_POINTS = 5_000  # held-out points that the checks during training use
MEASURED_POINTS = 50_000  # from which scales and correlations are taken


def make(flow: Flow | str, data: Any, context: Any) -> Flow:
    """Copy the flow, or make one by a builder's name."""
    if isinstance(flow, Flow):
        return copy.deepcopy(flow)
    if not isinstance(flow, str):
        raise ValueError(f"flow: expected a Flow or a builder's name, got a {type(flow).__name__}.")
    builder = BUILDERS[_checks.choice("flow", flow, BUILDERS)]
    if isinstance(data, DataLoader):
        raise ValueError("flow: a DataLoader does not tell its shape; pass a flow, such as pf.realnvp(dim).")
    shape = rows("data", data, None, torch.zeros(())).event_shape
    if len(shape) != 1:
        raise ValueError(f"flow: a name makes a flow of vectors, the data have shape {tuple(shape)}; pass a flow.")
    width = 0 if context is None else rows("context", context, None, torch.zeros(())).event_shape[-1]
    options = {} if flow == "planar" else {"network": "robust"}
    return builder(shape[0], context_dim=width, hidden=(64, 64), activation="relu", base="logistic", **options)


def sources(flow: Flow, data: Any, context: Any, validation: Any, levels: int | None) -> tuple[Source, Source | None]:
    """Make what is trained on and what is held out."""
    train = points_for(flow, "data", data, context)
    if levels is not None:
        train = train.quantized(levels)
    if validation is None:
        return train, None
    if isinstance(validation, float):
        if isinstance(train, Stream):
            raise ValueError(
                "validation: of a DataLoader no share can be held out; pass held-out data, a loader of them, or None."
            )
        if not 0.0 < validation < 1.0:
            raise ValueError(f"validation: expected a share between 0 and 1, data or None, got {validation!r}.")
        return train.split(validation)
    pair = validation if isinstance(validation, tuple) else (validation, None)
    if len(pair) != 2:
        raise ValueError(f"validation: expected data, or a pair (data, context), got {len(pair)} items.")
    held_out = points_for(flow, "validation", *pair)
    return train, held_out if levels is None else held_out.quantized(levels)


def with_scale(flow: Flow, train: Source, kind: str | None) -> tuple[Flow, str | None]:
    """Append the affine map to the scale of the data, as measured on the data, noise of levels included.

    It takes the place of one that the flow has. A flow that knows data already, since it was trained, may be on their
    scale: then ``"auto"`` leaves it as it is.
    """
    own = ending(flow)
    images, auto = len(flow.event_shape) > 1, kind == "auto"
    if kind is None or (auto and len(flow.event_shape) == 2):
        return flow, None
    if auto:
        inner = flow.bijection
        if isinstance(inner.layers[-1] if isinstance(inner, Compose) else inner, Logit):
            return flow, None
        kind = "whiten" if own is not None and own.full else "standardize"
    batches = held(train, MEASURED_POINTS)
    layer: Preprocess = preprocess(kind, batches, pooled=images)
    given = flow if auto and not is_fresh(flow) else None
    placed = with_preprocess(flow if given is None else copy.deepcopy(flow), layer)
    if given is not None and _likelihood(given, batches) >= _likelihood(placed, batches):
        return given, None if own is None else kind
    return placed, kind


@torch.no_grad()
def _likelihood(flow: Flow, batches: Sequence[Batch]) -> float:
    """Return the mean log density of about the first `CHECKED_POINTS` points; minus infinity if it is not finite."""
    total, count = 0.0, 0
    for y, context in batches:
        x, ladj = flow.bijection.inverse_and_ladj(y, context)
        total += float((flow.base_distribution().log_prob(x) + ladj).double().sum())
        count += len(y)
        if count >= CHECKED_POINTS:
            break
    return total / count if math.isfinite(total) else -math.inf


def identity(flow: Flow, train: Source, held_out: Source | None, validation: Any) -> dict[str, Any]:
    """Return what tells a checkpoint of these data and this flow from those of others."""
    share = validation if validation is None or isinstance(validation, float) else "given"
    given = held_out if share == "given" else None
    return {
        "weights": files.values_of(flow),
        "data": files.data_digest(train),
        "validation": share,
        "held out": files.data_digest(given),
    }


def held(points: Source, most: int) -> list[Batch]:
    """Return about the first ``most`` points as batches that stay the same, noise included."""
    if isinstance(points, Rows):
        return list(points.first(most).ordered(CHUNK))
    found: list[Batch] = []
    for batch in points.ordered(CHUNK):
        found.append(batch)
        if sum(len(y) for y, _ in found) >= most:
            break
    return found
