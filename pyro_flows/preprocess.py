"""The affine map between data and flow: standardised or whitened, fixed, and counted in the density."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows.density_data import Batch
from pyro_flows.transforms import Bijection, Chain

if TYPE_CHECKING:
    from pyro_flows.flows import Flow

KINDS = ("standardize", "whiten")
CONSTANT = 1e-12  # a variance below this share of the squared mean is rounding error


class Preprocess(Bijection):
    r"""A fixed affine map to the scale of the data, :math:`y = m + B c + A x`; A is diagonal or a full matrix.

    c is the context, if there is one. :math:`\log|J| = \log|\det A|` is a constant. Nothing here is trained: a flow
    with this as its last layer sees standardised or white data, and its density is that of the data as they are. Both
    ways cost O(D), or one product with a D x D matrix.

    Args:
        loc: m, of the shape of one point.
        scale: the diagonal of A, of the same shape, or A itself, ``(D, D)``.
        slope: B transposed, ``(context_dim, D)``.

    Raises:
        ValueError: for values that are not finite, a scale that is not positive, a matrix without an inverse, or
            shapes that do not fit.

    >>> import torch
    >>> layer = Preprocess(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    >>> layer.forward_and_ladj(torch.ones(2))
    (tensor([3., 6.]), tensor(2.0794))
    """

    loc: Tensor
    scale: Tensor
    inverse_scale: Tensor
    log_scale: Tensor
    slope: Tensor | None

    def __init__(self, loc: Tensor, scale: Tensor, slope: Tensor | None = None) -> None:
        super().__init__()
        self.event_dim = loc.dim()  # type: ignore[assignment]
        self.dim = loc.numel() if loc.dim() == 1 else tuple(loc.shape)
        self.context_dim = 0 if slope is None else slope.shape[0]
        self.full = scale.shape != loc.shape
        dim = loc.numel()
        if self.full and scale.shape != (dim, dim):
            raise ValueError(f"scale: expected shape {tuple(loc.shape)} or {(dim, dim)}, got {tuple(scale.shape)}.")
        if slope is not None and slope.shape != (len(slope), dim):
            raise ValueError(f"slope: expected shape (context_dim, {dim}), got {tuple(slope.shape)}.")
        log_scale = torch.linalg.slogdet(scale.double())[1] if self.full else scale.double().log().sum()
        given = [loc, scale, log_scale, *([] if slope is None else [slope])]
        if not all(bool(torch.isfinite(value).all()) for value in given):
            raise ValueError("scale: expected finite numbers, a positive diagonal or a matrix that can be inverted.")
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("inverse_scale", self._invert())
        self.register_buffer("log_scale", log_scale.to(scale.dtype))
        self.register_buffer("slope", None if slope is None else slope.clone())

    def _invert(self) -> Tensor:
        scale = self.scale.double()
        return (torch.linalg.inv(scale) if self.full else 1.0 / scale).to(self.scale.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Preprocess:
        """Move or convert; in a finer dtype the inverse is found anew, or both ways would not meet."""
        before = self.scale.dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != before:
            self.inverse_scale = self._invert()
        return self

    def _shift(self, x: Tensor, context: Tensor | None) -> Tensor:
        if x.shape[x.dim() - self.event_dim :] != self.loc.shape:
            raise ValueError(f"Preprocess: expected shape (..., {tuple(self.loc.shape)}), got {tuple(x.shape)}.")
        _checks.context("Preprocess", context, self.context_dim)
        if self.slope is None or context is None:
            return self.loc
        return self.loc + (context @ self.slope).unflatten(-1, self.loc.shape)

    def _product(self, x: Tensor, scale: Tensor) -> Tensor:
        if not self.full:
            return x * scale
        return (x.flatten(-self.event_dim) @ scale.mT).unflatten(-1, self.loc.shape)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self._shift(x, context) + self._product(x, self.scale)
        return y, self.log_scale.expand(y.shape[: y.dim() - self.event_dim])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._product(y - self._shift(y, context), self.inverse_scale)
        return x, -self.log_scale.expand(x.shape[: x.dim() - self.event_dim])


def preprocess(kind: str, batches: Iterable[Batch], *, pooled: bool = False, shrink: bool = True) -> Preprocess:
    r"""Measure data, and return the layer that makes them standardised or white. One pass over the batches.

    With a context, its linear effect on the mean is taken out too: for one-hot classes, the mean of each class.
    White means :math:`A A^\top = \hat\Sigma`, the covariance with its correlations shrunk towards none by Ledoit and
    Wolf's rule, and A its symmetric root on the scale of correlations.

    Args:
        kind: ``"standardize"`` or ``"whiten"``.
        batches: points, each with its context or none.
        pooled: whether all coordinates get one scale, as the pixels of an image should.
        shrink: whether correlations are shrunk.

    Raises:
        ValueError: for an unknown kind.

    Warns:
        UserWarning: if a coordinate is constant; its scale is then that of the narrowest other one.

    Reference: Ledoit and Wolf 2004, *A well-conditioned estimator for large-dimensional covariance matrices*.
    """
    _checks.choice("kind", kind, KINDS)
    seen = list(batches)
    shape, like = seen[0][0].shape[1:], seen[0][0]
    y = torch.cat([batch.flatten(1) for batch, _ in seen]).double()
    mean = y.mean(0)
    y = y - mean
    slope = None
    if seen[0][1] is not None:
        context = torch.cat([batch for _, batch in seen if batch is not None]).double()
        slope, y = _regress(context, y)
        mean = mean - context.mean(0) @ slope
    scale = _scales(y, mean)
    if pooled:
        scale = scale.square().mean().sqrt().expand(scale.shape)
    factor = scale.reshape(shape)
    if kind == "whiten":
        factor = scale[:, None] * _root(y / scale, shrink)
    return Preprocess(mean.reshape(shape).to(like), factor.to(like), None if slope is None else slope.to(like))


def append(flow: Flow, layer: Preprocess) -> Flow:
    """Make ``layer`` the last one of the flow, in the place of one of its kind, and note it in the flow's settings."""
    noted = {"full": layer.full, "context": layer.slope is not None}
    if ending(flow) is not None:
        flow.bijection = _ending_replaced(flow.bijection, layer)
        flow.settings = None if flow.settings is None else {**flow.settings, "preprocess": noted}
        return flow
    inner = flow.bijection
    flow.bijection = Chain([*(inner.layers if isinstance(inner, Chain) else [inner]), layer])  # type: ignore[list-item]
    flow.settings = wrapped(flow.settings, "preprocess", noted)
    return flow


def _ending_replaced(bijection: Bijection, layer: Preprocess) -> Bijection:
    if not isinstance(bijection, Chain):
        return layer
    stack: list[Any] = list(bijection.layers)
    return Chain([*stack[:-1], _ending_replaced(stack[-1], layer)])


def blank(about: Mapping[str, Any], flow: Flow) -> Preprocess:
    """Return a map of the kind that :func:`append` noted, that changes nothing: its numbers are read from a file."""
    loc = torch.zeros(flow.event_shape)
    scale = torch.eye(loc.numel()) if about["full"] else torch.ones_like(loc)
    return Preprocess(loc, scale, torch.zeros(flow.context_dim, loc.numel()) if about["context"] else None)


def wrapped(settings: Mapping[str, Any] | None, name: str, value: Any) -> dict[str, Any] | None:
    """Return the settings of a flow with one more map at its end: ``"preprocess"``, or ``"affine"`` of a guide.

    One of each may stand beside a builder's options, in this order; what comes on top of those has the settings so far
    as its ``"inner"`` ones.
    """
    if settings is None:
        return None
    if "affine" in settings or name in settings:
        return {"builder": settings["builder"], "inner": dict(settings), name: value}
    return {**settings, name: value}


@torch.no_grad()
def is_fresh(flow: Flow) -> bool:
    """Whether the flow is what builders make: the identity, up to an order of coordinates, so that it knows no data."""
    like = next(flow.parameters(), flow._like)
    x = torch.linspace(-1.0, 1.0, 2 * flow.dim).reshape(2, *flow.base_shape).to(like)
    context = x.new_zeros(2, flow.context_dim) if flow.context_dim else None
    y, ladj = copy.deepcopy(flow.bijection).eval().forward_and_ladj(x, context)
    order, other = x.flatten(1).sort(-1).values, y.flatten(1).sort(-1).values
    return torch.allclose(order, other, atol=1e-5) and torch.allclose(ladj, torch.zeros_like(ladj), atol=1e-4)


def ending(flow: Flow) -> Preprocess | None:
    """Return the map to the scale of data that is the flow's last layer, if there is one."""
    last: Any = flow.bijection
    while isinstance(last, Chain):
        last = last.layers[-1]
    return last if isinstance(last, Preprocess) else None


def _regress(context: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slope of centred ``y`` on the context, with a hint of a ridge, and what is left."""
    centred = context - context.mean(0)
    gram = centred.mT @ centred
    ridge = gram.diagonal().mean().clamp(min=1e-12) * 1e-4
    slope = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), centred.mT @ y)
    return slope, y - centred @ slope


def _scales(y: Tensor, mean: Tensor) -> Tensor:
    variance = y.square().mean(0)
    constant = variance <= CONSTANT * mean.square() + 1e-30
    if bool(constant.any()):
        where = constant.nonzero().flatten().tolist()
        warnings.warn(
            f"data: coordinate {where[0]} is constant ({len(where)} of {len(constant)} are), so that its density has "
            "no upper bound. Drop it, or pass levels= if the values are quantised.",
            UserWarning,
            stacklevel=4,
        )
        rest = variance[~constant]
        variance = torch.where(constant, rest.min() if len(rest) else torch.ones_like(variance), variance)
    return variance.sqrt()


def _root(z: Tensor, shrink: bool) -> Tensor:
    """Return the symmetric root of the shrunk correlations of standardised points."""
    count, dim = z.shape
    found = z.mT @ z / count
    found.diagonal().fill_(1.0)
    away = (found - torch.eye(dim).to(found)).square().sum()
    noise = (z.square().sum(-1).square().sum() / count - found.square().sum()) / count
    share = float((noise / away.clamp(min=1e-300)).clamp(0.0, 1.0)) if shrink else 0.0
    values, vectors = torch.linalg.eigh((1.0 - share) * found + share * torch.eye(dim).to(found))
    return (vectors * values.clamp(min=dim * 1e-7).sqrt()) @ vectors.mT
