"""Supports of distributions: bijections onto them, and which values lie inside, whatever wraps the distribution."""

from __future__ import annotations

import copy
from typing import ClassVar, TypeGuard, cast

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, TransformedDistribution, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform
from torch.types import _size

WRAPPERS = (Independent, ExpandedDistribution, MaskedDistribution)
NO_AXES = torch.Size()
Number = Tensor | bool | int | float
ROUNDING = 1e-4  # how far sums, norms and diagonals of data may be from 1: torch's 1e-6 refuses rounded float32 data


# which supports are what they claim -----------------------------------------------------------------------------------


def family(fn: Distribution) -> Distribution:
    """Return the distribution inside of wrappers."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def elementary(support: Constraint | None) -> Constraint | None:
    """Return the constraint of single numbers, or of what depends on each other, inside of others."""
    while support is not None and hasattr(support, "base_constraint"):  # of independent ones, and of a mixture
        support = support.base_constraint
    return support


def is_whole(fn: Distribution) -> bool:
    """Whether any real numbers are inside of a distribution's support."""
    fn = family(fn)
    if isinstance(fn, MixtureSameFamily):
        return is_whole(fn.component_distribution)
    support = elementary(support_of(fn))
    return support is None or (isinstance(support, type(constraints.real)) and not is_narrower(fn))


def support_of(fn: Distribution) -> Constraint | None:
    """Return the support that a distribution states, or None if it states none."""
    try:
        support = fn.support
    except NotImplementedError:
        return None
    return None if support is None or constraints.is_dependent(support) else support


def is_narrower(fn: Distribution) -> TypeGuard[TransformedDistribution]:
    """Whether this is a transformed distribution whose support is only a part of the codomain of its transforms."""
    if not isinstance(fn, TransformedDistribution) or type(fn).support is not TransformedDistribution.support:
        return False
    return bool(fn.transforms) and not is_whole(fn.base_dist)


def needs_guard(fn: Distribution) -> bool:
    """Whether a mixture's components have supports of their own, so that each has density outside of its own one."""
    fn = family(fn)
    if isinstance(fn, MixtureSameFamily):
        component = fn.component_distribution
        return not is_whole(component) and any(isinstance(part, Tensor) for part in signature(component))
    return isinstance(fn, TransformedDistribution) and needs_guard(fn.base_dist)


def signature(fn: Distribution) -> list[Number]:
    """Return all bounds of a distribution's support, tensors and numbers, so that two runs can be compared."""
    fn = family(fn)
    if isinstance(fn, MixtureSameFamily):
        return signature(fn.component_distribution)
    found = _numbers(support_of(fn))
    if is_narrower(fn):
        found = [*found, *_numbers(fn.transforms), *signature(fn.base_dist)]
    return found


def _numbers(thing: object) -> list[Number]:
    """Tensors and numbers among the attributes of a constraint or a transform, those of its parts too."""
    if isinstance(thing, (Tensor, bool, int, float)):
        return [thing]
    if isinstance(thing, (list, tuple)):
        return [number for part in thing for number in _numbers(part)]
    if isinstance(thing, (Constraint, Transform)):
        kept = {name: part for name, part in vars(thing).items() if name not in ("_cached_x_y", "_inv")}
        return [number for name in sorted(kept) for number in _numbers(kept[name])]
    return []


def missing(fn: Distribution) -> tuple[Tensor, int] | None:
    """Return the mask that a distribution itself holds (False: left out), and how many axes of one event it has.

    None if it holds none.
    """
    if not isinstance(fn, WRAPPERS):
        return None
    found = missing(fn.base_dist)
    if isinstance(fn, MaskedDistribution):
        mask = torch.as_tensor(fn._mask)
        return (mask, 0) if found is None else (mask.reshape(mask.shape + (1,) * found[1]) & found[0], found[1])
    return None if found is None else (found[0], found[1] + getattr(fn, "reinterpreted_batch_ndims", 0))


# which values lie inside ----------------------------------------------------------------------------------------------


def inside(fn: Distribution, value: Tensor) -> tuple[Tensor, int]:
    """Return which numbers of ``value`` lie in the support, and how many of the last axes are axes of one event.

    Numbers that depend on each other (a simplex) stand for one. What a :class:`MaskedDistribution` masks out counts as
    inside, and so does everything where no support is stated. A value of a mixture has to lie in the support of one of
    its components.
    """
    if isinstance(fn, MaskedDistribution):
        found, axes = inside(fn.base_dist, value)
        mask = torch.as_tensor(fn._mask, device=value.device)
        return found | ~mask.reshape(mask.shape + (1,) * axes), axes
    if isinstance(fn, Independent):
        found, axes = inside(fn.base_dist, value)
        return found, axes + fn.reinterpreted_batch_ndims
    if isinstance(fn, ExpandedDistribution):
        return inside(fn.base_dist, value)
    if isinstance(fn, MixtureSameFamily):
        found = events_inside(fn.component_distribution, value.unsqueeze(-1 - fn._event_ndims))
        return found.any(-1), 0
    if isinstance(fn, dist.MaskedMixture):
        other, first = (events_inside(part, value) for part in (fn.component0, fn.component1))
        return torch.where(vars(fn)["mask"], first, other), 0
    support = elementary(support_of(fn))
    depth = len(fn.event_shape)
    if support is None:
        return torch.ones(value.shape[: value.dim() - depth], dtype=torch.bool, device=value.device), 0
    found, axes = _check(support, value), depth - _event_dim(support)
    if isinstance(fn, (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)):
        found = found | torch.isnan(value)
    if is_narrower(fn):
        found, axes = _all(found, axes) & _image(fn, value), 0
    return found, axes


def events_inside(fn: Distribution, value: Tensor) -> Tensor:
    """Return which events of ``value`` lie in the support: one answer for each batch element."""
    return _all(*inside(fn, value))


def _image(fn: TransformedDistribution, value: Tensor) -> Tensor:
    """Whether events come from the base's support, through the transforms."""
    try:
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
    except NotImplementedError:  # a transform that goes one way only
        return torch.ones((), dtype=torch.bool, device=value.device)
    return events_inside(fn.base_dist, value)


def _event_dim(support: Constraint) -> int:
    return max(support.event_dim, int(isinstance(support, type(dist.constraints.positive_ordered_vector))))


def _all(found: Tensor, axes: int) -> Tensor:
    return found.flatten(-axes).all(-1) if axes else found


def _check(support: Constraint, value: Tensor) -> Tensor:
    """What the support says of values; sums, norms and diagonals of 1 hold up to rounding."""
    value = value if value.is_floating_point() else value.double()
    if isinstance(support, type(constraints.simplex)):
        return (value >= 0).all(-1) & ((value.sum(-1) - 1.0).abs() < ROUNDING)
    if isinstance(support, type(dist.constraints.sphere)):
        return (torch.linalg.norm(value, dim=-1) - 1.0).abs() < ROUNDING
    if isinstance(support, type(constraints.corr_cholesky)):
        norms = (torch.linalg.norm(value, dim=-1) - 1.0).abs() < ROUNDING
        return constraints.lower_cholesky.check(value) & norms.all(-1)
    if isinstance(support, type(dist.constraints.corr_matrix)):
        ones = (value.diagonal(dim1=-2, dim2=-1) - 1.0).abs() < ROUNDING
        return constraints.positive_definite.check(value) & ones.all(-1)
    found = support.check(value)
    if isinstance(support, constraints.multinomial):
        found = found & (value % 1 == 0).all(-1)  # torch asks for the sum alone
    return found


class Guarded(dist.TorchDistribution):
    """A distribution with density zero outside of its support, where torch's own density goes on as if inside.

    A mixture is guarded component by component.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(self, base_dist: Distribution) -> None:
        self.base_dist = base_dist
        self.has_rsample = base_dist.has_rsample
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        return cast(Constraint, self.base_dist.support)

    def sample(self, sample_shape: _size = NO_AXES) -> Tensor:
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: _size = NO_AXES) -> Tensor:
        return self.base_dist.rsample(sample_shape)

    def expand(self, batch_shape: _size, _instance: object = None) -> Guarded:
        return Guarded(self.base_dist.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(events_inside(self.base_dist, value), self.base_dist.log_prob(value), -torch.inf)


def guarded(fn: Distribution) -> Guarded:
    """Return the distribution with density zero outside of its support; the model's own object stays as it is."""
    return Guarded(_guard_components(fn))


def _guard_components(fn: Distribution) -> Distribution:
    new, base = copy.copy(fn), getattr(fn, "base_dist", None)
    if isinstance(fn, MixtureSameFamily):
        vars(new)["_component_distribution"] = guarded(fn.component_distribution)
    elif isinstance(base, Distribution) and needs_guard(base):
        vars(new)["base_dist"] = _guard_components(base)
    else:
        return fn
    return new


def check_density(name: str, fn: Distribution, value: Tensor) -> None:
    """Refuse the prior of a site that has no density, such as one by a transform that is not one-to-one."""
    try:
        fn.log_prob(value)
    except NotImplementedError:
        raise ValueError(
            f"site {name!r}: expected a prior with a density, got a {type(fn).__name__} without one. Is one of its "
            "transforms not one-to-one? In the place of a SoftmaxTransform, use a StickBreakingTransform."
        ) from None
    except (ValueError, RuntimeError):  # at an edge, or in other dtypes, which later runs find out about
        return
