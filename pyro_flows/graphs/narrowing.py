"""Operations of a flat graph on numbers that are the same along an axis, done on one of them.

A plate expands its parameters to all of its rows: a scale that is common to a thousand rows is squared, inverted and
logged a thousand times, forwards and backwards. Here such results are computed for one row, and are broadcast where
they meet others; a sum of equal numbers is a product. Gradients of parts of one tensor, each filled up with zeros, are
put side by side instead of being added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Target

from pyro_flows._fallbacks import Tried
from pyro_flows._tensors import broadcast
from pyro_flows.graphs.graph import (
    constant_node,
    copy_graph,
    graph_module,
    has_tag,
    int_at,
    ints_at,
    new_node,
    node_at,
    sweep,
)
from pyro_flows.graphs.sums import like_of, terms_of, zeros

_aten = torch.ops.aten
_SUM, _SLICE = _aten.sum.dim_IntList, _aten.slice_backward.default
LONG = 4000  # operations, above which loops take the time
LOOKED_AT = 2**20  # numbers of a constant
WIDE = 2**9  # numbers: narrower results cost as much as one number


def narrow(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Return a graph that does less and returns the same but for rounding; the same graph where nothing is to be had.

    It must not change tensors in place. ``inputs`` are those that it was recorded at: a graph that does not run there,
    since some operation asks for another layout of memory, is not taken. Cost: a run, and as long as a recording.

    ``record`` does this by itself; here it is seen on a graph as PyTorch records it:

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> inputs = (torch.ones(4),)
    >>> wide = make_fx(lambda x: ((x.exp()[:, None].expand(4, 1000) + 1.0).sum(1),))(*inputs)
    >>> widest = lambda module: max(_numbers(node) for node in module.graph.nodes if node.op == "call_function")
    >>> widest(wide), widest(narrow(wide, inputs))
    (4000, 4)
    """
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    if len(nodes) > LONG or not any(_numbers(node) >= WIDE for node in nodes):
        return module
    graph = copy_graph(module.graph)
    found = _Narrower(module, graph).changes + _side_by_side(graph)
    if not found:
        return module
    sweep(graph)
    written = graph_module(module, graph)
    with Tried() as tried, torch.no_grad():
        trial = fx.Interpreter(written)
        trial.extra_traceback = False  # its words for an error import torch's compiler: two seconds
        trial.run(*inputs)
    return written if tried.error is None else module  # whose memory is laid out in another way than a view needs


def _numbers(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


class _Narrower:
    """Finds nodes that are expansions of narrower ones, and lets operations take these."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        self.module, self.graph, self.changes = module, graph, 0
        self.core: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if node.op == "get_attr":
                self._constant(node)
            elif node.target is _aten.expand.default:
                source = node_at(node, 0)
                if source.meta["val"].dim() == node.meta["val"].dim():
                    self.core[node] = self.core.get(source, source)
            elif node.target is _SUM and not node.kwargs:
                self._sum(node)
            elif _is_pointwise(node):
                self._pointwise(node)
        self._expand()
        sweep(graph)  # what nobody takes any more has no part in what follows

    def _expand(self) -> None:
        """Expand what other operations need at full width: in memory as it was, since views ask for that.

        What they do not need goes afterwards: until then, narrow results may have no users yet.
        """
        for node, core in self.core.items():
            if not node.users or node.op == "get_attr" or node.target is _aten.expand.default:
                continue
            with self.graph.inserting_before(node):
                wide = self._add(_aten.expand.default, (core, [*node.meta["val"].shape]), node, node.meta["val"].shape)
                whole = self._add(_aten.clone.default, (wide,), node, node.meta["val"].shape)
                whole.kwargs = {"memory_format": torch.contiguous_format}
            node.replace_all_uses_with(whole)

    def _constant(self, node: fx.Node) -> None:
        """Look for axes along which a constant is the same; parameters are no constants."""
        value: Tensor = getattr(self.module, str(node.target))
        if isinstance(value, torch.nn.Parameter) or not 1 < value.numel() <= LOOKED_AT:
            return
        part = value.detach()
        for axis in range(value.dim()):
            first = part.narrow(axis, 0, 1)
            part = first if bool((part == first).all()) else part
        if part.numel() == value.numel():
            return
        name = f"narrow_{len(self.module._buffers)}"
        with self.graph.inserting_after(node):
            self.core[node] = constant_node(self.graph, self.module, name, part.clone())

    def _sum(self, node: fx.Node) -> None:
        """A sum of equal numbers is one of them times how many there are."""
        source = node_at(node, 0)
        core, value = self.core.get(source), source.meta["val"]
        if core is None or not node.args[1] or 0 in core.meta["val"].shape or not value.is_floating_point():
            return
        thin, axes = core.meta["val"].shape, ints_at(node, 1)
        count = math.prod(value.shape[axis] // thin[axis] for axis in axes)
        if count == 1:
            return
        like = like_of(node.meta["val"], *thin)  # on the device "meta", sums import sympy: a second
        like = like.sum(axes, keepdim=bool(int_at(node, 2)))
        with self.graph.inserting_before(node):
            whole = self._add(_SUM, (core, *node.args[1:]), node, like.shape)
            whole = self._add(_aten.mul.Tensor, (whole, float(count)), node, like.shape)
        self._becomes(node, whole)

    def _pointwise(self, node: fx.Node) -> None:
        same = self._repeated(node)
        if same is not None and same.meta["val"].shape == node.meta["val"].shape:
            self._becomes(node, same)
            return
        args = tuple(self.core.get(part, part) if isinstance(part, fx.Node) else part for part in node.args)
        if args == node.args or node.meta["val"].dim() == 0:
            return
        shapes = [part.meta["val"].shape for part in args if isinstance(part, fx.Node)]
        shape = broadcast(*shapes)
        if len(shape) != node.meta["val"].dim():
            return
        with self.graph.inserting_before(node):
            self._becomes(node, self._add(node.target, args, node, shape))

    def _repeated(self, node: fx.Node) -> fx.Node | None:
        """Return the operand that this node only repeats: times one, plus zero."""
        if node.target not in (_aten.mul.Tensor, _aten.add.Tensor, _aten.div.Tensor) or node.kwargs:
            return None
        nothing = 0.0 if node.target is _aten.add.Tensor else 1.0
        for place in (1,) if node.target is _aten.div.Tensor else (0, 1):
            other = node.args[1 - place]
            same = isinstance(other, fx.Node) and other.meta["val"].dtype == node.meta["val"].dtype
            if same and self._is(node.args[place], nothing):
                return cast("fx.Node", other)
        return None

    def _is(self, part: Argument, number: float) -> bool:
        """Whether an operand is this number everywhere."""
        if not isinstance(part, fx.Node):
            return isinstance(part, (int, float)) and not isinstance(part, bool) and part == number
        core = self.core.get(part, part)
        if core.op != "get_attr":
            return False
        value = getattr(self.module, str(core.target))
        return not isinstance(value, torch.nn.Parameter) and value.numel() == 1 and bool(value == number)

    def _becomes(self, node: fx.Node, other: fx.Node) -> None:
        """Let a node be another one, or an expansion of it where that is narrower."""
        self.changes += 1
        if other.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(other)
            if other in self.core:
                self.core[node] = self.core[other]
            return
        self.core[node] = other

    def _add(self, target: Target, args: tuple[Argument, ...], node: fx.Node, shape: Sequence[int]) -> fx.Node:
        kwargs = dict(node.kwargs) if target is node.target else {}
        return new_node(self.graph, target, args, like_of(node.meta["val"], *shape), kwargs)


def _is_pointwise(node: fx.Node) -> bool:
    if not has_tag(node, torch.Tag.pointwise) or has_tag(node, torch.Tag.nondeterministic_seeded):
        return False
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    plain = not any(isinstance(part, (list, tuple)) for part in node.args)
    return plain and not any(isinstance(part, fx.Node) for part in node.kwargs.values())


def _side_by_side(graph: fx.Graph) -> int:
    """Put gradients of parts of a tensor that do not overlap side by side; return how many sums that was."""
    changes = 0
    for node, terms in terms_of(graph):
        parts = [part for part, sign in terms if sign == 1 and part.target is _SLICE and len(part.users) == 1]
        parts = [part for part in parts if not part.kwargs and int_at(part, 5) == 1]
        axis = {(part.args[2], tuple(ints_at(part, 1))) for part in parts}
        if len(parts) < 2 or len(axis) > 1 or any(sign == -1 for _, sign in terms):
            continue
        parts.sort(key=lambda part: int_at(part, 3))
        with graph.inserting_before(node):
            whole = _joined(graph, parts, node.meta["val"])
            if whole is None:
                continue
            for other in (part for part, _ in terms if part not in parts):
                whole = new_node(graph, _aten.add.Tensor, (whole, other), node.meta["val"])
        node.replace_all_uses_with(whole)
        changes += 1
    return changes


def _joined(graph: fx.Graph, parts: Sequence[fx.Node], value: Tensor) -> fx.Node | None:
    """Return the sum of gradients of parts, in the order of the parts; None if they overlap."""
    axis, place = int_at(parts[0], 2) % value.dim(), 0
    pieces: list[fx.Node] = []
    ends = [int_at(part, 3) for part in parts[1:]] + [value.shape[axis]]
    for part, end in zip(parts, ends, strict=True):
        begin, length = int_at(part, 3), node_at(part, 0).meta["val"].shape[axis]
        if begin < place or begin + length > end:
            return None  # what was written by then is swept
        pieces += [*_zeros(graph, value, axis, begin - place), node_at(part, 0)]
        place = begin + length
    pieces += _zeros(graph, value, axis, value.shape[axis] - place)
    return new_node(graph, _aten.cat.default, (pieces, axis), value)


def _zeros(graph: fx.Graph, value: Tensor, axis: int, length: int) -> list[fx.Node]:
    if not length:
        return []
    shape = [*value.shape[:axis], length, *value.shape[axis + 1 :]]
    return [zeros(graph, like_of(value, *shape))]
