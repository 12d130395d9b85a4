"""By what stage the seconds of a fit went: the parts of its clock, put together."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_flows.inference.verdict.methods import CONDITIONALS, GRID
from pyro_flows.support.process import stages

OTHER = "other"
CROSSING = stages.TRACING, "compiling"  # wherever they are; the second is of earlier versions
SEARCHES_OF_CHAINS = stages.MISSED_BY_CHAINS, stages.SYMMETRIC  # also inside of a sampler
STAGES = {  # of parts inside of each other the outermost decides, but for these
    "reading": (stages.READING,),
    "tracing": (stages.TRACING,),
    "compiling": ("compiling",),
    "sampler": (stages.AT_ONCE, stages.NEXT, stages.SAMPLER),
    "coordinates": (stages.PARAMETERIZING, stages.TRANSFORMS),
    "modes": (
        *(stages.SEVERAL, stages.MISSED, stages.ADDED_RUN, stages.VARIANCE, stages.COMPARING, stages.TAILS),
        *SEARCHES_OF_CHAINS,
    ),
    "starts": (stages.STARTS, stages.MOMENTS, stages.BEST_START),
    "training": (stages.TRAINING, stages.INDEPENDENCE, GRID, CONDITIONALS),
    "judging": (stages.JUDGING, stages.WEIGHTS, stages.PROPRIETY, stages.ROWS),
}
SEARCHING = ("coordinates", "modes", "starts")
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
    """Return what :func:`written` wrote; a stage that fits have no more, such as the races, is among the others."""
    found: dict[str, float] = {}
    for stage, spent in (part.rsplit(" ", 1) for part in text.split("; ") if part):
        stage = stage if stage in STAGES else OTHER
        found[stage] = found.get(stage, 0.0) + float(spent)
    return found
