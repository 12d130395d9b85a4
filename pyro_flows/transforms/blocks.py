"""Sets of coordinates, each with a map of its own; all others stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_flows import _checks
from pyro_flows.transforms.base import Bijection


class Blocks(Bijection):
    r"""Map sets of coordinates :math:`I_1, \dots, I_K` by maps of their own: :math:`y_{I_k} = T_k(x_{I_k})`.

    .. math:: \log|J| = \sum_k \log|J_k(x_{I_k})|

    Coordinates that are in no set stay as they are. Both ways cost what the maps cost.

    Args:
        dim: number of coordinates D.
        sets: the coordinates of each set; no coordinate is in two sets.
        maps: the map of each set, of as many coordinates.

    Raises:
        ValueError: for coordinates that are out of range or in two sets.

    >>> import torch, pyro_flows as pf
    >>> from pyro_flows.transforms.blocks import Blocks
    >>> twice = pf.transforms.DiagonalAffine(2, scale=torch.full((2,), 2.0))
    >>> Blocks(3, [[0, 2]], [twice])(torch.ones(3)).tolist()
    [2.0, 1.0, 2.0]
    """

    def __init__(self, dim: int, sets: Sequence[Sequence[int]], maps: Sequence[Bijection]) -> None:
        super().__init__()
        self.dim = _checks.integer("dim", dim, 1)
        together = [index for own in sets for index in own]
        if len(set(together)) < len(together) or not set(together) <= set(range(dim)):
            raise ValueError(f"sets: expected coordinates from 0 to {dim - 1}, each in one set, got {list(sets)}.")
        self.maps = cast("Sequence[Bijection]", nn.ModuleList(maps))
        for number, own in enumerate(sets):
            self.register_buffer(f"set_{number}", torch.tensor(list(own), dtype=torch.long))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._each(x, lambda map_, own: map_.forward_and_ladj(own))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._each(y, lambda map_, own: map_.inverse_and_ladj(own))

    def _each(self, x: Tensor, way: Callable[[Bijection, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        _checks.event("Blocks", x, self.dim)
        found, total = x, x.new_zeros(x.shape[:-1])
        for number, map_ in enumerate(self.maps):
            index = self.get_buffer(f"set_{number}")
            mapped, ladj = way(map_, x.index_select(-1, index))
            found, total = found.index_copy(-1, index, mapped), total + ladj
        return found, total
