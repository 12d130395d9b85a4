"""The tensors among arguments, the memory that tensors are in, and modes that see torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., object]
Args = tuple[object, ...]
Kwargs = Mapping[str, object] | None  # these three are what modes are given


class Dispatch(TorchDispatchMode):
    """A mode for operations. To skip its compiler, torch would import it, and wrap each operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def storage_of(value: Tensor) -> int:
    """Tell the memory that a tensor is in: views of one tensor share it."""
    return int(value.untyped_storage()._cdata)


class Memories:
    """Tells memory as :func:`storage_of` does, for as long as this lives: no other memory comes to have the number.

    Else what is found would depend on which memory is free, and so on what the process did before. The number is kept
    by a weak reference, which lets the memory go.
    """

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def of(self, value: Tensor) -> int:
        """Return the number of the memory that a tensor is in."""
        number = storage_of(value)
        if number not in self._known:
            self._known[number] = StorageWeakRef(value.untyped_storage())
        return number


def tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, those in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
