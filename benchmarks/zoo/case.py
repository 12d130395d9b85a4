"""A case of the zoo: a Pyro model, and independent exact draws from its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Draws = dict[str, Array]

EXACT_DRAWS = 20_000
LARGE = 0.1  # share of cases that have many dimensions
DOUBLE = 0.3  # share of cases in double precision


@dataclass(frozen=True)
class Case:
    """A model whose posterior is known.

    Attributes:
        name: what it is, and its sizes.
        model, args, kwargs: what is fitted.
        draw: ``draw(n, rng)`` gives n independent draws from the exact posterior, ``{site: (n, *shape)}``, on the scale
            of the sites; None where there is no posterior. Sites that are not in it are not judged.
        log_evidence: the log normaliser, nats; None where it is not known.
        regions: where there are several modes: draws -> booleans (n, M), whether a draw lies in each of M regions.
        heavy: sites whose mean or standard deviation does not exist, or cannot be estimated from a sample.
        periods: sites that are angles, with their period.
        smooth: whether the density is differentiable on the whole unconstrained space.
        impossible: whether no value of the latents allows for the data.
        improper: whether the posterior has no finite integral.
        dtype: of data and parameters.
        family, seed, number: its place in the zoo.
    """

    name: str
    model: Callable[..., Any]
    draw: Callable[[int, np.random.Generator], Draws] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    log_evidence: float | None = None
    regions: Callable[[Draws], NDArray[np.bool_]] | None = None
    heavy: frozenset[str] = frozenset()
    periods: Mapping[str, float] = field(default_factory=dict)
    smooth: bool = True
    impossible: bool = False
    improper: bool = False
    dtype: torch.dtype = torch.float32
    family: str = ""
    seed: int = 0
    number: int = 0

    def draws(self, count: int, stream: int = 0) -> Draws:
        """Return ``count`` exact draws; each ``stream`` is independent of the others.

        Raises:
            ValueError: if there is no posterior.
        """
        if self.draw is None:
            raise ValueError(f"{self.name}: there is no posterior.")
        found = self.draw(count, np.random.default_rng([self.seed, self.number, 1 + stream]))
        return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}

    @cached_property
    def exact(self) -> Draws:
        """The exact draws that fits are compared with."""
        return self.draws(EXACT_DRAWS)

    @property
    def dim(self) -> int:
        """How many numbers are judged; 0 where there is no posterior."""
        return 0 if self.draw is None else sum(math.prod(value.shape[1:]) for value in self.draws(2).values())

    def masses(self, draws: Draws) -> Array:
        """Return the share of the draws in each of M regions, (M,)."""
        return np.empty(0) if self.regions is None else np.asarray(self.regions(draws), dtype=np.float64).mean(0)


class Maker:
    """The random choices that make one case; everything comes from ``rng``."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number, 0])
        self.dtype = torch.float64 if self.rng.random() < DOUBLE else torch.float32
        self.large = bool(self.rng.random() < LARGE)

    def size(self, low: int = 1, high: int = 40, most: int = 300) -> int:
        """Return a number of dimensions: from ``low`` to ``high``, or up to ``most`` in a large case."""
        low, high = (max(low, min(60, most)), most) if self.large and most > high else (low, high)
        return round(self.log_uniform(low, high))

    def uniform(self, low: float, high: float) -> float:
        """Return a number, uniform between two."""
        return float(self.rng.uniform(low, high))

    def log_uniform(self, low: float, high: float) -> float:
        """Return a positive number whose logarithm is uniform."""
        return float(np.exp(self.rng.uniform(math.log(low), math.log(high))))

    def integer(self, low: int, high: int) -> int:
        """Return a whole number from ``low`` to ``high``, both included."""
        return int(self.rng.integers(low, high + 1))

    def flag(self, share: float = 0.5) -> bool:
        """Return True with a probability of ``share``."""
        return bool(self.rng.random() < share)

    def choice(self, values: Sequence[Any]) -> Any:
        """Return one of the values."""
        return values[int(self.rng.integers(len(values)))]

    def tensor(self, values: Any) -> Tensor:
        """Return values as a tensor of the case's dtype."""
        return torch.tensor(np.asarray(values), dtype=self.dtype)

    def rounded(self, values: Any) -> Array:
        """Return values as the case's dtype can hold them, in double precision: what the model will see."""
        return self.tensor(values).double().numpy()

    def rotation(self, dim: int) -> Array:
        """Return a random rotation (dim, dim)."""
        q, r = np.linalg.qr(self.rng.standard_normal((dim, dim)))
        return np.asarray(q * np.sign(np.diag(r)))


def number_text(value: float) -> str:
    """Return a number with two digits."""
    return f"{value:.2g}"
