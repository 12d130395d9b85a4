r"""Non-centered coordinates: a site's location and scale taken out, where they depend on other latents.

The coordinate u of an unconstrained value y with prior location m and scale s is (y - m) / s. What the data say about y
is taken out as well. With a precision t and a center c, as if c had been observed with variance 1 / t,

.. math:: y = m' + s' u, \qquad s'^{-2} = s^{-2} + t, \qquad m' = s'^2\,(m / s^2 + t\,c).

Given location and scale, u is then about standard normal, whatever they are. It is non-centered in the neck of a
funnel, where s is small, and centered where s is large. t = 0 is non-centered everywhere. For a multivariate normal
with covariance :math:`\Sigma = L L^\top` and precisions T (a diagonal), likewise
:math:`\Sigma'^{-1} = \Sigma^{-1} + T`.

In the neck of a funnel s may be smaller than what y is rounded by: (y - m) / s has no digit left there, as if any u had
the density of its mode. So the prior's density is computed from u, see :func:`exact`.

This is the degree of centering of Gorinova, Moore and Hoffman 2020, "Automatic Reparameterisation of Probabilistic
Programs" (arXiv 1906.03028), made a function of the scale.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_flows.model.supports import WRAPPERS, family

Fn = TypeVar("Fn", bound=Distribution)
ELEMENTWISE = (dist.Normal, dist.StudentT, dist.Laplace, dist.Cauchy, dist.Logistic, dist.Gumbel, dist.LogNormal)


def location_scale(fn: Distribution) -> tuple[Tensor, Tensor] | None:
    """Return location and scale of a location-scale distribution on the unconstrained scale, or None for any other.

    The scale has the location's shape, or is a lower triangular matrix over the last axis (multivariate normal).
    """
    fn = family(fn)
    if isinstance(fn, ELEMENTWISE):
        return torch.broadcast_tensors(fn.loc, fn.scale)
    return (fn.loc, fn.scale_tril) if isinstance(fn, dist.MultivariateNormal) else None


@dataclass(frozen=True)
class Information:
    """What the data say of a site's unconstrained value: precisions and centers, each of its shape."""

    precision: Tensor
    center: Tensor

    @property
    def options(self) -> dict[str, Tensor]:
        """The same as :class:`LogDensity` takes it."""
        return {"precision": self.precision, "center": self.center}


class Spread(NamedTuple):
    """An unconstrained value y, the log determinant of each event, and (y - m) / s."""

    value: Tensor
    ladj: Tensor
    residual: Tensor


def spread(fn: Distribution, x: Tensor, data: Information | None) -> Spread:
    """Return the unconstrained value of coordinates ``x``."""
    own = _normal(fn, x, data)
    x = x.to(own.root.dtype)
    value = own.middle + _times(own.root, x, own.middle)
    residual = x if own.prior is None else _times(own.prior[0], x, own.middle) + own.prior[1]
    ladj, axes = own.log_diagonal.expand(value.shape), len(fn.event_shape)
    return Spread(value, ladj.flatten(-axes).sum(-1) if axes else ladj, residual)


def standardize(fn: Distribution, y: Tensor, data: Information | None) -> Tensor:
    """Return the coordinates of an unconstrained value ``y``: the inverse of :func:`spread`."""
    middle, root, *_ = _normal(fn, y, data)
    if root.dim() > middle.dim():
        return torch.linalg.solve(root, (y - middle).unsqueeze(-1)).squeeze(-1)
    return (y - middle) / root


class _Normal(NamedTuple):
    """Location and scale of y (a matrix for a multivariate normal), and the logarithms of the scale's diagonal.

    (y - m) / s is a scale times the coordinates, plus a shift: both are ``prior``; None, if it is the coordinates.
    """

    middle: Tensor
    root: Tensor
    log_diagonal: Tensor
    prior: tuple[Tensor, Tensor] | None


def _normal(fn: Distribution, like: Tensor, data: Information | None) -> _Normal:
    """Return location and scale of y.

    They have the highest precision of their own, of values ``like`` and of data: products of matrices mix none.
    """
    parts = [*_parts(fn), like, *([] if data is None else [data.precision])]
    precise = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    loc, scale = (part.to(precise) for part in parts[:2])
    wide = scale.dim() > loc.dim()
    log_diagonal = (scale.diagonal(dim1=-2, dim2=-1) if wide else scale).log()
    if data is None:
        return _Normal(loc, scale, log_diagonal, None)
    away = data.precision * (data.center - loc)
    if not wide:
        share = 1.0 / (1.0 + data.precision * scale.square())  # of the prior, in the location
        root, shift = share.sqrt(), share * scale * away
        return _Normal(loc + scale * shift, scale * root, log_diagonal + 0.5 * share.log(), (root, shift))
    # 1. With A = I + L' T L = R R', the covariance is L A^-1 L', and L R'^-1 is a root of it.
    identity = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
    inner = torch.linalg.cholesky_ex(identity + scale.mT @ (data.precision.unsqueeze(-1) * scale)).L
    share = torch.linalg.solve_triangular(inner, identity, upper=False).mT
    root = scale @ share
    # 2. The center pulls the location by the covariance times T (c - m).
    shift = _times(share, _times(root.mT, away, away), away)
    log_diagonal = log_diagonal - inner.diagonal(dim1=-2, dim2=-1).log()
    return _Normal(loc + _times(scale, shift, loc), root, log_diagonal, (share, shift))


def _times(scale: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Multiply ``x`` by a scale of the shape of ``like``, or by a matrix over its last axis."""
    return (scale @ x.unsqueeze(-1)).squeeze(-1) if scale.dim() > like.dim() else scale * x


def exact(fn: Fn, value: Tensor, at: Spread) -> Fn:
    """Return ``fn``, whose log density at this very ``value`` is computed from its coordinates."""
    if not isinstance(fn, WRAPPERS) and type(fn) not in EXACT:  # a class of the model's own may have any density
        return fn
    new = copy.copy(fn)
    if isinstance(fn, WRAPPERS):
        vars(new)["base_dist"] = exact(fn.base_dist, value, at)
    else:
        new.__class__ = cast(type[Fn], EXACT[type(fn)])
        vars(new)["_placed"] = value, at
    return new


def _exactly(kind: type[Distribution]) -> type[Distribution]:
    """Return the subclass of distributions that know their density at one value."""

    class Exactly(kind):  # type: ignore[misc, valid-type]
        _placed: tuple[Tensor, Spread]

        def log_prob(self, value: Tensor) -> Tensor:
            known, found = self._placed
            return _log_prob(self, found) if value is known else super().log_prob(value)

    return Exactly


EXACT = {kind: _exactly(kind) for kind in (*ELEMENTWISE, dist.MultivariateNormal)}


def _log_prob(fn: Distribution, at: Spread) -> Tensor:
    _, scale = _parts(fn)
    if isinstance(fn, dist.MultivariateNormal):
        log_scale = scale.diagonal(dim1=-2, dim2=-1).log()
        return (_standard(dist.Normal(0.0, 1.0), at.residual) - log_scale).sum(-1)
    if isinstance(fn, dist.LogNormal):
        return _standard(fn.base_dist, at.residual) - scale.log() - at.value
    return _standard(fn, at.residual) - scale.log()


def _standard(fn: Distribution, residual: Tensor) -> Tensor:
    """Return the log density that a distribution has with location 0 and scale 1."""
    fn = copy.copy(fn)
    vars(fn).update(loc=residual.new_zeros(()), scale=residual.new_ones(()))
    return fn.log_prob(residual)  # whose value is another one


def moves(first: Distribution, second: Distribution) -> bool:
    """Whether location or scale of a site differ between two runs."""
    before, after = location_scale(first), location_scale(second)
    if before is None or after is None:
        return False
    return any(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _parts(fn: Distribution) -> tuple[Tensor, Tensor]:
    parts = location_scale(fn)
    assert parts is not None  # sites are chosen by ``moves``
    return parts
