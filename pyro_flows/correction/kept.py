"""The draws that running chains keep, with the numbers of their sweeps."""

from __future__ import annotations

import torch
from torch import Tensor

STATS = (
    *("lp", "log_weight", "acceptance_rate", "diverging", "energy", "energy_error", "n_steps", "step_size"),
    *("proposed", "independent", "changes", "part"),
)


class Kept:
    """Draws z (C, D), one after the other, and numbers (C,) of each, from earlier ones (C, N, D) and (C, N) on."""

    def __init__(self, z: Tensor, stats: dict[str, Tensor]) -> None:
        self._like = z[:, :0]
        self._z = list(z.unbind(1))
        known = {"part": torch.zeros_like(z[..., 0]), **stats} if stats else dict.fromkeys(STATS, self._like[..., 0])
        self._stats = {name: list(known[name].unbind(1)) for name in STATS}

    def __len__(self) -> int:
        return len(self._z)

    def add(self, z: Tensor, numbers: dict[str, Tensor]) -> None:
        """Keep one more draw of each chain."""
        self._z.append(z)
        for name, value in numbers.items():
            self._stats[name].append(value)

    def choose(self, chosen: slice) -> None:
        self._z = self._z[chosen]
        self._stats = {name: values[chosen] for name, values in self._stats.items()}

    def total(self, name: str) -> float:
        return sum(float(one.sum()) for one in self._stats[name])

    def stacked(self) -> tuple[Tensor, dict[str, Tensor]]:
        if not self._z:
            return self._like, dict.fromkeys(STATS, self._like[..., 0])
        return torch.stack(self._z, 1), {name: torch.stack(values, 1) for name, values in self._stats.items()}
