"""Recorded graphs as functions that call torch's own bindings, with cheaper operations where some are known."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, fx

from pyro_flows.graphs.graph import (
    LIKE,
    constant_node,
    copy_graph,
    graph_module,
    int_at,
    is_aten,
    is_pure,
    name_of,
    node_at,
    operation_of,
    sweep,
)  # fmt: skip

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
_BY_NUMBER = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.rsub.Scalar)
NARROW, LARGE = 12, 2**13  # columns of a product, and numbers in its first factor, that make it faster transposed


def peephole(module: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """Return the graph as a function that calls torch's own bindings, which take half of an operator object's time.

    Call it without autograd. What it computes is the same but for rounding; whoever records checks that.
    """
    graph = copy_graph(module.graph)
    quick = graph_module(module, graph)
    if is_pure(module) and not any(node.target is _aten.as_strided.default for node in graph.nodes):
        for node in list(graph.nodes):
            value = _value(node)
            if isinstance(value, Tensor) and value.device.type == "cpu":
                if node.target in _BY_NUMBER:
                    _hold_number(quick, node, value)
                elif node.target is _aten.view.default:
                    _sum_at_once(node, value)
                elif node.target is _aten.addmm.default:
                    _as_linear(node)
                _multiply_and_add(node, value)
            transpose_product(node)
        sweep(graph)
    for node in graph.nodes:
        if is_aten(node):
            _bind(node)
    quick = fx.GraphModule(quick, graph)
    constants = dict(quick.named_buffers())
    quick._buffers.clear()
    quick.__dict__.update(constants)  # plain attributes, which Python finds at once
    return quick.forward


def _hold_number(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Make a number a tensor once and for all, as torch does in each call."""
    first, number, *factor = node.args
    like = _value(first)
    if not isinstance(first, fx.Node) or node.kwargs or value.dim() == 0 or like is None or like.dtype != value.dtype:
        return
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return
    if value.dtype not in (torch.float32, torch.float64):  # narrower numbers are worked on in a wider type
        return
    if node.target is _aten.mul.Tensor and first.target is _aten.neg.default:
        first, number = node_at(first, 0), -number
    constant = torch.tensor(number, dtype=value.dtype, device=value.device)
    with node.graph.inserting_before(node):
        held = constant_node(node.graph, module, f"number_{len(module._buffers)}", constant)
    if node.target is _aten.rsub.Scalar:
        node.target, node.args = _aten.sub.Tensor, (held, first)
        node.kwargs = {"alpha": factor[0]} if factor else {}
    else:
        node.args = (first, held)


def _multiply_and_add(node: fx.Node, value: Tensor) -> None:
    """Add a product, or take it away, in one operation, if it is not used elsewhere."""
    if node.target not in (_aten.add.Tensor, _aten.sub.Tensor) or node.kwargs or not value.is_floating_point():
        return
    for place in (1, 0) if node.target is _aten.add.Tensor else (1,):
        product = node.args[place]
        if isinstance(product, fx.Node) and product.target is _aten.mul.Tensor and len(product.users) == 1:
            parts = (node.args[1 - place], *product.args)
            if all(like is not None and like.dtype == value.dtype for like in map(_value, parts)):
                node.kwargs = {"value": -1} if node.target is _aten.sub.Tensor else {}
                node.target, node.args = _aten.addcmul.default, parts
                return


def _value(node: object) -> Tensor | None:
    """Return the example of a node's value, if there is one."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _sum_at_once(node: fx.Node, value: Tensor) -> None:
    """Sum over rows without keeping their axis, where it is dropped afterwards."""
    total = node_at(node, 0)
    like = _value(total)
    kept = total.target is _aten.sum.dim_IntList and total.args[1:] == ([0], True) and not total.kwargs
    if kept and value.dim() == 1 and like is not None and like.dim() == 2:
        node.target, node.args = _aten.sum.dim_IntList, (total.args[0], [0])


def _as_linear(node: fx.Node) -> None:
    """Leave it to torch to transpose the weights of a linear layer."""
    bias, x, weight = cast("tuple[fx.Node, ...]", node.args)
    like = _value(bias)
    if weight.target is _aten.t.default and like is not None and like.dim() == 1 and not node.kwargs:
        node.target, node.args = _aten.linear.default, (x, weight.args[0], bias)


def transpose_product(node: fx.Node) -> None:
    """Compute a product of few columns as one of few rows, which takes half of the time on a processor."""
    value = _value(node)
    if node.target is not _aten.mm.default or not isinstance(value, Tensor) or value.device.type != "cpu":
        return
    first, second = cast("tuple[fx.Node, ...]", node.args)
    like = _value(first)
    if 1 < value.shape[1] <= NARROW and like is not None and like.numel() >= LARGE:
        with node.graph.inserting_before(node):
            factors = (_transposed(second), _transposed(first))
            product = node.graph.call_function(_aten.mm.default, factors)
        node.target, node.args = _aten.t.default, (product,)


def _transposed(node: fx.Node) -> fx.Node:
    return node_at(node, 0) if node.target is _aten.t.default else node.graph.call_function(_aten.t.default, (node,))


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
