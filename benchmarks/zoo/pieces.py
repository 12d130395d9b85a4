"""Models that are put together from independent pieces, each with its own data and exact posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from benchmarks.zoo.case import Case, Draws, Maker


@dataclass(frozen=True)
class Piece:
    """A part of a model.

    ``run(prefix, data)`` samples its sites, whose names begin with the prefix; ``draw`` and the other attributes name
    them without it, see :class:`benchmarks.zoo.case.Case`.
    """

    text: str
    run: Callable[[str, Tensor | None], None]
    draw: Callable[[int, np.random.Generator], Draws]
    log_evidence: float
    data: Tensor | None = None
    heavy: tuple[str, ...] = ()
    periods: Mapping[str, float] = field(default_factory=dict)
    smooth: bool = True


def assemble(pieces: Sequence[Piece]) -> Case:
    """Return the case that consists of independent pieces."""
    prefixes = [f"{chr(ord('a') + number)}_" if len(pieces) > 1 else "" for number in range(len(pieces))]

    def model(data: Mapping[str, Tensor]) -> None:
        for prefix, piece in zip(prefixes, pieces, strict=True):
            piece.run(prefix, data.get(f"{prefix}y"))

    def draw(count: int, rng: np.random.Generator) -> Draws:
        found = [(prefix, piece.draw(count, rng)) for prefix, piece in zip(prefixes, pieces, strict=True)]
        return {f"{prefix}{name}": values for prefix, draws in found for name, values in draws.items()}

    pairs = list(zip(prefixes, pieces, strict=True))
    return Case(
        "; ".join(piece.text for piece in pieces),
        model,
        draw,
        ({f"{prefix}y": piece.data for prefix, piece in pairs if piece.data is not None},),
        log_evidence=sum(piece.log_evidence for piece in pieces),
        heavy=frozenset(f"{prefix}{name}" for prefix, piece in pairs for name in piece.heavy),
        periods={f"{prefix}{name}": turn for prefix, piece in pairs for name, turn in piece.periods.items()},
        smooth=all(piece.smooth for piece in pieces),
    )


def of_pieces(kind: Callable[[Maker], Piece], others: Sequence[Callable[[Maker], Piece]]) -> Callable[[Maker], Case]:
    """Return the variant that has a piece of one kind, and in a third of the cases another one beside it."""

    def variant(maker: Maker) -> Case:
        return assemble([kind(maker), *([maker.choice(others)(maker)] if maker.flag(0.33) else [])])

    variant.__module__, variant.__name__ = kind.__module__, kind.__name__
    variant.__doc__ = kind.__doc__
    return variant
