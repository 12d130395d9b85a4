"""A flow's two passes for the path gradient as flat graphs of tensor operations, without autograd.

Each layer is recorded once for all layers of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from pyro_flows.flows import bases
from pyro_flows.flows.flow import Flow
from pyro_flows.model.graphs import Runner, Stitcher, agree, partition, record
from pyro_flows.support.numbers.cache import Cache
from pyro_flows.support.numbers.tensors import nearby, pull
from pyro_flows.transforms.base import Bijection, hooked
from pyro_flows.transforms.compose import Compose


class Body(NamedTuple):
    """The forward pass of a layer with the score, and the vector-Jacobian product of its value, as graphs.

    ``forward(*state, x, score)`` returns ``(y, ladj, score, *saved)``. ``backward(*state, x, score, *saved, pull)``
    returns the gradients of ``(pull * y).sum()`` along x and along each of the layer's parameters that are trained.
    ``state`` are the layer's parameters, then its buffers, in the order of :func:`state_of`; ``saved`` tensors go from
    one to the other.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule


def state_of(layer: nn.Module) -> list[Tensor]:
    """Return a layer's parameters, then its buffers."""
    return [*layer.parameters(), *layer.buffers()]


def body_of(layer: Bijection, x: Tensor) -> Body:
    """Return the recorded passes of ``layer`` for batches like ``x`` (S, D); layers of one kind share one.

    Whoever uses them compares them with the layer itself once, see :meth:`Passes.check`.

    Raises:
        Exception: of any kind, if the layer's code cannot be recorded (branches on values).
    """
    kind = _layer_kind(layer)
    if kind is None:
        return _record(layer, x)
    return _bodies.of((kind, x.shape, x.dtype, x.device), lambda: _record(layer, x))


_bodies: Cache[object, Body] = Cache(64)
_MODULE_STATE = frozenset(vars(nn.Module()))


def _layer_kind(layer: nn.Module) -> tuple[object, ...] | None:
    """What the code of a layer depends on, besides the values of its parameters and buffers; None if that is not known.

    It is not known of a layer that has hooks, or attributes that are no plain values.
    """
    found: list[object] = []
    places: dict[int, int] = {}
    for name, module in layer.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _MODULE_STATE}
        if hooked(module) or not all(map(_is_plain, own.values())):
            return None
        tensors = [
            (key, value.shape, value.dtype, value.requires_grad, places.setdefault(id(value), len(places)))
            for key, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None
        ]
        found.append((name, type(module), tuple(sorted(own.items())), module.training, tuple(tensors)))
    return tuple(found)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, torch.Size)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


class _Scored(nn.Module):
    """Makes ``forward_and_score`` the call that ``functional_call`` makes."""

    def __init__(self, layer: Bijection) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer.forward_and_score(x, score)


def _joint(layer: Bijection) -> Callable[..., tuple[Tensor, ...]]:
    """Return both passes as one function of ``(*state, x, score, pull)``."""
    scored, trained = _Scored(layer), [parameter.requires_grad for parameter in layer.parameters()]
    names = [*dict(scored.named_parameters()), *dict(scored.named_buffers())]

    def passes(*inputs: Tensor) -> tuple[Tensor, ...]:
        *state, x, score, cotangent = inputs
        leaves = [part.detach().requires_grad_() for part, free in zip(state, trained, strict=False) if free]
        left = iter(leaves)
        given = [next(left) if free else part for part, free in zip(state, trained, strict=False)]
        root = x.detach().requires_grad_()
        with torch.enable_grad():
            tensors = dict(zip(names, [*given, *state[len(trained) :]], strict=True))
            y, ladj, score = torch.func.functional_call(scored, tensors, (root, score))
        gradients = pull(y, cotangent, [root, *leaves])
        return (y.detach(), ladj.detach(), score.detach(), *gradients)

    return passes


def _record(layer: Bijection, x: Tensor) -> Body:
    state, score = [part.detach() for part in state_of(layer)], nearby(x)
    # tensors that are one would be one input
    graph = record(_joint(layer), *state, x, score, score.clone())
    return Body(*partition(graph, 3))


class Kind:
    """What flows of one kind have in common: the recorded passes of their layers, to be put together.

    ``forward(*state, x)`` returns ``(z, log q(z), score, *tape)``; ``backward(*state, *tape, cotangent)`` returns the
    gradient of ``(cotangent * z).sum()`` along all trained parameters, as one vector. Orders are not among the inputs.

    Args:
        flow: one of them.
        bodies: of its layers.
        state: all layers' parameters and buffers, one layer after the other; orders of coordinates are the same in all
            flows of a kind, of the rest these are examples,
        ends: and where each layer's begin and end.
        like: base points (S, D).
    """

    def __init__(
        self, flow: Flow, bodies: Sequence[Body], state: Sequence[Tensor], ends: Sequence[int], like: Tensor
    ) -> None:
        self.bodies, self.ends, self.like = tuple(bodies), tuple(ends), like
        self._orders = {number: part.clone() for number, part in enumerate(state) if is_order(part)}
        self._state = [part.new_zeros(()).expand(part.shape) for part in state]  # not the weights of the first flow
        base, df = flow.base, flow.df
        self._at_base = record(lambda x: (bases.log_density(base, x, df).sum(-1), bases.score(base, x, df)), like)

    def add_forward(
        self, whole: Stitcher, state: Sequence[fx.Node], x: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node, list[list[fx.Node]]]:
        """Add the forward pass to a graph; return z, log q, the score, and what is kept of each layer."""
        log_q, score = whole.add(self._at_base, [x])
        tape: list[list[fx.Node]] = []
        for body, (first, last) in zip(self.bodies, pairwise(self.ends), strict=True):
            y, ladj, carried, *saved = whole.add(body.forward, [*state[first:last], x, score])
            tape.append([x, score, *saved])
            log_q = whole.call(torch.ops.aten.sub.Tensor, (log_q, ladj), log_q.meta["val"])
            x, score = y, carried
        return x, log_q, score, tape

    def add_backward(
        self, whole: Stitcher, state: Sequence[fx.Node], tape: Sequence[Sequence[fx.Node]], cotangent: fx.Node
    ) -> fx.Node:
        """Add the backward pass to a graph; return the gradient."""
        found: list[fx.Node] = []
        for number in reversed(range(len(self.bodies))):
            first, last = self.ends[number : number + 2]
            given = [*state[first:last], *tape[number], cotangent]
            cotangent, *gradients = whole.add(self.bodies[number].backward, given)
            found += reversed(gradients)
        return whole.join(reversed(found))

    def inputs(self, whole: Stitcher) -> list[fx.Node]:
        """Add the state to a graph: orders as constants, the rest as inputs."""
        return [
            whole.constant(self._orders[number]) if number in self._orders else whole.input(part)
            for number, part in enumerate(self._state)
        ]

    @cached_property
    def graphs(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Both passes, each as a graph of its own."""
        forward, backward = Stitcher(), Stitcher()
        z, log_q, score, tape = self.add_forward(forward, self.inputs(forward), forward.input(self.like))
        state = self.inputs(backward)
        kept = [[backward.input(node.meta["val"]) for node in nodes] for nodes in tape]
        gradient = self.add_backward(backward, state, kept, backward.input(self.like))
        outputs = [z, log_q, score, *(node for nodes in tape for node in nodes)]
        return forward.finish(outputs), backward.finish([gradient])


class Passes:
    r"""Draw with a score, then pull a cotangent of the draws back to the parameters: what one training step needs.

    The arithmetic is that of :meth:`Flow.sample_with_score` and of autograd, but each kind of layer is recorded as two
    flat graphs once (:class:`Body`), these are put together into one for each pass, and run without
    Python's modules and without a tape. When they have run often enough to pay for it, both are compiled.

    Args:
        flow: an unconditional flow; its layers must keep the shape of an event.
        like: base points (S, D) of the batches to come.
        weights: the flow's parameters that are trained, in their order; the passes read these tensors, not the flow's.

    Raises:
        Exception: of any kind, if some layer cannot be recorded.
    """

    def __init__(self, flow: Flow, like: Tensor, weights: Sequence[Tensor]) -> None:
        layers = list(flat(flow.bijection))
        owned = [parameter for layer in layers for parameter in layer.parameters()]
        if [id(parameter) for parameter in owned] != [id(parameter) for parameter in flow.parameters()]:
            raise ValueError("layers: expected parameters that belong to one layer each.")
        own = iter(weights)
        bodies: list[Body] = []
        self.flow = flow
        self.state: list[Tensor] = []  # of all layers, one after the other
        ends = [0]
        for layer in layers:
            bodies.append(body_of(layer, like))
            self.state += [next(own) if part.requires_grad else part.detach() for part in layer.parameters()]
            self.state += layer.buffers()
            ends.append(len(self.state))
        self.kind = _kind(flow, bodies, self.state, ends, like)
        self.state = [part for part in self.state if not is_order(part)]

    @torch.no_grad()
    def sample(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return ``z``, ``log q(z)``, the score and what :meth:`pull` needs, for base points ``x`` (S, D)."""
        z, log_q, score, *tape = self._runners[0](*self.state, x)
        return z.clone(), log_q.clone(), score.clone(), tape

    @torch.no_grad()
    def pull(self, tape: list[Tensor], cotangent: Tensor) -> Tensor:
        """Return the gradient of ``(cotangent * z).sum()`` along all parameters, as one vector."""
        return self._runners[1](*self.state, *tape, cotangent)[0].clone()

    @cached_property
    def _runners(self) -> tuple[Runner, Runner]:
        forward, backward = self.kind.graphs
        return Runner(forward), Runner(backward)

    def check(self, like: Tensor) -> None:
        """Compare with the flow and autograd; bodies may come from other flows.

        Raises:
            RuntimeError: if the graphs give other numbers.
        """
        x = points(like)
        pull = torch.cos(x)
        z, log_q, score = self.flow.sample_with_score(at=x)
        trained = [parameter for parameter in self.flow.parameters() if parameter.requires_grad]
        expected = (z.detach(), log_q, score, gradient_of((pull * z).sum(), trained))
        z, log_q, score, tape = self.sample(x)
        if not agree((z, log_q, score, self.pull(tape, pull)), expected):
            raise RuntimeError("the graphs gave other values than the flow")


def is_order(part: Tensor) -> bool:
    """Whether a layer's parameter or buffer says how coordinates are arranged: each of 0 to D - 1 once."""
    if part.dtype != torch.long or part.dim() != 1 or not len(part) or int(part.max()) >= len(part):
        return False
    return torch.equal(part.sort()[0], torch.arange(len(part), device=part.device))


def points(like: Tensor) -> Tensor:
    """Return points between -2 and 2 in the shape of ``like``, to check graphs at."""
    return 2.0 * torch.sin(torch.arange(like.numel(), dtype=like.dtype, device=like.device)).reshape(like.shape)


def gradient_of(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a loss along parameters by autograd, as one vector."""
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


_kinds: Cache[object, Kind] = Cache(16)


def _kind(flow: Flow, bodies: Sequence[Body], state: Sequence[Tensor], ends: Sequence[int], like: Tensor) -> Kind:
    """Return the kind of a flow, a known one if there is one."""
    orders = tuple(tuple(part.tolist()) for part in state if is_order(part))
    bodies_known = tuple(map(id, bodies))  # kept bodies keep their id
    key = (bodies_known, orders, flow.base, flow.df, like.shape, like.dtype, like.device)
    return _kinds.of(key, lambda: Kind(flow, bodies, state, ends, like))


def flat(bijection: Bijection) -> Iterator[Bijection]:
    if isinstance(bijection, Compose):
        for layer in bijection.layers:
            yield from flat(layer)
    else:
        yield bijection
