"""One entry of a fit's history, with the same fields whatever the stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Stage:
    """What a stage of a fit came to; a figure that a stage does not have is None."""

    stage: str  # its name
    run: int | None = None  # the number of the run, from 0 on
    start: str | None = None  # the name of the start
    start_elbo: float | None = None  # the start's ELBO, nats
    elbo: float | None = None  # the ELBO at the end, nats
    step_size: float | None = None  # Adam's
    batch: int | None = None  # draws a step
    steps: int | None = None  # how many were taken
    k_hat: float | None = None  # Pareto shape of the importance weights of a fresh sample; infinite without any
    ess_ratio: float | None = None  # effective sample size of these weights over their number
    gap: float | None = None  # log evidence less ELBO, nats, by this sample
    converged: bool | None = None  # whether means, sds and ELBO stood still
    why: str | None = None  # how the training ended
    skipped: int | None = None  # steps whose gradient was not finite
    falls: int | None = None  # how often the training went back to its best state with half the step size
    details: Mapping[str, object] = field(default_factory=dict)  # what only this kind of stage has, JSON values

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON values."""
        return asdict(self)
