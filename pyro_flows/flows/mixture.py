"""A finite mixture of flows, some of them moved by signed permutations of their coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flows.flows.flow import PIECE, Flow
from pyro_flows.flows.stacked import Copies, Stacked, log_sum, stacked
from pyro_flows.support import checks
from pyro_flows.support.numbers.tensors import broadcast

LEAST_WEIGHT = 1e-3
ROWS = 2**17  # that one flow is evaluated at together
LEAST_ROWS = 16


@dataclass(frozen=True)
class Component:
    """One part of a :class:`FlowMixture`: draws x of a flow, moved to ``signs * x[order]``.

    Attributes:
        flow: the flow's number.
        log_weight: the part's log weight, up to a constant that all share.
        order: which coordinate of x comes in each place (D,); as they are by default.
        signs: 1 or -1 for each place (D,); 1 by default.
    """

    flow: int
    log_weight: float = 0.0
    order: Tensor | None = None
    signs: Tensor | None = None


class FlowMixture(nn.Module):
    r"""A mixture of flows, each moved by a signed permutation, which preserves volumes:

    .. math:: q(z) = \sum_k w_k\, q_{f(k)}(T_k^{-1} z), \qquad T_k x = s_k \odot x_{\pi_k}

    Several parts may share one flow, which then is evaluated once for all of them. It stands in a guide in the place of
    a :class:`Flow`, and ``mixture()`` is its distribution. Weights, orders and signs are buffers: they are not trained,
    so that gradients of draws with respect to the flows' parameters are exact.

    Args:
        flows: unconditional flows of vectors, all of one dimension D.
        components: the parts; each flow once, all with equal weights, by default.

    Raises:
        ValueError: for flows of unequal or no dimension, a number that no flow has, orders that are no permutations,
            signs other than 1 and -1, or weights of which none is positive.

    >>> import torch, pyro_flows as pf
    >>> from pyro_flows.flows.mixture import Component, FlowMixture
    >>> there = Component(0, math.log(0.75))
    >>> mirrored = Component(0, math.log(0.25), signs=torch.tensor([-1.0, -1.0]))
    >>> mixture = FlowMixture([pf.realnvp(2, layers=2)], [there, mirrored])
    >>> z, log_q = mixture.draw(5)
    >>> z.shape, log_q.shape, bool(torch.allclose(mixture.log_prob(z), log_q))
    (torch.Size([5, 2]), torch.Size([5]), True)
    """

    which: Tensor
    orders: Tensor
    signs: Tensor
    log_weights: Tensor
    _like: Tensor

    def __init__(self, flows: Sequence[Flow], components: Sequence[Component] | None = None) -> None:
        super().__init__()
        if not flows or not all(isinstance(flow, Flow) for flow in flows):
            found = ", ".join(sorted({type(flow).__name__ for flow in flows})) or "none"
            raise ValueError(f"flows: expected one or more Flows, got {found}.")
        dims = [tuple(flow.event_shape) for flow in flows]
        if len({*dims}) > 1 or len(dims[0]) != 1 or any(flow.context_dim for flow in flows):
            raise ValueError(f"flows: expected unconditional flows of vectors of one dimension, got shapes {dims}.")
        parts = [Component(number) for number in range(len(flows))] if components is None else list(components)
        if not parts:
            raise ValueError("components: expected at least one, got none.")
        self.flows = nn.ModuleList(flows)
        self.dim = flows[0].dim
        self.event_shape = torch.Size((self.dim,))
        self.context_dim = 0
        like = next(flows[0].parameters(), flows[0]._like)
        for part in parts:
            if checks.integer("components: flow", part.flow, 0) >= len(flows):
                raise ValueError(f"components: flow {part.flow} does not exist, there are {len(flows)}.")
        weights = torch.tensor([float(part.log_weight) for part in parts], dtype=torch.float64)
        if not bool(torch.isfinite(weights.logsumexp(0))):
            raise ValueError(f"components: expected log weights with a finite sum, got {weights.tolist()}.")
        self.register_buffer("which", torch.tensor([part.flow for part in parts], device=like.device))
        orders = torch.stack([_order(part.order, self.dim) for part in parts]).to(like.device)
        signs = torch.stack([_signs(part.signs, self.dim) for part in parts]).to(like)
        self.register_buffer("orders", orders)
        self.register_buffer("signs", signs)
        self.register_buffer("log_weights", torch.log_softmax(weights, 0).to(like))
        self.register_buffer("_like", torch.zeros_like(like[..., :0].sum()), persistent=False)

    @classmethod
    def of(cls, flows: Sequence[Flow], weights: Sequence[float]) -> FlowMixture:
        """Return the mixture of flows by their weights, without those of next to none (below a thousandth of all)."""
        total = math.fsum(weights)
        kept = [(flow, weight) for flow, weight in zip(flows, weights, strict=True) if weight >= LEAST_WEIGHT * total]
        return cls([flow for flow, _ in kept], [Component(i, math.log(weight)) for i, (_, weight) in enumerate(kept)])

    @classmethod
    def copied(cls, flow: Flow | FlowMixture, moves: Sequence[tuple[Sequence[int], Sequence[float]]]) -> FlowMixture:
        """Return the images of a flow, or of each part of a mixture, under signed permutations, all as likely.

        What several moves bring to one place is one part.
        """
        plain = flow if isinstance(flow, FlowMixture) else cls([flow])
        found: dict[tuple[int, tuple[int, ...], tuple[float, ...]], float] = {}
        rows = zip(plain.which.tolist(), plain.log_weights.tolist(), plain.orders.cpu(), plain.signs.cpu(), strict=True)
        for which, log_weight, own, flips in rows:
            for order, signs in moves:
                moved = torch.tensor(signs, dtype=flips.dtype) * flips[list(order)]
                image = which, tuple(own[list(order)].tolist()), tuple(moved.tolist())
                found[image] = found.get(image, 0.0) + math.exp(log_weight)
        images = ((torch.tensor(order), torch.tensor(signs)) for _, order, signs in found)
        weights = zip(found.items(), images, strict=True)
        return cls(plain.members, [Component(key[0], math.log(weight), *image) for (key, weight), image in weights])

    @property
    def components(self) -> tuple[Component, ...]:
        """The parts, with weights that sum to one."""
        rows = zip(self.which.tolist(), self.log_weights.tolist(), self.orders, self.signs, strict=True)
        return tuple(Component(*row) for row in rows)

    @property
    def members(self) -> list[Flow]:
        """The flows, in the order of their numbers."""
        return [flow for flow in self.flows if isinstance(flow, Flow)]

    def forward(self) -> MixtureOfFlows:
        """Return the mixture as a Pyro distribution with event shape (D,)."""
        return MixtureOfFlows(self)

    def rsample(self, shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*shape, D)`` in random order, with gradients in the flows' parameters."""
        return self._drawn(math.prod(shape))[0].reshape(*shape, self.dim)

    def _drawn(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return draws (S, D) in random order, their parts (S,), and the parts' log densities (S,).

        These densities are NaN where gradients are asked for.
        """
        weights = self.log_weights.double().softmax(0).cpu()
        counts = torch.bincount(torch.multinomial(weights, count, replacement=True), minlength=len(weights))
        drawn = [(self.log_weights.new_zeros(0, self.dim), self.log_weights.new_zeros(0))]
        for part, many in enumerate(counts.tolist()):
            if many:
                flow = self.members[int(self.which[part])]
                if torch.is_grad_enabled():
                    x, log_q = flow().rsample(torch.Size((many,))), self.log_weights.new_full((many,), torch.nan)
                else:
                    x, log_q = flow.draw(many)
                drawn.append((self.signs[part] * x[:, self.orders[part]], log_q))
        z, own = (torch.cat(list(of)) for of in zip(*drawn, strict=True))
        mixed = torch.randperm(count).to(z.device)
        parts = torch.arange(len(counts)).repeat_interleave(counts).to(z.device)
        return z[mixed], parts[mixed], own[mixed]

    def rsample_and_log_prob(self, shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw and score: ``(*shape, D)`` and ``(*shape,)``, with gradients."""
        z = self.rsample(shape)
        return z, self.log_prob(z)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Return n draws (n, D) in random order, without gradients."""
        return self.rsample((checks.integer("n", n, 1),))

    @torch.no_grad()
    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Return n draws (n, D) in random order and their log density (n,) under the mixture, without gradients."""
        z, parts, own = self._drawn(checks.integer("n", n, 1))
        copies = stacked(self.members, self.components)
        if not isinstance(copies, Copies):
            return z, self.log_prob(z)
        found = []
        for rows, part, log_q in zip(*(of.split(self._rows) for of in (z, parts, own)), strict=True):
            elsewhere, others = copies.elsewhere(rows, part)
            found.append(log_sum(log_q + self.log_weights[part], elsewhere, self.log_weights[others]))
        return z, torch.cat(found)

    @property
    def _rows(self) -> int:
        """How many points are scored at once, so that those of all parts fit a cache."""
        return max(LEAST_ROWS, min(ROWS, PIECE // self.dim) // len(self.which))

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density ``(...,)`` of the mixture at ``z`` (..., D).

        A part whose inverse overflows at a point, far away from all of its mass, adds nothing there. Cost: a pass of
        ``z`` for each part; without gradients, affine parts, and copies of a flow, are passed all at once.
        """
        checks.event("FlowMixture", z, self.dim)
        rows = z.reshape(-1, self.dim)
        together = None if torch.is_grad_enabled() else stacked(self.members, self.components)
        return torch.cat([self._log_prob(part, together) for part in rows.split(self._rows)]).reshape(z.shape[:-1])

    def _log_prob(self, rows: Tensor, together: Stacked | Copies | None) -> Tensor:
        if together is not None:
            found = together.inverse(rows)[1]
            found = torch.where(found.isnan() & rows.isfinite().all(-1, keepdim=True), -torch.inf, found)
            return torch.logsumexp(found + self.log_weights, 1)
        backward = self.orders.argsort(1)
        terms = torch.empty(0)
        for number, flow in enumerate(self.members):
            parts = (self.which == number).nonzero()[:, 0]
            if not len(parts):
                continue
            x = torch.stack([(self.signs[part] * rows)[:, backward[part]] for part in parts.tolist()])
            found = flow.log_prob(x.flatten(0, 1)).reshape(len(parts), len(rows))
            found = torch.where(found.isnan() & rows.isfinite().all(-1), -torch.inf, found)
            found = found + self.log_weights[parts][:, None]
            terms = torch.cat([terms, found]) if len(terms) else found
        return torch.logsumexp(terms, 0)


class MixtureOfFlows(TorchDistribution):
    """The distribution of a :class:`FlowMixture`, with event shape (D,)."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, mixture: FlowMixture, batch_shape: torch.Size | Sequence[int] = ()) -> None:
        self.mixture = mixture
        super().__init__(torch.Size(batch_shape), mixture.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All vectors that some flow reaches."""
        return constraints.real_vector

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> MixtureOfFlows:
        """Return independent copies."""
        return MixtureOfFlows(self.mixture, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, D)`` with gradients."""
        return self.mixture.rsample((*sample_shape, *self.batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of shape ``(*sample_shape, *batch_shape)``."""
        found = self.mixture.log_prob(value)
        return found.expand(broadcast(found.shape, self.batch_shape))


def _order(order: Tensor | None, dim: int) -> Tensor:
    whole = torch.arange(dim)
    if order is None:
        return whole
    order = torch.as_tensor(order).cpu()
    if order.shape != (dim,) or not torch.equal(order.sort().values, whole):
        raise ValueError(f"components: order: expected a permutation of 0 to {dim - 1}, got {order.tolist()}.")
    return order.long()


def _signs(signs: Tensor | None, dim: int) -> Tensor:
    if signs is None:
        return torch.ones(dim)
    signs = torch.as_tensor(signs).cpu()
    if signs.shape != (dim,) or not bool((signs.abs() == 1).all()):
        raise ValueError(f"components: signs: expected {dim} numbers 1 or -1, got {signs.tolist()}.")
    return signs
