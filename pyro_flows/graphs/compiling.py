"""Recorded graphs as functions: run by torch's bindings at first, compiled once that pays."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_flows._clock import counted
from pyro_flows._fallbacks import fallback
from pyro_flows._threads import at_once, cores
from pyro_flows.graphs.bindings import quicken, turn
from pyro_flows.graphs.fused import Fused, fused
from pyro_flows.graphs.garbage import uncollected
from pyro_flows.graphs.graph import copy_graph, is_pure, sweep
from pyro_flows.graphs.outline import Outline
from pyro_flows.graphs.rounding import agree

# what a processor of 2026 took, in seconds (docs/evidence/speed.md); by clocks, results would depend on the load
COMPILE_START = 3.0  # to compile anything, in a process that has not done so yet, and for each graph more
COMPILE_NODE = 0.02  # more for each operation
SAVED_NODE = 7.0e-7  # a run saves for each operation,
SAVED_NUMBER = 3.0e-10  # and for each number that it writes
SAVED_CALL = -7.0e-6  # and for each call of a loop's round
COMPILE_NODES = 5000  # operations at most: Inductor's time grows faster than their number
LOOPS_FROM = 500  # operations in a graph in which loops are looked for
IN_LOOPS = 0.5  # share of the operations that must be in loops, to compile these alone
WORTH = 4.0  # times these seconds must be left, if there is a bound: compiling cannot be cut, and must pay in the rest


class Plan:
    """What is to be compiled of a graph: rounds of its loops alone, or all of it.

    The time that this takes goes with the number of different operations, so a loop costs as much as one of its rounds.

    Attributes:
        outline: the loops, if they are most of the graph.
        seconds: what compiling takes, about.
        saved: what it saves a run, about.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        called = [node for node in module.graph.nodes if node.op == "call_function"]
        self.outline = _loops(module, called)
        graphs, compiled = 1, len(called)
        if self.outline is None:
            values = (node.meta.get("val") for node in called)
            written = sum(value.numel() for value in values if isinstance(value, Tensor))
            self.saved = SAVED_NODE * len(called) + SAVED_NUMBER * written
        else:
            rounds = sum(len(kind.rounds) for kind in self.outline.kinds)
            graphs, compiled = len(self.outline.kinds), sum(len(kind.rounds[0].nodes) for kind in self.outline.kinds)
            self.saved = SAVED_NODE * self.outline.inside + SAVED_CALL * rounds
        self.seconds = COMPILE_START * graphs + COMPILE_NODE * compiled if compiled <= COMPILE_NODES else math.inf


def _loops(module: fx.GraphModule, called: Sequence[fx.Node]) -> Outline | None:
    if len(called) < LOOPS_FROM or not is_pure(module):
        return None
    outline = Outline(module)
    return outline if outline.inside >= IN_LOOPS * len(called) else None


def pays_at(plans: Sequence[Plan]) -> int:
    """Return after how many runs of all graphs compiling them would have saved half of what it costs; 0 for never."""
    cost, saved = sum(plan.seconds for plan in plans), sum(plan.saved for plan in plans)
    return 1 + int(0.5 * cost / saved) if math.isfinite(cost) and saved > 0.0 else 0


class Runner:
    """A recorded graph as a function: run block by block, or by torch's bindings, and compiled once it has run often.

    A graph is compiled when what compiling would have saved so far reaches half of what it costs. Both are estimated
    from the graph, not timed, so that one seed gives one answer on a busy machine too. Where there is no compiler, or
    where the compiled code gives other values, or where too few seconds are left, it stays as it is. Of a graph that
    is a loop, one round is compiled, and called once a round.

    Inputs must be of one shape, dtype and device; compiled code serves those with the strides that it was made with.

    Args:
        module: the graph.
        compile: whether to compile at the first run (True), never (False), or once it pays (None).
        along: other graphs that run as often, and are to be compiled at the same time.
        left: how many seconds are left.
        alike: whether the first run gives the numbers of later ones to the last digit; else it gives torch's, for those
            who check what was recorded.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        *,
        compile: bool | None = None,
        along: Sequence[fx.GraphModule] = (),
        left: Callable[[], float] = lambda: math.inf,
        alike: bool = False,
    ) -> None:
        self.module, self.left, self.alike = module, left, alike
        self._asked, self._along = compile, along
        self._compiled: Callable[..., Any] | None = None
        self._twins: list[Fused] = []
        self.runs = 0

    @functools.cached_property
    def _plan(self) -> Plan | None:
        return None if self._asked is False else Plan(self.module)

    @functools.cached_property
    def compile_at(self) -> int:
        """The run at which it is compiled; 0 for never. Cost: a look at all operations, if it is to pay."""
        if self._asked is None and self._plan is not None:
            return pays_at([self._plan, *map(Plan, self._along)])
        return int(bool(self._asked))

    @property
    def compiled(self) -> bool:
        """Whether it runs as code that Inductor made."""
        return self._compiled is not None and not self.in_blocks

    @property
    def in_blocks(self) -> bool:
        """Whether it runs block by block."""
        return isinstance(self._compiled, Fused)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run, without autograd. What comes out are inference tensors: clone what is to meet autograd later."""
        self.runs += 1
        if self.runs == 1 and not self._asked:
            found = self._fuse(inputs)
            if found is not None and not self.alike:
                return found
        if self.runs == self.compile_at:
            self._compile(inputs)
        if self._compiled is not None:
            try:
                return self._compiled(*inputs)
            except RuntimeError as error:
                fallback("recorded code in place of compiled code", error)
        with torch.inference_mode():  # an operation takes a tenth less time
            return self._recorded(*inputs)  # which says what is wrong with these inputs, if anything is

    def many(self, batches: Sequence[tuple[Tensor, ...]]) -> list[Any]:
        """Run for several sets of inputs, at once where there are cores and each takes long enough.

        Numbers are those of a run for each, one after the other.
        """
        whole, most = self._compiled, cores()
        if len(batches) < 2 or most < 2 or not isinstance(whole, Fused) or not whole.is_long:
            return [self(*inputs) for inputs in batches]
        self.runs += len(batches)
        count = min(most, len(batches))
        self._twins += [whole.twin() for _ in range(count - 1 - len(self._twins))]
        shares = [
            functools.partial(_each, one, batches[first::count])
            for first, one in enumerate([whole, *self._twins[: count - 1]])
        ]
        found: list[Any] = [None] * len(batches)
        try:
            for first, results in enumerate(at_once(shares)):
                found[first::count] = results
        except RuntimeError:
            return [self(*inputs) for inputs in batches]  # which says what is wrong
        return found

    @functools.cached_property
    def _recorded(self) -> Callable[..., Any]:
        return quicken(self.module)

    @counted("tracing")
    @uncollected()
    def _fuse(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Run block by block from now on, where that can be done, and return torch's results.

        There is little left for a compiler to gain.
        """
        try:
            found = fused(self.module, inputs)
        except (RuntimeError, torch.linalg.LinAlgError):
            return None  # of these inputs: what runs them says so
        if found is None:
            return None
        self._compiled, self.compile_at = found, 0
        expected, found.first = found.first, ()
        return expected

    @counted("compiling")
    def _compile(self, inputs: tuple[Tensor, ...]) -> None:
        plan = self._plan
        if plan is None or self.left() < WORTH * plan.seconds:
            return
        try:
            expected = self._recorded(*inputs)
        except torch.linalg.LinAlgError:
            self.compile_at += 1  # of these inputs, not of the compiler
            return
        try:
            with _silent(), torch.no_grad():
                compiled = _compiled(self.module, inputs) if plan.outline is None else _looped(plan.outline)
                agrees = agree(compiled(*inputs), expected)
        except Exception as error:  # no compiler, or one that fails: there is nothing to lose but time
            fallback("not compiled", error)
            return
        if agrees:
            self._compiled = compiled
        else:
            fallback("not compiled: the compiled code gave other values")


def _each(function: Callable[..., Any], batches: Sequence[tuple[Tensor, ...]]) -> list[Any]:
    return [function(*inputs) for inputs in batches]


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the compiler's remarks, on operations that it does not know, from users."""
    remarks = logging.getLogger("torch._inductor.ir")
    before = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(before)


def _compiled(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile by Inductor, with a wrapper in C++ where it can be had: a call of it costs less than one in Python.

    Inductor keeps what it compiled in files, by the content of the graph. Constants are inputs here, so that a model
    with other data finds its code there.
    """
    import torch._inductor as inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    graph = copy_graph(module.graph)
    for node in list(graph.nodes):
        turn(node)  # a seventh of the time of a step of 256 particles
    sweep(graph)
    constants = _lift(graph, module)
    for node in graph.nodes:
        node.meta.clear()  # of several recordings, whose examples do not go together
    bare = fx.GraphModule(nn.Module(), graph)
    mode = FakeTensorMode(shape_env=ShapeEnv())  # without one, the compiled code is not found again
    given = [mode.from_tensor(part, static_shapes=True) for part in (*inputs, *constants)]
    options: dict[str, Any] = {"compile_threads": 1}
    with tracing(TracingContext(mode)):
        try:
            code = inductor.compile(bare, given, options={**options, "cpp_wrapper": True})  # type: ignore[arg-type]
        except Exception as error:  # whatever the compiler, or the code that it made, may raise
            fallback("compiled with a wrapper in Python", error)
            code = inductor.compile(bare, given, options=options)  # type: ignore[arg-type]
    return lambda *inputs: code(*inputs, *constants)  # type: ignore[operator]


def _lift(graph: fx.Graph, module: fx.GraphModule) -> list[Tensor]:
    """Make the constants of a graph its last inputs; return their values.

    Inputs may stand anywhere in a graph that was put together. All of them are moved to its beginning.
    """
    for node in reversed([node for node in graph.nodes if node.op == "placeholder"]):
        graph._root.append(node)
    first = next(node for node in graph.nodes if node.op in ("call_function", "output"))
    constants: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            name = str(node.target)
            if name not in constants:
                with graph.inserting_before(first):
                    constants[name] = graph.placeholder(f"constant_{len(constants)}")
            node.replace_all_uses_with(constants[name])
            graph.erase_node(node)
    return [getattr(module, name).detach() for name in constants]


def _looped(outline: Outline) -> Callable[..., Any]:
    """Compile a round of each loop, and call it in the place of all rounds of its kind."""
    bodies = [_compiled(kind.body, [_example(part) for part in kind.examples]) for kind in outline.kinds]
    run = quicken(outline.called(bodies))

    def looped(*inputs: Tensor) -> Any:
        with torch.inference_mode():
            return run(*inputs)

    return looped


def _example(like: Tensor) -> Tensor:
    return torch.ones(like.shape, dtype=like.dtype, device=like.device)
