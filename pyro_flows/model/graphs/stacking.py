"""A recorded graph for many sets of inputs at once, as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.graph import copy_graph, is_pure
from pyro_flows.model.graphs.recording import record

_aten = torch.ops.aten
_functorch: ModuleType = torch._C._functorch


def stacked(module: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """Record a graph batched over a new first axis of all its inputs and outputs: products of matrices become batched.

    Args:
        module: a graph without changes in place.
        inputs: examples, each with the new axis in front.

    Raises:
        RuntimeError: for a graph that changes tensors in place, and for an operation that can only be done for one set
            of inputs after the other.

    >>> product = record(lambda x, w: (x @ w,), torch.ones(3, 2), torch.ones(2, 4))
    >>> whole = stacked(product, torch.ones(5, 3, 2), torch.ones(5, 2, 4))
    >>> whole(torch.ones(5, 3, 2), torch.ones(5, 2, 4))[0].shape
    torch.Size([5, 3, 4])
    """
    if not is_pure(module):
        raise RuntimeError("it changes tensors in place")
    graph = copy_graph(module.graph)
    for node in graph.nodes:
        node.target = _OTHERWISE.get(node.target, node.target) if node.op == "call_function" else node.target
    whole = torch.func.vmap(fx.GraphModule(module, graph))
    with torch.no_grad(), _at_once():
        return record(whole, *(part.clone() for part in inputs))


def _median(x: Tensor) -> Tensor:
    return x.reshape(-1).nanmedian(0).values


def _scattered(
    x: Tensor, part: Tensor, axis: int = 0, first: int | None = None, last: int | None = None, step: int = 1
) -> Tensor:
    size = x.shape[axis]  # vmap counts to the end, which may be the largest whole number
    return torch.slice_scatter(x, part, axis, first, size if last is None else min(last, size), step)


# what vmap has no rule for, by operations that it has rules for
_OTHERWISE: dict[object, Callable[..., Tensor]] = {
    _aten.view.default: torch.reshape,
    _aten._unsafe_view.default: torch.reshape,
    _aten.fill.Scalar: torch.full_like,
    _aten.nanmedian.default: _median,
    _aten.slice_scatter.default: _scattered,
}


@contextmanager
def _at_once() -> Iterator[None]:
    """Make it an error that ``vmap`` takes one set of inputs after the other: the graph would have as many copies."""
    before = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(before)
