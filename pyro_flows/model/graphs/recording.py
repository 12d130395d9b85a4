"""Functions of tensors, recorded as flat graphs while they run."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.node import Argument
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyro_flows.model.graphs.graph import (
    LIKE,
    constant_node,
    graph_module,
    new_node,
    out_of_place,
    sweep,
    through_copies,
    tidy,
    uncollected,
)
from pyro_flows.model.graphs.orders import ordered
from pyro_flows.model.graphs.sums import join_calls, join_parts
from pyro_flows.model.graphs.written import resolve
from pyro_flows.support.numbers.tensors import Args, Dispatch, Kwargs, Memories, storage_of, tensors_in
from pyro_flows.support.process import stages
from pyro_flows.support.process.ledger import counted

FOLDED = 2**16  # numbers in a constant that may be computed from smaller ones
ALIKE = 2**12  # numbers in a constant that is compared with others

_TAG = "_pyro_flows_recorded"
_aten = torch.ops.aten
_NEW = frozenset(f"aten::new_{name}" for name in ("zeros", "ones", "full", "empty", "empty_strided"))
_BY_SHAPE = _NEW.union(f"aten::{name}" for name in LIKE)


class Kind(NamedTuple):
    """What is to be known of an operation."""

    composite: bool  # made of others
    same: bool  # returns its input
    random: bool
    sized: bool  # the shape of its result may depend on values
    by_shape: bool  # the values of its inputs do not count
    new: bool  # a new tensor of the dtype and device of its input
    view: bool  # shares memory with its input
    written: tuple[bool, ...]  # which arguments it changes
    named: tuple[str, ...]  # and which of those with names

    @property
    def mutable(self) -> bool:
        return any(self.written) or bool(self.named)


def _has_kernel(operation: OpOverload, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), key))


@cache
def kind_of(operation: OpOverload) -> Kind:
    """Return what is to be known of one of torch's operations."""
    schema = operation._schema
    arguments = schema.arguments
    written = [part.alias_info is not None and part.alias_info.is_write for part in arguments]
    return Kind(
        composite=_has_kernel(operation, "CompositeImplicitAutograd") and not _has_kernel(operation, "CPU"),
        same=operation in (_aten.detach.default, _aten.alias.default),
        random=torch.Tag.nondeterministic_seeded in operation.tags,
        sized=torch.Tag.dynamic_output_shape in operation.tags,
        by_shape=schema.name in _BY_SHAPE,
        new=schema.name in _NEW,
        view=any(part.alias_info is not None for part in schema.returns),
        written=tuple(one for one, part in zip(written, arguments, strict=True) if not part.kwarg_only),
        named=tuple(part.name for one, part in zip(written, arguments, strict=True) if one and part.kwarg_only),
    )


class DependsOnValues(RuntimeError):
    """A number was taken out of a tensor that depends on the inputs of what is recorded, or a shape depends on it."""


class Unrecordable(RuntimeError):
    """What runs is not worth a graph, as it says itself."""


def refuse_recording(reason: str) -> None:
    """End a recording that is under way: the function is then called as it is, from the first time on.

    Raises:
        Unrecordable: if one is.
    """
    if isinstance(_get_current_dispatch_mode(), _Tape):
        raise Unrecordable(reason)


class _ChangesConstants(RuntimeError):
    """What depends on the inputs is written into tensors that did not; ``made_by`` are the operations they are from."""

    def __init__(self, made_by: frozenset[int]) -> None:
        super().__init__("what depends on the latents is written into a tensor that was made outside of the model")
        self.made_by = made_by


@counted(stages.TRACING)
@uncollected()
def record(function: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    """Record the tensor operations of ``function`` at ``inputs``, without those that repeat others or only constants.

    Tensors that are no inputs are constants. What depends on them alone is computed here and now, and may be taken out
    as a number (``float``, ``.item()``, ``if``); parameters are no constants, but stay what they are at each run.
    Random numbers are drawn anew at each run, but those from a ``torch.Generator`` that the function has are constants.
    Where that can be done, operations that change a tensor in place become ones that return a new tensor. Cost: a run,
    or two, and about 100 microseconds for each operation, twice as much if tensors are changed in place.

    Raises:
        DependsOnValues: if a number is taken out of a tensor that depends on the inputs, or if a shape depends on it.
    """
    try:
        recorded = _run(function, inputs)
    except _ChangesConstants as error:
        recorded = _run(function, inputs, error.made_by)
    pure = out_of_place(recorded.graph)
    if not pure:
        # Autograd in the function itself would import torch's compiler, inside of a transform (a second): what was
        # recorded is run instead. But a gradient that depends on no input is written into constants there.
        through_copies(recorded.graph)
        found = _functionalized(graph_module(recorded, recorded.graph), inputs) or _functionalized(function, inputs)
        recorded, pure = found or recorded, found is not None
    if pure:
        tidy(recorded.graph)
    sweep(recorded.graph)
    module = graph_module(recorded, recorded.graph)  # with those constants only that are used
    return ordered(join_calls(join_parts(module))) if pure else module


def _functionalized(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> _Recorded | None:
    """Record without changes in place, views of changed tensors included; None if that cannot be done."""
    try:
        recorded = _run(torch.func.functionalize(function), inputs)
    except RuntimeError:  # torch knows no such form of some operation
        return None
    if not out_of_place(recorded.graph):
        return None
    resolve(recorded.graph)
    return recorded


def _run(
    function: Callable[..., object], inputs: tuple[Tensor, ...], changed: frozenset[int] = frozenset()
) -> _Recorded:
    tape = _Tape(changed)
    given = [tape.input(part) for part in inputs]
    with torch.autograd.set_multithreading_enabled(False), tape:
        found = function(*given)
    return tape.finish(found)


class _Recorded(nn.Module):
    """Constants of a graph by name, and the graph."""

    graph: fx.Graph


class _Tape(Dispatch):
    """Sees each operation as it runs and writes those down that the inputs, or random numbers, have a part in.

    A tensor that has a node is tagged with its number, so that memory is freed as the function frees it. Tensors
    without one are constants. A result that would take far more memory than what it is computed from has a node too,
    though it is a constant.
    """

    def __init__(self, changed: frozenset[int]) -> None:
        super().__init__()
        self._root, self._graph = _Recorded(), fx.Graph()
        self._token = object()
        self._nodes: list[fx.Node] = []
        self._depends: list[bool] = []
        self._outside: dict[int, tuple[Tensor, int | None, fx.Node]] = {}  # constants and parameters, kept alive
        self._sharing: defaultdict[int, list[int]] = defaultdict(list)  # constants by the memory that they are in
        self._equal: dict[object, fx.Node] = {}
        self._like: dict[object, Tensor] = {}
        self._done = 0
        self._changed = changed  # operations whose results need nodes, since they are written into later
        self._memories = Memories()
        self._made_by: dict[int, int] = {}  # memory, and the operation that it came from
        self._written: set[int] = set()  # memory that what depends on the inputs was written into, by way of any view
        self._wrong: set[int] = set()  # operations whose results would have needed nodes

    def input(self, value: Tensor) -> Tensor:
        """Add an input; return the tensor that stands for it."""
        given = value.detach().requires_grad_(value.requires_grad)  # one tensor given twice is two inputs
        self._tag(given, self._graph.placeholder(f"input_{len(self._nodes)}"), True)
        return given

    def finish(self, found: object) -> _Recorded:
        """Return the graph that leads to these results."""
        if self._wrong:
            raise _ChangesConstants(frozenset(self._wrong))
        self._graph.output(self._argument(found))
        self._root.graph = self._graph
        return self._root

    def __torch_dispatch__(self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        kwargs, kind = kwargs or {}, kind_of(func)
        if kind.composite:
            with self:
                return func.decompose(*args, **kwargs)
        if kind.same:
            result, number = func(*args, **kwargs), self._number(cast("Tensor", args[0]))
            if number is not None:
                setattr(result, _TAG, (self._token, number))
            return result
        self._done += 1
        tensors = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        numbers = [self._number(part) for part in tensors]
        depends = any(number is not None and self._depends[number] for number in numbers)
        depends = depends or (bool(self._written) and any(storage_of(part) in self._written for part in tensors))
        if any(isinstance(part, torch.Generator) for part in (*args, *kwargs.values())):
            if depends:
                raise RuntimeError("a random number is drawn with a torch.Generator from what depends on the latents")
        else:
            depends = depends or kind.random
        if kind.mutable:
            return self._change(func, args, kwargs, kind, depends)
        result = func(*args, **kwargs)
        depends = depends and not kind.by_shape
        if depends or self._needs_node(kind, result, tensors, numbers):
            self._write(func, args, kwargs, result, depends)
        elif isinstance(result, Tensor) and not kind.view:
            self._made_by[self._memories.of(result)] = self._done
        return result

    def _needs_node(self, kind: Kind, result: object, tensors: list[Tensor], numbers: list[int | None]) -> bool:
        """Whether a result that does not depend on the inputs has a node all the same."""
        most = FOLDED if kind.by_shape else max([FOLDED, *(part.numel() for part in tensors)])
        large = any(part.numel() > most for part in tensors_in((result,)))
        of_node = kind.view and any(number is not None for number in numbers)
        return kind.new or self._done in self._changed or large or of_node

    def _change(self, func: OpOverload, args: Args, kwargs: Mapping[str, object], kind: Kind, depends: bool) -> object:
        """Run an operation that changes tensors in place."""
        parts = [part for part, one in zip(args, kind.written, strict=False) if one]
        changed = [*tensors_in((*parts, *(kwargs.get(name) for name in kind.named)))]
        numbers = [self._number(part) for part in changed]
        depends = depends or any(number is not None and self._depends[number] for number in numbers)
        if depends and None in numbers:
            self._wrong.update(self._made_by.get(storage_of(part), 0) for part in changed)
        for part in changed:
            self._keep(part)
            self._written.update([self._memories.of(part)] if depends else [])
        result = func(*args, **kwargs)
        if depends or any(number is not None for number in numbers):
            self._write(func, args, kwargs, result, depends)
        return result

    def _keep(self, changed: Tensor) -> None:
        """Copy the constants that share memory with a tensor which is about to be changed in place."""
        for key in self._sharing.pop(storage_of(changed), ()):
            value, _, node = self._outside.pop(key)
            self._equal.pop(key, None)  # from here on it is another constant
            if getattr(self._root, str(node.target)) is value:
                setattr(self._root, str(node.target), value.detach().clone())

    def _write(self, func: OpOverload, args: Args, kwargs: Mapping[str, object], result: object, depends: bool) -> None:
        """Write an operation down, and tag what it returns."""
        if depends and not isinstance(result, (Tensor, tuple, list, type(None))):
            raise DependsOnValues(
                "a number is taken out of a tensor that depends on the latents (float(), int(), .item(), if, numpy)"
            )
        if depends and kind_of(func).sized and self._is_sized_by_inputs(func, args):
            raise DependsOnValues("a shape depends on values, such as that of x[mask]: use torch.where, or a mask")
        named = {name: self._argument(part) for name, part in kwargs.items()}
        node = new_node(self._graph, func, tuple(map(self._argument, args)), kwargs=named)
        if isinstance(result, Tensor):
            self._tag(result, node, depends)
        elif isinstance(result, (tuple, list)):
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    item = new_node(self._graph, operator.getitem, (node, place))
                    self._tag(part, item, depends)

    def _is_sized_by_inputs(self, func: OpOverload, args: Args) -> bool:
        """Whether the shape of a result depends on values of the inputs. Of indices, only masks decide it."""
        numbers = [
            self._number(part)
            for part in tensors_in(tuple(args[1:] if func is _aten.index.Tensor else args))
            if func is not _aten.index.Tensor or part.dtype in (torch.bool, torch.uint8)
        ]
        return any(number is not None and self._depends[number] for number in numbers)

    def _argument(self, value: object) -> Argument:
        if isinstance(value, Tensor):
            number = self._number(value)
            return self._constant(value) if number is None else self._nodes[number]
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._argument, value))
        return cast("Argument", value)

    def _tag(self, value: Tensor, node: fx.Node, depends: bool) -> None:
        node.meta["val"] = self._example(value)
        setattr(value, _TAG, (self._token, len(self._nodes)))
        self._nodes.append(node)
        self._depends.append(depends)

    def _number(self, value: Tensor) -> int | None:
        """Return the number of a tensor's node; None for a constant."""
        tag = value.__dict__.get(_TAG)
        if tag is not None and tag[0] is self._token:
            return int(tag[1])
        if not value.requires_grad:
            return None
        if id(value) not in self._outside:
            self._nodes.append(self._attribute(value))
            self._depends.append(True)
            self._outside[id(value)] = value, len(self._nodes) - 1, self._nodes[-1]
        return self._outside[id(value)][1]

    def _constant(self, value: Tensor) -> fx.Node:
        if id(value) not in self._outside:
            alike = self._alike(value)
            node = self._equal.get(alike) or self._attribute(value)
            self._equal[alike] = node
            self._outside[id(value)] = value, None, node
            self._sharing[self._memories.of(value)].append(id(value))
        return self._outside[id(value)][2]

    def _alike(self, value: Tensor) -> object:
        """Return what small constants that are made in the function have in common if they are equal."""
        if value.numel() > ALIKE or storage_of(value) not in self._made_by or not value.is_contiguous():
            return id(value)
        flat = value.detach().resolve_conj().resolve_neg().reshape(-1)
        numbers = flat.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu().numpy().tobytes()
        return value.shape, value.dtype, value.device, numbers

    def _attribute(self, value: Tensor) -> fx.Node:
        name = f"constant_{len(self._root._buffers) + len(self._root._parameters)}"
        return constant_node(self._graph, self._root, name, value)

    def _example(self, value: Tensor) -> Tensor:
        """Return a tensor of the same shape, dtype and device that takes no memory."""
        key = value.shape, value.dtype, value.device
        if key not in self._like:
            self._like[key] = torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
        return self._like[key]
