"""Rounds of loops taken out of a flat graph: each kind becomes a small graph of its own, called once a round.

What a round hands on is put together in one tensor for each shape and dtype, a *pack*. So a call has few arguments,
however many numbers go from one round to the next, or from a forward pass to the backward pass.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_flows.graphs.graph import copy_node, graph_module, new_node, sweep
from pyro_flows.graphs.repeats import FEWEST, Repeat, repeats

_aten = torch.ops.aten
Like = tuple[torch.Size, torch.dtype, torch.device]
Input = tuple[int, int | None]  # which argument of a call, and which member of it if that is a pack


@dataclass(eq=False)
class Round:
    """One round: its operations, the nodes that it takes from outside, in the order in which it takes them."""

    nodes: list[fx.Node]
    taken: list[fx.Node]
    packs: list[fx.Node] = field(default_factory=list)  # once it is called


@dataclass(eq=False)
class Kind:
    """Rounds that are alike. ``places`` are the operations whose results leave a round, those of a pack together."""

    rounds: list[Round]
    places: dict[Like, list[int]]
    inputs: tuple[Input, ...] = ()  # for each node that a round takes
    examples: list[Tensor] = field(default_factory=list)  # of the arguments
    body: fx.GraphModule = field(init=False)

    def member(self, place: int) -> tuple[int, int]:
        """Return the pack with the result of an operation, and where in it."""
        packs = enumerate(self.places.values())
        return next((number, places.index(place)) for number, places in packs if place in places)

    @property
    def arguments(self) -> int:
        """How many arguments a call has."""
        return 1 + max((argument for argument, _ in self.inputs), default=-1)


class Outline:
    """A graph whose loops are calls.

    Args:
        module: the graph; it must not change tensors in place.

    Attributes:
        kinds: of rounds, none if nothing repeats; the body of each is a graph that returns its packs.
        inside: how many operations are in rounds.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.owner: dict[fx.Node, tuple[Kind, Round, int]] = {}
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        self.kinds = [kind for repeat in repeats(nodes) if (kind := self._kind(nodes, repeat)) is not None]
        for kind in self.kinds:
            kind.inputs = Counter(self._inputs(one) for one in kind.rounds).most_common(1)[0][0]
            model = next(one for one in kind.rounds if self._inputs(one) == kind.inputs)
            kind.inputs = _apart(kind)
            self._add_body(kind, model)
        self.inside = len(self.owner)

    # kinds of rounds ------------------------------------------------------------------------------------------------

    def _kind(self, nodes: Sequence[fx.Node], repeat: Repeat) -> Kind | None:
        """Return the rounds whose operations take each other's results in the same way."""
        forms: dict[Any, list[Round]] = {}
        for places in repeat.rounds:
            part = [nodes[place] for place in places]
            if not _may_be_one(part, nodes[places[0] : places[-1] + 1]):
                continue
            offsets = {node: place for place, node in enumerate(part)}
            arguments = [argument for node in part for argument in _arguments(node)]
            form = tuple(offsets.get(argument) for argument in arguments)
            taken = [argument for argument in arguments if argument not in offsets]
            forms.setdefault(form, []).append(Round(part, taken))
        rounds = max(forms.values(), key=len, default=[])
        leaving = sorted({place for one in rounds for place in _leaving(one)})
        if len(rounds) < FEWEST or not all("val" in rounds[0].nodes[place].meta for place in leaving):
            return None  # too few, or lists of tensors leave them
        kind = Kind(rounds, {})
        for place in leaving:
            kind.places.setdefault(_like(rounds[0].nodes[place]), []).append(place)
        for one in rounds:
            self.owner.update({node: (kind, one, place) for place, node in enumerate(one.nodes)})
        return kind

    def _inputs(self, one: Round) -> tuple[Input, ...]:
        """Return which argument each node that a round takes is in: results of one other round are in its packs."""
        arguments: dict[Any, int] = {}
        found: list[Input] = []
        for node in one.taken:
            key, member = self._source(node)
            found.append((arguments.setdefault(key, len(arguments)), member))
        return tuple(found)

    def _source(self, node: fx.Node) -> tuple[Any, int | None]:
        """Return the pack that a node is in, and its place there; or the node itself, and None."""
        if node not in self.owner:
            return node, None
        kind, one, place = self.owner[node]
        number, member = kind.member(place)
        return (one, number), member

    # bodies ---------------------------------------------------------------------------------------------------------

    def _add_body(self, kind: Kind, one: Round) -> None:
        """Write one round as a graph that returns its packs."""
        graph = fx.Graph()
        placeholders = [graph.placeholder(f"input_{number}") for number in range(kind.arguments)]
        members: dict[Input, fx.Node] = {}
        for node, (argument, member) in zip(one.taken, kind.inputs, strict=True):
            source = placeholders[argument]
            source.meta["val"] = node.meta["val"] if member is None else self._pack_like(node)
            if (argument, member) not in members:
                cut = source if member is None else _select(graph, source, member, node.meta["val"])
                members[argument, member] = cut
        taken = iter(kind.inputs)
        copies: dict[fx.Node, fx.Node] = {}
        for node in one.nodes:
            given = fx.map_arg((node.args, node.kwargs), lambda part: copies.get(part) or members[next(taken)])
            copies[node] = new_node(graph, node.target, *given)  # type: ignore[misc]
            copies[node].meta = dict(node.meta)
        packs = [_stack(graph, [copies[one.nodes[place]] for place in places]) for places in kind.places.values()]
        graph.output(tuple(packs))
        kind.body, kind.examples = graph_module(nn.Module(), graph), [node.meta["val"] for node in placeholders]

    def _pack_like(self, node: fx.Node) -> Tensor:
        kind, _, place = self.owner[node]
        number, _ = kind.member(place)
        return _repeated(node.meta["val"], len([*kind.places.values()][number]))

    # the graph with calls -------------------------------------------------------------------------------------------

    def called(self, bodies: Sequence[Callable[..., Any]]) -> fx.GraphModule:
        """Return the graph with a call of its kind's body in the place of each round that can be called."""
        return _Writer(self, dict(zip(self.kinds, bodies, strict=True))).written


class _Writer:
    """Writes a graph again, with calls."""

    def __init__(self, outline: Outline, bodies: dict[Kind, Callable[..., Any]]) -> None:
        self.outline, self.owner, self.bodies = outline, dict(outline.owner), bodies
        self.graph, self.copies = fx.Graph(), dict[fx.Node, fx.Node]()
        self.laid_out: dict[fx.Node, fx.Node] = {}
        for node in outline.module.graph.nodes:
            if node in self.owner and self.owner[node][2] == 0:
                self._call(*self.owner[node][:2])
            if node not in self.owner:
                self._get(node)
        sweep(self.graph)
        self.written = graph_module(outline.module, self.graph)

    def _get(self, node: fx.Node) -> fx.Node:
        """Return the copy of a node; that of a round's result is cut out of a pack."""
        if node not in self.copies and node not in self.owner:  # it lies between a round's operations, or is a constant
            for argument in _arguments(node):
                self._get(argument)
            self.copies[node] = copy_node(self.graph, node, self.copies)
        elif node not in self.copies:
            kind, one, place = self.owner[node]
            number, member = kind.member(place)
            self.copies[node] = _select(self.graph, one.packs[number], member, node.meta["val"])
        return self.copies[node]

    def _contiguous(self, node: fx.Node) -> fx.Node:
        """Return the copy of a node as bodies expect it in memory."""
        if node not in self.laid_out:
            copy = new_node(self.graph, Tensor.contiguous, (self._get(node),), {})
            copy.meta["val"] = node.meta["val"]
            self.laid_out[node] = copy
        return self.laid_out[node]

    def _call(self, kind: Kind, one: Round) -> None:
        """Write the call of a round, or leave its operations to be copied."""
        arguments = [self._argument(kind, one, argument) for argument in range(kind.arguments)]
        if any(argument is None for argument in arguments):
            for node in one.nodes:
                del self.owner[node]
            return
        call = new_node(self.graph, self.bodies[kind], tuple(arguments), {})
        one.packs = [new_node(self.graph, operator.getitem, (call, number), {}) for number in range(len(kind.places))]
        for pack, places in zip(one.packs, kind.places.values(), strict=True):
            pack.meta["val"] = _repeated(one.nodes[places[0]].meta["val"], len(places))

    def _argument(self, kind: Kind, one: Round, argument: int) -> fx.Node | None:
        """Return one argument of a call: a node, the pack of another round, or a pack that is made for it; or None."""
        given: dict[int | None, set[fx.Node]] = {}
        for node, (number, member) in zip(one.taken, kind.inputs, strict=True):
            if number == argument:
                given.setdefault(member, set()).add(node)
        if any(len(nodes) > 1 for nodes in given.values()):
            return None
        nodes = {member: next(iter(nodes)) for member, nodes in given.items()}
        if None in nodes:
            return self._contiguous(nodes[None])
        return self._known(nodes) or self._made(nodes, len(kind.examples[argument]))

    def _known(self, nodes: dict[Any, fx.Node]) -> fx.Node | None:
        """Return the pack that these nodes are the members of, if there is one."""
        packs = set()
        for member, node in nodes.items():
            kind, one, place = self.owner.get(node, (None, None, 0))
            if kind is None or one is None or kind.member(place)[1] != member:
                return None
            packs.add(one.packs[kind.member(place)[0]])
        return packs.pop() if len(packs) == 1 else None

    def _made(self, nodes: dict[Any, fx.Node], size: int) -> fx.Node:
        """Put nodes together as a pack; places that nobody looks at get one of them."""
        filler = self._get(next(iter(nodes.values())))
        return _stack(self.graph, [self._get(nodes[n]) if n in nodes else filler for n in range(size)])


def _arguments(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes among the arguments, each as often as it stands there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda one: found.append(one))  # type: ignore[func-returns-value]
    yield from found


def _may_be_one(part: list[fx.Node], among: Sequence[fx.Node]) -> bool:
    """Whether operations may become one: none needs what comes of another by way of what lies between them."""
    if len(part) == len(among):
        return True
    inside, after = set(part), set[fx.Node]()
    for node in among:
        given = node.all_input_nodes
        if node in inside:
            if not after.isdisjoint(given):
                return False
        elif not (inside.isdisjoint(given) and after.isdisjoint(given)):
            after.add(node)
    return True


def _apart(kind: Kind) -> tuple[Input, ...]:
    """Return the inputs of a kind, with two arguments for what is one in most rounds, but not in all."""
    others: dict[int, int] = {}
    inputs = list(kind.inputs)
    differ: set[int] = set()
    for one in kind.rounds:
        first: dict[Input, fx.Node] = {}
        for number, (node, place) in enumerate(zip(one.taken, kind.inputs, strict=True)):
            if first.setdefault(place, node) is not node:
                differ.add(number)
    for number in sorted(differ):
        argument, member = inputs[number]
        inputs[number] = others.setdefault(argument, kind.arguments + len(others)), member
    return tuple(inputs)


def _leaving(one: Round) -> Iterator[int]:
    inside = set(one.nodes)
    for place, node in enumerate(one.nodes):
        if any(user not in inside for user in node.users):
            yield place


def _like(node: fx.Node) -> Like:
    value = node.meta["val"]
    return value.shape, value.dtype, value.device


def _repeated(value: Tensor, times: int) -> Tensor:
    """Return an example of a pack, which takes no memory."""
    return torch.empty((), dtype=value.dtype, device=value.device).expand(times, *value.shape)


def _select(graph: fx.Graph, pack: fx.Node, member: int, value: Tensor) -> fx.Node:
    node = new_node(graph, _aten.select.int, (pack, 0, member), {})
    node.meta["val"] = value
    return node


def _stack(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    node = new_node(graph, _aten.stack.default, (nodes,), {})
    node.meta["val"] = _repeated(nodes[0].meta["val"], len(nodes))
    return node
