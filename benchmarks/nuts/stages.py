"""By what stage the seconds of a fit went: the parts of its clock, put together."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_flows import _stages
from pyro_flows.verdict.methods import CONDITIONALS, GRID

OTHER = "other"
CROSSING = _stages.TRACING, "compiling"  # wherever they are; the second is of earlier versions
SEARCHES_OF_CHAINS = _stages.MISSED_BY_CHAINS, _stages.SYMMETRIC  # also inside of a sampler
STAGES = {  # of parts inside of each other the outermost decides, but for these
    "reading": (_stages.READING,),
    "tracing": (_stages.TRACING,),
    "compiling": ("compiling",),
    "sampler": (_stages.AT_ONCE, _stages.NEXT, _stages.SAMPLER),
    "coordinates": (_stages.PARAMETERIZING, _stages.TRANSFORMS),
    "modes": (
        *(_stages.SEVERAL, _stages.MISSED, _stages.ADDED_RUN, _stages.VARIANCE, _stages.COMPARING, _stages.TAILS),
        *SEARCHES_OF_CHAINS,
    ),
    "starts": (_stages.STARTS, _stages.MOMENTS, _stages.BEST_START),
    "training": (_stages.TRAINING, _stages.INDEPENDENCE, GRID, CONDITIONALS),
    "judging": (_stages.JUDGING, _stages.WEIGHTS, _stages.PROPRIETY, _stages.ROWS),
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
