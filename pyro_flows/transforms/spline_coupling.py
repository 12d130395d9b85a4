"""Couplings by monotone splines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms import splines
from pyro_flows.transforms.conditioners import bounded
from pyro_flows.transforms.coupling import Coupling


@checks.constructor
class SplineCoupling(Coupling):
    r"""Neural spline coupling: :math:`y_K = x_K,\ y_M = e^{s} \odot g(x_M) + t`; g, s and t from a network of x_K.

    g is a monotone rational quadratic spline on :math:`[-B, B]`, with K bins and slope 1 at both ends, and the identity
    outside. The affine map after it moves far points too, where a spline alone leaves them alone; its log scale is
    bounded smoothly. Bins are at least a thousandth of the interval wide and high, slopes at the knots at least 0.001.
    The network's last layer starts at zero: the identity.

    .. math:: \log|J| = \sum_M s + \log g'(x_M)

    The inverse costs the same as the forward pass: one evaluation of the network, and the root of a quadratic. With one
    coordinate and no context the spline is free, and bends one dimension.

    Args:
        dim: number of coordinates, or the shape (C, T) of a signal or (C, H, W) of an image.
        mask: booleans, ``True`` for the kept ones (default: the first half, of channels if there are any).
        bins: their number K.
        bound: B, in units of x.
        context_dim: width of the context.
        hidden: widths of the network's hidden layers.
        activation: its activation.
        network: ``"mlp"``, ``"robust"`` or ``"residual"``; for images ``"convolution"``, ``"robust"``,
            ``"residual"`` or ``"dense"``, of all pixels (``None``: the first); for signals ``"wavenet"``.
        log_scale_bound: bound of the affine map's log scale, in nats.

    Raises:
        ValueError: for a mask that moves nothing or has the wrong shape, fewer than 2 or more than 500 bins, a bound
            that is not positive, or a wrong width.

    Reference: Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows*, NeurIPS 2019 (arXiv
    1906.04032).

    >>> import torch, pyro_flows as pf
    >>> y, ladj = pf.transforms.SplineCoupling(4, bins=5).forward_and_ladj(torch.randn(10, 4))
    >>> y.shape, ladj.shape
    (torch.Size([10, 4]), torch.Size([10]))
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        *,
        mask: Tensor | None = None,
        bins: int = 8,
        bound: float = 5.0,
        context_dim: int = 0,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        network: str | None = None,
        log_scale_bound: float = 8.0,
    ) -> None:
        self.bins = bins
        if bins > splines.MOST_BINS:
            raise ValueError(f"bins: expected at most {splines.MOST_BINS}, got {bins}.")
        self.per = splines.count(bins) + 2
        super().__init__(dim, mask=mask, context_dim=context_dim, hidden=hidden, activation=activation, network=network)
        self.bound = checks.positive("bound", bound)
        self.log_scale_bound = checks.positive("log_scale_bound", log_scale_bound)

    def _reach(self) -> Tensor:
        """Knots, by their widths and by their heights, move by up to B times as far as what they are made of."""
        reach = torch.tensor([1.0, 1.0] + [max(1.0, 2.0 * self.bound)] * (self.per - 2))
        moved = int((~self.mask).sum())
        return reach.repeat(moved) if self.event_dim == 1 else reach.max()

    def _read(self, raw: Tensor) -> tuple[Tensor, ...]:
        axis = -self.event_dim
        channels = axis < -1
        numbers = raw.unflatten(axis, (self.per, -1) if channels else (-1, self.per))
        numbers = numbers.movedim(axis - 1, -1) if channels else numbers
        log_scale, shift, knots = numbers.split([1, 1, self.per - 2], dim=-1)
        log_scale = bounded(log_scale.squeeze(-1), self.log_scale_bound)
        return log_scale, shift.squeeze(-1), knots

    def _move(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        y, terms = self._bend(moved, parameters)
        return y, self._total(terms)

    def _bend(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        log_scale, shift, raw = parameters
        bent, log_slope = splines.forward(moved, splines.knots(raw, self.bins, self.bound), self.bound)
        return torch.addcmul(shift, bent, log_scale.exp()), log_slope + log_scale

    def _unmove(self, moved: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        log_scale, shift, raw = parameters
        bent = (moved - shift) * torch.exp(-log_scale)
        x, log_slope = splines.inverse(bent, splines.knots(raw, self.bins, self.bound), self.bound)
        return x, self._total(log_slope - log_scale)

    def _carry(self, moved: Tensor, parameters: tuple[Tensor, ...], score: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            point = moved.detach().requires_grad_()
            leaves = tuple(parameter.detach().requires_grad_() for parameter in parameters)
            y, terms = self._bend(point, leaves)
            (bend,) = torch.autograd.grad(terms.sum(), point, retain_graph=True)
            carried = (score - bend) * torch.exp(-terms.detach())
            weights = torch.autograd.grad((y * carried).sum() + terms.sum(), leaves)
        return carried, weights
