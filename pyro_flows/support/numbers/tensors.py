"""The tensors among arguments, their memory, batches of points; modes that see operations; functions of torch anew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
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


# batches of points: how many to take at once, and other points close by -----------------------------------------------

PIECE = 2**17  # numbers in the largest intermediate result of a piece: 1 MiB in float64
ROWS_AT_LEAST, ROWS_AT_MOST = 16, 1024
LARGEST = 2**20  # numbers for which the least rows are still taken: memory above is mapped anew by each operation
SHARING = 4  # rows that share the data of a model, if memory is mapped anew even for one row,
MOST_MAPPED = 2**23  # and numbers of all of them, at most


def rows_for(numbers: int, budget: int = PIECE) -> int:
    """Return how many points to take at once where each takes ``numbers``: a power of two."""
    rows, most = (max(1, count // max(numbers, 1)) for count in (budget, LARGEST))
    if most == 1:
        most = max(1, min(SHARING, MOST_MAPPED // max(numbers, 1)))
    return min(max(1 << (rows.bit_length() - 1), min(1 << (most.bit_length() - 1), ROWS_AT_LEAST)), ROWS_AT_MOST)


def nearby(x: Tensor) -> Tensor:
    """Return other points close to ``x``, for a graph to be checked at; no random numbers are used."""
    return x + 0.1 * torch.sin(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)


# in the place of torch's functions ------------------------------------------------------------------------------------


def broadcast(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that all shapes broadcast to. Torch's first call for it imports sympy: half a second."""
    try:
        return torch.Size(np.broadcast_shapes(*map(tuple, shapes)))
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def least_squares(matrix: Tensor, values: Tensor) -> Tensor:
    """Return the x (K, V) of least norm for which ``matrix`` (N, K) times x is nearest to ``values`` (N, V).

    By singular values, on the processor. The default of ``torch.linalg.lstsq`` there (``gelsy``) reads pivots that it
    has not set, so that the digits of the result, and its rank, hang on what the memory held before (pytorch issue
    187411). On a GPU it takes matrices of full rank only. Cost: O(N K^2).

    >>> least_squares(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0], [4.0]]))
    tensor([[1.5000],
            [1.5000]])
    """
    return torch.linalg.lstsq(matrix.cpu(), values.cpu(), driver="gelsd").solution.to(values.device)


def pull(
    output: Tensor, cotangent: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool = False, further: bool = False
) -> list[Tensor]:
    """Return what ``torch.autograd.grad(output, inputs, cotangent, materialize_grads=True)`` does, 0.3 s earlier.

    That function imports sympy at its first call with a cotangent, to compare two shapes.

    Args:
        output: a tensor.
        cotangent: of the same shape, or a batch of such inside of ``vmap``.
        inputs: tensors that it depends on, or does not.
        retain_graph: whether there will be another call for this output.
        further: whether the results are to be differentiated in turn.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> pull(x.square(), torch.tensor([1.0, 10.0]), [x])
    [tensor([ 2., 40.])]
    """
    if not output.requires_grad:
        return [torch.zeros_like(part, requires_grad=False) for part in inputs]
    found = _engine_run_backward(
        (output,), (cotangent,), retain_graph or further, further, tuple(inputs), True, accumulate_grad=False
    )
    return [torch.zeros_like(part) if one is None else one for part, one in zip(inputs, found, strict=True)]


class _Filled(Dispatch):
    """Gives tensors of zeros where a derivative says that it is zero; a model with ``abs`` has such ones."""

    def __torch_dispatch__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        if func is torch.ops.aten._efficientzerotensor.default:
            func = torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))


def filled() -> AbstractContextManager[object]:
    """Return a context for second derivatives: zeros in them are plain tensors, as long as that saves time.

    To add to one that is not, torch imports its compiler: two seconds, once.
    """
    return nullcontext() if "torch._dynamo" in sys.modules else _Filled()
