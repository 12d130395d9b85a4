"""Operations of a flat graph that are alike and do not need each other, done at once: what a loop did one by one.

A model that loops over time or over rows is recorded as thousands of operations on a few numbers each. Most of them do
not wait for the round before, such as the innovations of an autoregression, the terms of its log density, and the
gradient of each parameter, which is a sum over all rounds. These become one operation on a matrix with a row for each.
What does wait, such as the state, stays a loop.

Source: Larsen and Amarasinghe 2000, "Exploiting superword level parallelism with multimedia instruction sets",
doi:10.1145/349299.349320. Alike are operations with the same distance from the inputs, or from the results.
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from pyro_flows.graphs.graph import (
    constant_node,
    copy_node,
    graph_module,
    has_tag,
    int_at,
    is_aten,
    key_of,
    new_node,
    node_at,
    sweep,
)  # fmt: skip
from pyro_flows.graphs.sums import FEWEST, PERMUTED, SMALL, STACKED, Kind, like_of, read_rows, sum_at_once

_aten = torch.ops.aten


def vectorize(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without changes in place that does at once what can be; the same graph if there is nothing.

    Results are the same but for rounding, since sums have another order. Cost: 20 microseconds for each operation.

    >>> from pyro_flows.graphs.recording import record
    >>> loop = record(lambda x: (sum(2.0 * part.exp() for part in x.unbind()),), torch.ones(50, 3))
    >>> sum(node.target is torch.ops.aten.exp.default for node in loop.graph.nodes)
    1
    """
    graph = module.graph
    if sum(map(is_aten, graph.nodes)) < 2 * FEWEST:
        return module
    random, placed = torch.Tag.nondeterministic_seeded, _aten.as_strided.default
    if any(has_tag(node, random) or node.target is placed for node in graph.nodes):
        return module  # which depends on what ran before, or on how tensors lie in memory
    read_rows(graph)
    sum_at_once(graph)
    sweep(graph)
    for from_results in (False, True):
        groups = _groups(graph, _levels(graph, from_results=from_results))
        graph = _Writer(module, graph, groups).written if groups else graph
        sweep(graph)
    return graph_module(module, graph)


# groups ---------------------------------------------------------------------------------------------------------------


def _levels(graph: fx.Graph, *, from_results: bool) -> dict[fx.Node, int]:
    """Return the distance of each node from the inputs, or from the results."""
    levels: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes) if from_results else graph.nodes:
        others = node.users if from_results else node.all_input_nodes
        levels[node] = 1 + max((levels[other] for other in others), default=0)
    return levels


def _groups(graph: fx.Graph, levels: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """Return operations that are alike and at one level: none needs another one, whichever are put together."""
    found: defaultdict[Kind, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_small_pointwise(node):
            found[(levels[node], *_kind(node))].append(node)
    return [nodes for nodes in found.values() if len(nodes) >= FEWEST]


def _is_small_pointwise(node: fx.Node) -> bool:
    """Whether it does the same to each number, without a change of dtype that depends on the number of axes."""
    if not has_tag(node, torch.Tag.pointwise):
        return False
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.numel() > SMALL or not node.all_input_nodes:
        return False
    nested = any(isinstance(part, (list, tuple)) for part in node.args)
    if nested or any(isinstance(part, fx.Node) for part in node.kwargs.values()):
        return False
    dtypes = {part.meta["val"].dtype for part in node.all_input_nodes}
    return len(dtypes - {torch.bool}) <= 1


def _kind(node: fx.Node) -> Kind:
    """Return what operations have in common that can be done at once: all but which tensors they take."""
    values = [part.meta["val"] if isinstance(part, fx.Node) else part for part in node.args]
    like = [(*part.shape, part.dtype) if isinstance(part, Tensor) else key_of(part) for part in values]
    return node.target, tuple(like), key_of(node.kwargs), node.meta["val"].shape


class _Writer:
    """Writes a graph anew with groups of operations done at once, each where its last member stood, or later."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, groups: Sequence[list[fx.Node]]) -> None:
        self.module, self.written = module, fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._rows: dict[fx.Node, tuple[fx.Node, int]] = {}  # nodes that are rows, and of what
        self._stacks: dict[tuple[fx.Node, ...], fx.Node] = {}
        for unit in _ordered(graph, groups):
            if len(unit) > 1:
                self._at_once(unit)
            else:
                self._copies[unit[0]] = self._copy(unit[0])

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.target is STACKED and not node.kwargs:
            rows = [self._copies[part] for part in cast("Sequence[fx.Node]", node.args[0])]
            if all(row in self._rows for row in rows):
                stack, like = self._stack(rows), node.meta["val"]
                axis = int_at(node, 1) % like.dim()
                order = [*range(1, axis + 1), 0, *range(axis + 1, like.dim())]
                return new_node(self.written, PERMUTED, (stack, order), like) if axis else stack
        copy = copy_node(self.written, node, self._copies)
        if node.target is operator.getitem:
            source = node_at(copy, 0)
            if source.target is _aten.unbind.int and source.args[1:] == (0,):
                self._rows[copy] = node_at(source, 0), int_at(copy, 1)
        return copy

    def _at_once(self, nodes: list[fx.Node]) -> None:
        first, count = nodes[0], len(nodes)
        value: Tensor = first.meta["val"]
        args = tuple(self._operand(given, value.dim()) for given in zip(*(node.args for node in nodes), strict=True))
        whole = new_node(self.written, first.target, args, like_of(value, count, *value.shape), dict(first.kwargs))
        parts = new_node(self.written, _aten.unbind.int, (whole, 0))
        for place, node in enumerate(nodes):
            row = self._copies[node] = new_node(self.written, operator.getitem, (parts, place), value)
            self._rows[row] = whole, place

    def _operand(self, given: tuple[Argument, ...], axes: int) -> Argument:
        """Return one operand of all: what they share as it is, else a stack, with axes of length one in the middle."""
        parts = [self._copies[part] for part in given if isinstance(part, fx.Node)]
        if not parts:
            return given[0]
        if all(part is given[0] for part in given):
            return parts[0]
        stack = self._stack(parts)
        value: Tensor = stack.meta["val"]
        if value.dim() == axes + 1:
            return stack
        shape = [len(parts), *[1] * (axes + 1 - value.dim()), *value.shape[1:]]
        return new_node(self.written, _aten.view.default, (stack, shape), like_of(value, *shape))

    def _stack(self, parts: list[fx.Node]) -> fx.Node:
        """Return tensors of one shape as rows of one tensor."""
        key = tuple(parts)
        if key not in self._stacks:
            value: Tensor = parts[0].meta["val"]
            like = like_of(value, len(parts), *value.shape)
            found = self._constant(parts) if all(part.op == "get_attr" for part in parts) else self._range(parts, like)
            self._stacks[key] = new_node(self.written, STACKED, (parts,), like) if found is None else found
        return self._stacks[key]

    def _constant(self, parts: list[fx.Node]) -> fx.Node | None:
        values = [getattr(self.module, str(part.target)) for part in parts]
        if any(isinstance(value, torch.nn.Parameter) for value in values):
            return None
        name = f"stack_{len(self.module._buffers)}"
        return constant_node(self.written, self.module, name, torch.stack(values))

    def _range(self, parts: list[fx.Node], like: Tensor) -> fx.Node | None:
        """Return rows that follow each other in one tensor, forwards or backwards, as a part of it."""
        rows = [self._rows[part] for part in parts if part in self._rows]
        if len(rows) < len(parts) or any(source is not rows[0][0] for source, _ in rows):
            return None
        source, first, last = *rows[0], rows[-1][1]
        step = 1 if last >= first else -1
        if [place for _, place in rows] != [*range(first, last + step, step)]:
            return None
        low, high = min(first, last), max(first, last) + 1
        if (low, high) != (0, source.meta["val"].shape[0]):
            source = new_node(self.written, _aten.slice.Tensor, (source, 0, low, high), like)
        return source if step == 1 else new_node(self.written, _aten.flip.default, (source, [0]), like)


def _ordered(graph: fx.Graph, groups: Sequence[list[fx.Node]]) -> list[list[fx.Node]]:
    """Return groups, and other operations by themselves, after what they need, as near to where they were as can be."""
    units = {node: group for group in groups for node in group}
    places = {node: place for place, node in enumerate(graph.nodes)}
    waits: dict[int, int] = {}
    users: defaultdict[int, set[int]] = defaultdict(set)
    at: dict[int, list[fx.Node]] = {}  # units by the place of their last member
    for node in graph.nodes:
        unit = units.setdefault(node, [node])
        at[places[unit[-1]]] = unit
    for place, unit in at.items():
        needed = {places[units[part][-1]] for node in unit for part in node.all_input_nodes}
        waits[place] = len(needed)
        for part in needed:
            users[part].add(place)
    ready = [place for place, count in waits.items() if count == 0]
    heapq.heapify(ready)
    found = []
    while ready:
        place = heapq.heappop(ready)
        found.append(at[place])
        for user in users[place]:
            waits[user] -= 1
            if waits[user] == 0:
                heapq.heappush(ready, user)
    return found
