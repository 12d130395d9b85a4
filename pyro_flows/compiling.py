"""Recorded graphs that are compiled once that pays."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from pyro_flows.graphs import agree, quicken

# what a processor of 2026 took, in seconds (docs/performance.md); rules by clocks would make results depend on the load
COMPILE_START = 3.0  # to compile anything, in a process that has not done so yet
COMPILE_NODE = 0.02  # more for each operation
SAVED_NODE = 1.1e-6  # a run saves for each operation,
SAVED_NUMBER = 3.0e-10  # and for each number that it writes

logger = logging.getLogger("pyro_flows")


class Runner:
    """A recorded graph as a function: run by torch's bindings at first, compiled by Inductor when it has run often.

    A graph is compiled when what compiling would have saved so far reaches half of what it costs. Both are estimated
    from the graph, not timed, so that one seed gives one answer on a busy machine too. Where there is no compiler, or
    where the compiled code gives other values, it stays as it is.

    Inputs must be of one shape, dtype and device; compiled code serves those with the strides that it was made with.

    Args:
        module: the graph.
        compile: whether to compile at the first run (True), never (False), or once it pays (None).
        along: other graphs that run as often, and are to be compiled at the same time.
    """

    def __init__(
        self, module: fx.GraphModule, *, compile: bool | None = None, along: Sequence[fx.GraphModule] = ()
    ) -> None:
        self.module = module
        self._recorded: Callable[..., Any] = quicken(module)
        self._compiled: Callable[..., Any] | None = None
        self.runs = 0
        self.compile_at = pays_at([module, *along]) if compile is None else int(compile)

    @property
    def compiled(self) -> bool:
        """Whether it runs as compiled code."""
        return self._compiled is not None

    def __call__(self, *inputs: Tensor) -> Any:
        """Run, without autograd."""
        self.runs += 1
        if self.runs == self.compile_at:
            self._compile(inputs)
        if self._compiled is not None:
            try:
                return self._compiled(*inputs)
            except RuntimeError:
                logger.debug("recorded code in place of compiled code", exc_info=True)
        return self._recorded(*inputs)  # which says what is wrong with these inputs, if anything is

    def _compile(self, inputs: tuple[Tensor, ...]) -> None:
        try:
            expected = self._recorded(*inputs)
        except torch.linalg.LinAlgError:
            self.compile_at += 1  # of these inputs, not of the compiler
            return
        try:
            with _silent(), torch.no_grad():
                compiled = _compiled(self.module, inputs)
                agrees = agree(compiled(*inputs), expected)
        except Exception as error:  # no compiler, or one that fails: there is nothing to lose but time
            logger.debug("not compiled: %s", error)
        else:
            self._compiled = compiled if agrees else None


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
    """Compile by Inductor, with a wrapper in C++ where it can be had: a call of it costs less than one in Python."""
    import torch._inductor as inductor

    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.meta.clear()  # of several recordings, whose examples do not go together
    bare = fx.GraphModule(module, graph)
    for options in ({"compile_threads": 1, "cpp_wrapper": True}, {"compile_threads": 1}):
        try:
            return inductor.compile(bare, list(inputs), options=options)  # type: ignore[arg-type, return-value]
        except Exception as error:
            reason = error
    raise reason


def pays_at(modules: Sequence[fx.GraphModule]) -> int:
    """Return after how many runs of all these graphs compiling them would have saved half of what it costs."""
    called = [node for module in modules for node in module.graph.nodes if node.op == "call_function"]
    values = (node.meta.get("val") for node in called)
    written = sum(value.numel() for value in values if isinstance(value, Tensor))
    cost = COMPILE_START + COMPILE_NODE * len(called)
    return 1 + int(0.5 * cost / (SAVED_NODE * len(called) + SAVED_NUMBER * written + 1e-12))
