"""Layers that standardize: by trained numbers that start from data, or by the statistics of each batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.conditioners import conditioner


class _Standardizing(Bijection):
    """Shapes of a shift and a log scale for each coordinate, or for each channel of a signal or an image."""

    def __init__(self, dim: int | Sequence[int]) -> None:
        super().__init__()
        self.dim = checks.size("dim", dim)
        shape = (self.dim,) if isinstance(self.dim, int) else self.dim
        self.event_dim = len(shape)
        self._width, self._ones = shape[0], (1,) * (len(shape) - 1)
        self._pixels = math.prod(shape[1:])
        self.conditioner = conditioner(0, 0, 2 * self._width)

    def _spread(self, values: Tensor) -> Tensor:
        """Give numbers for channels the axes of a signal or an image."""
        return values.reshape(self._width, *self._ones)

    def _ladj(self, log_scale: Tensor, x: Tensor) -> Tensor:
        return (self._pixels * log_scale.sum()).expand(x.shape[: -self.event_dim])

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Return shift and log scale of the map from x to y."""
        raise NotImplementedError

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, context)
        return self._do(x, *self._affine())

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y, context)
        return self._undo(y, *self._affine())

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        self._check(x, context)
        shift, log_scale = self._affine()
        return *self._do(x, shift, log_scale), score * self._spread(torch.exp(-log_scale.detach()))

    def _do(self, x: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self._spread(shift), x, self._spread(log_scale.exp())), self._ladj(log_scale, x)

    def _undo(self, y: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self._spread(shift)) * self._spread(torch.exp(-log_scale)), -self._ladj(log_scale, y)

    def _moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of a batch, for each coordinate or channel."""
        flat = y.movedim(-self.event_dim, -1).reshape(-1, self._width)
        if len(flat) < 2:
            raise ValueError(f"{type(self).__name__}: expected a batch of at least 2 points, got {tuple(y.shape)}.")
        mean = flat.mean(0)
        return mean, (flat - mean).square().mean(0)


@checks.constructor
class ActNorm(_Standardizing):
    r"""Scale and shift of each coordinate, or channel of an image: :math:`y = m + \ell \odot (b + e^{s} \odot x)`.

    It starts as the identity: m = 0, :math:`\ell` = 1. An explicit :meth:`start_from` sets m and :math:`\ell`, which
    are fixed, to mean and standard deviation of a batch of data, and b and s, which are trained, to zero; then the data
    have mean 0 and variance 1 on the side of x. :math:`\log|J| = H W \sum_c (s_c + \log \ell_c)`, without H W for
    vectors. Both ways cost O(D).

    Args:
        dim: number of coordinates, or the shape (C, T) of a signal or (C, H, W) of an image.

    Raises:
        ValueError: for a ``dim`` below 1, a wrong shape, or data with fewer than two points or with values that are not
            finite.

    Reference: Kingma and Dhariwal, *Glow*, NeurIPS 2018 (arXiv 1807.03039).

    >>> import torch, pyro_flows as pf
    >>> layer = pf.transforms.ActNorm(2)
    >>> layer.start_from(torch.tensor([[1.0, 10.0], [3.0, 50.0]])).round(decimals=3).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, dim: int | Sequence[int]) -> None:
        super().__init__(dim)
        self.register_buffer("loc", torch.zeros(self._width))
        self.register_buffer("scale", torch.ones(self._width))

    @torch.no_grad()
    def start_from(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Set the start to mean and standard deviation of a batch; what does not vary keeps the scale 1.

        Raises:
            ValueError: for data with values that are not finite.
        """
        self._check(y, context)
        mean, variance = self._moments(y)
        if not bool(torch.isfinite(variance).all()):
            raise ValueError("y: expected finite data, got NaN or infinite values.")
        self.loc.copy_(mean)
        self.scale.copy_(torch.where(variance > 0, variance.sqrt(), 1.0))
        for parameter in self.parameters():
            parameter.zero_()
        return self.inverse_and_ladj(y)[0]

    def _affine(self) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.conditioner(None, None).chunk(2)
        return self.loc + self.scale * shift, log_scale + self.scale.log()


@checks.constructor
class BatchNorm(_Standardizing):
    r"""Batch normalization, in the direction of the density: :math:`x = b + e^{s} \odot (y - \mu) / \sqrt{v}`.

    :math:`\mu` and v are mean and variance (and a small number more) of each coordinate, or of each channel of an
    image. **In train mode** those of the batch at hand (as in Real-NVP, the log-determinant takes them as given), which
    also moves the running averages: the one thing in this package that a pass leaves on a module. The direction
    of sampling is refused, since a draw has no batch of data. **In eval mode** those of the running averages; then it
    is a fixed map, both ways.

    :math:`\log|J| = H W \sum_c (\tfrac12 \log v_c - s_c)`, without H W for vectors. Both ways cost O(D). It
    starts as the identity in eval mode.

    Args:
        dim: number of coordinates, or the shape (C, T) of a signal or (C, H, W) of an image.
        momentum: share of a batch in the running averages.
        epsilon: what is added to the variance.

    Raises:
        ValueError: for a ``dim`` below 1, a momentum outside of (0, 1], an epsilon that is not positive, a wrong shape,
            or fewer than two points in train mode.
        RuntimeError: for the direction of sampling in train mode.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, ICLR 2017
    (arXiv 1605.08803), appendix E.

    >>> import torch, pyro_flows as pf
    >>> layer = pf.transforms.BatchNorm(2)
    >>> layer.inverse_and_ladj(torch.tensor([[1.0, 10.0], [3.0, 50.0]]))[0].round(decimals=3).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> layer.eval()(torch.zeros(2)).shape
    torch.Size([2])
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, dim: int | Sequence[int], *, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        super().__init__(dim)
        self.momentum, self.epsilon = checks.positive("momentum", momentum), checks.positive("epsilon", epsilon)
        if self.momentum > 1.0:
            raise ValueError(f"momentum: expected a number in (0, 1], got {momentum!r}.")
        self.register_buffer("running_mean", torch.zeros(self._width))
        self.register_buffer("running_variance", torch.ones(self._width))

    def _affine(self) -> tuple[Tensor, Tensor]:
        return self._affine_of(self.running_mean, self.running_variance)

    def _affine_of(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the affine map from x to y: :math:`\mu - b\,e^{-s} \sqrt{v}` and :math:`\log(e^{-s} \sqrt{v})`."""
        shift, log_scale = self.conditioner(None, None).chunk(2)
        log_scale = 0.5 * torch.log(variance) - log_scale
        return mean - shift * log_scale.exp(), log_scale

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._refuse_training()
        return super().forward_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().inverse_and_ladj(y, context)
        self._check(y, context)
        mean, variance = self._moments(y)
        variance = variance + self.epsilon
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_variance.lerp_(variance, self.momentum)
        return self._undo(y, *self._affine_of(mean, variance))

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        self._refuse_training()
        return super().forward_and_score(x, score, context)

    def _refuse_training(self) -> None:
        if self.training:
            raise RuntimeError(
                "BatchNorm: sampling in train mode would need the statistics of a batch of data. "
                "Call eval() on the flow first."
            )
