"""Recorded graphs as functions that call torch's own bindings."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.graph import LIKE, copy_graph, int_at, is_aten, name_of, operation_of

Binding = Callable[..., Tensor | Sequence[Tensor]]
_aten = torch.ops.aten
_ELSEWHERE: dict[str, Binding] = {
    "linear": torch._C._nn.linear,
    "silu": torch._C._nn.silu,
    "split": torch.unsafe_split,
    "view": torch.reshape,  # a product may be stored otherwise than it was when the graph was recorded
    "_unsafe_view": torch.reshape,
    "expand": torch.Tensor.expand,  # a method only
}
_OTHERWISE = ("index", "index_put", "scalar_tensor")  # whose bindings take other arguments


def bound(module: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """Return the graph as a function that calls torch's own bindings, which take half of an operator object's time.

    Call it without autograd.
    """
    graph = copy_graph(module.graph)
    for node in graph.nodes:
        if is_aten(node):
            _bind(node)
    quick = fx.GraphModule(module, graph)
    constants = dict(quick.named_buffers())
    quick._buffers.clear()
    quick.__dict__.update(constants)  # plain attributes, which Python finds at once
    return quick.forward


def binding_of(node: fx.Node) -> Binding:
    """Return torch's binding of an operation that takes the same arguments, or the operator object."""
    name = name_of(node)
    if node.target is _aten.view.dtype:
        return torch.Tensor.view
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in LIKE or name in _OTHERWISE or not hasattr(torch._C._VariableFunctions, name) or not hasattr(torch, name):
        return operation_of(node)
    return getattr(torch, name)


def _bind(node: fx.Node) -> None:
    """Put torch's binding of the same operation in place of the operator object, where there is one."""
    name = name_of(node)
    if node.target is _aten.slice.Tensor and len(node.args) == 4 and node.args[1] in (0, 1, 2):
        tensor, _, start, stop = node.args
        node.args = tensor, (slice(None),) * int_at(node, 1) + (slice(start, stop),)
        node.target = operator.getitem
    elif name in LIKE:
        node.target = getattr(torch, name)
        node.kwargs = {key: value for key, value in node.kwargs.items() if (key, value) != ("pin_memory", False)}
    else:
        node.target = binding_of(node)
