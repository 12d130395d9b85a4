"""The passes of a layer as flat graphs of tensor operations, recorded once for all layers of a kind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from pyro_flows.graphs import quicken, record
from pyro_flows.transforms.base import Bijection

BODIES_KEPT = 64

_aten = torch.ops.aten
_VIEWS = (_aten.t.default, _aten.view.default, _aten.unsqueeze.default, _aten.expand.default, _aten.slice.Tensor)


class Body(NamedTuple):
    """The forward pass of a layer with the score, and the vector-Jacobian product of its value.

    ``forward(*state, x, score)`` returns ``(y, ladj, score, *saved)``. ``backward(*state, x, score, *saved, pull)``
    returns the gradients of ``(pull * y).sum()`` along x and along each of the layer's parameters that are trained.
    ``state`` are the layer's parameters, then its buffers, in the order of :func:`state_of`; ``saved`` tensors go from
    one to the other. The graphs are those that both run.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    saved: int
    forward_graph: fx.GraphModule
    backward_graph: fx.GraphModule


def state_of(layer: nn.Module) -> list[Tensor]:
    """Return a layer's parameters, then its buffers."""
    return [*layer.parameters(), *layer.buffers()]


def body_of(layer: Bijection, x: Tensor) -> Body:
    """Return the recorded passes of ``layer`` for batches like ``x`` (S, D); layers of one kind share one.

    Raises:
        Exception: of any kind, if the layer's code cannot be recorded (branches on values), or repeats badly.
    """
    key = (_kind(layer), x.shape, x.dtype, x.device)
    if key not in _bodies:
        _bodies[key] = _record(layer, x)
        while len(_bodies) > BODIES_KEPT:
            _bodies.popitem(last=False)
    _bodies.move_to_end(key)
    return _bodies[key]


_bodies: OrderedDict[Any, Body] = OrderedDict()


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What the code of a layer depends on, besides the values of its parameters and buffers."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        plain = sorted((key, value) for key, value in vars(module).items() if _is_plain(value))
        other = [key for key, value in vars(module).items() if not _is_plain(value) and key not in _MODULE_STATE]
        tensors = [
            (key, value.shape, value.dtype, value.requires_grad)
            for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        ]
        found.append((name, type(module), tuple(plain), tuple(tensors), id(module) if other else None))
    return tuple(found)


_MODULE_STATE = frozenset(vars(nn.Module()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, torch.Size)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


class _Scored(nn.Module):
    """Makes ``forward_and_score`` the call that ``functional_call`` makes."""

    def __init__(self, layer: Bijection) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.layer.forward_and_score(x, score)


def _joint(layer: Bijection) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return both passes as one function of ``(*state, x, score, cotangent)``."""
    scored, trained = _Scored(layer), [parameter.requires_grad for parameter in layer.parameters()]
    names = [*dict(scored.named_parameters()), *dict(scored.named_buffers())]

    def passes(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        *state, x, score, cotangent = inputs
        leaves = [part.detach().requires_grad_() for part, free in zip(state, trained, strict=False) if free]
        left = iter(leaves)
        given = [next(left) if free else part for part, free in zip(state, trained, strict=False)]
        root = x.detach().requires_grad_()
        with torch.enable_grad():
            tensors = dict(zip(names, [*given, *state[len(trained) :]], strict=True))
            y, ladj, score = torch.func.functional_call(scored, tensors, (root, score))
        grads = torch.autograd.grad(y, [root, *leaves], cotangent, allow_unused=True)
        present = [
            torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, [root, *leaves], strict=True)
        ]
        return (y.detach(), ladj.detach(), score.detach(), *present)

    return passes


def _record(layer: Bijection, x: Tensor) -> Body:
    joint, state = _joint(layer), [part.detach() for part in state_of(layer)]
    wave = torch.sin(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)
    body = _split(record(joint, *state, x, wave, wave.clone()).graph, len(state) + 2)
    other = [*state, x + 0.1 * wave, wave.flip(0), 1.0 - wave]
    with torch.no_grad():
        out: list[Tensor] = body.forward(*other[:-1])
        ours = (*out[:3], *body.backward(*other[:-1], *out[3:], other[-1]))
    tolerance = 1e-8 if x.dtype == torch.float64 else 1e-3
    for recorded, plain in zip(ours, joint(*other), strict=True):
        assert plain is not None
        if not torch.allclose(recorded, plain, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise RuntimeError(f"{type(layer).__name__}: the graph gave other values at new points")
    return body


# ---- cutting in two --------------------------------------------------------------------------------------------------


def _split(graph: fx.Graph, inputs: int) -> Body:
    """Cut the joint graph in two: what does not need the cotangent, and the rest, given what it needs of the first."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    (result,) = (node for node in graph.nodes if node.op == "output")
    results = list(result.args[0])  # type: ignore[arg-type]
    late = {placeholders[inputs]}
    for node in graph.nodes:
        if node.op == "call_function" and late.intersection(node.all_input_nodes):
            late.add(node)
    saved: dict[fx.Node, None] = {}

    def need(nodes: Iterable[Any]) -> None:
        for node in nodes:
            if not isinstance(node, fx.Node) or node in late or node.op != "call_function":
                continue
            if node.target in _VIEWS:
                need(node.all_input_nodes)  # made anew: a view costs less than handing it over
            else:
                saved[node] = None

    for node in late:
        need(node.all_input_nodes)
    need(results[3:])
    forward = _graph(graph, placeholders[:inputs], [*results[:3], *saved])
    backward = _graph(graph, [*placeholders[:inputs], *saved, placeholders[inputs]], results[3:])
    return Body(quicken(forward), quicken(backward), len(saved), forward, backward)


def _graph(source: fx.Graph, inputs: list[fx.Node], outputs: list[Any]) -> fx.GraphModule:
    """Return the part of ``source`` that leads from some of its nodes to others."""
    part, copies = fx.Graph(), {}
    for number, node in enumerate(inputs):
        copies[node] = part.placeholder(f"input_{number}")
        copies[node].meta = dict(node.meta)
    for node in source.nodes:
        known = all(argument in copies for argument in node.all_input_nodes)
        if node.op in ("call_function", "get_attr") and node not in copies and known:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    part.eliminate_dead_code()
    return fx.GraphModule(source.owning_module, part)  # type: ignore[arg-type]
