"""Many small operations of a flat graph as a few large ones: gradients of parts of one tensor, and special functions.

Gradients of parts, each filled up with zeros, are put side by side instead of being added: a loop over the T entries of
a tensor would else add up T tensors of the size of the whole.

Special functions that a loop calls one by one are called once: a call of torch's takes as long as thousands of them.
What the interpreter does itself needs no such thing. A model with a site for each of a hundred truncated or gamma
distributions would else call ``log_ndtr`` or ``lgamma`` a hundred times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Target

from pyro_flows.model.graphs.graph import (
    copy_node,
    graph_module,
    has_tag,
    int_at,
    ints_at,
    key_of,
    name_of,
    new_node,
    node_at,
    sweep,
)
from pyro_flows.model.graphs.points import POINTS

_aten = torch.ops.aten
_ADDED, _TAKEN = _aten.add.Tensor, _aten.sub.Tensor
_ROW, _SLICE = _aten.select_backward.default, _aten.slice_backward.default


def like_of(value: Tensor, *shape: int) -> Tensor:
    """Return an example of this shape that takes no memory."""
    return torch.empty((), dtype=value.dtype, device=value.device).expand(shape)


def zeros(graph: fx.Graph, like: Tensor) -> fx.Node:
    """Add zeros of this shape, dtype and device."""
    kwargs: dict[str, Argument] = {"dtype": like.dtype, "device": like.device}
    return new_node(graph, _aten.zeros.default, ([*like.shape],), like, kwargs)


def join_parts(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without changes in place in which sums of gradients of parts are joins of these parts.

    Parts that overlap are added as before, unless they are the same. Results are the same but for the order of sums.

    >>> from pyro_flows.model.graphs.recording import record
    >>> def gradient(x):
    ...     with torch.enable_grad():
    ...         x = x.detach().requires_grad_()
    ...         return torch.autograd.grad((x[:2] * x[2:].exp()).sum(), x)
    >>> targets = [node.target for node in record(gradient, torch.ones(4)).graph.nodes]  # by join_parts
    >>> torch.ops.aten.slice_backward.default in targets, torch.ops.aten.cat.default in targets
    (False, True)
    """
    graph = module.graph
    for node in list(graph.nodes):
        if is_plain_sum(node) and not (len(node.users) == 1 and is_plain_sum(next(iter(node.users)))):
            with graph.inserting_before(node):
                _join_terms(graph, node)
    sweep(graph)
    return graph_module(module, graph)


def is_plain_sum(node: fx.Node) -> bool:
    """Whether it is a sum or a difference of two tensors of one shape and dtype."""
    if node.target not in (_ADDED, _TAKEN) or node.kwargs or not all(isinstance(part, fx.Node) for part in node.args):
        return False
    value, others = node.meta["val"], [part.meta["val"] for part in node.all_input_nodes]
    return all(other.shape == value.shape and other.dtype == value.dtype for other in others)


def _terms(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return the terms of a sum and their signs; sums that are used elsewhere too are terms."""
    found: list[tuple[fx.Node, int]] = []
    left = [(node, 1)]
    while left:
        part, sign = left.pop()
        if part is node or (is_plain_sum(part) and len(part.users) == 1 and part.args[0] is not part.args[1]):
            left += [(node_at(part, 0), sign), (node_at(part, 1), sign if part.target is _ADDED else -sign)]
        else:
            found.append((part, sign))
    return found[::-1]


def _join_terms(graph: fx.Graph, node: fx.Node) -> None:
    """Join the terms of a sum that are gradients of rows, or of slices, along one axis, and have the same sign."""
    kinds: defaultdict[tuple[int, int, Target], list[fx.Node]] = defaultdict(list)
    rest: list[tuple[fx.Node, int]] = []
    for term, sign in _terms(node):
        if term.target is _ROW or (term.target is _SLICE and int_at(term, 5) == 1):
            kinds[sign, int_at(term, 2) % len(ints_at(term, 1)), term.target].append(term)
        else:
            rest.append((term, sign))
    wholes: list[tuple[fx.Node, int]] = []
    for (sign, axis, _), parts in kinds.items():
        whole = _joined(graph, parts, axis, node.meta["val"])
        if whole is None:
            rest += [(part, sign) for part in parts]
        else:
            wholes.append((whole, sign))
    if not wholes:
        return
    (total, first), *others = sorted([*wholes, *rest], key=lambda part: -part[1])  # what is taken away comes last
    for part, sign in others:
        total = new_node(graph, _ADDED if first == sign else _TAKEN, (total, part), node.meta["val"])
    node.replace_all_uses_with(total if first == 1 else new_node(graph, _aten.neg.default, (total,), node.meta["val"]))


def _joined(graph: fx.Graph, gradients: Sequence[fx.Node], axis: int, value: Tensor) -> fx.Node | None:
    """Return the sum of gradients of parts, with zeros in between; None for a single one, or if some overlap."""
    size, at = value.shape[axis], dict[tuple[int, int], list[fx.Node]]()
    for node in gradients:
        begin, end, _ = slice(int_at(node, 3), int_at(node, 4, size), 1).indices(size)
        if node.target is _ROW:
            begin = int_at(node, 3) % size
            end = begin + 1
        at.setdefault((begin, end), []).append(node)
    spans = sorted(at)
    if len(gradients) < 2 or any(one[1] > other[0] for one, other in pairwise(spans)):
        return None
    pieces, done = list[fx.Node](), 0
    for begin, end in (*spans, (size, size)):
        if begin > done:
            pieces.append(zeros(graph, value.narrow(axis, done, begin - done)))
        if begin < size:
            pieces.append(_total(graph, at[begin, end], axis))
        done = end
    return new_node(graph, _aten.cat.default, (pieces, axis), value) if len(pieces) > 1 else pieces[0]


def _total(graph: fx.Graph, gradients: Sequence[fx.Node], axis: int) -> fx.Node:
    """Return the sum of gradients of the same part, without the zeros."""
    total, *others = (node_at(node, 0) for node in gradients)
    like = total.meta["val"]
    for other in others:
        total = new_node(graph, _ADDED, (total, other), like)
    row = gradients[0].target is _ROW
    return new_node(graph, _aten.unsqueeze.default, (total, axis), like.unsqueeze(axis)) if row else total


# special functions that are alike ------------------------------------------------------------------------------------

FEWEST = 8  # calls that become one, at least
SMALL = 2**12  # numbers of one, at most: the time of larger ones goes with their numbers


def join_calls(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without changes in place in which special functions that are alike are called once.

    Alike are calls of one function that have the same distance from the inputs, so that none waits for another one.
    The same graph comes back where there are few, or where random numbers or places in memory depend on the order.

    >>> from pyro_flows.model.graphs.recording import record
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
