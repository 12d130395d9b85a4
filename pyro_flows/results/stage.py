"""One entry of a fit's history, with the same fields whatever the stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """What a stage of a fit came to; a figure that a stage does not have is None.

    Attributes:
        stage: its name.
        run: the number of the run, from 0 on.
        start: the name of the start.
        start_elbo: the start's ELBO, nats.
        elbo: the ELBO at the end, nats.
        step_size: Adam's.
        batch: draws a step.
        steps: how many were taken.
        k_hat: Pareto shape of the importance weights of a fresh sample; infinite without any.
        ess_ratio: effective sample size of these weights over their number.
        gap: log evidence less ELBO, nats, by this sample.
        converged: whether means, sds and ELBO stood still.
        why: how the training ended.
        skipped: steps whose gradient was not finite.
        falls: how often the training went back to its best state with half the step size.
        details: what only this kind of stage has, JSON values.
    """

    stage: str
    run: int | None = None
    start: str | None = None
    start_elbo: float | None = None
    elbo: float | None = None
    step_size: float | None = None
    batch: int | None = None
    steps: int | None = None
    k_hat: float | None = None
    ess_ratio: float | None = None
    gap: float | None = None
    converged: bool | None = None
    why: str | None = None
    skipped: int | None = None
    falls: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
