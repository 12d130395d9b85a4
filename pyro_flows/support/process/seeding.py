"""Seeding without side effects, and random draws that ``torch.func.vmap`` can batch."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor
from torch.distributions import dirichlet
from torch.overrides import TorchFunctionMode

from pyro_flows.support.numbers.tensors import Args, Function, Kwargs
from pyro_flows.support.process.threads import turn


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators (of the CPU, and of ``device``) inside, put them back after.

    Other threads wait: their draws would come from the same generators.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    if device is None and torch.cuda.is_initialized():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    with turn(), torch.random.fork_rng(devices=devices):
        (torch.manual_seed if _accelerated() else torch.default_generator.manual_seed)(seed)
        yield


@functools.cache
def _accelerated() -> bool:
    """Whether there are generators besides that of the CPU.

    Without any, ``torch.manual_seed`` takes 3 ms to note where it was called, for devices that may come later.
    """
    return torch.accelerator.is_available()


def derive(seed: int, purpose: str) -> int:
    """Return a seed of its own for each purpose.

    Two purposes with one seed would draw the same numbers: noise of predictive draws would be that of the posterior's.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "little")


class BatchedDraws(TorchFunctionMode):
    """Inside, torch's in-place draws on fresh tensors are made out of place, with the same distribution.

    Distributions draw by ``torch.empty(shape).normal_()`` and the like, which ``vmap(randomness="different")`` refuses:
    the fresh tensor has no batch axis. Only the returned value counts, so a new tensor does as well. Dirichlet and beta
    distributions draw by an ``autograd.Function`` that the transforms of ``torch.func`` refuse; inside of them, what it
    calls is called, and there are no gradients of these draws.
    """

    def __enter__(self) -> Self:
        self._drawn_by = dirichlet._Dirichlet
        vars(dirichlet)["_Dirichlet"] = _Dirichlet
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        vars(dirichlet)["_Dirichlet"] = self._drawn_by
        super().__exit__(*error)

    def __torch_function__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        draw = OUT_OF_PLACE.get(func)
        return (draw or func)(*args, **(kwargs or {}))


class _Dirichlet:
    """What stands for torch's function of this name; other threads, which are in no transform, get torch's own."""

    _torch = dirichlet._Dirichlet

    @classmethod
    def apply(cls, concentration: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return torch._sample_dirichlet(concentration)
        return cls._torch.apply(concentration)


def _new(x: Tensor, *given: object, **options: object) -> Tensor:
    """Return a tensor with the batch axis of ``x``: draws of counts are added to such a one."""
    sizes = given[0] if len(given) == 1 and isinstance(given[0], tuple) else given
    sized = bool(given) and not options and all(type(part) is int for part in sizes)
    make: Callable[..., Tensor] = x.new_zeros if sized else x.new
    return make(sizes) if sized else make(*given, **options)


OUT_OF_PLACE: dict[Function, Callable[..., Tensor]] = {
    torch.Tensor.normal_: lambda x, mean=0.0, std=1.0: mean + std * torch.randn_like(x),
    torch.Tensor.uniform_: lambda x, low=0.0, high=1.0: low + (high - low) * torch.rand_like(x),
    torch.Tensor.exponential_: lambda x, rate=1.0: -torch.log1p(-torch.rand_like(x)) / rate,
    torch.Tensor.cauchy_: lambda x, median=0.0, scale=1.0: (
        median + scale * torch.tan(math.pi * (torch.rand_like(x) - 0.5))
    ),
    torch.Tensor.new: _new,
    torch.binomial: lambda count, prob: torch.binomial(count + torch.zeros_like(prob), prob),  # vmap resizes an output
}
