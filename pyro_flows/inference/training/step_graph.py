"""A training step as one recorded graph: draw, score, density, gradient, and update by Adam with clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.training.flow_graphs import Kind, Passes, gradient_of, points
from pyro_flows.inference.training.objectives import pulled
from pyro_flows.model.batching import nearer
from pyro_flows.model.graphs import Runner, Stitcher, agree, record
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.numbers.cache import Cache
from pyro_flows.support.process.fallbacks import fallback

BETAS = (0.9, 0.999)
CLIP = 5.0
KEPT = 0.95  # of a running mean, at each step


class Moments(NamedTuple):
    """What an optimizer knows besides the weights (W,): running means of the gradient and its square (W,), and scalars.

    ``counted`` is how many gradients were finite, ``norm`` the running norm of them, ``ess`` the running share of a
    batch that is effective, ``skipped`` how many gradients were not finite. Of several flows, all have one axis more.
    """

    mean: Tensor
    square: Tensor
    counted: Tensor
    norm: Tensor
    ess: Tensor
    skipped: Tensor

    @classmethod
    def fresh(cls, weights: Tensor) -> Moments:
        """Return those before the first step."""
        zero = weights.new_zeros(weights.shape[:-1])
        skipped = torch.zeros_like(zero, dtype=torch.long)
        return cls(torch.zeros_like(weights), torch.zeros_like(weights), zero, zero.clone(), zero.clone(), skipped)

    def forget(self) -> Moments:
        """Return fresh moments of the gradient, the rest as it is."""
        return Moments.fresh(self.mean)._replace(ess=self.ess, skipped=self.skipped)


def update(weights: Tensor, moments: Moments, gradient: Tensor, rate: float | Tensor) -> tuple[Tensor, Moments]:
    """Return the weights and moments after one step of Adam.

    The gradient is clipped at five times its running norm; one that is not finite changes nothing and is counted.
    """
    norm = torch.linalg.vector_norm(gradient)
    good = torch.isfinite(norm)
    smooth = KEPT * moments.norm + (1.0 - KEPT) * torch.minimum(norm, CLIP * moments.norm)
    running = torch.where(good, torch.where(moments.norm == 0.0, norm, smooth), moments.norm)
    share = torch.where(norm > 0.0, torch.clamp(CLIP * running / norm, max=1.0), 1.0)
    gradient = torch.where(good, gradient * share, 0.0)
    moved = good.to(weights.dtype)
    mean = torch.lerp(moments.mean, gradient, (1.0 - BETAS[0]) * moved)
    square = torch.lerp(moments.square, gradient.square(), (1.0 - BETAS[1]) * moved)
    counted = moments.counted + moved
    mean_share, square_share = (1.0 - beta ** counted.clamp(min=1.0) for beta in BETAS)  # 0 if all so far were bad
    size = torch.where(good, rate / mean_share, 0.0)
    weights = torch.addcdiv(weights, mean * -size, (square / square_share).sqrt() + 1e-8)
    skipped = moments.skipped + torch.logical_not(good)
    return weights, Moments(mean, square, counted, running, moments.ess, skipped)


def watch(moments: Moments, terms: Tensor, log_weights: Tensor) -> tuple[Tensor, Moments]:
    """Return the loss, less the mean of the terms that are finite, and moments that have seen this batch's weights."""
    finite = torch.isfinite(terms)
    mean = torch.where(finite, terms, 0.0).sum() / finite.sum()
    loss = torch.where(finite.any(), -mean, torch.inf)
    weights = torch.softmax(torch.nan_to_num(log_weights, nan=-torch.inf, neginf=-torch.inf), 0)
    share = torch.nan_to_num(1.0 / (weights.square().sum() * len(terms)))
    return loss, moments._replace(ess=KEPT * moments.ess + (1.0 - KEPT) * share)


def advance(
    weights: Tensor, moments: Moments, gradient: Tensor, terms: Tensor, log_weights: Tensor, rate: float | Tensor
) -> tuple[Tensor, Tensor, Moments]:
    """Return the loss, and the weights and moments after a step: :func:`watch`, then :func:`update`."""
    loss, moments = watch(moments, terms, log_weights)
    return loss, *update(weights, moments, gradient, rate)


class Step:
    """One step of training a flow on a density, from values to values; nothing in it waits for a result.

    Where the density has a graph for the batch, all of the step is one graph, which flows of one kind share; else, the
    passes and the density are run one after the other.

    Args:
        flow: the flow, unconditional.
        density: the target.
        like: base points (S, D) of the batches to come.
        weights: the parameters that are trained, as one vector (W,),
        views: and one by one, as views of it.

    Raises:
        Exception: of any kind, if some layer cannot be recorded, or the passes give other numbers than the flow.
    """

    def __init__(self, flow: Flow, density: LogDensity, like: Tensor, weights: Tensor, views: Sequence[Tensor]) -> None:
        self.flow, self.density = flow, density
        self.passes = Passes(flow, like, views)
        self._scalars = weights.new_zeros(2)
        self._whole: Runner | None = None
        try:
            nearer(lambda size: self._make_whole(size * points(like), weights))
        except RuntimeError as error:
            self._whole = None
            fallback("a step in parts", error)
        if self._whole is None:
            self.passes.check(like)

    @torch.no_grad()
    def __call__(
        self, weights: Tensor, moments: Moments, x: Tensor, log_importance_ratio: Tensor, rate: float, blend: float
    ) -> tuple[Tensor, Tensor, Moments]:
        """Return the loss, and the weights and moments after the step.

        Args:
            weights: before the step (W,).
            moments: likewise.
            x: base points (S, D).
            log_importance_ratio: as in :func:`pulled` (S,).
            rate: step size.
            blend: share of the forward divergence, ``forward`` in :func:`pulled`.
        """
        if self._whole is not None:
            try:
                found = self._run(weights, moments, x, log_importance_ratio, rate, blend)
            except torch.linalg.LinAlgError:
                pass  # of some of the points, which the density itself goes around
            else:
                self.density.spend(len(x))
                return found
        z, log_q, score_q, tape = self.passes.sample(x)
        log_p, score_p = self.density.value_and_grad(z)
        pull, terms, log_weights = pulled(log_p, score_p, log_q, score_q, log_importance_ratio, forward=blend)
        return advance(weights, moments, self.passes.pull(tape, pull), terms, log_weights, rate)

    def _run(
        self, weights: Tensor, moments: Moments, x: Tensor, log_importance_ratio: Tensor, *scalars: float
    ) -> tuple[Tensor, Tensor, Moments]:
        assert self._whole is not None
        for place, value in zip(self._scalars.unbind(), scalars, strict=True):
            place.fill_(value)  # a GPU need not wait for this
        loss, new, *rest = self._whole(*self.passes.state, x, log_importance_ratio, self._scalars, weights, *moments)
        return loss, new, Moments(*rest)

    def possible(self, x: Tensor) -> Tensor:
        """Return which base points (S,) lead to where the flow and the density are finite; S gradient evaluations."""
        z, log_q, score_q, _ = self.passes.sample(x)
        log_p, score_p = self.density.value_and_grad(z)
        return torch.isfinite(torch.cat([score_p, score_q, log_p[:, None], log_q[:, None]], 1)).all(1)

    def _make_whole(self, x: Tensor, weights: Tensor) -> None:
        """Find the step as one graph, recorded and checked where base points ``x`` lead, if there is one."""
        with torch.no_grad():
            graph = self.density.graph(self.flow.sample_with_score(at=x)[0])
        if graph is not None:
            self._whole = _whole(self.density, graph, self.passes.kind, weights)
            self._check(x, weights)

    def _check(self, x: Tensor, weights: Tensor) -> None:
        """Compare a first step with autograd's and the model's own: its loss, and a tenth of the gradient."""
        none, fresh = torch.zeros_like(x[:, 0]), Moments.fresh(weights)
        z, log_q, score_q = self.flow.sample_with_score(at=x)
        log_p, score_p = self.density.unrecorded(z)
        pull, terms, log_weights = pulled(log_p, score_p, log_q, score_q, none, forward=0.5)
        trained = [parameter for parameter in self.flow.parameters() if parameter.requires_grad]
        gradient = gradient_of((pull * z).sum(), trained)
        loss, _, expected = advance(weights, fresh, gradient, terms, log_weights, 0.0)
        with torch.no_grad():
            found, _, after = self._run(weights, fresh, x, none, 0.0, 0.5)
        size = torch.maximum(expected.mean.abs().max(), 1e-3 * score_q.abs().max())  # p may be q
        if int(expected.skipped) or not agree((found, after.mean / size), (loss, expected.mean / size)):
            raise RuntimeError("the graph gave other values than the flow and the model")


# ---- one graph -------------------------------------------------------------------------------------------------------

_wholes: WeakKeyDictionary[LogDensity, Cache[object, tuple[Kind, fx.GraphModule, Runner]]] = WeakKeyDictionary()


def _whole(density: LogDensity, graph: fx.GraphModule, kind: Kind, weights: Tensor) -> Runner:
    """Return the step as one graph, the one that is known for such flows on this density."""
    known, key = _wholes.setdefault(density, Cache(8)), (id(kind), id(graph))
    make = lambda: (kind, graph, Runner(stitched(graph, kind, weights)))  # noqa: E731
    return known.of(key, make)[-1]  # with kind and graph kept, so that ids stay theirs


def stitched(graph: fx.GraphModule, kind: Kind, weights: Tensor, given: Sequence[Tensor] = ()) -> fx.GraphModule:
    """Return a step as one graph.

    It takes ``(*state, x, *given, log_importance_ratio, scalars, weights, *moments)`` to ``(loss, weights, *moments)``.

    Args:
        graph: of the density: ``(z, *given)`` to values and gradients.
        kind: of the flow.
        weights: examples of the trained parameters (W,).
        given: examples of what the density takes besides.
    """
    like, whole = kind.like, Stitcher()
    state = kind.inputs(whole)
    z, log_q, score_q, tape = kind.add_forward(whole, state, whole.input(like))
    log_p, score_p = whole.add(graph, [z, *map(whole.input, given)])
    none, scalars, moments = torch.zeros_like(like[:, 0]), weights.new_ones(2), Moments.fresh(weights)
    values = log_p.meta["val"].dtype
    given = [none.to(values), like, none.clone(), like.clone(), none.clone(), scalars]
    pulling = record(_pulling, *(part.clone() for part in given))
    ratios, rate_and_blend = whole.input(none), whole.input(scalars)
    pull, terms, log_weights = whole.add(pulling, [log_p, score_p, log_q, score_q, ratios, rate_and_blend])
    gradient = kind.add_backward(whole, state, tape, pull)
    held = [weights, *moments]
    updating = record(_updating, weights.clone(), none.clone(), none + 1.0, scalars, *(part.clone() for part in held))
    outputs = whole.add(updating, [gradient, terms, log_weights, rate_and_blend, *map(whole.input, held)])
    return whole.finish(outputs)


def _pulling(
    log_p: Tensor, score_p: Tensor, log_q: Tensor, score_q: Tensor, log_importance_ratio: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    log_p = log_p.to(log_q.dtype)
    return pulled(log_p, score_p, log_q, score_q, log_importance_ratio, forward=scalars[1])


def _updating(
    gradient: Tensor, terms: Tensor, log_weights: Tensor, scalars: Tensor, weights: Tensor, *moments: Tensor
) -> tuple[Tensor, ...]:
    loss, weights, after = advance(weights, Moments(*moments), gradient, terms, log_weights, scalars[0])
    return loss, weights, *after
