"""Least squares, with one result for one problem."""

from __future__ import annotations

import torch
from torch import Tensor


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
