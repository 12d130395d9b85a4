"""Elementwise maps that change the tails of a distribution and leave its middle alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.conditioners import bounded, conditioner

SLOW = 0.1  # three units out, k moves a point by three times itself, and six units out by nine times


@checks.constructor
class SinhArcsinh(Bijection):
    r"""Two-sided tails: :math:`y_d = c\,\sinh(k\,\mathrm{arcsinh}(x_d / c)) / k`; k and c one number a side of 0 each.

    :math:`y \approx x` for :math:`|x| \ll c`, whatever k (value, slope and curvature agree at 0); far out
    :math:`|y| \approx c\,|2x / c|^k / 2k`: heavier tails for k > 1, lighter ones for k < 1. k = 2 turns a Gaussian tail
    into an exponential one, which is how the logarithm of a scale falls off towards zero; c says where that begins. The
    logarithms of k and c are bounded smoothly by ``log_bound`` and start at 0: the identity.

    .. math:: \log|J| = \sum_d \log\cosh(k\,a_d) - \log\cosh(a_d), \qquad a_d = \mathrm{arcsinh}(x_d / c)

    Both ways cost O(D), in closed form: :math:`x = c\,\sinh(\mathrm{arcsinh}(k y / c) / k)`.

    Shapes: ``x`` and ``y`` are ``(..., dim)``, ``ladj`` is ``(...)``.

    Args:
        dim: number of coordinates.
        context_dim: width of the context; above 0, a network of it gives k and c.
        hidden: widths of that network.
        activation: its activation.
        log_bound: bound of :math:`|\log k|` and :math:`|\log c|`.

    Raises:
        ValueError: for a ``dim`` below 1, a bound that is not positive, or a wrong width.

    Reference: Jones and Pewsey, *Sinh-arcsinh distributions*, Biometrika 2009, doi:10.1093/biomet/asp053 (one
    k, no c; here two a side).

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.SinhArcsinh(2)(torch.tensor([-1.0, 2.0])).tolist()
    [-1.0, 2.0]
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        log_bound: float = 1.5,
    ) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.context_dim = context_dim
        self.log_bound = checks.positive("log_bound", log_bound)
        self.conditioner = conditioner(0, context_dim, 4 * dim, hidden=hidden, activation=activation)

    def slow(self, count: float) -> None:
        """Let a step of Adam move far points about as little as an affine map does; the map stays as it is."""
        self.conditioner.slow(SLOW)

    def _tails(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return k and c for each coordinate of ``x``, by the side it is on (the map keeps the sign)."""
        self._check(x, context)
        raw = self.conditioner(None, context)
        left, right = torch.exp(bounded(raw, self.log_bound)).chunk(2, dim=-1)
        ends = zip(left.chunk(2, dim=-1), right.chunk(2, dim=-1), strict=True)
        power, onset = (torch.where(x < 0, low, high) for low, high in ends)
        return power, onset

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        power, onset = self._tails(x, context)
        angle = torch.asinh(x / onset)
        stretched = power * angle
        return onset * torch.sinh(stretched) / power, (_log_cosh(stretched) - _log_cosh(angle)).sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        power, onset = self._tails(y, context)
        stretched = torch.asinh(power * y / onset)
        angle = stretched / power
        return onset * torch.sinh(angle), (_log_cosh(angle) - _log_cosh(stretched)).sum(-1)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        power, onset = self._tails(x, context)
        angle = torch.asinh(x / onset)
        stretched = power * angle
        terms = _log_cosh(stretched) - _log_cosh(angle)
        with torch.no_grad():
            bend = (power * torch.tanh(stretched) - torch.tanh(angle)) / (onset * torch.cosh(angle))
            carried = (score - bend) * torch.exp(-terms)
        return onset * torch.sinh(stretched) / power, terms.sum(-1), carried


def _log_cosh(x: Tensor) -> Tensor:
    size = x.abs()
    return size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)
