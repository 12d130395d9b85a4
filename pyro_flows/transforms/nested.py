"""A few coordinates by a map of their own, and all others by a normal distribution whose precision depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection
from pyro_flows.transforms.sliced import in_pieces

NUMBERS = 2**19  # of matrices that are worked on together


class Terms(NamedTuple):
    r"""T functions of k numbers :math:`\theta`, each a product over the numbers, with :math:`u = \theta - c`:

    .. math:: f_t(\theta) = \prod_j e^{r_{tj} u_j}\, (u_j / s_j)^{p_{tj}}\, \sigma(\theta_j)^{q_{tj}}

    ``center`` c and ``scale`` s (k,); ``rates`` r, ``powers`` p and ``shares`` q (T, k). :math:`\sigma` is the
    logistic function.
    """

    center: Tensor
    scale: Tensor
    rates: Tensor
    powers: Tensor
    shares: Tensor

    def at(self, theta: Tensor) -> Tensor:
        """Return the functions (..., T) at numbers (..., k)."""
        away = theta - self.center
        found = (away @ self.rates.mT).exp()
        for number in range(theta.shape[-1]):
            one = away[..., number, None] / self.scale[number]
            share = torch.sigmoid(theta[..., number, None])
            found = found * one.pow(self.powers[:, number]) * share.pow(self.shares[:, number])
        return found


class Nested(Bijection):
    r"""Map the k held coordinates by ``outer``, and all others by a normal distribution given what comes of these:
    :math:`\theta = g(x_S)`, :math:`z_I = b + H(\theta)^{-1} h(\theta) + R(\theta)^{-\top} x_I`, :math:`R R^\top = H`.

    Every entry of the precision H and of the vector h is a sum of the same functions of :math:`\theta`, with
    coefficients of its own (:class:`Terms`). R is the lower triangular root. Where H is not positive definite, the
    identity and zero stand in for H and h. Both ways cost O(D^3) a point, in double precision, and

    .. math:: \log|J| = \log|J_g| - \sum_i \log R_{ii}(\theta).

    Args:
        dim: number of coordinates D.
        held: the k of them that are mapped by ``outer``, rising.
        outer: a map of k coordinates.
        terms: number T of functions.
        entries: number E of entries of the lower half of H that are not always zero.

    Shapes: ``coefficients`` (T, E + D - k), for these entries, then h; ``rows`` and ``columns`` (E,) of the entries;
    ``order`` (D - k,), which coordinate each row of H stands for; ``base`` b (D - k,).

    Reference: Rue, Martino and Chopin 2009, doi:10.1111/j.1467-9868.2008.00700.x (the conditional is normal here).

    >>> import torch
    >>> from pyro_flows.transforms import DiagonalAffine
    >>> from pyro_flows.transforms.nested import Nested
    >>> Nested(3, held=(1,), outer=DiagonalAffine(1), terms=1, entries=2)(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [1.0, 2.0, 3.0]
    """

    center: Tensor
    scale: Tensor
    rates: Tensor
    powers: Tensor
    shares: Tensor
    coefficients: Tensor
    rows: Tensor
    columns: Tensor
    order: Tensor
    base: Tensor

    def __init__(self, dim: int, *, held: Sequence[int], outer: Bijection, terms: int, entries: int) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 2)
        self.held = sorted({checks.integer("held", number, 0, dim - 1) for number in held})
        self.outer = outer
        few, many = len(self.held), dim - len(self.held)
        checks.integer("terms", terms, 1)
        checks.integer("entries", entries, many)
        like = torch.zeros(())
        diagonal = torch.arange(entries).clamp_max(many - 1)
        start = like.new_zeros(terms, entries + many)
        start[0, :many] = 1.0
        self.register_buffer("center", like.new_zeros(few))
        self.register_buffer("scale", like.new_ones(few))
        for name in ("rates", "powers", "shares"):
            self.register_buffer(name, like.new_zeros(terms, few))
        self.register_buffer("coefficients", start)
        self.register_buffer("rows", diagonal)
        self.register_buffer("columns", diagonal.clone())
        self.register_buffer("order", torch.tensor([number for number in range(dim) if number not in self.held]))
        self.register_buffer("base", like.new_zeros(many))

    @torch.no_grad()
    def set(
        self, terms: Terms, coefficients: Tensor, entries: tuple[Tensor, Tensor], order: Tensor, base: Tensor
    ) -> Nested:  # fmt: skip
        """Take functions, coefficients (T, E + D - k), rows and columns (E,), order and base (D - k,). Returns it."""
        for name, value in zip(Terms._fields, terms, strict=True):
            getattr(self, name).copy_(value)
        self.coefficients.copy_(coefficients)
        self.rows.copy_(entries[0])
        self.columns.copy_(entries[1])
        self.order.copy_(order)
        self.base.copy_(base)
        return self

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.event("Nested", x, self.dim)
        return in_pieces(self._out, x, self._at_once)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.event("Nested", y, self.dim)
        return in_pieces(self._back, y, self._at_once)

    @property
    def _at_once(self) -> int:
        return max(1, NUMBERS // len(self.order) ** 2)

    def _out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        theta, ladj = self.outer.forward_and_ladj(x[..., self.held])
        root, pull = self._normal(theta.double())
        noise = pull + x[..., self.order].double()
        away = torch.linalg.solve_triangular(root.mT, noise[..., None], upper=True)[..., 0]
        return self._joined(theta, self.base + away), ladj - _log_size(root).to(ladj)

    def _back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        theta = y[..., self.held]
        root, pull = self._normal(theta.double())
        x, ladj = self.outer.inverse_and_ladj(theta)
        away = y[..., self.order].double() - self.base
        noise = (root.mT @ away[..., None])[..., 0] - pull
        return self._joined(x, noise), ladj + _log_size(root).to(ladj)

    def _joined(self, held: Tensor, others: Tensor) -> Tensor:
        """Return points (..., D) of k coordinates and all others, in the dtype of the first."""
        places = torch.cat([torch.tensor(self.held, device=held.device), self.order]).argsort()
        return torch.cat([held, others.to(held)], -1)[..., places]

    def _normal(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return R (..., D - k, D - k), and the mean less b in its units (..., D - k)."""
        terms = Terms(*(getattr(self, name).double() for name in Terms._fields))
        found = terms.at(theta) @ self.coefficients.double()
        size, many = len(self.rows), len(self.order)
        lower = found.new_zeros(*found.shape[:-1], many * many)
        lower = lower.index_copy(-1, self.rows * many + self.columns, found[..., :size]).unflatten(-1, (many, many))
        identity = torch.eye(many, dtype=lower.dtype, device=lower.device)
        with torch.no_grad():
            root, lost = torch.linalg.cholesky_ex(lower)
            fault = (lost != 0) | ~torch.isfinite(found).all(-1)
        if torch.is_grad_enabled():  # of both halves: else each entry off the diagonal gets half of its gradient
            whole = lower + lower.tril(-1).mT  # and that of what has no root would be NaN at all points
            root = torch.linalg.cholesky_ex(torch.where(fault[..., None, None], identity, whole))[0]
        else:
            root = torch.where(fault[..., None, None], identity, root)
        pull = torch.where(fault[..., None], 0.0, found[..., size:])
        return root, torch.linalg.solve_triangular(root, pull[..., None], upper=False)[..., 0]


def _log_size(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
