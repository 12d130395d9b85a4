"""Vector-Jacobian products by autograd's engine, for tensors whose shapes are known to be right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from pyro_flows._tensors import Args, Dispatch, Function, Kwargs

_aten = torch.ops.aten


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
        if func is _aten._efficientzerotensor.default:
            func = _aten.zeros.default
        return func(*args, **(kwargs or {}))


def filled() -> AbstractContextManager[object]:
    """Return a context for second derivatives: zeros in them are plain tensors, as long as that saves time.

    To add to one that is not, torch imports its compiler: two seconds, once.
    """
    return nullcontext() if "torch._dynamo" in sys.modules else _Filled()
