"""Long sums in a flat graph, and rows of one tensor that are taken one by one: each done at once."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from pyro_flows.graphs.graph import int_at, ints_at, new_node, node_at

FEWEST = 8  # operations that are done at once, at least
SMALL = 2**12  # numbers in a result, at most: the time of larger ones goes with their numbers
STACKED, PERMUTED = torch.ops.aten.stack.default, torch.ops.aten.permute.default
_aten = torch.ops.aten
_SELECTED, _GRADIENT = _aten.select.int, _aten.select_backward.default
_ADDED, _TAKEN = _aten.add.Tensor, _aten.sub.Tensor

Kind = tuple[object, ...]  # what operations that can be done at once have in common


def like_of(value: Tensor, *shape: int) -> Tensor:
    """Return an example of this shape that takes no memory."""
    return torch.empty((), dtype=value.dtype, device=value.device).expand(shape)


def zeros(graph: fx.Graph, like: Tensor) -> fx.Node:
    """Add zeros of this shape, dtype and device."""
    kwargs: dict[str, Argument] = {"dtype": like.dtype, "device": like.device}
    return new_node(graph, _aten.zeros.default, ([*like.shape],), like, kwargs)


def read_rows(graph: fx.Graph) -> None:
    """Take a tensor apart once, where many of its rows (or columns) are selected one by one."""
    selected: defaultdict[tuple[fx.Node, int], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is _SELECTED and not node.kwargs:
            selected[node.args[0], node.args[1] % node.args[0].meta["val"].dim()].append(node)
    for (source, axis), nodes in selected.items():
        value = source.meta["val"]
        if len(nodes) == 1 or FEWEST * len(nodes) < value.shape[axis]:
            continue
        with graph.inserting_before(nodes[0]):
            given: tuple[Argument, ...] = (source, axis)
            if len(nodes) >= FEWEST:  # each row is put together in memory
                order = [axis, *(place for place in range(value.dim()) if place != axis)]
                like = like_of(value, *(value.shape[place] for place in order))
                rows = new_node(graph, PERMUTED, (source, order), like) if axis else source
                rows = new_node(graph, _aten.clone.default, (rows,), like, {"memory_format": torch.contiguous_format})
                given = (rows, 0)
            parts = new_node(graph, _aten.unbind.int, given)
        for node in nodes:
            node.target, node.args = operator.getitem, (parts, node.args[2] % value.shape[axis])


def terms_of(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[tuple[fx.Node, int]]]]:
    """Yield each sum that is no term of another one, and its terms with their signs."""
    for node in list(graph.nodes):
        if is_plain_sum(node) and not (len(node.users) == 1 and is_plain_sum(next(iter(node.users)))):
            yield node, _terms(node)


def sum_at_once(graph: fx.Graph) -> None:
    """Stack the terms of a long sum, and sum over the stack; gradients of rows become the rows of one tensor."""
    for node, terms in terms_of(graph):
        kinds: defaultdict[Kind, list[fx.Node]] = defaultdict(list)
        for term, sign in terms:
            of_row = (tuple(ints_at(term, 1)), term.args[2]) if term.target is _GRADIENT else ()
            kinds[sign, term.target, *of_row].append(term)
        with graph.inserting_before(node):
            parts = [(part, kind[0]) for kind, alike in kinds.items() for part in _summed(graph, alike)]
            if len(parts) == len(terms):
                continue
            parts.sort(key=operator.itemgetter(1), reverse=True)  # what is taken away comes last
            whole, first = parts[0]
            for part, other in parts[1:]:
                whole = new_node(graph, _ADDED if first == other else _TAKEN, (whole, part), node.meta["val"])
            whole = whole if first == 1 else new_node(graph, _aten.neg.default, (whole,), node.meta["val"])
        node.replace_all_uses_with(whole)


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


def _summed(graph: fx.Graph, terms: list[fx.Node]) -> list[fx.Node]:
    """Return terms of one kind as few ones."""
    value: Tensor = terms[0].meta["val"]
    if terms[0].target is _GRADIENT:
        sparse = value.shape[int_at(terms[0], 2)] > FEWEST * len(terms)
        return terms if len(terms) == 1 or sparse else [_put_together(graph, terms)]
    return terms if len(terms) < FEWEST or value.numel() > SMALL else [_total(graph, terms)]


def _put_together(graph: fx.Graph, gradients: list[fx.Node]) -> fx.Node:
    """Return the sum of gradients that are zero but for one row each."""
    value: Tensor = gradients[0].meta["val"]
    axis = int_at(gradients[0], 2) % value.dim()
    rows: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node in gradients:
        rows[int_at(node, 3) % value.shape[axis]].append(node_at(node, 0))
    whole = {place: _total(graph, parts) for place, parts in rows.items()}
    first = next(iter(whole.values()))
    zero = new_node(graph, _aten.zeros_like.default, (first,), first.meta["val"])
    ordered = [whole.get(place, zero) for place in range(value.shape[axis])]
    return new_node(graph, STACKED, (ordered, axis), value)


def _total(graph: fx.Graph, terms: list[fx.Node]) -> fx.Node:
    """Return the sum of terms that are no gradients of rows."""
    value: Tensor = terms[0].meta["val"]
    if len(terms) >= FEWEST and value.numel() <= SMALL:
        stack = new_node(graph, STACKED, (terms,), like_of(value, len(terms), *value.shape))
        return new_node(graph, _aten.sum.dim_IntList, (stack, [0]), value)
    whole = terms[0]
    for term in terms[1:]:
        whole = new_node(graph, _ADDED, (whole, term), value)
    return whole
