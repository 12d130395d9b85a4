"""Flat graphs of tensor operations: put together, tidied and compared."""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import Argument, Target

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)
_BY_ONE = (_aten.mul.Scalar, _aten.pow.Tensor_Scalar)
LIKE = ("ones_like", "zeros_like", "empty_like", "full_like")


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a graph as a module. Its Python code is written when it is called: most are made part of others."""
    return _LazyGraphModule(root, graph)


def new_node(
    graph: fx.Graph, target: Target, args: tuple[Argument, ...], like: Tensor | None = None,
    kwargs: dict[str, Argument] | None = None,
) -> fx.Node:  # fmt: skip
    """Add an operation, whose result has the shape, dtype and device of ``like``, if that is known.

    torch.fx takes most of its time for a name, and for arguments that are given at once.
    """
    node = graph.create_node("call_function", target, name="value")
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    if like is not None:
        node.meta["val"] = like
    return node


def constant_node(graph: fx.Graph, root: nn.Module, name: str, value: Tensor) -> fx.Node:
    """Add a tensor that stays what it is, under a name of the module that holds the constants of a graph."""
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
    node = graph.get_attr(name)
    node.meta["val"] = value
    return node


def node_at(node: fx.Node, place: int) -> fx.Node:
    """Return an argument of a node that is a node."""
    part = node.args[place]
    assert isinstance(part, fx.Node)
    return part


def int_at(node: fx.Node, place: int, otherwise: int = 0) -> int:
    """Return an argument of a node that is a whole number; another one where it is left out or None."""
    number = node.args[place] if place < len(node.args) else None
    return otherwise if number is None else int(cast("int", number))


def ints_at(node: fx.Node, place: int) -> list[int]:
    """Return an argument of a node that is a sequence of whole numbers."""
    return [*cast("Sequence[int]", node.args[place])]


def operation_of(node: fx.Node) -> OpOverload:
    """Return the operation of torch's that a node calls, see :func:`is_aten`."""
    assert isinstance(node.target, OpOverload)
    return node.target


def has_tag(node: fx.Node, tag: torch.Tag) -> bool:
    """Whether a node calls an operation that torch marks so."""
    return is_aten(node) and tag in operation_of(node).tags


def copy_node(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Add a copy of a node of another graph, given those of the nodes before it."""
    if node.op != "call_function":
        return graph.node_copy(node, copies.__getitem__)
    args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
    copy = new_node(graph, node.target, args, kwargs=kwargs)
    copy.meta = dict(node.meta)
    return copy


def copy_graph(source: fx.Graph) -> fx.Graph:
    """Return a copy of a graph."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in source.nodes:
        copies[node] = copy_node(graph, node, copies)
    return graph


class Stitcher:
    """Puts recorded graphs together into one: each is added with nodes of those before as its inputs.

    They must not change tensors in place, see :func:`is_pure`.

    >>> from pyro_flows.model.graphs.recording import record
    >>> double = record(lambda x: (x + x,), torch.ones(2))
    >>> whole = Stitcher()
    >>> (twice,) = whole.add(double, [whole.input(torch.ones(2))])
    >>> whole.finish(whole.add(double, [twice]))(torch.ones(2))
    (tensor([4., 4.]),)
    """

    def __init__(self) -> None:
        self.graph, self._constants, self._inputs = fx.Graph(), nn.Module(), 0
        self._names: dict[int, str] = {}  # of constants: one tensor has one name

    def input(self, like: Tensor) -> fx.Node:
        """Add an input of the whole, of the shape, dtype and device of ``like``."""
        node = self.graph.placeholder(f"input_{self._inputs}")
        node.meta["val"] = like.detach()
        self._inputs += 1
        return node

    def constant(self, value: Tensor) -> fx.Node:
        """Add a tensor that stays what it is."""
        name = self._names.setdefault(id(value), f"constant_{len(self._names)}")
        return constant_node(self.graph, self._constants, name, value)

    def add(self, module: fx.GraphModule, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Add a graph that returns a tuple of tensors; return their nodes."""
        left = iter(inputs)
        copies: dict[fx.Node, fx.Node] = {}
        for node in module.graph.nodes:
            if node.op == "output":
                return [copies[part] for part in node.args[0]]
            if node.op == "placeholder":
                copies[node] = next(left)
            elif node.op == "get_attr":
                copies[node] = self.constant(getattr(module, node.target))
            else:
                copies[node] = copy_node(self.graph, node, copies)
        raise ValueError("module: expected a graph that returns something.")

    def call(self, operation: Callable[..., object], arguments: tuple[Argument, ...], like: Tensor) -> fx.Node:
        """Add one operation whose result has the shape, dtype and device of ``like``."""
        return new_node(self.graph, operation, arguments, like)

    def join(self, nodes: Iterable[fx.Node]) -> fx.Node:
        """Add tensors of any shapes, flattened and one after the other."""
        flat = []
        for node in nodes:
            value = node.meta["val"]
            if value.dim() != 1:
                node = self.call(_aten.reshape.default, (node, [-1]), value.new_zeros(()).expand(value.numel()))
            flat.append(node)
        length = sum(node.meta["val"].numel() for node in flat)
        return self.call(_aten.cat.default, (flat,), flat[0].meta["val"].new_zeros(()).expand(length))

    def finish(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        """Return the whole, without what is computed twice or not used."""
        self.graph.output(tuple(outputs))
        tidy(self.graph)
        sweep(self.graph)
        return graph_module(self._constants, self.graph)


def first_result(module: fx.GraphModule) -> fx.GraphModule:
    """Return the part of a graph that leads to its first result."""
    graph = copy_graph(module.graph)
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0][:1]),)
    sweep(graph)
    return graph_module(module, graph)


def is_pure(module: fx.GraphModule) -> bool:
    """Whether no operation of a graph changes a tensor in place."""
    return not any(map(_changes, module.graph.nodes))


def out_of_place(graph: fx.Graph) -> bool:
    """Replace operations that change a tensor by ones that return a new tensor; return whether none is left."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _changes(node):
            continue
        pure, changed = _pure(node), node.args[0]
        if pure is None or not isinstance(changed, fx.Node) or not _is_own(changed, node):
            return False
        node.target = pure
        changed.replace_all_uses_with(node, {user for user in changed.users if order[user] > order[node]}.__contains__)
    return True


def through_copies(graph: fx.Graph) -> None:
    """Write what operations change in place as a new tensor, and a copy of it into the old one.

    Of copies alone, torch undoes the changes without its symbolic shapes, which take a third of a second to import.
    """
    for node in graph.nodes:
        pure = _pure(node) if _changes(node) and name_of(node) != "copy_" else None
        if pure is not None:
            with graph.inserting_before(node):
                new = new_node(graph, pure, node.args, kwargs=dict(node.kwargs))
            new.meta = dict(node.meta)
            node.target, node.args, node.kwargs = _aten.copy_.default, (node.args[0], new), {}


def _pure(node: fx.Node) -> OpOverload | None:
    """Return the operation that gives a new tensor in place of changing its first argument; None if there is none."""
    name = name_of(node)
    overloads = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(overloads, operation_of(node)._overloadname, None)


def _is_own(changed: fx.Node, by: fx.Node) -> bool:
    """Whether no other tensor shares memory with ``changed``, and a new tensor would have the same dtype."""
    others = [node.meta["val"].dtype for node in by.all_input_nodes if isinstance(node.meta.get("val"), Tensor)]
    promoted = any(dtype.is_floating_point and dtype != changed.meta["val"].dtype for dtype in others)
    return not promoted and _is_fresh(changed) and all(_is_fresh(user) for user in changed.users if user is not by)


def _is_fresh(node: fx.Node) -> bool:
    if node.op == "output":
        return True
    return is_aten(node) and all(result.alias_info is None for result in operation_of(node)._schema.returns)


def is_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, OpOverload)


def tidy(graph: fx.Graph) -> None:
    """Drop operations that repeat their input; compute equal things once."""
    seen: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            replacement = _simpler(node)
            random = has_tag(node, torch.Tag.nondeterministic_seeded)  # a second call is no second copy of the value
            if replacement is None and (node.target is operator.getitem or (is_aten(node) and not random)):
                replacement = seen.setdefault((node.target, key_of(node.args), key_of(node.kwargs)), node)
            if replacement is not None and replacement is not node:
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)


def sweep(graph: fx.Graph) -> None:
    """Drop what is not used. Changes in place stay; a random number that nobody takes need not be drawn."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and not _changes(node))):
            graph.erase_node(node)


def _changes(node: fx.Node) -> bool:
    return is_aten(node) and operation_of(node)._schema.is_mutable


def name_of(node: fx.Node) -> str:
    return operation_of(node)._schema.name.removeprefix("aten::")


def _simpler(node: fx.Node) -> fx.Node | None:
    """Return the node whose value this one only repeats, if there is one."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target in _SAME:
        return first
    if node.target in _BY_ONE and node.args[1] == 1 and node.meta["val"].dtype == first.meta["val"].dtype:
        return first
    if node.target is _aten.t.default and first.target is _aten.t.default:
        return node_at(first, 0)
    if node.target is _aten.permute.default and ints_at(node, 1) == [*range(len(ints_at(node, 1)))]:
        return first
    shaped = node.target in (_aten.view.default, _aten.expand.default)
    return first if shaped and node.meta["val"].shape == first.meta["val"].shape else None


def key_of(value: object) -> object:
    """Return what arguments of operations are compared by."""
    if isinstance(value, (list, tuple)):
        return tuple(key_of(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, key_of(part)) for key, part in value.items())
    return type(value), value  # 1, 1.0 and True are equal, but not to a graph


@contextmanager
def uncollected() -> Iterator[None]:
    """Do not look for cycles of garbage inside.

    Thousands of new nodes set the collector off again and again, and it looks at all of them: a third of the time in
    which a loop of 22,000 operations is recorded.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
