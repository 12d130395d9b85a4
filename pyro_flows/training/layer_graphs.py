"""The passes of a layer as flat graphs of tensor operations, recorded once for all layers of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from pyro_flows._batches import nearby
from pyro_flows._cache import Cache
from pyro_flows._tensors import pull
from pyro_flows.graphs import partition, record
from pyro_flows.transforms.base import Bijection


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

    Whoever uses them compares them with the layer itself once, see ``flow_graphs.Passes.check``.

    Raises:
        Exception: of any kind, if the layer's code cannot be recorded (branches on values).
    """
    kind = _kind(layer)
    if kind is None:
        return _record(layer, x)
    return _bodies.of((kind, x.shape, x.dtype, x.device), lambda: _record(layer, x))


_bodies: Cache[object, Body] = Cache(64)
_MODULE_STATE = frozenset(vars(nn.Module()))
_HOOKS = [key for key in _MODULE_STATE if "hooks" in key and "state_dict" not in key]


def _kind(layer: nn.Module) -> tuple[object, ...] | None:
    """What the code of a layer depends on, besides the values of its parameters and buffers; None if that is not known.

    It is not known of a layer that has hooks, or attributes that are no plain values.
    """
    found: list[object] = []
    places: dict[int, int] = {}
    for name, module in layer.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _MODULE_STATE}
        if any(vars(module).get(key) for key in _HOOKS) or not all(map(_is_plain, own.values())):
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
    graph = record(_joint(layer), *state, x, score, score.clone(), joint=True)
    return Body(*partition(graph, 3))
