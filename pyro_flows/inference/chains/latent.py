r"""The posterior in the latent space of a flow, or of the flows of a mixture.

A point is x in the base space of part k, and stands for :math:`z = T_k(x)`. Its target is

.. math:: \log\pi(x, k) = \log\tilde p(z) + \log|\det J_{T_k}(x)| + \log r(k \mid z),
    \qquad r(k \mid z) = \frac{w_k q_k(z)}{\sum_j w_j q_j(z)},

so that z is a draw of the posterior, whatever the parts. With one flow r = 1. Drawing a point from the flow itself has
the density :math:`\log w_k + \log q_0(x)`, and the difference of the two is the log importance weight
:math:`\log\tilde p(z) - \log q(z)`. Where the flow is the posterior, the target in x is the base distribution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx, nn

from pyro_flows.flows import bases
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.stacked import but_own, log_sum, stacked
from pyro_flows.inference.modes.under_covered import Points
from pyro_flows.model.graphs import Recorder, Runner
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.numbers.cache import Cache
from pyro_flows.transforms import LowerTriangularAffine
from pyro_flows.transforms.nested import Nested
from pyro_flows.transforms.sliced import Sliced

WRITTEN_DEAR = 30_000  # numbers that a gradient of the model writes


def _widest(flow: Flow) -> int:
    """Return how many numbers the largest intermediate result of a flow has for each point."""
    linear = [layer.out_features for layer in flow.modules() if isinstance(layer, nn.Linear)]
    sliced = [layer.values.shape[1] for layer in flow.modules() if isinstance(layer, Sliced)]
    matrices = [len(layer.order) ** 2 for layer in flow.modules() if isinstance(layer, Nested)]
    return max(flow.dim, *linear, *sliced, *matrices, 1)


def only_finite(
    z: Tensor, log_p: Tensor, log_pi: Tensor, slope: Tensor, log_ref: Tensor, ref_slope: Tensor
) -> tuple[Tensor, ...]:
    """Return what is known of points, the target -inf and its gradient zero where something is not finite."""
    fine = torch.isfinite(log_pi) & torch.isfinite(slope).all(1) & torch.isfinite(z).all(1)
    return z, log_p, torch.where(fine, log_pi, -torch.inf), torch.where(fine[:, None], slope, 0.0), log_ref, ref_slope


class Latent:
    """The target in latent space, its gradient, and draws of the flow or mixture there.

    Args:
        flow: a flow of vectors, or a mixture; it is copied.
        density: the model as a log density. Its clock is looked at, its evaluations are counted.
    """

    def __init__(self, flow: Flow | FlowMixture, density: LogDensity) -> None:
        flow = copy.deepcopy(flow).requires_grad_(False)
        for layer in flow.modules():
            if isinstance(layer, LowerTriangularAffine):
                layer.settle()
        self.density, self.dim = density, density.dim
        self.mixture = flow if isinstance(flow, FlowMixture) else None
        self.flows = flow.members if isinstance(flow, FlowMixture) else [flow]
        self.parts = flow.components if isinstance(flow, FlowMixture) else (Component(0),)
        self.log_w = torch.tensor([part.log_weight for part in self.parts], dtype=density.dtype, device=density.device)
        self.log_w = torch.log_softmax(self.log_w, 0)
        self.stacked = stacked(self.flows, self.parts)
        numbers = max(density.numbers, len(self.parts) * max(map(_widest, self.flows)))
        recordable = density.batched and not self._by_parts and not density.by_rows
        # Graphs of their own, so that chains that go on repeat themselves.
        look = partial(self._evaluated, graph=True)
        make = partial(Recorder, look, numbers, own=True, before=self._prepare, changed=density.faults)
        self._recorder = make() if recordable else None
        self.leaps: Cache[object, Runner | None] = Cache(4)  # steps of trajectories

    @property
    def costly(self) -> bool:
        """Whether a look costs many times what others do: some flows have a matrix for each point, and some models."""
        if self.density.written > WRITTEN_DEAR:
            return True
        layers = (layer for flow in self.flows for layer in flow.modules())
        many = self.dim > 24  # then each point has hundreds of numbers of its own
        return many and any(isinstance(layer, (Nested, Sliced)) for layer in layers)

    @property
    def walkable(self) -> bool:
        """Whether a look costs little more than one of a flow: each part is scored by all of them."""
        return len(self.parts) <= 4 and not self.density.by_rows

    @property
    def _by_parts(self) -> bool:
        """Whether points are moved one part after the other."""
        return self.mixture is not None and self.stacked is None

    # maps of one part -------------------------------------------------------------------------------------------------

    def _forward(self, part: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = T_k(x) and the log Jacobian."""
        of = self.parts[part]
        y, ladj = self.flows[of.flow].bijection.forward_and_ladj(x)
        return (y if of.order is None or of.signs is None else of.signs * y[:, of.order]), ladj

    def _inverse(self, part: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x = T_k^-1(z) and log q_k(z)."""
        of = self.parts[part]
        if of.order is not None and of.signs is not None:
            z = (of.signs * z)[:, of.order.argsort()]
        x, ladj = self.flows[of.flow].bijection.inverse_and_ladj(z)
        return x, self._base(part, x)[0] + ladj

    def _base(self, part: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log q_0 (C,) and its gradient (C, D)."""
        flow = self.flows[self.parts[part].flow]
        return bases.log_density(flow.base, x, flow.df).sum(-1), bases.score(flow.base, x, flow.df)

    # what chains need -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw x and k of the flow or mixture itself, by torch's global generator."""
        k = torch.multinomial(self.log_w.double().exp(), count, replacement=True)
        x = torch.empty(count, self.dim, dtype=self.density.dtype, device=self.density.device)
        for part in k.unique().tolist():
            rows = (k == part).nonzero()[:, 0]
            x[rows] = self.flows[self.parts[part].flow].base_distribution().sample((len(rows),)).to(x)
        return x, k

    @torch.no_grad()
    def place(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and k of points z (C, D), k drawn from r(k | z)."""
        x, log_q = self._inverses(z)
        if len(self.parts) == 1:
            return x[:, 0], torch.zeros(len(z), dtype=torch.long, device=z.device)
        log_r = log_q.nan_to_num(nan=-torch.inf) + self.log_w
        k = torch.multinomial(torch.softmax(log_r.double(), 1).nan_to_num(nan=1.0), 1)[:, 0]
        return x[torch.arange(len(z)), k], k

    @torch.no_grad()
    def look(self, x: Tensor, k: Tensor) -> Points:
        """Evaluate at points; cost: a gradient for each. Where something is not finite, the target is -inf."""
        self.density.clock.look()
        return Points(x, k, *only_finite(*self._looked(self.joined(x, k))))

    def joined(self, x: Tensor, k: Tensor) -> Tensor:
        """Return points for a graph: those of a mixture have the number of their part as a last coordinate."""
        return x if self.mixture is None else torch.cat([x, k[:, None].to(x)], 1)

    def _parted(self, points: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixture is None:
            return points, torch.zeros(len(points), dtype=torch.long, device=points.device)
        return points[:, : self.dim], points[:, self.dim].round().long()

    def graph(self, points: Tensor) -> fx.GraphModule | None:
        """Return what :meth:`look` evaluates at :meth:`joined` points like these, before it looks what is finite.

        None if there is no graph.
        """
        return None if self._recorder is None else self._recorder.graph(points)

    def _prepare(self, points: Tensor) -> None:
        """Record the density for as many points, which cannot be done while something else is recorded."""
        self.density.graph(self._moved_by(*self._parted(points))[0])

    def _looked(self, points: Tensor) -> tuple[Tensor, ...]:
        if self._recorder is None:
            return self._evaluated(points, graph=False)
        self.density.spend(len(points))
        try:
            return tuple(part.to(points.dtype) for part in self._recorder(points))
        except torch.linalg.LinAlgError:  # at some of these points: they are -inf, the others count
            return self._evaluated(points, graph=False)

    def _evaluated(self, points: Tensor, *, graph: bool) -> tuple[Tensor, ...]:
        x, k = self._parted(points)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z, ladj = self._moved_by(leaf, k)
        log_p, slope = self._model(z.detach(), graph=graph)
        with torch.enable_grad():
            log_q0, score = self._by_part(self._base, leaf, k) if self._by_parts else self._base(0, leaf)
            extra = ladj if self.mixture is None else ladj + self._log_share(k, z, log_q0 - ladj)
            pulled = torch.autograd.grad(extra.sum() + (z * slope).sum(), leaf)[0]
        log_ref = log_q0.detach() if self.mixture is None else log_q0.detach() + self.log_w[k]
        return z.detach(), log_p, log_p + extra.detach(), pulled, log_ref, score.detach()

    def _model(self, z: Tensor, *, graph: bool) -> tuple[Tensor, Tensor]:
        """Return log p and its gradient; as a graph of operations that a recorder sees, where there is one."""
        found = self.density.graph(z) if graph and self._recorder is not None else None
        if found is not None:
            log_p, slope = found(z)
        else:
            log_p, slope = self.density.unrecorded(z) if graph else self.density.value_and_grad(z)
        return log_p.to(z.dtype), torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)

    def _moved_by(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = T_k(x) and the log Jacobians, each point in its own part."""
        if self._by_parts:
            return self._by_part(self._forward, x, k)
        return self._forward(0, x) if self.stacked is None else self.stacked.forward(x, k)

    def _by_part(
        self, function: Callable[[int, Tensor], tuple[Tensor, Tensor]], x: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the two results of a function of part and points, one part after the other."""
        rows = {part: (k == part).nonzero()[:, 0] for part in k.unique().tolist()}
        back = torch.cat(list(rows.values())).argsort()
        first, second = zip(*(function(part, x[row]) for part, row in rows.items()), strict=True)
        return torch.cat(first)[back], torch.cat(second)[back]

    def _inverses(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (C, K, D) of z in all parts, and log q_k(z) (C, K)."""
        if self.stacked is not None:
            return self.stacked.inverse(z)
        pairs = [self._inverse(part, z) for part in range(len(self.parts))]
        return torch.stack([x for x, _ in pairs], 1), torch.stack([log_q for _, log_q in pairs], 1)

    def _log_share(self, k: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
        """Return log r(k | z) (C,), with gradients; a part that overflows at a point adds nothing there.

        ``log_q`` (C,) are the log densities of the points' own parts.
        """
        if self.stacked is None:
            found, parts = but_own(self._inverses(z)[1], k)
        else:
            found, parts = self.stacked.elsewhere(z, k)
        own = log_q + self.log_w[k]
        return own - log_sum(own, found, self.log_w[parts])
