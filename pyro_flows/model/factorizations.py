"""Cholesky factorizations that give NaN where there is none, at that point alone, in the place of an error for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CHOLESKY = (torch.linalg.cholesky, torch.cholesky, torch.Tensor.cholesky)


class Factorizations(TorchFunctionMode):
    """While it is entered, matrices that are not positive definite have factors of NaN.

    torch raises an error for a whole batch if one matrix of it has no factor. Then whoever evaluates a model at many
    points has to look for that point, half by half.

    Attributes:
        met: whether there was a factorization.

    >>> import torch
    >>> with Factorizations():
    ...     torch.linalg.cholesky(torch.tensor([[[4.0]], [[-1.0]]])).flatten().tolist()
    [2.0, nan]
    """

    def __init__(self, *, strict: bool = False) -> None:
        """``strict`` leaves the error as it is, and only looks."""
        super().__init__()
        self.strict, self.met = strict, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CHOLESKY:
            return func(*args, **kwargs)
        self.met = True
        return func(*args, **kwargs) if self.strict else _factor(*args, **kwargs)


def _factor(matrix: Tensor, upper: bool = False) -> Tensor:
    factor, fault = torch.linalg.cholesky_ex(matrix, upper=upper)
    return factor * torch.where(fault > 0, torch.nan, 1.0).to(factor.dtype)[..., None, None]  # NaN gradients, too
