"""What the search for missed modes can see: the share of planted modes that it finds, by dimension and width."""

from __future__ import annotations

WIDTHS = {"1": "as wide as the first", "1/3": "a third as wide", "1/10": "a tenth as wide"}
FOUND = {
    1: (100, 100, 98),
    2: (100, 100, 100),
    3: (100, 100, 100),
    5: (100, 100, 30),
    10: (100, 42, 0),
    20: (100, 15, 0),
}


def searched(dim: int) -> str:
    """Return what share of second modes the search finds in so many dimensions, where a model computes no sum.

    It is that of the next larger dimension that was measured, of 40 to 50 planted modes for each width, in percent;
    masses are .1 to .9 and distances 2 to 10 standard deviations (``python -m benchmarks.search``).

    >>> print(searched(8).split(", the ")[0])
    Of second modes planted in 10 dimensions
    """
    measured = next((size for size in FOUND if size >= dim), max(FOUND))
    shares = ", ".join(f"{share} % {width}" for share, width in zip(FOUND[measured], WIDTHS.values(), strict=True))
    where = f"{measured} dimension{'s' if measured > 1 else ''}"
    more = "It finds more where the model computes a sum of densities."
    return f"Of second modes planted in {where}, the search finds {shares}. {more}"
