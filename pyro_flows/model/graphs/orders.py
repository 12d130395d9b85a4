"""Indexing by constant whole numbers or masks, such as ``effect[group]``, by operations that are made for it.

Torch's general indexing takes about four times as long as ``gather``, and its gradient, ``index_put``, about four times
as long as ``index_add``. A regression on groups spends half of its time there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.graph import constant_node, graph_module, new_node, node_at, sweep, tidy
from pyro_flows.model.graphs.sums import like_of

_aten = torch.ops.aten
MASKS = (torch.bool, torch.uint8)  # dtypes of indices that choose numbers


class _Order(NamedTuple):
    """Rows of some ``axes`` from ``start`` on, taken as one axis, in an order that has a ``shape``.

    Equal orders have one ``key``.
    """

    rows: Tensor
    start: int
    axes: int
    shape: tuple[int, ...]
    key: object


def ordered(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without changes in place whose constant orders are applied by the fastest operations.

    On other devices than the CPU it stays as it is: there ``index_add`` may add up in another order each time.
    """
    graph = _Graph(module)
    for node in list(module.graph.nodes):
        if node.target is _aten.index.Tensor:
            graph.read(node)
        elif node.target is _aten.index_put.default:
            graph.add(node)
    if not graph.constants:
        return module
    sweep(module.graph)
    tidy(module.graph)  # the rows of one order are spread once
    return graph_module(module, module.graph)


class _Graph:
    """A graph, and the orders that it has by now."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.constants: dict[object, fx.Node] = {}

    def read(self, node: fx.Node) -> None:
        """Replace ``x[..., order]``."""
        x, order = node_at(node, 0), self._order(node)
        if order is None:
            return
        value, shape = x.meta["val"], node.meta["val"].shape
        lead, trail = shape[: order.start], shape[order.start + len(order.shape) :]
        sizes = [*lead, len(order.rows), *trail]
        with self.graph.inserting_before(node):
            flat, rows = self._flat(x, order), self._constant(order)
            operation = _aten.index_select.default
            if math.prod(trail) == 1 and value.dtype == torch.float64:
                operation = _aten.gather.default
                rows = self._reshaped(rows, [1] * len(lead) + [len(order.rows)] + [1] * len(trail))
                rows = new_node(self.graph, _aten.expand.default, (rows, sizes), like_of(order.rows, *sizes))
            found = self._reshaped(
                new_node(self.graph, operation, (flat, order.start, rows), like_of(value, *sizes)), shape
            )
        node.replace_all_uses_with(found)

    def add(self, node: fx.Node) -> None:
        """Replace the addition of values to the places of an order, where each of these is a single number."""
        order = self._order(node) if node.args[3:] == (True,) else None
        if order is None:
            return
        x, values = node_at(node, 0), node_at(node, 2)
        value = x.meta["val"]
        lead, trail = value.shape[: order.start], value.shape[order.start + order.axes :]
        if math.prod(trail) != 1 or values.meta["val"].shape != (*lead, *order.shape, *trail):
            return
        with self.graph.inserting_before(node):
            flat, rows = self._flat(x, order), self._constant(order)
            values = self._reshaped(values, [*lead, len(order.rows), *trail])
            args = (flat, order.start, rows, values)
            found = new_node(self.graph, _aten.index_add.default, args, flat.meta["val"])
            found = self._reshaped(found, value.shape)
        node.replace_all_uses_with(found)

    def _order(self, node: fx.Node) -> _Order | None:
        """Return the order that constant indices stand for; None if they are no constants, or stand apart."""
        value, indices = node_at(node, 0).meta["val"], cast("Sequence[fx.Node | None]", node.args[1])
        start = next((axis for axis, index in enumerate(indices) if index is not None), 0)
        given = [index for index in indices[start:] if index is not None and index.op == "get_attr"]
        if value.device.type != "cpu" or len(given) != len(indices) - start or not given:
            return None
        whole = list[Tensor]()  # numbers for each axis
        for numbers in (getattr(self.module, str(index.target)) for index in given):
            whole += numbers.nonzero(as_tuple=True) if numbers.dtype in MASKS else (numbers.long(),)
        sizes = value.shape[start : start + len(whole)]
        rows = torch.zeros((), dtype=torch.long)
        for part, size in zip(whole, sizes, strict=True):
            rows = rows * size + torch.where(part < 0, part + size, part)
        key = tuple(given), tuple(sizes)
        return _Order(rows.reshape(-1), start, len(whole), tuple(rows.shape), key) if rows.numel() else None

    def _flat(self, x: fx.Node, order: _Order) -> fx.Node:
        """Return ``x`` with the axes of an order as one."""
        shape, end = x.meta["val"].shape, order.start + order.axes
        return self._reshaped(x, [*shape[: order.start], math.prod(shape[order.start : end]), *shape[end:]])

    def _constant(self, order: _Order) -> fx.Node:
        """Return the rows of an order, which are the same for all operations by equal indices."""
        if order.key not in self.constants:
            name = f"order_{len(self.constants)}"
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self.constants[order.key] = constant_node(self.graph, self.module, name, order.rows)
        return self.constants[order.key]

    def _reshaped(self, x: fx.Node, sizes: Sequence[int]) -> fx.Node:
        value = x.meta["val"]
        if value.shape == tuple(sizes):
            return x
        return new_node(self.graph, _aten.reshape.default, (x, [*sizes]), like_of(value, *sizes))
