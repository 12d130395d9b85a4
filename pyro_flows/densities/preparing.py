"""What a fit begins with: the flow, the points it learns from and is checked on, and the scale of the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pyro_flows.densities import files
from pyro_flows.densities.ascent import score
from pyro_flows.densities.mixtures import FOLDS, Parts, choose
from pyro_flows.densities.points import CHUNK, Batch, Rows, Source, Stream, points_for, rows
from pyro_flows.densities.standardizing import (
    is_fresh,
    knots_of,
    preprocess,
    scale_of,
    warn_dependent,
    warn_repeated,
)
from pyro_flows.flows.bases import DefendedBase
from pyro_flows.flows.ensemble import Ensemble, averaged
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.flows.recipe import AUTO, BUILDERS, ending, with_fixed, with_mixture, with_preprocess
from pyro_flows.flows.vectors import realnvp, spline
from pyro_flows.support import checks
from pyro_flows.support.files.bundles import Entries
from pyro_flows.transforms import Compose, Logit
from pyro_flows.transforms.fixed import Preprocess
from pyro_flows.transforms.networks import standardized

CHECKED_POINTS = 5_000  # held-out points that the checks during training use
MEASURED_POINTS = 50_000  # from which scales and correlations are taken
SPLINES_UP_TO = 100  # dimensions, above which the default is affine couplings
MIXTURES_UP_TO = 200  # dimensions of a mixture of Gaussians as base
PARTS_OF_CONTEXTS = 5  # of a mixture at least, if their weights, places and scales depend on a context
AVERAGED_UP_TO = 1000  # points, for which the densities of five flows are averaged: it takes seconds
MIXTURE_SHARE = 0.35  # of the seconds, that expectation maximization may take
STACKED = 200  # steps of expectation maximization for the share of a mixture without the context
NUMBER = (int, float, np.number)  # kinds of a share


def make(flow: object, data: object, context: object) -> Flow:
    """Copy the flow, or make one by a builder's name; in double precision where single does not hold the data."""
    if isinstance(flow, Flow):
        return copy.deepcopy(flow)
    if not isinstance(flow, str):
        raise ValueError(
            f"flow: expected a Flow or a builder's name, got a {type(flow).__name__}. Pass fit_density(data) or "
            "fit_density(flow, data), and what the density is conditional on as context=."
        )
    checks.choice("flow", flow, (AUTO, *BUILDERS))
    if isinstance(data, DataLoader):
        raise ValueError("flow: a DataLoader does not tell its shape; pass a flow, such as pf.realnvp(dim).")
    given = [rows(name, one, None, None) for name, one in (("data", data), ("context", context)) if one is not None]
    shape, dtypes = given[0].event_shape, [one.values.dtype for one in given]
    dtype = torch.float64 if torch.float64 in dtypes else torch.get_default_dtype()
    if len(shape) != 1:
        raise ValueError(f"flow: a name makes a flow of vectors, the data have shape {tuple(shape)}; pass a flow.")
    width = 0 if context is None else given[1].event_shape[-1]
    options: dict[str, Any] = {"context_dim": width, "hidden": (64, 64), "activation": "relu"}
    if flow == AUTO:
        return _default(shape[0], options).to(dtype)
    options |= {} if flow == "planar" else {"network": "robust"}
    return BUILDERS[flow](shape[0], base="logistic", **options).to(dtype)


def _default(dim: int, options: Entries) -> Flow:
    """Return what is taken before a mixture is its base: splines, and affine couplings of very many coordinates.

    The mixture alone bends one coordinate that depends on a context. A spline as well takes twice the time, and fits
    noise of few points.
    """
    if dim == 1 and options["context_dim"]:
        return BUILDERS["realnvp"](dim, layers=1, **{**options, "activation": "silu"})
    if dim <= SPLINES_UP_TO:
        return spline(dim, layers=1 if dim == 1 else 4, network="robust", **options)
    return realnvp(dim, network="robust", **options)


def sources(
    flow: Flow, data: object, context: object, validation: object, levels: int | None, noise: float, folds: bool = False
) -> list[tuple[Source, Source | None]]:
    """Make what is trained on and what is held out; with ``folds``, of few points five times, each time others."""
    train = points_for(flow, "data", data, context)
    train.steps(1)  # refuses a loader without points or a length
    if levels is not None:
        train = train.quantized(levels)
    train = replace(train, noise=noise)
    if validation is None:
        return [(train, None)]
    if isinstance(validation, NUMBER):
        if isinstance(train, Stream):
            raise ValueError(
                "validation: of a DataLoader no share can be held out; pass held-out data, a loader of them, or None."
            )
        if not 0.0 < validation < 1.0:
            raise ValueError(f"validation: expected a share between 0 and 1, data or None, got {validation!r}.")
        several = folds and len(train) <= AVERAGED_UP_TO
        return [*train.splits(float(validation), FOLDS if several else 1)]
    pair = validation if isinstance(validation, tuple) else (validation, None)
    if len(pair) != 2:
        raise ValueError(f"validation: expected data, or a pair (data, context), got {len(pair)} items.")
    held_out = points_for(flow, "validation", *pair)
    if train.levels is not None:
        held_out = held_out.quantized(train.levels.count, train.levels.step)
    return [(train, replace(held_out, noise=noise))]


def with_scale(flow: Flow, train: Source, kind: str | None, *, warns: bool = True) -> tuple[Flow, str | None]:
    """Append the affine map to the scale of the data, as measured on the data, noise of levels included.

    It takes the place of one that the flow has; in a mean of densities, of each flow's. A flow that knows data already,
    since it was trained, may be on their scale: then ``"auto"`` leaves it as it is.
    """
    own = ending(_parts(flow)[0])
    images, auto = len(flow.event_shape) > 1, kind == "auto"
    if kind is None or (auto and len(flow.event_shape) == 2):
        return flow, None
    if auto:
        inner = flow.bijection
        if isinstance(inner.layers[-1] if isinstance(inner, Compose) else inner, Logit):
            return flow, None
        kind = "whiten" if own is not None and own.full else "standardize"
    batches = held(train, MEASURED_POINTS)
    if warns and not images and train.levels is None:
        warn_dependent(batches)
        warn_repeated(batches)
    fresh = is_fresh(flow)
    given = flow if auto and not fresh else None
    placed = flow if given is None else copy.deepcopy(flow)
    parts = []
    for number, part in enumerate(_parts(placed)):
        scaled = _scale_context(part, batches, fresh)
        layer: Preprocess = preprocess(kind, scaled, pooled=images, warns=warns and number == 0)
        parts.append(with_preprocess(part, layer))
    placed = averaged(parts) if isinstance(placed.mixture, Ensemble) else parts[0]
    if given is not None and score(given, batches, CHECKED_POINTS) >= score(placed, batches, CHECKED_POINTS):
        return given, None if own is None else kind
    return placed, kind


def _parts(flow: Flow) -> list[Flow]:
    """Return the flows that have maps to the scale of data: those of a mean of densities, or the flow itself."""
    return flow.mixture.members if isinstance(flow.mixture, Ensemble) else [flow]


def _scale_context(flow: Flow, batches: Sequence[Batch], fresh: bool) -> Sequence[Batch]:
    """Let a new flow of a builder standardize its context, and return the batches with the context on its scale."""
    if not flow.context_dim or not isinstance(flow.bijection, Compose):
        return batches
    if fresh and flow.recipe is not None and flow.recipe.named:
        contexts = torch.cat([c for _, c in batches if c is not None])
        flow.bijection.context_scale, flow.bijection.context_knots = scale_of(contexts), knots_of(contexts)
    return [(y, None if c is None else standardized(c, flow.bijection.context_scale)) for y, c in batches]


@torch.no_grad()
def begin_mixture(
    flow: Flow, train: Source, held_out: Source | None, over: Callable[[], bool]
) -> tuple[Flow, MixtureBase | None]:
    """Give a flow of vectors a mixture as its base, begun at Gaussians by expectation maximization.

    Returns the flow, and the mixture that is to be mixed in at the end, if points are held out to weigh it.
    """
    if flow.dim > MIXTURES_UP_TO:
        return flow, None
    parts, fixed = mixtures(flow, train, held_out, over)
    if flow.context_dim:
        parts = parts.split(PARTS_OF_CONTEXTS)
    found = with_mixture(flow, components=len(parts.log_weights), context_dim=flow.context_dim)
    assert isinstance(found.mixture, MixtureBase)
    found.mixture.assign(*parts)
    if isinstance(flow.bijection, Compose):
        found.mixture.context_scale = flow.bijection.context_scale
        found.mixture.context_knots = flow.bijection.context_knots
    return found, None if held_out is None else fixed


@torch.no_grad()
def mixtures(flow: Flow, train: Source, held_out: Source | None, over: Callable[[], bool]) -> tuple[Parts, MixtureBase]:
    """Return mixtures of what a flow's map to the scale of data makes of points: to train, and to mix in at the end.

    They are the same one, or without a context, where held-out points ask for it, the second has narrower parts.
    Residuals of a regression on the context are inflated first, since it has seen them.
    """
    x, other = (
        None if points is None else torch.cat([flow.bijection.inverse_and_ladj(y, c)[0] for y, c in held(points, most)])
        for points, most in ((train, MEASURED_POINTS), (held_out, CHECKED_POINTS))
    )
    assert x is not None
    if flow.context_dim:
        x = x * math.sqrt(len(x) / max(len(x) - flow.context_dim - 1, 0.5 * len(x)))
    white = preprocess("whiten", [(x, None)], warns=False)
    given = None if other is None else white.inverse_and_ladj(other)[0]
    narrow = other is not None and not flow.context_dim
    found = choose(white.inverse_and_ladj(x)[0], given, narrow=narrow, over=over)
    parts, last = (one.moved(white.loc, white.scale) for one in (found[0], found[-1]))
    return parts, MixtureBase(flow.dim, len(last.loc)).to(x).assign(*last)


Member = tuple[Flow, MixtureBase, Source]  # a trained flow, the mixture that is mixed in, what was held out


@torch.no_grad()
def defend(members: Sequence[Member]) -> float:
    r"""Mix in a mixture that was not trained, with the share w that held-out points (N) give it; return w.

    .. math:: w = \arg\max \; \log w + \log(1 - w) + \sum_n \log\bigl((1 - w)\, q_n + w\, q_{1n}\bigr)

    This is stacking, with a point more for each of the two. So w is at least 1 / (N + 2), and the network is not
    believed where few points tell what it is worth. All flows get the same share, by what each was not trained on.

    Reference: Yao, Vehtari, Simpson and Gelman 2018, *Using stacking to average Bayesian predictive distributions*,
    doi:10.1214/17-BA1091.
    """
    bases, gains = [], []
    for flow, fixed, held_out in members:
        base = with_fixed(flow, fixed, 0.5).mixture
        assert isinstance(base, DefendedBase)
        bases.append(base)
        for y, context in held(held_out, CHECKED_POINTS):
            moved, still = base(context).terms(flow.bijection.inverse_and_ladj(y, context)[0])
            gains.append((still - moved).double().nan_to_num(0.0, math.inf, -math.inf))  # none where both are 0
    gain, share = torch.cat(gains), 0.5
    for _ in range(STACKED):
        odds = math.log(share / (1.0 - share))
        share = (float((gain + odds).sigmoid().sum()) + 1.0) / (len(gain) + 2.0)
    for base in bases:
        base.share.fill_(share)
    return share


def identity(flow: Flow, train: Source, held_out: Source | None, validation: object) -> dict[str, object]:
    """Return what tells a checkpoint of these data and this flow from those of others."""
    share = validation if validation is None or isinstance(validation, NUMBER) else "given"
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
