"""Models that raise an error at some values of their latents, of many kinds and sizes, for tests of what a fit does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.registry import normal

Y = 0.3 * normal(6, seed=71) + 1.5
X = torch.linspace(0.0, 4.0, 6, dtype=torch.float64)


class Bad(NamedTuple):
    """A model with its data; ``batched`` says whether it takes no number out of a latent."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    batched: bool


def _latent(kind: str, dim: int, loc: float, scale: float) -> Tensor:
    """Return a latent "a" of ``dim`` coordinates: a scalar, a vector, or in a plate."""
    prior = dist.Normal(torch.tensor(loc, dtype=torch.float64), scale)
    if kind == "scalar":
        for number in range(1, dim):
            pyro.sample(f"other_{number}", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        return pyro.sample("a", prior)[None]
    if kind == "vector":
        return pyro.sample("a", prior.expand([dim]).to_event(1))
    with pyro.plate("units", dim):
        return pyro.sample("a", prior)


def _refuse(wrong: bool, said: str) -> None:
    if wrong:
        raise ValueError(said)


def _positive(a: Tensor) -> Tensor:
    _refuse(bool((a <= 0).any()), "a has to be positive")
    return a.log()


def _factor(a: Tensor) -> Tensor:
    corner = torch.stack([torch.stack([a[0], a[0] * 0 + 1.0]), torch.stack([a[0] * 0 + 1.0, a[0]])])
    return torch.linalg.cholesky(corner).diagonal().log().sum()[None] + 0.0 * a


def _inverse(a: Tensor) -> Tensor:
    there = (a[0] > 0).double()  # a matrix of zeros below
    return torch.linalg.inv(there * torch.eye(2, dtype=a.dtype)).sum()[None] * 0.5 * a


def _whole(a: Tensor) -> Tensor:
    steps = int(a[0].detach() * 10)
    return a * (100 // steps) / 50


#: what is computed from a latent around 1, which is not defined below 0; and whether it is of tensors alone
COMPUTED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "divisor": (lambda a: 1.0 / a, True),
    "log": (lambda a: a.log(), True),
    "root": (lambda a: a.sqrt(), True),
    "power": (lambda a: a**1.5, True),
    "cholesky": (_factor, True),
    "inverse": (_inverse, True),
    "raise": (_positive, False),
    "math": (lambda a: a + 0.0 * math.log(float(a[0].detach())), False),
    "math root": (lambda a: a * (1.0 + 0.0 * math.sqrt(float(a[-1].detach()))), False),
    "whole numbers": (_whole, False),
    "divided by zero": (lambda a: a + 0.0 / max(float(a[0].detach()), 0.0), False),
    "index": (lambda a: a + 0.0 * Y[int(max(float(a[0].detach()), 0.0) * 3)], False),
    "assertion": (lambda a: _asserted(a), False),
    "scale": (lambda a: dist.Normal(0.0, a, validate_args=True).scale, False),
}


def _asserted(a: Tensor) -> Tensor:
    assert bool((a > 0).all()), "a is positive"
    return a


def _of(computed: Callable[[Tensor], Tensor], kind: str, dim: int) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        a = _latent(kind, dim, 1.0, 0.7)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(computed(a).mean(), 0.5), obs=y)

    return model


def periodic(x: Tensor, y: Tensor) -> None:
    """A Gaussian process with a periodic kernel: no period of 0."""
    period = pyro.sample("period", dist.Normal(torch.tensor(11.0, dtype=x.dtype), 1.0))
    apart = torch.sin(torch.pi * (x[:, None] - x) / period)
    kernel = torch.exp(-2.0 * apart**2) + 0.1 * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), kernel), obs=y)


def _at_random(error: type[Exception], dim: int, every: int) -> Callable[[Tensor], None]:
    """A model that raises in one of ``every`` runs, on the whole: at 7, 7 + 13 ... of a fixed sequence."""
    calls = itertools.count()

    def model(y: Tensor) -> None:
        a = _latent("vector", dim, 0.0, 2.0)
        if (next(calls) * 7919) % every == every // 2:
            raise error("by chance")
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a.mean(), 1.0), obs=y)

    return model


def bad_models() -> Iterator[Bad]:
    """Yield all of them."""
    kinds = itertools.cycle([("scalar", 1), ("vector", 3), ("plated", 4), ("scalar", 2), ("vector", 5)])
    for name, (computed, batched) in COMPUTED.items():
        for kind, dim in itertools.islice(kinds, 3):
            yield Bad(f"{name}, {kind}, {dim}", _of(computed, kind, dim), (Y,), batched)
    yield Bad("periodic", periodic, (X, Y), True)
    for error in (ValueError, RuntimeError, torch.linalg.LinAlgError, ZeroDivisionError):
        yield Bad(f"{error.__name__} by chance", _at_random(error, 3, 100), (Y,), True)
