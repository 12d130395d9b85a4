"""A guide's tensors: in Pyro's store, by their names, and as one vector for Pyro's optimizers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence

import pyro
import torch
from pyro.infer import SVI
from pyro.poutine import runtime
from pyro.poutine.runtime import effectful
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.weak import WeakTensorKeyDictionary

# The tensors that guides of this process put into the store, each with the store's table at that time, which is another
# one once the store was cleared. What else is found there was loaded.
_placed = WeakTensorKeyDictionary()


class Named:
    """The tensors of a flow by their names, and where its modules have them: to name them anew takes long."""

    def __init__(self, prefix: str, flow: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.prefix, self.flow, self.tensors = prefix, flow, tensors
        parts = {id(part): part for part in tensors.values() if isinstance(part, nn.Parameter)}
        self.parameters = list(parts.values())  # one that has two names is there once
        owners = [owner for module in flow.modules() for owner in (module._parameters, module._buffers)]
        self._places = [(owner, dict(owner)) for owner in owners]

    def still(self, prefix: str, flow: nn.Module) -> bool:
        """Whether the flow has these very tensors, under this name."""
        if prefix != self.prefix or flow is not self.flow:
            return False
        return all(
            len(owner) == len(kept) and all(owner.get(name) is tensor for name, tensor in kept.items())
            for owner, kept in self._places
        )


class Whole:
    """One vector whose memory is that of all parameters, of one dtype and device: an optimizer of it moves them.

    Pyro's optimizers take about a tenth of a millisecond for each tensor, however small. Four couplings have 26.

    >>> import torch
    >>> from pyro_flows.guides.store import Whole
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
        """Give each parameter memory of its own, for copies, files and other vectors, until the next :meth:`hold`.

        Where Pyro has set the vector's gradient to zero since, the parameters' ones are of the step before, and go.
        """
        gone = set() if self.vector.grad is self._gradient else set(map(id, self._parts))
        for part in self.parameters:
            part.data = part.data.clone()
            part.grad = None if part.grad is None or id(part.grad) in gone else part.grad.clone()
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
        self.vector.grad = gradient.clone() if self.vector.grad is None else self.vector.grad + gradient


def in_svi() -> bool:
    """Whether a step of SVI asks for parameters.

    Pyro's compiled losses ask once more, and need each one. So do other loops, which may take derivatives by them.
    """
    asked = [part for part in runtime._PYRO_STACK if isinstance(part, TraceMessenger) and part.param_only]
    frame = sys._getframe() if len(asked) == 1 else None
    while frame is not None and frame.f_code is not SVI.step.__code__:
        frame = frame.f_back
    return frame is not None


@effectful(type="param")
def param_statement(name: str, tensor: nn.Parameter, **_: object) -> nn.Parameter:
    return tensor


def was_loaded(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether the store holds values for a guide under a name, and not the guide's ``own`` tensor or another guide's.

    Another guide's tensors come back with a state. At the end of ``scope()``, they are none for a guide of that scope,
    which was placed in another table.
    """
    store = pyro.get_param_store()
    stored, table = store._params.get(name), store._constraints
    if stored is None or stored is own.get(name) or _placed.get(stored) is table:
        return False
    return stored not in _placed or all(_placed.get(tensor, table) is table for tensor in own.values())


def place(name: str, tensor: Tensor) -> None:
    """Let the store hold this very tensor under a name."""
    store = pyro.get_param_store()
    if store._params.get(name) is not tensor:
        forget(name)
        store._constraints[name] = constraints.real
        store._params[name] = tensor
        store._param_to_name[tensor] = name
        _placed[tensor] = store._constraints


def forget(name: str) -> None:
    """Take a name out of the store; its tensor may have others, as that of a layer that is there twice."""
    store = pyro.get_param_store()
    tensor = store._params.pop(name, None)
    store._constraints.pop(name, None)
    if tensor is not None and store._param_to_name.get(tensor) == name:
        del store._param_to_name[tensor]


def copy_stored(name: str, parameter: Tensor, stored: Tensor) -> None:
    if stored.shape != parameter.shape:
        raise ValueError(
            f"param store: {name!r} has shape {tuple(stored.shape)}, this guide's is {tuple(parameter.shape)}. "
            "It was saved from another guide; call pyro.clear_param_store(), or build the guide with the same settings."
        )
    with torch.no_grad():
        parameter.copy_(stored)
