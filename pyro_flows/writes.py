"""What stops ``torch.func.vmap`` in a model though it need not: writes in place, and data handed to numpy."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

Place = tuple[CodeType, int]  # in a program: code outside of torch, and its instruction
_AT = "_pyro_flows_made_at"
_TO_NUMPY = (Tensor.numpy, Tensor.__array__, Tensor.tolist)


class Places(NamedTuple):
    """Where a model makes tensors that it writes into later, where it reads from them, and whether it uses numpy."""

    made: frozenset[Place]
    read: frozenset[Place]
    numpy: bool


class FindWrites(TorchFunctionMode):
    """Inside, sees which tensors are changed in place: ``x = torch.zeros(T)`` and then ``x[t] = ...``.

    >>> import torch
    >>> with FindWrites() as found:
    ...     x = torch.zeros(2)
    ...     x[0] = torch.ones(3).sum()
    >>> len(found.places.made)
    1
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, Place] = {}
        self._views: defaultdict[int, set[Place]] = defaultdict(set)
        self._written: set[Place] = set()
        self._memories: set[int] = set()  # that were written into
        self._read: set[Place] = set()
        self._numpy = False
        self._through: set[Place] = set()  # views that are written into

    @property
    def places(self) -> Places:
        """What was seen."""
        read = self._read.union(*(self._views[memory] for memory in self._memories))
        return Places(frozenset(self._written), frozenset(read - self._through), self._numpy)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._numpy = self._numpy or func in _TO_NUMPY
        given = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        versions = [0 if part.is_inference() else part._version for part in given]
        result = func(*args, **kwargs)
        for part, version in zip(given, versions, strict=True):
            if not part.is_inference() and part._version != version:
                self._write(part)
        if isinstance(result, Tensor) and not any(result is part for part in given):
            self._make(result, given, _place())
        return result

    def _write(self, changed: Tensor) -> None:
        memory = _memory(changed)
        if memory not in self._made:
            return  # made outside
        self._written.add(self._made[memory])
        self._memories.add(memory)
        at = getattr(changed, _AT, None)
        while at is not None:
            place, at = at
            self._through.add(place)

    def _make(self, result: Tensor, given: list[Tensor], place: Place) -> None:
        memory = _memory(result)
        source = next((part for part in given if _memory(part) == memory), None)
        if source is None:
            self._made[memory] = place
            views = self._views.pop(memory, set())
            if memory in self._memories:  # freed, and used again
                self._memories.remove(memory)
                self._read |= views
        else:
            self._views[memory].add(place)
            setattr(result, _AT, (place, getattr(source, _AT, None)))


class Batchable(TorchFunctionMode):
    """Inside, tensors that a model writes into have the batch axis of ``like``, and reading from them copies.

    ``vmap`` cannot write a batch into a tensor without one, and autograd cannot go back through a value that is
    overwritten afterwards. Data without a batch axis may be handed to numpy, which the transforms of ``torch.func``
    refuse.

    Args:
        places: where they are made, and where they are read.
        like: a tensor with a batch axis, unseen as it is inside of ``vmap``.
    """

    def __init__(self, places: Places, like: Tensor) -> None:
        super().__init__()
        self.places, self.like = places, like

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TO_NUMPY and not _functorch.is_batchedtensor(_bare(args[0])):
            with temporarily_clear_interpreter_stack():
                return func(_bare(args[0]).detach(), *args[1:], **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            place = _place()
            if place in self.places.made:
                options: dict[str, Any] = {"dtype": result.dtype, "device": result.device}
                return self.like.new_zeros(result.shape, **options).copy_(result)
            if place in self.places.read:
                return result.clone()
        return result


def _bare(value: Tensor) -> Tensor:
    """Return the tensor inside of the wrappers of ``torch.func``; a batch keeps its own."""
    while _functorch.is_functorch_wrapped_tensor(value) and not _functorch.is_batchedtensor(value):
        value = _functorch.get_unwrapped(value)
    return value


def _place() -> Place:
    """Return where the program called torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch":
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
