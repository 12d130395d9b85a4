"""The distribution of a fitted prior: a flow on the supports of its sites, in one event."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_flows._shapes import broadcast
from pyro_flows.flows.flow import Flow
from pyro_flows.priors.errors import PriorError
from pyro_flows.priors.parts import Joint, Part, coordinates


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

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> PriorDistribution:
        """Return independent copies."""
        return PriorDistribution(self.flow, self.parts, self.error, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, *event_shape)``."""
        shape = (*sample_shape, *self.batch_shape)
        z, _ = self.flow.rsample_and_log_prob(shape)
        pieces = z.split([part.size for part in self.parts], -1)
        values = [part.forward(piece)[0] for part, piece in zip(self.parts, pieces, strict=True)]
        return values[0] if len(values) == 1 else torch.cat([value.reshape(*shape, -1) for value in values], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of shape ``(*sample_shape, *batch_shape)``."""
        z, ladj = coordinates(self.parts, value)
        found = self.flow.log_prob(z) - ladj
        return found.expand(broadcast(found.shape, self.batch_shape))
