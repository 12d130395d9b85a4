"""Recorded graphs as functions: run by torch's bindings at first, compiled once that pays."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx

from pyro_flows._fallbacks import fallback
from pyro_flows.graphs.graph import LIKE, agree, copy_graph, graph_module, is_aten, is_pure, name_of, sweep

# what a processor of 2026 took, in seconds (docs/performance.md); rules by clocks would make results depend on the load
COMPILE_START = 3.0  # to compile anything, in a process that has not done so yet
COMPILE_NODE = 0.02  # more for each operation
SAVED_NODE = 7.0e-7  # a run saves for each operation,
SAVED_NUMBER = 3.0e-10  # and for each number that it writes
COMPILE_NODES = 5000  # operations at most: Inductor's time grows faster than their number


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
        """Run, without autograd. What comes out are inference tensors: clone what is to meet autograd later."""
        self.runs += 1
        if self.runs == self.compile_at:
            self._compile(inputs)
        if self._compiled is not None:
            try:
                return self._compiled(*inputs)
            except RuntimeError as error:
                fallback("recorded code in place of compiled code", error)
        with torch.inference_mode():  # an operation takes a tenth less time
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
            fallback("not compiled", error)
            return
        if agrees:
            self._compiled = compiled
        else:
            fallback("not compiled: the compiled code gave other values")


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

    graph = copy_graph(module.graph)
    for node in list(graph.nodes):
        _turn(node)  # a seventh of the time of a step of 256 particles
    sweep(graph)
    for node in graph.nodes:
        node.meta.clear()  # of several recordings, whose examples do not go together
    bare = fx.GraphModule(module, graph)
    options: dict[str, Any] = {"compile_threads": 1}
    try:
        return inductor.compile(bare, list(inputs), options={**options, "cpp_wrapper": True})  # type: ignore[arg-type, return-value]
    except Exception as error:  # whatever the compiler, or the code that it made, may raise
        fallback("compiled with a wrapper in Python", error)
    return inductor.compile(bare, list(inputs), options=options)  # type: ignore[arg-type, return-value]


def pays_at(modules: Sequence[fx.GraphModule]) -> int:
    """Return after how many runs of all graphs compiling them would have saved half of what it costs; 0 for never."""
    called = [node for module in modules for node in module.graph.nodes if node.op == "call_function"]
    if len(called) > COMPILE_NODES:
        return 0
    values = (node.meta.get("val") for node in called)
    written = sum(value.numel() for value in values if isinstance(value, Tensor))
    cost = COMPILE_START + COMPILE_NODE * len(called)
    return 1 + int(0.5 * cost / (SAVED_NODE * len(called) + SAVED_NUMBER * written + 1e-12))


# ---- by torch's bindings ---------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_ELSEWHERE: dict[str, Callable[..., Any]] = {
    "linear": torch._C._nn.linear,  # type: ignore[attr-defined]
    "silu": torch._C._nn.silu,  # type: ignore[attr-defined]
    "split": torch.unsafe_split,
    "view": torch.reshape,  # a product may be stored otherwise than it was when the graph was recorded
    "_unsafe_view": torch.reshape,
    "expand": torch.Tensor.expand,  # a method only
}
_OTHERWISE = ("index", "index_put", "scalar_tensor")  # whose bindings take other arguments
_BY_NUMBER = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.rsub.Scalar)
NARROW, LARGE = 12, 2**13  # columns of a product, and numbers in its first factor, that make it better turned around


def quicken(module: fx.GraphModule) -> Callable[..., Any]:
    """Return the graph as a function that calls torch's own bindings, which take half of an operator object's time.

    Call it without autograd. What it computes is the same but for rounding; whoever records checks that.
    """
    graph = copy_graph(module.graph)
    quick = graph_module(module, graph)
    if is_pure(module) and not any(node.target is _aten.as_strided.default for node in graph.nodes):
        for node in list(graph.nodes):
            value = _value(node)
            if isinstance(value, Tensor) and value.device.type == "cpu":
                _hasten(quick, node, value)
            _turn(node)
        sweep(graph)
    for node in graph.nodes:
        if is_aten(node):
            _bind(node)
    quick = fx.GraphModule(quick, graph)
    constants = dict(quick.named_buffers())
    quick._buffers.clear()
    quick.__dict__.update(constants)  # plain attributes, which Python finds at once
    return quick.forward  # type: ignore[return-value]


def _hasten(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Put something that takes less time in place of an operation, where something is known."""
    if node.target in _BY_NUMBER:
        _hold_number(module, node, value)
    elif node.target is _aten.view.default:
        _sum_at_once(node, value)
    elif node.target is _aten.addmm.default:
        _as_linear(node)


def _hold_number(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Make a number a tensor once and for all, as torch does in each call."""
    first, number, *factor = cast("tuple[Any, ...]", node.args)
    like = _value(first)
    if type(number) not in (int, float) or node.kwargs or value.dim() == 0 or like is None or like.dtype != value.dtype:
        return
    if value.dtype not in (torch.float32, torch.float64):  # narrower numbers are worked on in a wider type
        return
    if node.target is _aten.mul.Tensor and first.target is _aten.neg.default:
        first, number = first.args[0], -number
    name = f"number_{len(module._buffers)}"
    module.register_buffer(name, torch.tensor(number, dtype=value.dtype, device=value.device))
    with node.graph.inserting_before(node):
        held = node.graph.get_attr(name)
    if node.target is _aten.rsub.Scalar:
        node.target, node.args = _aten.sub.Tensor, (held, first)
        node.kwargs = {"alpha": factor[0]} if factor else {}
    else:
        node.args = (first, held)


def _value(node: Any) -> Tensor | None:
    """Return the example of a node's value, if there is one."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _sum_at_once(node: fx.Node, value: Tensor) -> None:
    """Sum over rows without keeping their axis, where it is dropped afterwards."""
    total: Any = node.args[0]
    like = _value(total)
    kept = total.target is _aten.sum.dim_IntList and total.args[1:] == ([0], True) and not total.kwargs
    if kept and value.dim() == 1 and like is not None and like.dim() == 2:
        node.target, node.args = _aten.sum.dim_IntList, (total.args[0], [0])


def _as_linear(node: fx.Node) -> None:
    """Leave it to torch to transpose the weights of a linear layer."""
    bias, x, weight = cast("tuple[fx.Node, ...]", node.args)
    like = _value(bias)
    if weight.target is _aten.t.default and like is not None and like.dim() == 1 and not node.kwargs:
        node.target, node.args = _aten.linear.default, (x, weight.args[0], bias)


def _turn(node: fx.Node) -> None:
    """Compute a product of few columns as one of few rows, which takes half of the time on a processor."""
    value = _value(node)
    if node.target is not _aten.mm.default or not isinstance(value, Tensor) or value.device.type != "cpu":
        return
    first, second = cast("tuple[fx.Node, ...]", node.args)
    like = _value(first)
    if 1 < value.shape[1] <= NARROW and like is not None and like.numel() >= LARGE:
        with node.graph.inserting_before(node):
            factors = (_transposed(second), _transposed(first))
            product = node.graph.call_function(_aten.mm.default, factors)
        node.target, node.args = _aten.t.default, (product,)


def _transposed(node: fx.Node) -> Any:
    return node.args[0] if node.target is _aten.t.default else node.graph.call_function(_aten.t.default, (node,))


def _bind(node: fx.Node) -> None:
    """Put torch's binding of the same operation in place of the operator object, where there is one."""
    name = name_of(node)
    if node.target is _aten.slice.Tensor and len(node.args) == 4 and node.args[1] in (0, 1, 2):
        tensor, axis, start, stop = node.args
        node.target, node.args = operator.getitem, (tensor, (slice(None),) * axis + (slice(start, stop),))  # type: ignore[operator, arg-type]
    elif node.target is _aten.view.dtype:
        node.target = torch.Tensor.view
    elif name in _ELSEWHERE:
        node.target = _ELSEWHERE[name]
    elif name in LIKE:
        node.target = getattr(torch, name)
        node.kwargs = {key: value for key, value in node.kwargs.items() if (key, value) != ("pin_memory", False)}
    elif name not in _OTHERWISE and hasattr(torch._C._VariableFunctions, name) and hasattr(torch, name):
        node.target = getattr(torch, name)
