"""A zoo of random Pyro models whose posteriors are known exactly: what ``fit`` says of them can be checked.

    case = zoo(seed=1, number=17)
    posterior = pyro_flows.fit(case.model, *case.args, model_kwargs=case.kwargs)
    judge(case, posterior).outcome

References are closed forms, quadrature over at most two numbers, or independent draws; never another fit. See
``python -m benchmarks.zoo --help``.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.zoo import (
    conjugate,
    digits,
    faulty,
    hierarchical,
    mixtures,
    narrow,
    propriety,
    symmetric,
    tails,
    warped,
)
from benchmarks.zoo.case import Case, Maker

FAMILIES = {
    "mixtures": mixtures.VARIANTS,
    "mirrored": symmetric.VARIANTS,
    "warped": warped.VARIANTS,
    "hierarchical": hierarchical.VARIANTS,
    "conjugate": conjugate.VARIANTS,
    "tails and bounds": tails.VARIANTS,
    "faulty data": faulty.VARIANTS,
    "propriety": propriety.VARIANTS,
    "narrow": narrow.VARIANTS,
    "digits": digits.VARIANTS,
}

SEEDS, MODELS = (101, 102, 103), 300  # of the table: seeds that nobody has developed on, and models of each


def family_of(number: int) -> str:
    """Return the family of a case: they take turns, so that any first cases cover all of them evenly."""
    return list(FAMILIES)[number % len(FAMILIES)]


def zoo(seed: int, number: int, *, among: int | None = None) -> Case:
    """Return one case; the same seed and number give the same case.

    ``among`` is the number of families that take turns, all by default: a case of an earlier zoo had fewer beside it.

    Raises:
        ValueError: for a negative seed or number.
    """
    for name, value in (("seed", seed), ("number", number)):
        if value < 0:
            raise ValueError(f"{name}: expected a number from 0 on, got {value}.")
    count = len(FAMILIES) if among is None else among
    family, turn = list(FAMILIES)[number % count], number // count
    variants = FAMILIES[family]
    maker = Maker(seed, number)
    made = variants[turn % len(variants)](maker)
    return replace(made, family=family, seed=seed, number=number, dtype=maker.dtype)


__all__ = ["FAMILIES", "MODELS", "SEEDS", "Case", "family_of", "zoo"]
