"""Permutations of coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._arguments import MOST_COORDINATES, refused
from pyro_flows.transforms.base import Bijection


@_checks.constructor
class Permutation(Bijection):
    r"""Reorders the coordinates: :math:`y_i = x_{p(i)}`, :math:`\log|J| = 0`. Both ways cost one gather.

    Shapes: ``x`` and ``y`` are ``(..., dim)``, ``ladj`` is ``(...)``.

    Args:
        permutation: the indices p, or a number of coordinates to be shuffled by ``seed``.
        seed: of the shuffle; the result is a registered buffer, saved and moved with the module.

    Raises:
        ValueError: if the indices are no permutation of 0 to D - 1.

    >>> import torch, pyro_flows as pf
    >>> pf.transforms.Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0])).tolist()
    [30.0, 10.0, 20.0]
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor | int, *, seed: int = 0) -> None:
        super().__init__()
        if isinstance(permutation, int) and not isinstance(permutation, bool):
            size = _checks.integer("permutation", permutation, 1, MOST_COORDINATES)
            permutation = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        try:
            indices = torch.as_tensor(permutation, dtype=torch.long)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise refused("permutation", "indices, or how many there are", permutation) from None
        if indices.dim() != 1 or sorted(indices.tolist()) != list(range(len(indices))) or not len(indices):
            raise ValueError(f"permutation: expected each of 0 to D - 1 once, got {indices.tolist()}.")
        self.dim = len(indices)
        self.register_buffer("permutation", indices.clone())

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._gather(x, context, self.permutation)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._gather(y, context, torch.argsort(self.permutation))

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return *self.forward_and_ladj(x, context), score.index_select(-1, self.permutation)

    def _gather(self, x: Tensor, context: Tensor | None, indices: Tensor) -> tuple[Tensor, Tensor]:
        _checks.event("Permutation", x, self.dim)
        _checks.context("Permutation", context, 0)
        return x.index_select(-1, indices), x.new_zeros(x.shape[:-1])
