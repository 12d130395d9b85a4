"""By what stage the seconds of a fit went: the parts of its clock, put together."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_flows.correction import search, untrained
from pyro_flows.fitting.slicing import STAGE as SLICES
from pyro_flows.modes.propriety import PART

OTHER = "other"
CROSSING = "tracing", "compiling"  # wherever they are
SEARCHES_OF_CHAINS = search.COUNTED, untrained.COPIES  # also inside of a sampler
STAGES = {  # of parts inside of each other the outermost decides, but for these
    "reading": ("reading the model",),
    "tracing": ("tracing",),
    "compiling": ("compiling",),
    "sampler": (
        "a sampler in the place of training",
        "a sampler in the place of another round",
        "the sampler",
    ),
    "coordinates": ("the choice of coordinates", "the search for angles and heavy tails"),
    "modes": (
        *("a survey of modes", "the search for modes that the guide lacks", "a run for a missed mode"),
        *("a look at how uneven the density is", "the comparison of runs", "a look at the tails of marginals"),
        *SEARCHES_OF_CHAINS,
    ),
    "starts": ("the starts", "the match of moments", "a look at the best start"),
    "races": ("the races",),
    "training": ("training", "larger batch", "more layers", "heavier tails", "tempering", SLICES),
    "judging": ("judging", "a look at the round", PART),
}
SEARCHING = ("coordinates", "modes", "starts", "races")
_STAGE_OF = {part: stage for stage, parts in STAGES.items() for part in parts}


def stage_of(parts: tuple[str, ...]) -> str:
    """Return the stage of parts inside of each other, the outermost first: see :data:`STAGES` for which decides."""
    inner = [part for part in parts[-1:] if part in CROSSING] or [part for part in parts if part in SEARCHES_OF_CHAINS]
    deciding = inner or [part for part in parts if part in _STAGE_OF and part not in CROSSING]
    return _STAGE_OF[deciding[0]] if deciding else OTHER


def written(seconds: Mapping[tuple[str, ...], float]) -> str:
    """Return seconds by stage as the text of one cell, stages in the order of `STAGES`."""
    found = dict.fromkeys([*STAGES, OTHER], 0.0)
    for parts, spent in seconds.items():
        found[stage_of(parts)] += spent
    return "; ".join(f"{stage} {spent:.2f}" for stage, spent in found.items() if spent >= 0.005)


def read(text: str) -> dict[str, float]:
    """Return what :func:`written` wrote."""
    pairs = (part.rsplit(" ", 1) for part in text.split("; ") if part)
    return {stage: float(spent) for stage, spent in pairs}
