"""Planar layers (Rezende and Mohamed 2015), invertible at any point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.conditioners import conditioner

_UNIT = math.log(math.e - 1.0)  # softplus(_UNIT) = 1
_ITERATIONS = 60


def _root(target: Tensor, gain: Tensor, slope: Tensor) -> Tensor:
    r"""Solve :math:`s + c \tanh s = r` for ``s``, where ``target`` is r, ``gain`` is c > -1 and ``slope`` is 1 + c > 0.

    The left side is odd, so take :math:`r \ge 0`, :math:`s \ge 0`. There it is concave for :math:`c \ge 0`, convex for
    :math:`c < 0`: Newton's steps from a point below (concave) or above (convex) the root approach it from that side
    only. The starting points are such bounds, so no step can leave the bracket :math:`[r - |c|, r + |c|]`.
    """
    size, sign = target.abs(), target.sign()
    below = torch.maximum(size - gain, size / slope)
    above = torch.minimum(size - gain, size / slope)
    cubic = 5.0 * size / gain.abs().clamp_min(torch.finfo(size.dtype).tiny)
    above = torch.where(cubic < 1.0, torch.minimum(above, cubic.clamp_min(0.0) ** (1.0 / 3.0)), above)
    point = torch.where(gain >= 0.0, below, above)
    for _ in range(_ITERATIONS):
        tanh = torch.tanh(point)
        residual = point + gain * tanh - size
        step = residual / (slope + (1.0 - slope) * tanh.square())
        point = (point - step).clamp_min(0.0)
        if not torch._C._functorch.is_functorch_wrapped_tensor(step):
            small = step.abs() <= 2.0 * torch.finfo(size.dtype).eps * point
            if bool(small.all()):
                break
    return sign * point


@checks.constructor
class Planar(Bijection):
    r"""Planar layer: :math:`y = x + \hat u \tanh(a)`, :math:`a = w^\top x + b`.

    The map is invertible if :math:`w^\top \hat u > -1`. With :math:`m(t) = \mathrm{softplus}(t + \log(e - 1)) - 1`,

    .. math:: \hat u = u + (m(w^\top u) - w^\top u)\, w / \|w\|^2,
              \qquad \log|J| = \log(\tanh^2 a + (1 + w^\top\hat u)(1 - \tanh^2 a)),

    so that :math:`w^\top u = 0` is left as it is, and :math:`w = 0` is a plain shift.
    Parameters start at :math:`u = 0`: the identity; w and b start at random, so that the planes :math:`a = 0` lie where
    a standard normal has its mass, each in a place of its own.

    Inverse: the scalar root of :math:`a + (w^\top\hat u)\tanh a = w^\top y + b` by Newton's method from a bound on its
    convex side (monotone, so it cannot fail), and two differentiable Newton steps, which make first and second
    derivatives right. Cost: O(D) each way, and up to a few tens of scalar steps per point for the inverse.

    Args:
        dim: number of coordinates.
        context_dim: width of the context; above 0, a network of it gives u, w and b.
        hidden: widths of that network.
        activation: its activation.

    Raises:
        ValueError: for a ``dim`` below 1, or an input or context of the wrong width.

    Reference: Rezende and Mohamed, *Variational Inference with Normalizing Flows*, ICML 2015 (arXiv
    1505.05770).

    >>> import torch, pyro_flows as pf
    >>> layer = pf.transforms.Planar(3)
    >>> y, ladj = layer.forward_and_ladj(torch.ones(4, 3))
    >>> y.shape, ladj.tolist()
    (torch.Size([4, 3]), [0.0, 0.0, 0.0, 0.0])
    """

    def __init__(
        self, dim: int, *, context_dim: int = 0, hidden: Sequence[int] = (32, 32), activation: str = "silu"
    ) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.context_dim = context_dim
        start = torch.zeros(2 * dim + 1)
        start[dim : 2 * dim] = w = torch.randn(dim) / math.sqrt(dim)
        start[2 * dim] = -(w @ torch.randn(dim))
        self.conditioner = conditioner(0, context_dim, 2 * dim + 1, hidden=hidden, activation=activation, start=start)

    def slow(self, count: float) -> None:
        """Let a step of Adam move u, w and b by a share of one in ``count`` maps, which all move a point."""
        self.conditioner.slow(min(1.0, 1.0 / count))

    def _parameters_at(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the constrained u, then w, b and the slope 1 + w.u > 0."""
        u, w, b = self.conditioner(None, context).split([self.dim, self.dim, 1], dim=-1)
        finfo = torch.finfo(u.dtype)
        dot = (w * u).sum(-1, keepdim=True)
        square = w.square().sum(-1, keepdim=True)
        slope = finfo.eps + (1.0 - finfo.eps) * softplus(dot + _UNIT)
        away = square > math.sqrt(finfo.tiny)
        mild = dot > -1.0
        near = torch.log1p(torch.expm1(-dot.clamp_min(-1.0)) / math.e)  # m(t) - t without cancellation
        safe = torch.where(away, square, 1.0)
        u = u + torch.where(away, torch.where(mild, near, slope - 1.0 - dot) / safe, 0.0) * w
        slope = torch.where(away, slope, 1.0)
        rounding = (slope - 1.0 - (w * u).sum(-1, keepdim=True)) / safe * w  # of a large u
        return u + torch.where(away & ~mild, rounding, 0.0).detach(), w, b, slope

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        u, w, b, slope = self._parameters_at(context)
        tanh = torch.tanh((w * x).sum(-1, keepdim=True) + b)
        return x + u * tanh, _log_determinant(tanh, slope)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y, context)
        u, w, b, slope = self._parameters_at(context)
        target = (w * y).sum(-1, keepdim=True) + b
        gain = slope - 1.0
        with torch.no_grad():
            root = _root(target.detach(), gain.detach().expand_as(target), slope.detach().expand_as(target))
        derivative = (slope + (1.0 - slope) * torch.tanh(root).square()).detach()
        for _ in range(2):  # leaves the value, brings in the first and second derivatives
            step = (root + gain * torch.tanh(root) - target) / derivative
            root = root - (step - step.detach())
        tanh = torch.tanh(root)
        return y - u * tanh, -_log_determinant(tanh, slope)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        self._check(x, context)
        u, w, b, slope = self._parameters_at(context)
        tanh = torch.tanh((w * x).sum(-1, keepdim=True) + b)
        with torch.no_grad():
            bend = 1.0 - tanh.square()
            determinant = tanh.square() + slope * bend
            left = score - (2.0 * (1.0 - slope) * tanh * bend / determinant) * w
            carried = left - (bend / determinant) * (u * left).sum(-1, keepdim=True) * w
        return x + u * tanh, _log_determinant(tanh, slope), carried


def _log_determinant(tanh: Tensor, slope: Tensor) -> Tensor:
    square = tanh.square()
    return torch.log(square + slope * (1.0 - square)).squeeze(-1)
