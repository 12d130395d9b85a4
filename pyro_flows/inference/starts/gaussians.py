"""Normal distributions: a start, and covariances in compact form, a scale for each coordinate and a few directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity

CLOSE = 12.0  # nats of ELBO between starts, or of evidence between modes, of which none is left out


@dataclass(frozen=True)
class Start:
    """An affine map z = loc + scale eps: ``scale`` is (D,) or lower triangular (D, D); ``elbo`` in nats, robust.

    ``evidence`` is Laplace's estimate of the log mass around ``loc``, for starts at a mode with full curvature.
    """

    name: str
    loc: Tensor
    scale: Tensor
    elbo: float = -math.inf
    evidence: float | None = None

    @property
    def volume(self) -> float:
        return float((self.scale if self.scale.dim() == 1 else self.scale.diagonal()).log().sum())

    @property
    def root(self) -> Tensor:
        """The scale as a matrix (D, D)."""
        return self.scale if self.scale.dim() == 2 else self.scale.diag()

    @property
    def sds(self) -> Tensor:
        """The standard deviations (D,)."""
        return self.scale.norm(dim=1) if self.scale.dim() == 2 else self.scale

    def map(self, noise: Tensor) -> Tensor:
        return self.loc + (self.scale * noise if self.scale.dim() == 1 else noise @ self.scale.mT)


def standard(density: LogDensity) -> Start:
    """Return the start that needs no work: zero, with unit scales."""
    zero = torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    return Start("standard", zero, torch.ones_like(zero))


def divergence(one: Start, other: Start) -> float:
    """KL(one || other) of the two Gaussians."""
    away = one.loc - other.loc
    if one.scale.dim() == other.scale.dim() == 1:
        ratio, away = one.scale / other.scale, away / other.scale
        log_ratio = ratio.log().sum()
    else:
        ratio, away = (torch.linalg.solve_triangular(other.root, x, upper=False) for x in (one.root, away[:, None]))
        log_ratio = ratio.diagonal().log().sum()
    return float(0.5 * (ratio.square().sum() + away.square().sum() - len(one.loc)) - log_ratio)


class Gaussians(NamedTuple):
    r"""K normal distributions: the images of standard normal noise under

    .. math:: \epsilon \mapsto m + U R\, (I + Q (C - I) Q^\top)\, \epsilon.

    m = ``loc`` (K, D); U = ``units``, lower triangular (K, D, D) or a diagonal (K, D); R = ``root``, a diagonal (K, D);
    Q = ``basis`` (K, D, M) has orthonormal columns; C = ``factor`` (K, M, M) is lower triangular.

    >>> import torch
    >>> one = torch.ones(1, 2)
    >>> wide = Gaussians(0 * one, one, 3 * one, torch.eye(2)[None], torch.eye(2)[None])
    >>> z, log_q = wide.map(torch.ones(5, 2))
    >>> z.shape, torch.allclose(log_q, wide.log_prob(z[0]))
    (torch.Size([1, 5, 2]), True)
    """

    loc: Tensor
    units: Tensor
    root: Tensor
    basis: Tensor
    factor: Tensor

    @classmethod
    def of(cls, loc: Tensor, units: Tensor) -> Gaussians:
        """Return the images of noise under scales that are lower triangular (K, D, D) or a diagonal (K, D)."""
        none = torch.zeros_like(loc[..., None])
        return cls(loc, units, torch.ones_like(loc), none, torch.ones_like(none[:, :1]))

    def some(self, rows: Tensor | slice | Sequence[int]) -> Gaussians:
        return Gaussians(*(part[rows] for part in self))

    def map(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (K, S, D) of noise (S, D) or (K, S, D), and their log densities (K, S)."""
        inner = noise @ self.basis
        turned = noise + (inner @ self.factor.mT - inner) @ self.basis.mT
        z = self.loc[:, None] + stretch(self.units, self.root[:, None] * turned)
        return z, -0.5 * noise.square().sum(-1) - self._log_scale()

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log densities (K, S) of points (S, D)."""
        away = z - self.loc[:, None]
        if self.units.dim() == 2:
            x = away / self.units[:, None]
        else:
            x = torch.linalg.solve_triangular(self.units, away.mT, upper=False).mT
        x = x / self.root[:, None]
        inner = x @ self.basis
        back = torch.linalg.solve_triangular(self.factor, inner.mT, upper=False).mT
        squares = x.square().sum(-1) - inner.square().sum(-1) + back.square().sum(-1)
        return -0.5 * squares - self._log_scale()

    def pull(self, gradient: Tensor) -> Tensor:
        """Return gradients (K, S, D) with respect to the noise, from those with respect to the images."""
        units = self.units.mT if self.units.dim() == 3 else self.units
        scaled = self.root[:, None] * stretch(units, gradient)
        inner = scaled @ self.basis
        return scaled + (inner @ self.factor - inner) @ self.basis.mT

    def _log_scale(self) -> Tensor:
        diagonals = torch.cat([_diagonal(self.units), self.root, _diagonal(self.factor)], -1)
        return diagonals.log().sum(-1, keepdim=True) + 0.5 * self.loc.shape[-1] * math.log(2.0 * math.pi)

    def scale(self) -> Tensor:
        r"""Return W (K, D, D) with :math:`W W^\top` the covariances; a diagonal (K, D) where units are diagonal.

        That diagonal is the one of best ELBO: the standard deviation of each coordinate given all others.
        """
        if self.units.dim() == 3:
            return self.matrix()
        inverse = torch.linalg.solve_triangular(self.factor, identity_like(self.factor), upper=False)
        within = (self.basis @ inverse.mT).square().sum(-1) - self.basis.square().sum(-1)
        return self.units * self.root * (1.0 + within).rsqrt()

    def matrix(self) -> Tensor:
        r"""Return W (K, D, D) with :math:`W W^\top` the covariances, whatever units are. Cost: O(D^2 M)."""
        turn = self.basis @ (self.factor - identity_like(self.factor)) @ self.basis.mT
        return stretch(self.units, self.root[:, None] * (identity_like(turn) + turn).mT).mT


def compact(alpha: Tensor, steps: Tensor, changes: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return basis Q and factor C (see :class:`Gaussians`) of the inverse Hessians that L-BFGS has built up.

    .. math:: H = \operatorname{diag}(\alpha) + B\, \Gamma B^\top
                = R\,(I + Q (C C^\top - I) Q^\top) R, \qquad R = \operatorname{diag}(\alpha)^{1/2}

    is the recursion :math:`H \leftarrow (I - s y^\top) H (I - y s^\top) + s s^\top` over the history of ``steps`` s and
    ``changes`` y (K, J, D) of the gradient, from :math:`\operatorname{diag}(\alpha)`, with :math:`s^\top y = 1`. Empty
    places of the history are zero. Where rounding has eaten up the factor, it is the identity. Cost: O(D J^2).

    References: Byrd, Nocedal and Schnabel 1994; Zhang et al. 2022.
    """
    dtype, root = alpha.dtype, alpha.double().sqrt()[:, None]
    steps, changes, identity, inverse = _history(steps, changes)
    corner = inverse.mT @ (identity + (changes * root) @ (changes * root).mT) @ inverse
    middle = torch.cat([torch.cat([torch.zeros_like(corner), -inverse], -1), torch.cat([-inverse.mT, corner], -1)], -2)
    basis, upper = torch.linalg.qr(torch.cat([changes * root, steps / root], 1).mT)
    inner = upper @ middle @ upper.mT
    inner = 0.5 * (inner + inner.mT) + identity_like(inner)
    factor, fault = torch.linalg.cholesky_ex(inner)
    factor = choose(fault == 0, factor, identity_like(factor))
    return basis.to(dtype), factor.to(dtype)


def newton_step(alpha: Tensor, steps: Tensor, changes: Tensor, gradient: Tensor) -> Tensor:
    r"""Return H g (K, D) of the matrices of :func:`compact`, without a factor of them; diag(alpha) g where that falls.

    .. math:: H = \operatorname{diag}(\alpha) + [\alpha Y\ S] \begin{pmatrix} 0 & -R^{-1} \\
        -R^{-\top} & R^{-\top}(I + Y^\top \alpha Y) R^{-1} \end{pmatrix} [\alpha Y\ S]^\top

    with R the upper triangle of :math:`S^\top Y`, whose diagonal is 1. Cost: O(D J^2).
    """
    x, scale = gradient.double()[..., None], alpha.double()[..., None]
    steps, changes, _, inverse = _history(steps, changes)
    along = inverse @ (steps @ x)
    back = inverse.mT @ (along + changes @ (scale * (changes.mT @ along - x)))
    found = (scale * (x - changes.mT @ along) + steps.mT @ back)[..., 0]
    plain = scale[..., 0] * x[..., 0]
    rises = (found * x[..., 0]).sum(-1) > 0.0
    return choose(rises & torch.isfinite(found).all(-1), found, plain).to(gradient.dtype)


def _history(steps: Tensor, changes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Return steps and changes in double precision, the identity (J, J), and the inverse of R (K, J, J)."""
    steps, changes = steps.double(), changes.double()
    identity = torch.eye(steps.shape[1], dtype=steps.dtype, device=steps.device)
    upper = (steps @ changes.mT).triu(1) + identity
    return steps, changes, identity, torch.linalg.solve_triangular(upper, identity, upper=True)


def diagonal_update(alpha: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Fit the diagonal (K, D) of an inverse Hessian to one more step (K, D), with step times change 1.

    Reference: Gilbert and Lemaréchal 1989.
    """
    a = (alpha * change.square()).sum(-1, keepdim=True)
    c = (step.square() / alpha).sum(-1, keepdim=True)
    inverse = a / alpha * (1.0 - step.square() / (alpha * c)) + change.square()
    return inverse.clamp_min(torch.finfo(alpha.dtype).tiny).reciprocal()


def stretch(units: Tensor, x: Tensor) -> Tensor:
    """Multiply the rows of x (K, S, D) by matrices (K, D, D) or diagonals (K, D)."""
    return units[:, None] * x if units.dim() == 2 else x @ units.mT


def _diagonal(units: Tensor) -> Tensor:
    return units if units.dim() == 2 else units.diagonal(dim1=-2, dim2=-1)


def choose(mask: Tensor, ours: Tensor, theirs: Tensor | float) -> Tensor:
    """Return ``ours`` (K, ...) where the mask (K,) is set, ``theirs`` elsewhere."""
    return torch.where(mask.reshape(-1, *[1] * (ours.dim() - 1)), ours, theirs)


def identity_like(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
