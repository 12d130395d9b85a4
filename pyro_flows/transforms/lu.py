"""Linear maps of all coordinates, or of the channels of each pixel or time, kept as triangular factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.conditioners import conditioner


@checks.constructor
class LULinear(Bijection):
    r"""Linear map :math:`y = P L U x`: P a permutation, L unit lower, U upper triangular with diagonal :math:`e^{s}`.

    P is fixed. :math:`\log|J| = \sum_d s_d`. L and U start as the identity, so the map starts as P, which is the
    identity without a ``seed``. Both ways cost O(D^2) a point: two products forward, two triangular solves back. A
    matrix that exchanges coordinates is out of reach without a permutation.

    Shapes: ``x`` and ``y`` are ``(..., dim)``, ``ladj`` is ``(...)``.

    Args:
        dim: number of coordinates.
        seed: of the permutation P, a registered buffer; None: no permutation.

    Raises:
        ValueError: for a ``dim`` below 1, or an input of the wrong width.

    Reference: Oliva et al., *Transformation Autoregressive Networks*, ICML 2018 (arXiv 1801.09819).

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.LULinear(3)(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [1.0, 2.0, 3.0]
    """

    permutation: Tensor
    _pixels = 1

    def __init__(self, dim: int, *, seed: int | None = None) -> None:
        super().__init__()
        self.dim: int | tuple[int, ...] = checks.integer("dim", dim, 1)
        self._fill(dim, seed)

    def _fill(self, width: int, seed: int | None) -> None:
        order = torch.arange(width)
        if seed is not None:
            order = torch.randperm(width, generator=torch.Generator().manual_seed(checks.integer("seed", seed, 0)))
        self.register_buffer("permutation", order)
        self.conditioner = conditioner(0, 0, width * width)

    def _factors(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, U and the log-determinant for points like ``x``."""
        self._check(x, context)
        matrix = self.conditioner(None, None).unflatten(0, (len(self.permutation), -1))
        log_diagonal = matrix.diagonal()
        lower = matrix.tril(-1) + torch.ones_like(log_diagonal).diag_embed()
        upper = matrix.triu(1) + log_diagonal.exp().diag_embed()
        return lower, upper, (self._pixels * log_diagonal.sum()).expand(x.shape[: -self.event_dim])

    def _rows(self, x: Tensor) -> Tensor:
        return x

    def _events(self, rows: Tensor) -> Tensor:
        return rows

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self._factors(x, context)
        y = self._rows(x) @ upper.mT @ lower.mT
        return self._events(y.index_select(-1, self.permutation)), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self._factors(y, context)
        rows = self._rows(y).index_select(-1, torch.argsort(self.permutation))
        x = _solve(upper.mT, _solve(lower.mT, rows, upper=True), upper=False)
        return self._events(x), -ladj

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        y, ladj = self.forward_and_ladj(x, context)
        with torch.no_grad():
            lower, upper, _ = self._factors(x, context)
            carried = _solve(lower, _solve(upper, self._rows(score), upper=True), upper=False)
        return y, ladj, self._events(carried.index_select(-1, self.permutation))


@checks.constructor
class Conv1x1(LULinear):
    r"""Glow's convolution: :class:`LULinear` of the channels of each pixel, :math:`\log|J| = H W \sum_c s_c`.

    It mixes channels between couplings that keep some of them. Both ways cost O(C^2) a pixel.

    Args:
        dim: the shape (C, T) of a signal or (C, H, W) of an image.
        seed: of the permutation of channels; None: no permutation.

    Raises:
        ValueError: for a ``dim`` that is no such shape, or an input of another shape.

    Reference: Kingma and Dhariwal, *Glow*, NeurIPS 2018 (arXiv 1807.03039), section 3.2.

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.Conv1x1((4, 2, 2), seed=1)(torch.zeros(5, 4, 2, 2)).shape
    torch.Size([5, 4, 2, 2])
    """

    def __init__(self, dim: Sequence[int], *, seed: int | None = None) -> None:
        Bijection.__init__(self)
        channels, *sides = self.dim = checks.grid("dim", dim)
        self.event_dim = len(self.dim)
        self._pixels = math.prod(sides)
        self._fill(channels, seed)

    def _rows(self, x: Tensor) -> Tensor:
        return x.movedim(-self.event_dim, -1)

    def _events(self, rows: Tensor) -> Tensor:
        return rows.movedim(-1, -self.event_dim).contiguous()


def _solve(factor: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
    """Return the rows r of r @ factor = rows for a triangular factor."""
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    return torch.linalg.solve_triangular(factor, flat, upper=upper, left=False).reshape(rows.shape)
