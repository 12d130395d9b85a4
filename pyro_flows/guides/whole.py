"""A flow's parameters as one vector for Pyro's optimizers, which make an optimizer for each tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Whole:
    """One vector whose memory is that of all parameters, of one dtype and device: an optimizer of it moves them.

    Pyro's optimizers take about a tenth of a millisecond for each tensor, however small. Four couplings have 26.

    >>> import torch
    >>> from pyro_flows.guides.whole import Whole
    >>> parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(1, 1))]
    >>> whole = Whole(parameters)
    >>> whole.vector.data.mul_(3.0)
    tensor([3., 3., 0.])
    >>> parameters[0].tolist()
    [3.0, 3.0]
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        if len({(part.dtype, part.device) for part in parameters}) != 1:
            raise ValueError("parameters: expected one dtype and device.")
        self.parameters = list(parameters)
        self._gradient: Tensor | None = None  # the vector's, of which the parameters' ones are parts
        self._parts: list[Tensor] = []
        self.vector = nn.Parameter(torch.cat([part.detach().reshape(-1) for part in parameters]))
        self._offsets = [0, *itertools.accumulate(part.numel() for part in self.parameters)][:-1]
        self.hold()

    @torch.no_grad()
    def hold(self) -> bool:
        """Take the memory of parameters that have another one by now; return whether they still fit in."""
        first = self.parameters[0]
        if first.dtype != self.vector.dtype or first.device != self.vector.device:
            return False
        begin, width = self.vector.data_ptr(), self.vector.element_size()
        for part, offset in zip(self.parameters, self._offsets, strict=True):
            if part.data_ptr() != begin + width * offset:
                part.data = self.vector.data[offset : offset + part.numel()].view(part.shape).copy_(part)
        return True

    def release(self) -> None:
        """Give each parameter memory of its own, for copies and files, until the next :meth:`hold`."""
        for part in self.parameters:
            part.data = part.data.clone()
            part.grad = None if part.grad is None else part.grad.clone()
        self._gradient, self._parts = None, []

    def gather(self) -> None:
        """Let each parameter add its gradient to its part of the vector's, and give over what it has already."""
        if self.vector.grad is None:
            self.vector.grad = torch.zeros_like(self.vector)
        if self.vector.grad is not self._gradient:
            self._gradient, before = self.vector.grad, self._parts
            parts = self._gradient.split([part.numel() for part in self.parameters])
            self._parts = [own.view_as(part) for part, own in zip(self.parameters, parts, strict=True)]
            for part, own, old in zip(self.parameters, self._parts, before or self._parts, strict=True):
                if part.grad is not None and part.grad is not old:
                    own.add_(part.grad)
                part.grad = own
        for part, own in zip(self.parameters, self._parts, strict=True):
            if part.grad is not own:  # an optimizer of the parameters has taken it away
                own.zero_() if part.grad is None else own.copy_(part.grad)
                part.grad = own

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to the gradient of the vector."""
        self.vector.grad = gradient.clone() if self.vector.grad is None else self.vector.grad + gradient
