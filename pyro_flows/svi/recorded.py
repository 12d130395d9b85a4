"""The path gradient of one SVI step as a recorded graph, with the data as inputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_flows.flows.flow import Flow
from pyro_flows.graphs import Runner, Stitcher, agree, record
from pyro_flows.model.batching import quiet
from pyro_flows.model.gradients import values_and_grads
from pyro_flows.model.log_density import LogDensity
from pyro_flows.objectives import pulled
from pyro_flows.training.flow_graphs import Passes, gradient_of, points

STEEP = 5.0  # times the median length of a draw's gradient: with few draws, one would decide a step
Shapes = tuple[object, ...]
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # what is compared by how it is written


class Arguments:
    """A model's arguments: their tensors, which are inputs of a graph, and all else, which a graph depends on."""

    def __init__(self, args: Sequence[object], kwargs: dict[str, object]) -> None:
        leaves, self.form = tree_flatten((tuple(args), kwargs))
        self.where = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[place] for place in self.where]
        self.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for leaf in self.rest:
            if not isinstance(leaf, PLAIN):
                raise TypeError(f"an argument is a {type(leaf).__name__}, and no tensor")

    @property
    def key(self) -> Shapes:
        """What arguments have to agree in to go through one graph."""
        shapes = tuple((part.shape, part.dtype, part.device) for part in self.tensors)
        return (str(self.form), shapes, tuple(map(repr, self.rest)))

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return arguments and keyword arguments with other tensors in the place of these."""
        leaves = list(self.rest)
        for place, value in zip(self.where, tensors, strict=True):
            leaves[place] = value
        form: TreeSpec = self.form
        args, kwargs = tree_unflatten(leaves, form)
        return args, kwargs


class RecordedStep:
    """From base points and data to the terms of the ELBO and the path gradient, as one graph.

    The graph reads the parameters of the flow, an unconditional one, where they are, so an optimizer changes them in
    place. The tensors among the model's arguments are inputs. ``like`` are base points (S, D) of the steps to come. An
    error of any kind says that a layer or the model cannot be recorded, or that the graph gives other values than they.
    """

    def __init__(self, flow: Flow, density: LogDensity, arguments: Arguments, like: Tensor) -> None:
        self.flow, self.density = flow, density
        self.parameters = [parameter for parameter in flow.parameters() if parameter.requires_grad]
        self.passes = Passes(flow, like, [parameter.detach() for parameter in self.parameters])
        self._run = Runner(self._graph(arguments))
        self._check(like, arguments.tensors)

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the terms (S,) at base points (S, D) with these data, and the gradient (W,) of the loss."""
        terms, gradient = self._run(*self.passes.state, x, *tensors)
        return terms, gradient

    def _graph(self, arguments: Arguments) -> fx.GraphModule:
        kind, whole, bare = self.passes.kind, Stitcher(), copy.copy(self.density)

        def scored(z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            bare.args, bare.kwargs = arguments.with_tensors(tensors)
            with torch.no_grad(), quiet():
                return values_and_grads(bare.single, z)

        state, x = kind.inputs(whole), whole.input(kind.like)
        given = [whole.input(part) for part in arguments.tensors]
        z, log_q, score_q, tape = kind.add_forward(whole, state, x)
        with torch.no_grad():
            examples = [self.flow.sample_with_score(at=points(kind.like))[0], *arguments.tensors]
        log_p, score_p = whole.add(record(scored, *examples), [z, *given])
        none = torch.zeros_like(kind.like[:, 0])
        values = [none.to(log_p.meta["val"].dtype), kind.like.clone(), none.clone(), kind.like.clone()]
        pull, terms = whole.add(record(_pull, *values), [log_p, score_p, log_q, score_q])
        return whole.finish([terms, kind.add_backward(whole, state, tape, pull)])

    def _check(self, like: Tensor, tensors: Sequence[Tensor]) -> None:
        """Compare a step with autograd's and the model's own."""
        x = 0.5 * points(like)
        found = self(x, tensors)
        if not agree(found, eager_step(self.flow, self.density, self.parameters, x)):
            raise RuntimeError("the graph gave other values than the flow and the model")


def eager_step(flow: Flow, density: LogDensity, parameters: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :class:`RecordedStep` returns, by autograd and by the model itself."""
    z, log_q, score_q = flow.sample_with_score(at=x)
    log_p, score_p = density.unrecorded(z)
    pull, terms = _pull(log_p, score_p, log_q, score_q)
    return terms, gradient_of((pull * z).sum(), parameters)


def _pull(log_p: Tensor, score_p: Tensor, log_q: Tensor, score_q: Tensor) -> tuple[Tensor, Tensor]:
    none = torch.zeros_like(log_q)
    found = pulled(log_p.to(log_q.dtype), score_p.to(log_q.dtype), log_q, score_q, none, steep=STEEP)
    return found[0], found[1]
