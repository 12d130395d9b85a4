"""Affine maps: NICE's scaling, diagonal and triangular."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection, Scored
from pyro_flows.transforms.conditioners import conditioner
from pyro_flows.transforms.networks import Free, State, adopt_buffer


@checks.constructor
class DiagonalAffine(Bijection):
    r"""Affine map relative to its start, of which a shift and a scale of each coordinate are trained.

    .. math:: y = m + L\,(b + e^{s} \odot x), \qquad \log|J| = \sum_d (s_d + \log L_{dd}).

    :math:`m` and :math:`L` (``loc`` and ``scale``) are fixed; b and s are trained from zero, so one step size serves
    coordinates of any unit. L is diagonal, as a rule, and both ways cost O(D). A start with correlations gives it a
    lower triangular matrix, of which nothing is trained; then they cost O(D^2).

    Args:
        dim: number of coordinates.
        loc: m, default zeros. The module follows a floating tensor in dtype and device.
        scale: the diagonal of L, (dim,), or L itself, lower triangular (dim, dim); positive on the diagonal, default
            ones.
        context_dim: width of the context; above 0, a network of it gives b and s.
        hidden: widths of that network.
        activation: its activation.

    Raises:
        ValueError: for a start of the wrong shape, not finite, not lower triangular, or with a diagonal that is not
            positive.

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.DiagonalAffine(2, loc=[1.0, 1.0], scale=[2.0, 4.0])(torch.ones(2)).tolist()
    [3.0, 5.0]
    """

    _shifts = True
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        *,
        loc: Sequence[float] | Tensor | None = None,
        scale: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        context_dim: int = 0,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.context_dim = context_dim
        self.register_buffer("loc", torch.zeros(dim) if loc is None else checks.vector("loc", _start(loc), dim))
        start = torch.ones(dim) if scale is None else _start(scale)
        if start.dim() == 2:
            start = _triangular("scale", start, dim)
        elif not bool((checks.vector("scale", start, dim) > 0).all()):
            raise ValueError(f"scale: expected positive numbers, got {start.tolist()}.")
        self.register_buffer("scale", start)
        out = 2 * dim if self._shifts else dim
        self.conditioner = conditioner(0, context_dim, out, hidden=hidden, activation=activation)
        _follow(self, loc, scale)

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: object, **kwargs: object) -> None:
        found = state_dict.get(f"{prefix}scale")
        if found is not None and found.shape in ((self.dim,), (self.dim, self.dim)):
            adopt_buffer(self, "scale", state_dict, prefix)  # of either shape
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _affine(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shift m + L b, logarithms of the scales that x gets before L, and the log determinant.

        A diagonal L is a part of these scales.
        """
        self._check(x, context)
        free = self.conditioner(None, context)
        shift, log_scale = free.chunk(2, dim=-1) if self._shifts else (None, free)
        whole = self.scale.dim() == 2
        logs = (self.scale.diagonal() if whole else self.scale).log()
        ladj = (log_scale + logs).sum(-1)
        if shift is not None:
            shift = self.loc + (_product(shift, self.scale) if whole else self.scale * shift)
        return self.loc if shift is None else shift, log_scale if whole else log_scale + logs, ladj

    def _forward(self, x: Tensor, shift: Tensor, log_scale: Tensor) -> Tensor:
        if self.scale.dim() == 1:
            return torch.addcmul(shift, x, log_scale.exp())
        return shift + _product(x * log_scale.exp(), self.scale)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, ladj = self._affine(x, context)
        y = self._forward(x, shift, log_scale)
        return y, ladj.expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, ladj = self._affine(y, context)
        x = y - shift if self.scale.dim() == 1 else _solve(y - shift, self.scale)
        x = x * torch.exp(-log_scale)
        return x, -ladj.expand(x.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        shift, log_scale, ladj = self._affine(x, context)
        y = self._forward(x, shift, log_scale)
        with torch.no_grad():
            carried = score * torch.exp(-log_scale)
            carried = carried if self.scale.dim() == 1 else _solve(carried, self.scale, transpose=True)
        return y, ladj.expand(y.shape[:-1]), carried


class Rescale(DiagonalAffine):
    r"""NICE's scaling: :math:`y_d = e^{s_d} x_d`, :math:`\log|J| = \sum_d s_d`; without it NICE preserves volume.

    In NICE's own notation, which maps data to noise, it comes last and is :math:`e^{-s_d}`. Both ways cost O(D).

    Shapes: ``x`` and ``y`` are ``(..., dim)``, ``ladj`` is ``(...)``.

    Args:
        dim: number of coordinates.
        context_dim: width of the context; above 0, a network of it gives s.
        hidden: widths of that network.
        activation: its activation.

    Raises:
        ValueError: for a ``dim`` below 1 or a wrong width.

    Reference: Dinh, Krueger and Bengio, *NICE*, ICLR workshop 2015 (arXiv 1410.8516), section 3.3.

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.Rescale(2)(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    _shifts = False

    def __init__(
        self, dim: int, *, context_dim: int = 0, hidden: Sequence[int] = (32, 32), activation: str = "silu"
    ) -> None:
        super().__init__(dim, context_dim=context_dim, hidden=hidden, activation=activation)


@checks.constructor
class LowerTriangularAffine(Bijection):
    r"""Affine map relative to its start: :math:`y = m + L (b + A x)`, A lower triangular with diagonal :math:`e^{s}`.

    :math:`m` and :math:`L` (``loc`` and ``scale_tril``) are fixed; b, s and the part of A below the diagonal are
    trained from zero, so one step size serves kilometers and millimeters. :math:`\log|J| = \sum_d (s_d + \log L_{dd})`.
    After :meth:`slow`, what is trained below the diagonal is in units of the row's diagonal.
    Forward: one or two products with D x D matrices; inverse: as many triangular solves, O(D^2) a point.

    Args:
        dim: number of coordinates.
        loc: m, default zeros. The module follows a floating tensor in dtype and device.
        scale_tril: L, lower triangular with a positive diagonal, default the identity.
        context_dim: width of the context; above 0, a network of it gives b, s and A.
        hidden: widths of that network.
        activation: its activation.

    Raises:
        ValueError: for a start of the wrong shape, not finite, not lower triangular or without a positive diagonal.

    >>> import torch, pyro_flows as pf
    >>> layer = pf.transforms.LowerTriangularAffine(2, loc=[1.0, 0.0], scale_tril=[[1.0, 0.0], [1.0, 2.0]])
    >>> layer(torch.ones(2)).tolist()
    [2.0, 3.0]
    """

    loc: Tensor
    scale_tril: Tensor
    relative: Tensor | None
    settled = False  # b is zero and A the identity for good
    _below: Tensor
    _rows: Tensor

    def __init__(
        self,
        dim: int,
        *,
        loc: Sequence[float] | Tensor | None = None,
        scale_tril: Sequence[Sequence[float]] | Tensor | None = None,
        context_dim: int = 0,
        hidden: Sequence[int] = (32, 32),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.context_dim = context_dim
        self.register_buffer("loc", torch.zeros(dim) if loc is None else checks.vector("loc", _start(loc), dim))
        start = torch.eye(dim) if scale_tril is None else _start(scale_tril)
        self.register_buffer("scale_tril", _triangular("scale_tril", start, dim))
        rows, columns = torch.tril_indices(dim, dim, -1).unbind()
        self.register_buffer("_below", rows * dim + columns, persistent=False)
        self.register_buffer("_rows", rows, persistent=False)
        self.register_buffer("relative", None)
        below = dim * (dim - 1) // 2
        self.conditioner = conditioner(0, context_dim, 2 * dim + below, hidden=hidden, activation=activation)
        _follow(self, loc, scale_tril)

    @torch.no_grad()
    def slow(self, count: float) -> None:
        """Train what is below the diagonal in units of the row's diagonal, as Pyro's Gaussian guide; the map stays.

        In units of L, entries of a row that has become narrow jitter as far as those of a wide one, and are as slow to
        grow in a row that has become wide. A buffer, ``relative``, goes with the parameters: those that come without it
        are in units of L. A map with a context, whose rows have no one diagonal, is left alone.
        """
        if self.relative is None and not self.context_dim:
            self.relative = torch.ones_like(self.loc[0])
            assert isinstance(self.conditioner, Free)
            _, log_diagonal, below = self._split(self.conditioner.values)
            below.div_(log_diagonal[self._rows].exp())

    @torch.no_grad()
    def settle(self) -> None:
        """Put b and A into m and L, for a map without a context that is trained no more: one product is enough then."""
        if not self.context_dim:
            loc, scale_tril, _ = self._affine(self.loc, None)
            self.loc.copy_(loc)
            self.scale_tril.copy_(scale_tril)
            assert isinstance(self.conditioner, Free)
            self.conditioner.values.zero_()
            self.settled = True

    def _split(self, free: Tensor) -> tuple[Tensor, ...]:
        """Split into b, s and what is below the diagonal."""
        return free.split([self.dim, self.dim, free.shape[-1] - 2 * self.dim], dim=-1)

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: object, **kwargs: object) -> None:
        adopt_buffer(self, "relative", state_dict, prefix)
        self.settled = False
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _affine(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shift m + L b, the matrix L A and its log determinant."""
        shift, matrix, ladj = self._factored(x, context)
        return shift, self.scale_tril @ matrix, ladj

    def _maps(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the shift, the matrix L A or both of them, and the log determinant: L A is costly for few points."""
        if self.settled:
            checks.event("LowerTriangularAffine", x, self.dim)
            return self.loc, [self.scale_tril], self.scale_tril.diagonal().log().sum()
        shift, matrix, ladj = self._factored(x, context)
        few = matrix.dim() == 2 and math.prod(x.shape[:-1]) < self.dim
        return shift, [self.scale_tril, matrix] if few else [self.scale_tril @ matrix], ladj

    def _factored(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shift m + L b, the matrix A and the log determinant of L A."""
        self._check(x, context)
        free = self.conditioner(None, context)
        shift, log_diagonal, below = self._split(free)
        if self.relative is not None:
            below = below * torch.exp(self.relative * log_diagonal.index_select(-1, self._rows))
        matrix = torch.diag_embed(log_diagonal.exp())
        if self.dim > 1:
            flat = below.new_zeros(*below.shape[:-1], self.dim * self.dim)
            flat = flat.scatter(-1, self._below.expand(below.shape), below)
            matrix = matrix + flat.unflatten(-1, (self.dim, self.dim))
        start = self.scale_tril
        ladj = (log_diagonal + start.diagonal().log()).sum(-1)
        return self.loc + (start @ shift.unsqueeze(-1)).squeeze(-1), matrix, ladj

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, maps, ladj = self._maps(x, context)
        y = shift + reduce(_product, reversed(maps), x)
        return y, ladj.expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, maps, ladj = self._maps(y, context)
        x = reduce(_solve, maps, y - shift)
        return x, -ladj.expand(x.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        shift, maps, ladj = self._maps(x, context)
        y = shift + reduce(_product, reversed(maps), x)
        with torch.no_grad():
            carried = reduce(partial(_solve, transpose=True), reversed(maps), score)
        return y, ladj.expand(y.shape[:-1]), carried


def _start(value: object) -> Tensor:
    """Return a copy: a floating tensor as it is, anything else in the default dtype."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone()
    return torch.as_tensor(value, dtype=torch.get_default_dtype()).clone()


def _triangular(name: str, matrix: Tensor, dim: int) -> Tensor:
    if matrix.shape != (dim, dim) or not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name}: expected a finite {dim} x {dim} matrix, got shape {tuple(matrix.shape)}.")
    if not torch.equal(matrix, matrix.tril()) or not bool((matrix.diagonal() > 0).all()):
        raise ValueError(f"{name}: expected a lower triangular matrix with a positive diagonal.")
    return matrix


def _follow(module: Bijection, *starts: object) -> None:
    """Move a module to dtype and device of the first start that is a floating tensor."""
    for value in starts:
        if isinstance(value, Tensor) and value.is_floating_point():
            module.to(value)
            return


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    if matrix.dim() == 2:
        return x @ matrix.mT
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _solve(y: Tensor, matrix: Tensor, transpose: bool = False) -> Tensor:
    """Solve ``matrix x = y`` (or with its transpose) for a lower triangular matrix, or a batch of them."""
    if matrix.dim() == 2:
        rows = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
        # x^T M^T = y^T: M^T is upper triangular and stands on the right
        factor = matrix if transpose else matrix.mT
        return torch.linalg.solve_triangular(factor, rows, upper=not transpose, left=False).reshape(y.shape)
    factor = matrix.mT if transpose else matrix
    return torch.linalg.solve_triangular(factor, y.unsqueeze(-1), upper=transpose).squeeze(-1)
