"""The mean of the densities of several flows, as the base of one flow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_flows.flows.flow import MIXTURE, Flow
from pyro_flows.flows.mixture_base import OfParts, together
from pyro_flows.flows.recipe import Recipe, of_mixtures
from pyro_flows.flows.recipe_json import from_json, to_json
from pyro_flows.transforms.fixed import Preprocess


class Ensemble(nn.Module):
    r"""K flows of vectors, all alike likely:

    .. math:: q(y \mid c) = \frac1K \sum_k q_k(y \mid c)

    Args:
        flows: of one dimension D, and of one width of the context, or without. If D is 1, each rises with its base.

    Shapes: y is (..., D), the context (..., context_dim), or None. Cost: that of all flows.

    Reference: Krogh and Vedelsby 1995, *Neural network ensembles, cross validation, and active learning*;
    Lakshminarayanan, Pritzel and Blundell 2017, arXiv 1612.01474.
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)
        self.dim, self.context_dim = flows[0].dim, flows[0].context_dim

    @property
    def members(self) -> list[Flow]:
        """The flows."""
        return [cast(Flow, flow) for flow in self.flows]

    def forward(self, context: Tensor | None = None) -> Averaged:
        """Return the distribution, with the batch shape of the context."""
        return Averaged(self, context)


class Averaged(OfParts):
    """The distribution of an :class:`Ensemble` in one context, or in each of a batch; event shape (D,)."""

    def __init__(self, ensemble: Ensemble, context: Tensor | None, batch_shape: Sequence[int] | None = None) -> None:
        self.ensemble, self.context = ensemble, context
        own = () if context is None else context.shape[:-1]
        batch = torch.Size(own if batch_shape is None else batch_shape)
        super().__init__(batch, torch.Size((ensemble.dim,)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Averaged:
        """Return independent copies."""
        return Averaged(self.ensemble, self.context, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of shape ``(*sample_shape, *batch_shape)``."""
        y, context = self._with_context(value)
        found = []
        for flow in self.ensemble.members:
            x, ladj = flow.bijection.inverse_and_ladj(y, context)
            found.append(flow.base_distribution(context).log_prob(x) + ladj)
        whole = torch.stack(found).logsumexp(0) - math.log(len(found))
        return whole.expand(torch.broadcast_shapes(whole.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, D)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        context = None if self.context is None else self.context.expand(*shape, -1)
        members = self.ensemble.members
        found = next(members[0].parameters()).new_empty(*shape, self.ensemble.dim)
        chosen = torch.randint(len(members), shape, device=found.device)
        for number, flow in enumerate(members):
            here = chosen == number
            own = None if context is None else context[here]
            x = flow.base_distribution(own).expand((int(here.sum()),)).sample()  # it may not depend on the context
            found[here] = flow.bijection.forward_and_ladj(x, own)[0]
        return found

    def _with_context(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        return (value, None) if self.context is None else together(value, self.context)

    # one coordinate ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cdf(self, value: Tensor) -> Tensor:
        """Return the distribution function (...,) at points (..., 1) of one coordinate."""
        y, context = self._with_context(value)
        placed = ((flow, flow.bijection.inverse_and_ladj(y, context)[0]) for flow in self.ensemble.members)
        return torch.stack([flow.base_distribution(context).cdf(x) for flow, x in placed]).mean(0)

    @torch.no_grad()
    def around(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest quantile (..., 1) of all flows, for probabilities (...,)."""
        at, context = self._with_context(value[..., None])
        ends = [
            flow.bijection.forward_and_ladj(end, context)[0]
            for flow in self.ensemble.members
            for end in flow.base_distribution(context).around(at[..., 0])
        ]
        low, high = torch.stack(ends).aminmax(dim=0)
        return low, high


@of_mixtures
def ensemble(dim: int, *, members: Sequence[Mapping[str, object]], base: str = "normal", df: float = 15.0) -> Flow:
    """Return the mean of the densities of flows, each described as :func:`~pyro_flows.flows.recipe_json.to_json` does.

    Raises:
        ValueError: for no member, or members that are no flows of vectors of ``dim`` coordinates.
    """
    flows = [from_json(one) for one in members]
    fits = [isinstance(one, Flow) and one.event_shape == (dim,) for one in flows]
    if not fits or not all(fits) or len({one.context_dim for one in flows}) > 1:
        raise ValueError(f"members: expected one or more flows of {dim} coordinates, got others.")
    return averaged(cast("list[Flow]", flows))


def averaged(flows: Sequence[Flow]) -> Flow:
    """Return the flow whose density is the mean of those of flows of vectors, at least one."""
    like = next(flows[0].parameters())
    dim, width = flows[0].dim, flows[0].context_dim
    slope = like.new_zeros(width, dim) if width else None
    whole = Flow(Preprocess(like.new_zeros(dim), like.new_ones(dim), slope))
    whole.mixture, whole.base = Ensemble(flows), MIXTURE
    described = [to_json(flow) for flow in flows]
    if None not in described:
        whole.recipe = Recipe("ensemble", {"members": tuple(described)})
    return whole.to(like)
