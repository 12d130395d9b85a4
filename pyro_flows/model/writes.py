"""What stops ``torch.func.vmap`` in a model though it need not: writes in place, boolean masks, numpy on data."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import CodeType
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

from pyro_flows.model.sites import Keywords
from pyro_flows.support.numbers.tensors import Args, Function, Kwargs, Memories, storage_of, tensors_in

Place = tuple[CodeType, int]  # in a program: code outside of torch, and its instruction
_AT = "_pyro_flows_made_at"
_TO_NUMPY = (Tensor.numpy, Tensor.__array__, Tensor.tolist)
_CHOSEN = "_pyro_flows_chosen_by"  # the mask, of values that were read through one
_ON_CHOSEN: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(("add", "iadd", "radd", "add_"), torch.add),
    **dict.fromkeys(("sub", "isub", "sub_"), torch.sub),
    **dict.fromkeys(("mul", "imul", "rmul", "mul_"), torch.mul),
    "rsub": torch.rsub,
    "neg": torch.neg,
}


class Places(NamedTuple):
    """Where a model makes tensors that it writes into later, where it reads from them, and what else it does."""

    made: frozenset[Place]
    read: frozenset[Place]
    numpy: bool
    masks: bool  # whether it writes through boolean masks

    def ways(self) -> Iterator[Places]:
        """Yield what to try to batch the model, the cheaper way first."""
        if self.masks:
            yield Places(frozenset(), frozenset(), False, True)
        if self.made or self.numpy:
            yield self


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
        self._held, self._memories = Memories(), set[int]()  # the latter were written into
        self._read: set[Place] = set()
        self._numpy = self._masks = False
        self._through: set[Place] = set()  # views that are written into

    @property
    def places(self) -> Places:
        """What was seen."""
        read = self._read.union(*(self._views[memory] for memory in self._memories))
        return Places(frozenset(self._written), frozenset(read - self._through), self._numpy, self._masks)

    def __torch_function__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        kwargs = kwargs or {}
        self._numpy = self._numpy or func in _TO_NUMPY
        self._masks = self._masks or _written(func, args, kwargs) is not None
        given = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        versions = [0 if part.is_inference() else part._version for part in given]
        result = func(*args, **kwargs)
        for part, version in zip(given, versions, strict=True):
            if not part.is_inference() and part._version != version:
                self._write(part)
        if isinstance(result, Tensor) and not any(result is part for part in given):
            self._make(result, given, _place())
        return result

    def _write(self, changed: Tensor) -> None:
        memory = storage_of(changed)
        if memory not in self._made:
            return  # made outside
        self._written.add(self._made[memory])
        self._memories.add(memory)
        at = getattr(changed, _AT, None)
        while at is not None:
            place, at = at
            self._through.add(place)

    def _make(self, result: Tensor, given: list[Tensor], place: Place) -> None:
        memory = self._held.of(result)
        source = next((part for part in given if storage_of(part) == memory), None)
        if source is None:
            self._made[memory] = place
        else:
            self._views[memory].add(place)
            setattr(result, _AT, (place, getattr(source, _AT, None)))


class Batchable(TorchFunctionMode):
    """Inside, tensors that a model writes into have the batch axis of ``like``, and reading from them copies.

    ``vmap`` cannot write a batch into a tensor without one, and autograd cannot go back through a value that is
    overwritten afterwards. Nor can it choose entries by a boolean mask that has a batch axis: ``x[mask] = value`` is
    written as ``torch.where(mask, value, x)``, and so is ``x[mask] += value``. Data without a batch axis may be handed
    to numpy, which the transforms of ``torch.func`` refuse.
    """

    def __init__(self, places: Places, like: Tensor) -> None:
        super().__init__()
        self.places, self.like = places, like

    def __torch_function__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        if func in _TO_NUMPY and isinstance(args[0], Tensor) and not _has_batch(args[0]):
            with temporarily_clear_interpreter_stack():
                return func(_bare(args[0]).detach(), *args[1:], **(kwargs or {}))
        if self.places.masks:
            done, result = _through_mask(func, args, kwargs or {})
            if done:
                return result
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (self.places.made or self.places.read):
            place = _place()
            if place in self.places.made:
                return self.like.new_zeros(result.shape, dtype=result.dtype, device=result.device).copy_(result)
            if place in self.places.read:
                return result.clone()
        return result


def _bare(value: Tensor) -> Tensor:
    """Return the tensor inside of the wrappers of ``torch.func``; a batch keeps its own."""
    while _functorch.is_functorch_wrapped_tensor(value) and not _functorch.is_batchedtensor(value):
        value = _functorch.get_unwrapped(value)
    return value


def _place() -> Place:
    """Return where the program, or a distribution of torch's, called torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] != "torch" or module.startswith("torch.distributions."):
            break
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


# boolean masks --------------------------------------------------------------------------------------------------------


class _Write(NamedTuple):
    """``x[parts] = value``, where one of ``parts`` is a boolean mask."""

    x: Tensor
    parts: tuple[object, ...]
    mask: Tensor
    value: object


def _read(x: object, index: object, value: object = None) -> _Write | None:
    parts = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    masks = [part for part in parts if isinstance(part, Tensor) and part.dtype == torch.bool]
    others = [part for part in parts if not (isinstance(part, Tensor) and part.dtype == torch.bool)]
    plain = all(part is None or part is Ellipsis or type(part) in (int, slice) for part in others)
    return _Write(x, parts, masks[0], value) if len(masks) == 1 and plain and isinstance(x, Tensor) else None


def _written(func: Function, args: Args, kwargs: Keywords) -> _Write | None:
    """Return what is written through a mask; None if this is no such operation."""
    if func is Tensor.__setitem__:
        return _read(*args)
    if func is not Tensor.index_put_:
        return None
    given = dict(zip(("x", "indices", "values", "accumulate"), args, strict=False)) | dict(kwargs)
    return None if given.get("accumulate") else _read(given["x"], given["indices"], given["values"])


def _through_mask(func: Function, args: Args, kwargs: Keywords) -> tuple[bool, object]:
    """Run an operation that has to do with a boolean mask with a batch axis; return whether it was one, and its result.

    Values that are read through a mask keep the places of those that are not chosen, which are 0. So few operations can
    be done with them: to add, subtract or multiply what is no vector, or what the same mask chose, and to write.
    """
    write = _written(func, args, kwargs)
    if write is not None and _has_batch(write.mask):
        view, mask = _aligned(write)
        view.copy_(torch.where(mask, _spread(write, view, mask), view))
        return True, write.x if func is Tensor.index_put_ else None
    if func is Tensor.__getitem__:
        write = _read(*args)
        if write is not None and _has_batch(write.mask):
            view, mask = _aligned(write)
            chosen = torch.where(mask, view, torch.zeros_like(view))
            setattr(chosen, _CHOSEN, write.mask)
            return True, chosen
    by = [getattr(part, _CHOSEN, None) for part in tensors_in((*args, *kwargs.values()))]
    chosen_by = next((mask for mask in by if mask is not None), None)
    if chosen_by is None:
        return False, None
    writes = func in (Tensor.__setitem__, Tensor.index_put_)
    operation = None if writes else _ON_CHOSEN.get(getattr(func, "__name__", "").strip("_"))
    vectors = [part for part in tensors_in(args) if getattr(part, _CHOSEN, None) is not chosen_by and part.dim()]
    if operation is None or vectors or kwargs:
        raise RuntimeError("indexing with a boolean mask that depends on a latent: its result has a dynamic shape")
    result = operation(*args)
    setattr(result, _CHOSEN, chosen_by)
    return True, result


def _aligned(write: _Write) -> tuple[Tensor, Tensor]:
    """Return the part of a tensor that a mask may choose from, and the mask with an axis for each of its axes."""
    at = next(place for place, part in enumerate(write.parts) if part is write.mask)
    before, after = write.parts[:at], write.parts[at + 1 :]
    axes = write.mask.dim()
    view = write.x[cast("tuple[slice, ...]", (*before, *[slice(None)] * axes, *after))]
    if any(part is Ellipsis for part in before):
        last = sum(type(part) is not int for part in after)
    else:
        last = view.dim() - axes - sum(type(part) is not int for part in before)
    if view.shape[view.dim() - last - axes : view.dim() - last] != write.mask.shape:
        raise IndexError(f"a mask of shape {tuple(write.mask.shape)} for values of shape {tuple(view.shape)}")
    return view, write.mask.reshape(*write.mask.shape, *[1] * last)


def _spread(write: _Write, view: Tensor, mask: Tensor) -> Tensor:
    """Return the value that is written, with a place for each that could be chosen."""
    value, last = write.value, mask.dim() - write.mask.dim()
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=view.dtype, device=view.device)
    if getattr(value, _CHOSEN, None) is write.mask or value.dim() <= last:
        return value
    first = value.dim() - last - 1  # the axis along which one value follows the other
    if getattr(value, _CHOSEN, None) is not None or value.shape[first] != 1:
        raise RuntimeError("as many values as a boolean mask that depends on a latent chooses: a dynamic shape")
    return value.reshape(*value.shape[:first], *[1] * write.mask.dim(), *value.shape[first + 1 :])


def _has_batch(value: Tensor) -> bool:
    return bool(_functorch.is_batchedtensor(_bare(value)))
