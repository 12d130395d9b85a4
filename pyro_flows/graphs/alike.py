"""Special functions that a loop calls one by one, called once: a call of torch's takes as long as thousands of them.

What the interpreter does itself needs no such thing. A model with a site for each of a hundred truncated or gamma
distributions would else call ``log_ndtr`` or ``lgamma`` a hundred times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from pyro_flows.graphs.graph import copy_node, graph_module, has_tag, key_of, name_of, new_node
from pyro_flows.graphs.points import POINTS
from pyro_flows.graphs.sums import like_of

FEWEST = 8  # calls that become one, at least
SMALL = 2**12  # numbers of one, at most: the time of larger ones goes with their numbers
_aten = torch.ops.aten


def join_calls(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without changes in place in which special functions that are alike are called once.

    Alike are calls of one function that have the same distance from the inputs, so that none waits for another one.
    The same graph comes back where there are few, or where random numbers or places in memory depend on the order.

    >>> from pyro_flows.graphs.recording import record
    >>> loop = record(lambda x: (sum(part.lgamma() for part in x.unbind()),), torch.ones(50, 3))
    >>> sum(node.target is torch.ops.aten.lgamma.default for node in loop.graph.nodes)
    1
    """
    random, placed = torch.Tag.nondeterministic_seeded, _aten.as_strided.default
    levels: dict[fx.Node, int] = {}
    kinds: defaultdict[object, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        levels[node] = 1 + max((levels[other] for other in node.all_input_nodes), default=0)
        if has_tag(node, random) or node.target is placed:
            return module
        if _is_special(node):
            value: Tensor = node.meta["val"]
            options = [None if isinstance(part, fx.Node) else key_of(part) for part in node.args]
            kinds[levels[node], node.target, tuple(options), key_of(node.kwargs), value.dtype].append(node)
    groups = {node: nodes for nodes in kinds.values() if len(nodes) >= FEWEST for node in nodes}
    if not groups:
        return module
    written, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in sorted(module.graph.nodes, key=levels.__getitem__):  # in the order that there was, level by level
        if node not in groups:
            copies[node] = copy_node(written, node, copies)
        elif node not in copies:
            _call(written, groups[node], copies)
    return graph_module(module, written)


def _is_special(node: fx.Node) -> bool:
    """Whether a function of one tensor does the same to each number, and is none of the interpreter's."""
    if not has_tag(node, torch.Tag.pointwise) or name_of(node) in POINTS:
        return False
    given = [part for part in node.args if isinstance(part, fx.Node)]
    value = node.meta.get("val")
    if len(given) != 1 or len(node.all_input_nodes) != 1 or not isinstance(value, Tensor) or value.numel() > SMALL:
        return False
    taken = given[0].meta["val"]
    return bool(taken.shape == value.shape and taken.dtype == value.dtype)


def _call(graph: fx.Graph, nodes: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
    """Add one call for all nodes, whose copies become parts of its result."""
    first, sizes = nodes[0], [node.meta["val"].numel() for node in nodes]
    like: Tensor = first.meta["val"]
    given = [copies[node.all_input_nodes[0]] for node in nodes]
    flat = [
        new_node(graph, _aten.reshape.default, (x, [size]), like_of(like, size))
        for x, size in zip(given, sizes, strict=True)
    ]
    whole = like_of(like, sum(sizes))
    joined = new_node(graph, _aten.cat.default, (flat,), whole)
    args = tuple(joined if isinstance(part, fx.Node) else part for part in first.args)
    called = new_node(graph, first.target, args, whole, dict(first.kwargs))
    begin = 0
    for node, size in zip(nodes, sizes, strict=True):
        part = new_node(graph, _aten.slice.Tensor, (called, 0, begin, begin + size), like_of(like, size))
        copies[node] = new_node(graph, _aten.reshape.default, (part, [*node.meta["val"].shape]), node.meta["val"])
        begin += size
