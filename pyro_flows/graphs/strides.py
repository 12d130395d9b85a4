"""What takes or writes parts of a contiguous tensor by strides, as autograd does for what was written: by selection."""

from __future__ import annotations

import torch
from torch import fx

from pyro_flows.graphs.graph import int_at, ints_at, new_node, node_at, sweep

_aten = torch.ops.aten


def by_selection(graph: fx.Graph) -> None:
    """Replace strides in a graph that changes no tensor in place, where they take one entry along some axes."""
    for node in list(graph.nodes):
        if node.target in (_aten.as_strided.default, _aten.as_strided_scatter.default):
            _selected(graph, node)
    sweep(graph)


def _selected(graph: fx.Graph, node: fx.Node) -> None:
    """Write what takes or writes a part by strides of a contiguous tensor as selections, one axis after the other."""
    written = node.target is _aten.as_strided_scatter.default
    if len(node.args) != 4 + written:
        return
    source = whole = node_at(node, 0)
    sizes, strides = ints_at(node, 1 + written), ints_at(node, 2 + written)
    while whole.target is _aten.select_scatter.default:
        whole = node_at(whole, 0)
    made = node_at(whole, 0) if whole.target is _aten.copy.default else whole
    if made.target is not _aten.new_empty_strided.default or ints_at(made, 2) != _contiguous(ints_at(made, 1)):
        return
    chosen = _chosen(ints_at(made, 1), list(zip(sizes, strides, strict=True)), int_at(node, 3 + written))
    if not chosen:
        return
    parts, like = [source], source.meta["val"]
    with graph.inserting_before(node):
        for axis, index in chosen:
            like = like.select(axis, index)
            parts.append(new_node(graph, _aten.select.int, (parts[-1], axis, index), like))
        if not written:
            node.replace_all_uses_with(parts[-1])
            return
        new = node_at(node, 1)
        for part, (axis, index) in zip(reversed(parts[:-1]), reversed(chosen), strict=True):
            new = new_node(graph, _aten.select_scatter.default, (part, new, axis, index), part.meta["val"])
    node.replace_all_uses_with(new)


def _chosen(shape: list[int], left: list[tuple[int, int]], offset: int) -> list[tuple[int, int]]:
    """Return axes of a contiguous tensor and an index along each, in turn, that leave these sizes and strides."""
    found = list[tuple[int, int]]()
    kept = list(left)
    for size, step in zip(shape, _contiguous(shape), strict=True):
        if kept and kept[0] == (size, step):
            kept.pop(0)
        else:
            found.append((len(left) - len(kept), (offset // step) % size))
            offset -= found[-1][1] * step
    return found if not kept and offset == 0 else []


def _contiguous(shape: list[int]) -> list[int]:
    steps = [1]
    for size in reversed(shape[1:]):
        steps.insert(0, steps[0] * max(size, 1))
    return steps
