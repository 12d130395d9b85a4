"""What a fitted prior is of: the supports, shapes and dimensions of its sites, and its distribution over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to as registry
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_flows.flows.flow import Flow
from pyro_flows.model.bijections import biject_to
from pyro_flows.priors.errors import DRAWN, TINY, PriorError, two_sided
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.numbers.tensors import broadcast
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.thresholds import PREDICTIVE_TAIL

PLAIN: dict[str, Constraint] = {
    "real": constraints.real,
    "simplex": constraints.simplex,
    "lower_cholesky": constraints.lower_cholesky,
    "corr_cholesky": constraints.corr_cholesky,
    "positive_definite": constraints.positive_definite,
    "corr_matrix": dist.constraints.corr_matrix,
    "ordered_vector": dist.constraints.ordered_vector,
    "positive_ordered_vector": dist.constraints.positive_ordered_vector,
}
BOUNDED: dict[str, tuple[type[Constraint], tuple[str, ...]]] = {
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
}
CONSTANTS = {"greater_than": constraints.positive, "greater_than_eq": constraints.nonnegative}  # of types of their own


@dataclass(frozen=True)
class Part:
    """One site of a fitted prior."""

    name: str  # of the site
    shape: torch.Size  # of its value, plates included
    support: Constraint  # of the whole value, as one event
    dims: tuple[str | None, ...]  # a name for each axis that a plate had, None for others

    @property
    def transform(self) -> Transform:
        return biject_to(self.support)

    @property
    def unconstrained_shape(self) -> torch.Size:
        return torch.Size(self.transform.inverse_shape(self.shape))

    @property
    def size(self) -> int:
        return math.prod(self.unconstrained_shape)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value (..., *shape) at coordinates (..., size), and the log Jacobian (...)."""
        x = z.reshape((*z.shape[:-1], *self.unconstrained_shape))
        value = self.transform(x)
        return value, self.transform.log_abs_det_jacobian(x, value)

    def inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates (..., size) of a value, and the log Jacobian (...) of the way there and back."""
        transform = self.transform
        x = transform.inv(value)
        batch = value.shape[: value.dim() - len(self.shape)]
        return x.reshape((*batch, self.size)), transform.log_abs_det_jacobian(x, value)

    def describe(self) -> dict[str, object]:
        """Return the part as JSON has it; :meth:`read` is the inverse."""
        support = describe(self.support)
        return {"name": self.name, "shape": list(self.shape), "support": support, "dims": list(self.dims)}

    @classmethod
    def read(cls, text: Entries, dtype: torch.dtype) -> Part:
        dims = tuple(None if dim is None else str(dim) for dim in text["dims"])
        return cls(str(text["name"]), torch.Size(text["shape"]), restore(text["support"], dtype), dims)


# supports as text -----------------------------------------------------------------------------------------------------


def describe(support: Constraint) -> dict[str, object]:
    """Return a support as JSON has it."""
    if isinstance(support, constraints.independent):
        base, axes = describe(support.base_constraint), support.reinterpreted_batch_ndims
        return {"kind": "independent", "base": base, "axes": axes}
    for kind, plain in PLAIN.items():
        if type(support) is type(plain):
            return {"kind": kind}
    for kind, (cls, names) in BOUNDED.items():
        if type(support) in (cls, type(CONSTANTS.get(kind))):
            return {"kind": kind, **{name: torch.as_tensor(getattr(support, name)).tolist() for name in names}}
    raise NotImplementedError(f"the support {support}")


def restore(text: Entries, dtype: torch.dtype) -> Constraint:
    """Make the support that :func:`describe` told of."""
    kind = text["kind"]
    if kind == "independent":
        return constraints.independent(restore(text["base"], dtype), int(text["axes"]))
    if kind in PLAIN:
        return PLAIN[kind]
    if kind not in BOUNDED:
        raise ValueError(f"support: unknown kind {kind!r}.")
    cls, names = BOUNDED[kind]
    bounds = [text[name] for name in names]
    return cls(*(torch.tensor(one, dtype=dtype) if isinstance(one, list) else float(one) for one in bounds))


# several sites in one event -------------------------------------------------------------------------------------------


class Joint(Constraint):
    """Vectors that hold the values of several sites, flattened, one after the other."""

    event_dim = 1
    is_discrete = False

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return which vectors (..., N) hold values inside of their supports."""
        pairs = zip(self.parts, self.split(value), strict=True)
        checked = [part.support.check(piece).reshape(*value.shape[:-1], -1) for part, piece in pairs]
        return torch.cat(checked, -1).all(-1)

    def split(self, value: Tensor) -> list[Tensor]:
        """Return the values of the sites, (..., *shape) each."""
        pieces = value.split([math.prod(part.shape) for part in self.parts], -1)
        return [piece.reshape((*value.shape[:-1], *part.shape)) for part, piece in zip(self.parts, pieces, strict=True)]


def pieces(parts: Sequence[Part], value: Tensor) -> list[Tensor]:
    """Return the values (..., *shape) of the parts of one event, which of a single part is its value."""
    return [value] if len(parts) == 1 else Joint(parts).split(value)


def coordinates(parts: Sequence[Part], value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unconstrained coordinates (..., D) of one event, and the log Jacobian (...) of the way back."""
    found = [part.inverse(piece) for part, piece in zip(parts, pieces(parts, value), strict=True)]
    return torch.cat([z for z, _ in found], -1), torch.stack([ladj for _, ladj in found]).sum(0)


def placed(parts: Sequence[Part], z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the value (..., *shape) of each part at coordinates (..., D), and its log Jacobian (...)."""
    pieces = zip(parts, z.split([part.size for part in parts], -1), strict=True)
    return [part.forward(piece) for part, piece in pieces]


def _flat(values: Sequence[Tensor], batch: Sequence[int]) -> Tensor:
    return torch.cat([value.reshape(*batch, -1) for value in values], -1)


class JointTransform(Transform):
    """The bijections of several sites, one after the other in a vector."""

    domain = constraints.real_vector
    bijective = True

    def __init__(self, support: Joint) -> None:
        super().__init__()
        self.support = self.codomain = support

    def _call(self, x: Tensor) -> Tensor:
        return _flat([value for value, _ in placed(self.support.parts, x)], x.shape[:-1])

    def _inverse(self, y: Tensor) -> Tensor:
        return coordinates(self.support.parts, y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return sum((ladj for _, ladj in placed(self.support.parts, x)), x.new_zeros(x.shape[:-1]))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], sum(math.prod(part.shape) for part in self.support.parts)))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], sum(part.size for part in self.support.parts)))


registry.register(Joint, JointTransform)
transform_to.register(Joint, JointTransform)


class PriorDistribution(TorchDistribution):
    """The distribution of a :class:`FittedPrior`; its one event holds all of the sites."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self, flow: Flow, parts: Sequence[Part], error: PriorError, batch_shape: torch.Size | Sequence[int] = ()
    ) -> None:
        self.flow, self.parts, self.error = flow, tuple(parts), error
        single = len(self.parts) == 1
        self._support = self.parts[0].support if single else Joint(self.parts)
        event = self.parts[0].shape if single else [sum(part.shape.numel() for part in self.parts)]
        super().__init__(torch.Size(batch_shape), torch.Size(event), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The site's own support, or all sites' one after the other."""
        return self._support

    @property
    def event_dims(self) -> tuple[str | None, ...]:
        """Names of the event's axes, None where there is none."""
        return self.parts[0].dims if len(self.parts) == 1 else (None,)

    @property
    def site_dims(self) -> dict[str, tuple[str | None, ...]]:
        """Names of the axes of each site."""
        return {part.name: part.dims for part in self.parts}

    @torch.no_grad()
    def sds_away(self, value: Tensor, weights: Tensor) -> tuple[float, float]:
        """Return how far the mean of weighted values lies from the prior's own, and how far it may, in its sds.

        Both are of unconstrained coordinates and of principal axes: the farthest, and what :data:`PREDICTIVE_TAIL` of
        the draws of a normal distribution exceed on either side. The prior's tails beyond have next to no draws.

        Args:
            value: (S, *batch, *event).
            weights: (S,), their sum is one.
        """
        with seeded(0, value.device):
            known = self.flow.draw(DRAWN)[0].double()
        z = coordinates(self.parts, value)[0].double()
        finite = torch.isfinite(z.flatten(1)).all(1)
        share = (weights / weights[finite].sum())[finite].double()
        apart = torch.tensordot(share, z[finite], 1) - known.mean(0)
        variances, axes = torch.linalg.eigh(known.mT.cov().reshape(z.shape[-1], z.shape[-1]))
        along = (apart @ axes) / variances.clamp_min(TINY).sqrt()
        away = max(float(found.abs().max()) for found in (apart / known.std(0), along))
        return away, two_sided(PREDICTIVE_TAIL / apart.numel())

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> PriorDistribution:
        return PriorDistribution(self.flow, self.parts, self.error, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, *event_shape)``; there are no parameters that a gradient could go to."""
        shape = (*sample_shape, *self.batch_shape)
        drawn = self.flow.draw(math.prod(shape))[0].reshape(*shape, self.flow.dim)
        values = [value for value, _ in placed(self.parts, drawn)]
        return values[0] if len(values) == 1 else _flat(values, shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of shape ``(*sample_shape, *batch_shape)``."""
        shape = value.shape[value.dim() - len(self.event_shape) :]
        if shape != self.event_shape:
            names = ", ".join(part.name for part in self.parts)
            raise ValueError(
                f"value: expected an event of shape {tuple(self.event_shape)}, of {names}, got {tuple(shape)}."
            )
        z, ladj = coordinates(self.parts, value)
        found = self.flow.log_prob(z) - ladj
        return found.expand(broadcast(found.shape, self.batch_shape))
