"""Recorded graphs as functions: run block by block by the interpreter, or by torch's bindings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from pyro_flows.model.graphs.bindings import bound
from pyro_flows.model.graphs.fused import Fused, fused
from pyro_flows.model.graphs.graph import uncollected
from pyro_flows.support.process import stages
from pyro_flows.support.process.fallbacks import fallback
from pyro_flows.support.process.ledger import counted
from pyro_flows.support.process.threads import at_once, cores

Results = tuple[Tensor, ...]


class Runner:
    """A recorded graph as a function: run block by block where that can be done, by torch's bindings elsewhere.

    Inputs must be of one shape, dtype and device.

    Args:
        module: the graph.
        alike: whether the first run gives the numbers of later ones to the last digit; else it gives torch's, for those
            who check what was recorded.
    """

    def __init__(self, module: fx.GraphModule, *, alike: bool = False) -> None:
        self.module, self.alike = module, alike
        self._fused: Fused | None = None
        self._twins: list[Fused] = []
        self.runs = 0

    @property
    def in_blocks(self) -> bool:
        """Whether it runs block by block."""
        return self._fused is not None

    def __call__(self, *inputs: Tensor) -> Results:
        """Run, without autograd. What comes out are inference tensors: clone what is to meet autograd later."""
        self.runs += 1
        if self.runs == 1:
            found = self._fuse(inputs)
            if found is not None and not self.alike:
                return found
        if self._fused is not None:
            try:
                return self._fused(*inputs)
            except RuntimeError as error:
                fallback("recorded code in place of the interpreter", error)
        with torch.inference_mode():  # an operation takes a tenth less time
            return self._recorded(*inputs)  # which says what is wrong with these inputs, if anything is

    def many(self, batches: Sequence[tuple[Tensor, ...]]) -> list[Results]:
        """Run for several sets of inputs, at once where there are cores and each takes long enough.

        Numbers are those of a run for each, one after the other.
        """
        whole, most = self._fused, cores()
        if len(batches) < 2 or most < 2 or whole is None or not whole.is_long:
            return [self(*inputs) for inputs in batches]
        self.runs += len(batches)
        count = min(most, len(batches))
        self._twins += [whole.twin() for _ in range(count - 1 - len(self._twins))]

        def each(one: Fused, share: Sequence[tuple[Tensor, ...]]) -> list[Results]:
            return [one(*inputs) for inputs in share]

        both = enumerate([whole, *self._twins[: count - 1]])
        try:
            found = at_once([functools.partial(each, one, batches[first::count]) for first, one in both])
        except RuntimeError:
            return [self(*inputs) for inputs in batches]  # which says what is wrong
        return [found[place % count][place // count] for place in range(len(batches))]

    @functools.cached_property
    def _recorded(self) -> Callable[..., Results]:
        return bound(self.module)

    @counted(stages.TRACING)
    @uncollected()
    def _fuse(self, inputs: tuple[Tensor, ...]) -> Results | None:
        """Run block by block from now on, where that can be done, and return torch's results."""
        try:
            found = fused(self.module, inputs)
        except (RuntimeError, torch.linalg.LinAlgError):
            return None  # of these inputs: what runs them says so
        if found is None:
            return None
        self._fused = found
        expected, found.first = found.first, ()
        return expected
