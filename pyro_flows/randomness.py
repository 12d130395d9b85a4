"""Seeding without side effects, and random draws that ``torch.func.vmap`` can batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_flows.batching import turn


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators (of the CPU, and of ``device``) inside, put them back after.

    Other threads wait: their draws would come from the same generators.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    if device is None and torch.cuda.is_initialized():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    with turn(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def derive(seed: int, purpose: str) -> int:
    """Return a seed of its own for each purpose.

    Two purposes with one seed would draw the same numbers: noise of predictive draws would be that of the posterior's.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "little")


class BatchedDraws(TorchFunctionMode):
    """Inside, torch's in-place draws on fresh tensors are made out of place, with the same distribution.

    Distributions draw by ``torch.empty(shape).normal_()`` and the like, which ``vmap(randomness="different")`` refuses:
    the fresh tensor has no batch axis. Only the returned value counts, so a new tensor does as well.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draw = OUT_OF_PLACE.get(func)
        return (draw or func)(*args, **(kwargs or {}))


def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn_like(x)


def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand_like(x)


def _exponential(x: Tensor, rate: float = 1.0) -> Tensor:
    return -torch.log1p(-torch.rand_like(x)) / rate


def _cauchy(x: Tensor, median: float = 0.0, scale: float = 1.0) -> Tensor:
    return median + scale * torch.tan(math.pi * (torch.rand_like(x) - 0.5))


OUT_OF_PLACE: dict[Any, Callable[..., Tensor]] = {
    torch.Tensor.normal_: _normal,
    torch.Tensor.uniform_: _uniform,
    torch.Tensor.exponential_: _exponential,
    torch.Tensor.cauchy_: _cauchy,
}
