"""The affine map between data and flow: standardized or whitened, fixed, and counted in the density."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_flows.densities.points import Batch, like
from pyro_flows.flows.bases import DefendedBase
from pyro_flows.flows.ensemble import Ensemble
from pyro_flows.flows.flow import Flow
from pyro_flows.support import checks
from pyro_flows.support.process.warnings import outside
from pyro_flows.transforms.fixed import Preprocess

KINDS = ("standardize", "whiten")
DEPENDENT = 1e-10  # a share of a variance, of an eigenvalue of correlations too, below this one is rounding error
FAR_SDS = 10.0  # robust standard deviations, beyond which values are far away
SD_OVER_MAD = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation
NAMED = 10  # coordinates that a warning names at most
REPEATED = 10  # rows for each value: far more than rounding gives, and each held-out row is one of training too
CONSTANT = 1e-12  # a variance below this share of the mean square is rounding error in single precision


def preprocess(
    kind: str, batches: Iterable[Batch], *, pooled: bool = False, shrink: bool = True, warns: bool = True
) -> Preprocess:
    r"""Measure data, and return the layer that makes them standardized or white. One pass over the batches.

    With a context, its linear effect on the mean is taken out too: for one-hot classes, the mean of each class.
    White means :math:`A A^\top = \hat\Sigma`, the covariance with its correlations shrunk towards none by Ledoit and
    Wolf's rule, and A its symmetric root on the scale of correlations.

    Args:
        kind: ``"standardize"`` or ``"whiten"``.
        batches: points, each with its context or none.
        pooled: whether all coordinates get one scale, as the pixels of an image should.
        shrink: whether correlations are shrunk.
        warns: whether of constant coordinates.

    Warns:
        UserWarning: if a coordinate is constant, given the context if there is one. Its scale is then that of the
            narrowest other one.

    Reference: Ledoit and Wolf 2004, *A well-conditioned estimator for large-dimensional covariance matrices*.
    """
    checks.choice("kind", kind, KINDS)
    seen = list(batches)
    shape, first = seen[0][0].shape[1:], seen[0][0]
    y = torch.cat([batch.flatten(1) for batch, _ in seen]).double()
    mean, size = y.mean(0), y.square().mean(0)
    y = y - mean
    slope, given = None, ""
    if seen[0][1] is not None:
        context = torch.cat([batch for _, batch in seen if batch is not None])
        given = " given the context"
        slope, y = _regress(context, y)
        mean = mean - context.double().mean(0) @ slope
    scale = _scales(y, size, given if warns else None, first.dtype)
    if pooled:
        scale = scale.square().mean().sqrt().expand(scale.shape)
    factor = scale.reshape(shape)
    if kind == "whiten":
        factor = scale[:, None] * _root(y / scale, shrink)
    return Preprocess(mean.reshape(shape).to(first), factor.to(first), None if slope is None else slope.to(first))


def warn_dependent(batches: Iterable[Batch]) -> None:
    """Warn if coordinates that vary fulfil linear equations, with the context if there is one; name them.

    In units of sizes, what a regression on the context leaves then has directions with as little variance as constant
    coordinates have. Few points have such by chance. Rows far away count less: each gets a weight, which leaves
    equations as they are. Constant coordinates get a warning of :func:`preprocess`.
    """
    y, context = (torch.cat(part) if part[0] is not None else None for part in zip(*batches, strict=True))
    assert y is not None
    y, dtype = y.double(), y.dtype
    rest = y - y.mean(0)
    varies = ~_constant(rest if context is None else _regress(context, rest)[1], y.square().mean(0), dtype)
    where = varies.nonzero().flatten()
    points = y[:, where] if context is None else torch.cat([y[:, where], context.double()], 1)
    if len(points) - 1 <= points.shape[1] or not len(where):
        return
    loc, scale, _ = tails(points)
    weight = (FAR_SDS / ((points - loc).abs() / scale).amax(1, keepdim=True)).clamp_max(1.0)
    u = weight * (points - (weight.square() * points).sum(0) / weight.square().sum())
    u = u / (weight * points).square().mean(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    u, given = u[:, : len(where)], u[:, len(where) :]
    u = u - given @ (torch.linalg.pinv(given.mT @ given, rtol=DEPENDENT, hermitian=True) @ (given.mT @ u))
    values, vectors = torch.linalg.eigh(u.mT @ u / len(u))
    least = vectors[:, values <= CONSTANT]
    if found := where[least.square().sum(1) * u.square().mean(0) > DEPENDENT].tolist():
        named = ", ".join(map(str, found[:NAMED])) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
        many = least.shape[1]
        equations = "a linear equation" if many == 1 else f"{many} linear equations"
        drop = "one of them" if many == 1 else f"{many} of them, one for each equation"
        warnings.warn(
            f"data: coordinates {named} fulfil {equations}{'' if context is None else ' with the context'}, such as a "
            f"sum or a copy, so that the density has no upper bound. Drop {drop}, or pass levels= if the values are "
            "quantized.",
            UserWarning,
            stacklevel=outside(),
        )


def warn_repeated(batches: Iterable[Batch]) -> None:
    """Warn if rows have so few different values that they are counts, categories, or copies of each other."""
    y = torch.cat([batch.flatten(1) for batch, _ in batches]).double()
    distinct = len(torch.unique(y @ torch.arange(1.0, y.shape[1] + 1.0).to(y).sin()))  # numbers that tell rows apart
    if 1 < distinct <= len(y) / REPEATED:
        warnings.warn(
            f"data: {len(y)} rows have {distinct} different values, so that the density has no upper bound, and "
            "held-out rows, which are copies of others, do not end the training. Drop copies. Of counts, pass levels=, "
            "or noise= with a standard deviation.",
            UserWarning,
            stacklevel=outside(),
        )


def scale_of(contexts: Tensor) -> Tensor:
    """Return a location and a scale (2, C) of contexts (N, C); columns of zeros and ones stay as they are.

    Those of one value have this place and scale 1, so that networks do not see a large number.
    """
    c = contexts.double()
    loc, scale = c.mean(0), c.std(0, correction=int(len(c) > 1))
    still = scale <= 8.0 * torch.finfo(contexts.dtype).eps * loc.abs() + 1e-30
    found = torch.stack([loc, torch.where(still, 1.0, scale)])
    marks = ((c == 0) | (c == 1)).all(0)
    return torch.where(marks, torch.tensor([[0.0], [1.0]]).to(c), found).to(contexts)


def tails(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return median, robust standard deviation, and share of values more than ten of these away, of columns (N, C)."""
    loc = values.median(0).values
    away = (values - loc).abs()
    scale, mean = SD_OVER_MAD * away.median(0).values, away.mean(0)
    scale = torch.where(scale > 0.0, scale, torch.where(mean > 0.0, mean, 1.0))  # most counts may be equal
    return loc, scale, (away > FAR_SDS * scale).double().mean(0)


def knots_of(contexts: Tensor) -> Tensor | None:
    r"""Return knots (2, C, K), places and values, of the map of contexts (N, C) to what networks see; None if linear.

    Columns with values that are far away become normal scores. Values :math:`v_k` are equally far from each other, and
    their places are the quantiles of :math:`\Phi(v_k)`. Places that coincide share the mean of their values. The first
    two knots are one, and so are the last two, so that values are constant beyond them. K - 2 is
    :math:`2 N^{1/3}`, as of a histogram's bins by the Rice rule. So far values become values of a few units, and the
    others stay apart. Other columns are mapped by the line of :func:`scale_of`.

    Reference: van der Waerden 1952, *Order tests for the two-sample problem and their power* (normal scores).
    """
    count, c = len(contexts), contexts.double()
    heavy = (tails(c)[2] > 0.0) & ~((c == 0) | (c == 1)).all(0)
    if not bool(heavy.any()):
        return None
    most = -torch.special.ndtri(torch.tensor(0.5 / count, dtype=torch.float64))
    values = torch.linspace(-1.0, 1.0, math.ceil(2.0 * count ** (1.0 / 3.0)) + 2).to(c)
    values = values * (most.to(c) / values[-2])
    scores = values.clamp(values[1], values[-2])
    at = torch.special.ndtr(scores) * (count - 1)
    ordered, low = c.sort(0).values, at.floor().long()
    quantiles = torch.lerp(ordered[low], ordered[(low + 1).clamp_max(count - 1)], (at - low)[:, None]).mT
    same = (quantiles[:, :, None] == quantiles[:, None, :]).to(c)
    bent = torch.stack([quantiles, same @ scores / same.sum(-1)])
    loc, scale = scale_of(c)[..., None]
    line = torch.stack([loc + scale * values, values.expand(len(loc), -1)])
    return torch.where(heavy[:, None], bent, line).to(contexts)


@torch.no_grad()
def is_fresh(flow: Flow) -> bool:
    """Whether the flow is what builders make: the identity, up to an order of coordinates, so that it knows no data."""
    if isinstance(flow.mixture, (Ensemble, DefendedBase)):
        return False
    x = torch.linspace(-1.0, 1.0, 2 * flow.dim).reshape(2, *flow.base_shape).to(like(flow))
    context = x.new_zeros(2, flow.context_dim) if flow.context_dim else None
    y, ladj = copy.deepcopy(flow.bijection).eval().forward_and_ladj(x, context)
    order, other = x.flatten(1).sort(-1).values, y.flatten(1).sort(-1).values
    return torch.allclose(order, other, atol=1e-5) and torch.allclose(ladj, torch.zeros_like(ladj), atol=1e-4)


def _regress(context: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope of centered ``y`` on the context by ridge regression, and what is left.

    The penalty, one for each output, has the smallest error by generalized cross-validation. What contexts that depend
    on each other share has no effect twice.

    Reference: Golub, Heath and Wahba 1979, doi:10.1080/00401706.1979.10489751.
    """
    least, context = torch.finfo(context.dtype).eps, context.double()
    centered = context - context.mean(0)
    scale = centered.square().mean(0).sqrt()
    unit = centered / torch.where(scale > least * context.abs().amax(0), scale, torch.inf)
    values, vectors = torch.linalg.eigh(unit.mT @ unit)
    most = values.amax().clamp_min(1e-30)
    values, vectors = values[values > DEPENDENT * most], vectors[:, values > DEPENDENT * most]
    along = vectors.mT @ (unit.mT @ y) / values.sqrt()[:, None]
    size = y.square().sum(0).clamp_min(1e-300)
    free = max(len(y) - 1 - len(values), 0)
    rest = (1.0 - (along.square() / size).sum(0)).clamp_min(0.0) if free else torch.zeros_like(size)
    penalties = most * 10.0 ** torch.arange(-10.0, 3.0, 0.25).to(y)[:, None]
    shrunk = penalties / (values + penalties)
    error = (rest + shrunk.square() @ (along.square() / size)) / (free + shrunk.sum(1, keepdim=True)).square()
    slope = vectors @ (along / values.sqrt()[:, None] * (1.0 - shrunk[error.argmin(0)]).mT)
    slope = slope / torch.where(scale > 0.0, scale, 1.0)[:, None]
    return slope, y - centered @ slope


def _constant(y: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Say which coordinates of centered points are constant up to rounding errors in the dtype that they had.

    These are a share of ``size``, the mean square before centering.
    """
    least = CONSTANT * (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) ** 2
    return y.square().mean(0) <= least * size + torch.finfo(torch.float32).tiny ** 2


def _scales(y: Tensor, size: Tensor, given: str | None, dtype: torch.dtype) -> Tensor:
    """Return standard deviations of centered points whose mean square was ``size`` before centering."""
    variance, constant = y.square().mean(0), _constant(y, size, dtype)
    if bool(constant.any()):
        where = constant.nonzero().flatten().tolist()
        if given is not None:
            warnings.warn(
                f"data: coordinate {where[0]} is constant{given} ({len(where)} of {len(constant)} are), so that its "
                "density has no upper bound. Drop it, or pass levels= if the values are quantized.",
                UserWarning,
                stacklevel=outside(),
            )
        rest = variance[~constant]
        variance = torch.where(constant, rest.min() if len(rest) else torch.ones_like(variance), variance)
    return variance.sqrt()


def _root(z: Tensor, shrink: bool) -> Tensor:
    """Return the symmetric root of the shrunk correlations of standardized points."""
    count, dim = z.shape
    found = z.mT @ z / count
    found.diagonal().fill_(1.0)
    away = (found - torch.eye(dim).to(found)).square().sum()
    noise = (z.square().sum(-1).square().sum() / count - found.square().sum()) / count
    share = float((noise / away.clamp(min=1e-300)).clamp(0.0, 1.0)) if shrink else 0.0
    values, vectors = torch.linalg.eigh((1.0 - share) * found + share * torch.eye(dim).to(found))
    return (vectors * values.clamp(min=dim * 1e-7).sqrt()) @ vectors.mT
