"""The sites that a fitted prior is of: their supports, shapes and dimensions, in one event or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to as registry
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_flows._bundles import Entries
from pyro_flows.model.bijections import biject_to

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
BOUNDED: dict[str, tuple[Any, tuple[str, ...]]] = {
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
        """The bijection from real numbers onto the support."""
        return biject_to(self.support)

    @property
    def unconstrained_shape(self) -> torch.Size:
        """The shape of the value's unconstrained coordinates."""
        return torch.Size(self.transform.inverse_shape(self.shape))

    @property
    def size(self) -> int:
        """How many unconstrained coordinates it has."""
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

    def describe(self) -> dict[str, Any]:
        """Return the part as JSON has it; :meth:`read` is the inverse."""
        support = describe(self.support)
        return {"name": self.name, "shape": list(self.shape), "support": support, "dims": list(self.dims)}

    @classmethod
    def read(cls, text: Entries, dtype: torch.dtype) -> Part:
        """Make a part of what :meth:`describe` gave."""
        dims = tuple(None if dim is None else str(dim) for dim in text["dims"])
        return cls(str(text["name"]), torch.Size(text["shape"]), restore(text["support"], dtype), dims)


# supports as text -----------------------------------------------------------------------------------------------------


def describe(support: Any) -> dict[str, Any]:
    """Return a support as JSON has it."""
    if isinstance(support, constraints.independent):
        return {
            "kind": "independent",
            "base": describe(support.base_constraint),
            "axes": support.reinterpreted_batch_ndims,
        }
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
    return cls(*(_bound(text[name], dtype) for name in names))


def _bound(value: Any, dtype: torch.dtype) -> Any:
    return torch.tensor(value, dtype=dtype) if isinstance(value, list) else float(value)


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
        found = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        for part, piece in zip(self.parts, self.split(value), strict=True):
            checked = part.support.check(piece)
            found = found & checked.reshape(*value.shape[:-1], -1).all(-1)
        return found

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


class JointTransform(Transform):
    """The bijections of several sites, one after the other in a vector."""

    domain = constraints.real_vector
    bijective = True

    def __init__(self, support: Joint) -> None:
        super().__init__()
        self.support = support

    @property
    def codomain(self) -> Constraint:  # type: ignore[override]
        return self.support

    @property
    def _sizes(self) -> list[int]:
        return [part.size for part in self.support.parts]

    def _call(self, x: Tensor) -> Tensor:
        pieces = zip(self.support.parts, x.split(self._sizes, -1), strict=True)
        return torch.cat([part.forward(piece)[0].reshape(*x.shape[:-1], -1) for part, piece in pieces], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        pieces = zip(self.support.parts, self.support.split(y), strict=True)
        return torch.cat([part.inverse(piece)[0] for part, piece in pieces], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        pieces = zip(self.support.parts, x.split(self._sizes, -1), strict=True)
        return sum((part.forward(piece)[1] for part, piece in pieces), x.new_zeros(x.shape[:-1]))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], sum(math.prod(part.shape) for part in self.support.parts)))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((*shape[:-1], sum(self._sizes)))


registry.register(Joint, JointTransform)
transform_to.register(Joint, JointTransform)
