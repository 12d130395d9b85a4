"""A joint graph of two passes, partitioned into a graph of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx
from torch.fx.node import Argument

from pyro_flows.model.graphs.graph import graph_module, sweep

_aten = torch.ops.aten
_VIEWS = (_aten.t.default, _aten.view.default, _aten.unsqueeze.default, _aten.expand.default, _aten.slice.Tensor)


def partition(module: fx.GraphModule, results: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Partition the joint graph of two passes into a forward and a backward graph.

    The joint graph takes ``(*inputs, cotangent)``. Its first ``results`` results are those of the forward pass, and do
    not depend on the cotangent. The forward graph takes ``inputs`` to these results and to what is saved. The backward
    graph takes ``(*inputs, *saved, cotangent)`` to the other results.

    >>> from pyro_flows.model.graphs.recording import record
    >>> joint = record(lambda x, pull: (x.exp(), pull * x.exp()), torch.zeros(2), torch.ones(2))
    >>> forward, backward = partition(joint, 1)
    >>> value, saved = forward(torch.zeros(2))
    >>> backward(torch.zeros(2), saved, torch.full((2,), 3.0))
    (tensor([3., 3.]),)
    """
    graph = module.graph
    *inputs, cotangent = (node for node in graph.nodes if node.op == "placeholder")
    (output,) = (node for node in graph.nodes if node.op == "output")
    found = list(output.args[0])
    late = {cotangent}
    for node in graph.nodes:
        if node.op == "call_function" and late.intersection(node.all_input_nodes):
            late.add(node)
    saved: dict[fx.Node, None] = {}

    def need(nodes: Iterable[Argument]) -> None:
        for node in nodes:
            if not isinstance(node, fx.Node) or node in late or node.op != "call_function":
                continue
            if node.target in _VIEWS:
                need(node.all_input_nodes)  # made anew: a view costs less than handing it over
            else:
                saved[node] = None

    for node in late:
        need(node.all_input_nodes)
    need(found[results:])
    forward = _part(module, inputs, [*found[:results], *saved])
    return forward, _part(module, [*inputs, *saved, cotangent], found[results:])


def _part(source: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """Return the part of ``source`` that leads from some of its nodes to others."""
    part, copies = fx.Graph(), {}
    for number, node in enumerate(inputs):
        copies[node] = part.placeholder(f"input_{number}")
        copies[node].meta = dict(node.meta)
    for node in source.graph.nodes:
        known = all(argument in copies for argument in node.all_input_nodes)
        if node.op in ("call_function", "get_attr") and node not in copies and known:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    sweep(part)
    return graph_module(source, part)
