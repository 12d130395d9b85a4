"""Bijections from real numbers onto the supports of distributions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
from pyro.distributions.mixture import MaskedConstraint
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Beta, Dirichlet, Distribution, Independent, constraints
from torch.distributions import biject_to as registered
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint
from torch.distributions.transforms import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    StackTransform,
    Transform,
)

from pyro_flows.model.supports import WRAPPERS, is_narrower
from pyro_flows.support.numbers.tensors import broadcast

GENERALIZED_PARETO: type[Distribution] | tuple[()] = getattr(torch.distributions, "GeneralizedPareto", ())  # in 2.8
BOUNDS = {"lower_bound": torch.amin, "upper_bound": torch.amax}


def bijection(fn: Distribution) -> Transform:
    """Return a bijection from real numbers onto the support of a distribution; NotImplementedError if there is none.

    A transformed distribution claims all of its last transform's codomain. Where its base has a narrower support than
    the real numbers, the image of that one is taken instead.
    """
    inner, lifted = fn, 0
    while isinstance(inner, WRAPPERS):
        lifted += getattr(inner, "reinterpreted_batch_ndims", 0)
        inner = inner.base_dist
    if isinstance(inner, GENERALIZED_PARETO):
        support = cast(constraints.interval, inner.support)
        lower, upper = support.lower_bound, torch.as_tensor(support.upper_bound)
        bounded = torch.isfinite(upper)
        interval = constraints.interval(lower, torch.where(bounded, upper, lower + 1.0))
        choice = _Choice(bounded, registered(constraints.greater_than(lower)), registered(interval))
        return _lifted(choice, lifted)
    if is_narrower(inner) and ComposeTransform(inner.transforms).bijective:
        return _lifted(ComposeTransform([bijection(inner.base_dist), *inner.transforms]), lifted)
    return biject_to(cast(Constraint, fn.support))


def real_log_prob(fn: Distribution, y: Tensor) -> Tensor | None:
    r"""Return the log density of real numbers that :func:`bijection` takes to values of a Beta or Dirichlet; else None.

    With shares :math:`x_k` of the unit, :math:`\log p(y) = \sum_k a_k \log x_k(y) - \log B(a)`. Beyond y = 36, 1 - x
    has no digit in double precision, and a small concentration has mass there. The logarithms of all shares have their
    digits at all y.
    """
    if isinstance(fn, Independent):
        inner = real_log_prob(fn.base_dist, y)
        return None if inner is None else sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    if not isinstance(fn, (Beta, Dirichlet)):
        return None
    shares, y = (fn._dirichlet, y.unsqueeze(-1)) if isinstance(fn, Beta) else (fn, y)
    sticks = y - torch.arange(y.shape[-1], 0, -1).to(y).log()  # as torch's StickBreakingTransform has it
    taken = torch.nn.functional.pad(torch.nn.functional.logsigmoid(sticks), (0, 1))
    left = torch.nn.functional.pad(torch.nn.functional.logsigmoid(-sticks).cumsum(-1), (1, 0))
    a = shares.concentration
    return (a * (taken + left)).sum(-1) + a.sum(-1).lgamma() - a.lgamma().sum(-1)


def _lifted(transform: Transform, axes: int) -> Transform:
    return IndependentTransform(transform, axes) if axes else transform


def biject_to(support: Constraint) -> Transform:
    """Return torch's bijection onto a support, also where constraints without one of their own wrap it.

    Components of a mixture that have bounds of their own share the interval from the lowest to the highest of them.
    """
    if isinstance(support, constraints.independent):
        return IndependentTransform(biject_to(support.base_constraint), support.reinterpreted_batch_ndims)
    if isinstance(support, constraints.cat):
        return CatTransform([biject_to(part) for part in support.cseq], support.dim, support.lengths)
    if isinstance(support, constraints.stack):
        return StackTransform([biject_to(part) for part in support.cseq], support.dim)
    if isinstance(support, MixtureSameFamilyConstraint):
        return biject_to(_hull(support.base_constraint, -1))
    if isinstance(support, MaskedConstraint):
        return _Choice(support.mask, biject_to(support.constraint0), biject_to(support.constraint1))
    if isinstance(support, type(constraints.lower_cholesky)):
        return _Triangle()
    if isinstance(support, (type(constraints.positive_definite), type(constraints.positive_semidefinite))):
        return _Triangle(square=True)
    return cast(Transform, registered(support))


class _Choice(Transform):
    """One of two elementwise transforms for each element: ``first`` where ``mask`` is True, else ``other``."""

    domain = constraints.real
    codomain = constraints.real  # of both together; each has its own
    bijective = True

    def __init__(self, mask: Tensor, other: Transform, first: Transform) -> None:
        super().__init__()
        if other.domain.event_dim or first.domain.event_dim:
            raise NotImplementedError("a masked mixture of distributions whose elements depend on each other")
        self.mask, self.other, self.first = mask, other, first

    def _call(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.first(x), self.other(x))

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.where(self.mask, self.first.inv(y), self.other.inv(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        first, other = (part.log_abs_det_jacobian(x, part(x)) for part in (self.first, self.other))
        return torch.where(self.mask, first, other)


class _Triangle(Transform):
    r"""Lower triangular matrices L with a positive diagonal from n (n + 1) / 2 numbers, or their products L L^T.

    Row by row; the diagonal is exponentiated. Its logarithms add to the log determinant; the step from L to L L^T
    adds :math:`n \log 2 + \sum_i (n - i + 1) \log L_{ii}`, i counted from 1.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, *, square: bool = False) -> None:
        super().__init__()
        self.square = square

    @constraints.dependent_property
    def codomain(self) -> Constraint:
        return constraints.positive_definite if self.square else constraints.lower_cholesky

    def _call(self, x: Tensor) -> Tensor:
        size = _side(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, device=x.device)
        flat = x.new_zeros(*x.shape[:-1], size * size).index_copy(-1, rows * size + columns, x)
        root = flat.unflatten(-1, (size, size))
        root = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).exp())
        return root @ root.mT if self.square else root

    def _inverse(self, y: Tensor) -> Tensor:
        root = y
        if self.square:  # NaN where a matrix is not positive definite
            root, fault = torch.linalg.cholesky_ex(y)
            root = torch.where((fault == 0)[..., None, None], root, torch.nan)
        size = root.shape[-1]
        rows, columns = torch.tril_indices(size, size, device=y.device)
        root = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).log())
        return root.flatten(-2).index_select(-1, rows * size + columns)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = _side(x.shape[-1])
        steps = torch.arange(1, size + 1, device=x.device)
        logs = x.index_select(-1, steps * (steps + 1) // 2 - 1)
        if not self.square:
            return logs.sum(-1)
        return ((size + 2 - steps) * logs).sum(-1) + size * math.log(2.0)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        side = _side(shape[-1])
        return torch.Size((*shape[:-1], side, side))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def real_shape(transform: Transform, shape: Sequence[int]) -> torch.Size:
    """Return the shape of the real numbers that a bijection takes to values of some shape."""
    if isinstance(transform, ComposeTransform):
        for part in reversed(transform.parts):
            shape = real_shape(part, shape)
        return torch.Size(shape)
    if isinstance(transform, IndependentTransform):
        return real_shape(transform.base_transform, shape)
    if isinstance(transform, AffineTransform):
        return broadcast(shape, *(getattr(part, "shape", ()) for part in (transform.loc, transform.scale)))
    return torch.Size(transform.inverse_shape(shape))


def _side(numbers: int) -> int:
    """The side of the triangle that holds so many numbers."""
    return int(math.isqrt(8 * numbers + 1) - 1) // 2


def _hull(support: Constraint, axis: int) -> Constraint:
    """Return the support that holds those of all components, which lie along ``axis`` of its bounds."""
    if isinstance(support, MixtureSameFamilyConstraint):
        return _hull(_hull(support.base_constraint, -1), axis)
    if isinstance(support, constraints.independent):
        base = _hull(support.base_constraint, axis - support.reinterpreted_batch_ndims)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    bounds = {name: value for name, value in vars(support).items() if isinstance(value, Tensor) and value.dim()}
    if not bounds:
        return support
    if not bounds.keys() <= BOUNDS.keys():
        raise NotImplementedError(f"a mixture of components with the support {type(support).__name__}")
    wider = copy.copy(support)
    for name, value in bounds.items():
        if value.dim() >= -axis:
            setattr(wider, name, BOUNDS[name](value, axis))
    return wider
