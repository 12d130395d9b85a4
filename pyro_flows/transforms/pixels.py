"""Between whole numbers, the unit interval and the real line: what images need before and after a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.conditioners import bounded, conditioner


@checks.constructor
class Logit(Bijection):
    r"""Real numbers to the unit interval, elementwise: :math:`\alpha + (1 - 2\alpha)\,y = \sigma(x)`.

    So :math:`x = \mathrm{logit}(\alpha + (1 - 2\alpha) y)`, which is finite at y = 0 and y = 1; this is the form of
    Real-NVP and of MAF. The last map of a flow for data in [0, 1], with

    .. math:: \log|J| = \sum_d \log\sigma(x_d) + \log\sigma(-x_d) - \log(1 - 2\alpha).

    The price of safe ends: y can fall outside of [0, 1], by up to :math:`\alpha / (1 - 2\alpha)` at either end.

    The log-determinant is counted, so ``log_prob`` is a density of y in nats. For data of n levels, made continuous by
    y = (level + u) / n (:class:`Dequantize`), the bits per dimension of the *levels* are
    :math:`\log_2 n - \log p(y) / (D \ln 2)`: 8 is added for 256 levels, nothing else. Both ways cost O(D).

    Args:
        dim: number of coordinates, or the shape (C, T) of a signal or (C, H, W) of an image.
        alpha: between 0 and 0.5; 0.05 for color images, 1e-6 for digits on black are usual.

    Raises:
        ValueError: for an alpha outside of (0, 0.5), or an input of another shape.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803), section 4.1.

    >>> import torch, pyro_flows as pf
    >>> layer = pf.transforms.Logit(2, alpha=0.05)
    >>> layer.inv(torch.tensor([0.0, 1.0]).double()).round(decimals=3).tolist()
    [-2.944, 2.944]
    """

    def __init__(self, dim: int | Sequence[int], *, alpha: float = 0.05) -> None:
        super().__init__()
        self.dim = checks.size("dim", dim)
        self.event_dim = 1 if isinstance(self.dim, int) else len(self.dim)
        self.alpha = checks.positive("alpha", alpha)
        if self.alpha >= 0.5:
            raise ValueError(f"alpha: expected a number between 0 and 0.5, got {alpha!r}.")

    @constraints.dependent_property
    def codomain(self) -> constraints.Constraint:
        beyond = self.alpha / (1.0 - 2.0 * self.alpha)
        return constraints.independent(constraints.interval(-beyond, 1.0 + beyond), self.event_dim)

    def _total(self, terms: Tensor) -> Tensor:
        return terms.flatten(-self.event_dim).sum(-1)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        width = 1.0 - 2.0 * self.alpha
        terms = _log_slope(x) - math.log(width)
        return (torch.sigmoid(x) - self.alpha) / width, self._total(terms)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y, context)
        width = 1.0 - 2.0 * self.alpha
        low, high = torch.log(self.alpha + width * y), torch.log(self.alpha + width * (1.0 - y))
        return low - high, self._total(math.log(width) - low - high)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        y, ladj = self.forward_and_ladj(x, context)
        with torch.no_grad():
            slope = torch.exp(_log_slope(x)) / (1.0 - 2.0 * self.alpha)
            carried = (score + torch.tanh(0.5 * x)) / slope
        return y, ladj, carried


@checks.constructor
class Dequantize(nn.Module):
    r"""Make whole numbers k = 0 ... n - 1 continuous: :math:`y = (k + u) / n`, with noise :math:`u \in [0, 1)^D`.

    It is random, so it is no :class:`Bijection`: it is used on data in front of a flow of y. Called on k, it returns y
    and :math:`\log q(y|k)`, in nats, a draw each time. With them,

    .. math:: \log P(k) \ge \mathrm{E}[\log p(y) - \log q(y|k)],
              \qquad \text{bits per dimension} = \frac{\log q(y|k) - \log p(y)}{D \ln 2}.

    Uniform noise (the default): :math:`\log q(y|k) = D \log n`. Variational: :math:`u = \sigma(a + e^{b} \epsilon)`
    with logistic :math:`\epsilon`, and a and b from a network of k, trained with the flow to make the bound tighter.
    The network starts at a = b = 0, which is uniform noise; :math:`|b| \le 4`, smoothly.

    Args:
        dim: number of coordinates D, or the shape (C, T) of a signal or (C, H, W) of an image.
        levels: their number n.
        variational: whether the noise is learned.
        hidden: widths of its network's hidden layers.
        activation: their activation.
        network: ``"mlp"``, ``"robust"`` or ``"residual"``; for images ``"convolution"``, ``"robust"``,
            ``"residual"`` or ``"dense"``, of all pixels (``None``: the first); for signals ``"wavenet"``.

    Cost: O(D) a point, and one evaluation of the network if the noise is learned.

    Raises:
        ValueError: for fewer than 2 levels, or data that are not whole numbers from 0 to n - 1.

    Reference: Ho et al., *Flow++*, ICML 2019 (variational, arXiv 1902.00275); Theis, van den Oord and Bethge, ICLR
    2016 (the bound, arXiv 1511.01844).

    >>> import torch, pyro_flows as pf
    >>> dequantize = pf.transforms.Dequantize(3, levels=4)
    >>> y, log_q = dequantize(torch.tensor([[0, 1, 3]]))
    >>> dequantize.levels_of(y).tolist(), log_q.exp().round().tolist()
    ([[0, 1, 3]], [64.0])
    """

    _like: Tensor

    def __init__(
        self,
        dim: int | Sequence[int],
        *,
        levels: int = 256,
        variational: bool = False,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
        network: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = checks.size("dim", dim)
        self.levels = checks.integer("levels", levels, 2)
        shape = (self.dim,) if isinstance(self.dim, int) else self.dim
        self._axes = tuple(range(-len(shape), 0))
        make = partial(conditioner, hidden=hidden, activation=activation, network=network, axes=len(shape))
        self.conditioner = make(shape[0], 0, 2 * shape[0]) if variational else None
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def forward(self, data: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return y in [0, 1), of the module's dtype, and ``log q(y|k)``, a number for each event."""
        level = self._read(data)
        uniform = torch.rand(level.shape, generator=generator, dtype=level.dtype, device=level.device)
        noise, log_q = (uniform, level.new_zeros(())) if self.conditioner is None else self._learned(level, uniform)
        below = 1.0 - 2.0 * torch.finfo(level.dtype).eps  # rounding must not lift y to the next level
        top = (level + 1.0) * below / self.levels
        total = (log_q + math.log(self.levels)).expand(level.shape).sum(self._axes)
        return torch.minimum((level + noise) / self.levels, top), total

    def levels_of(self, y: Tensor) -> Tensor:
        """Return the whole numbers that ``y`` came from, as int64; draws of a flow beyond [0, 1] go to the ends."""
        return (y * self.levels).floor().clamp(0, self.levels - 1).long()

    def _read(self, data: Tensor) -> Tensor:
        checks.event("Dequantize", data, self.dim)
        level = data.to(self._like)
        if not bool(((level >= 0) & (level < self.levels) & (level == level.floor())).all()):
            raise ValueError(f"data: expected whole numbers from 0 to {self.levels - 1}.")
        return level

    def _learned(self, level: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return the learned noise and its log density, elementwise."""
        assert self.conditioner is not None
        raw = self.conditioner((2.0 * level + 1.0) / self.levels - 1.0, None)
        shift, log_scale = raw.chunk(2, dim=self._axes[0])
        log_scale = bounded(log_scale, 4.0)
        smallest = torch.finfo(uniform.dtype).eps
        standard = torch.logit(uniform.clamp(smallest, 1.0 - smallest))
        noise = shift + log_scale.exp() * standard
        return torch.sigmoid(noise), _log_slope(standard) - log_scale - _log_slope(noise)


def _log_slope(x: Tensor) -> Tensor:
    """Return the log of the slope of the sigmoid, which is the log density of a logistic variable."""
    return logsigmoid(x) + logsigmoid(-x)
