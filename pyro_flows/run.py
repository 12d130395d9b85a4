"""One run of a fit: starts, a race, a first round of training, and what follows where that does not suffice."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pyro_flows.bar import Bar
from pyro_flows.chains import Chains
from pyro_flows.clock import Clock
from pyro_flows.correction.rungs import attempt
from pyro_flows.escalation import Round, assess, entry, rounds
from pyro_flows.guides import AutoFlow, FlowLike
from pyro_flows.initial import Start, portfolio, standard
from pyro_flows.labels import coordinate_names
from pyro_flows.log_density import LogDensity
from pyro_flows.race import CLOSE, Entrant, race, share
from pyro_flows.randomness import seeded
from pyro_flows.training import Budget, Trainer, train

STARTS_SHARE, RACE_SHARE = 0.5, 0.5  # of the seconds that are left, if there is a bound


@dataclass(frozen=True)
class Plan:
    """What the caller of :func:`~pyro_flows.fit` asked for."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flow: FlowLike
    options: dict[str, Any]
    max_steps: int
    train_model: bool
    escalate: bool
    clock: Clock
    bar: Bar
    refine: str | None = None
    draws: int = 4000

    def guide(self, density: LogDensity) -> AutoFlow:
        """Return an untrained guide in the coordinates of ``density``."""
        flow = self.flow
        if density.dim == 1 and flow in ("realnvp", "nice"):
            flow = "planar"
        if not isinstance(flow, str):
            flow = copy.deepcopy(flow)  # the caller's flow stays untrained, and each run has one of its own
        noncentred = density.structure.noncentred
        # batches bear larger steps than single draws
        options: dict[str, Any] = {"noncentred": noncentred, "cautious": False, **self.options}
        guide = AutoFlow(self.model, flow, df=_tails(density.dim), **options)
        return guide.initialize(*self.args, **self.kwargs)


@dataclass
class Run:
    """What a run has come to so far; its guide holds the flow of the best round once :meth:`settle` is called.

    Attributes:
        number: of the run, from 0 on.
        guide: the guide, once there is one.
        trainer: of the last round, with the losses of all.
        best: the best round, and ``kept`` its entry in the history.
        modes: starts at modes.
        history: an entry for each stage.
        chains: of a sampler that sufficed in the place of further rounds.
    """

    number: int
    guide: AutoFlow | None = None
    trainer: Trainer | None = None
    best: Round | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    modes: list[Start] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    chains: Chains | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better."""
        return (-1.0, -math.inf) if self.best is None else self.best.rank

    @property
    def losses(self) -> torch.Tensor:
        """The negative ELBO of each step."""
        return torch.tensor([] if self.trainer is None else self.trainer.losses)

    def note(self, stage: dict[str, Any]) -> dict[str, Any]:
        """Add an entry to the history, and return it."""
        self.history.append({"run": self.number, **stage})
        return stage

    def take(self, name: str, trainer: Trainer, outcome: Round) -> None:
        """Note a round, and keep it if it is the best so far."""
        stage = self.note(entry(name, trainer, outcome))
        if self.best is None or outcome.rank > self.best.rank:
            self.best, self.kept = outcome, stage
        self.trainer = trainer

    def settle(self, plan: Plan, density: LogDensity) -> AutoFlow:
        """Return the guide, with the flow of the best round; an untrained one, if there was no time for more."""
        if self.guide is None:
            self.guide = plan.guide(density)
        if self.best is not None:
            self.guide.adopt(self.best.flow)
        return self.guide


def make_run(
    plan: Plan, density: LogDensity, run: Run, extra: Sequence[Start], lack: Start | None = None, *, seed: int
) -> None:
    """Train one guide: portfolio (with the starts in ``extra``), race, first round, escalation.

    With ``lack``, a start where the runs before lack a mode, this run starts there.

    All that is found is in ``run`` at once, so that Ctrl-C or the end of the time loses nothing.
    """
    clock = plan.clock
    with seeded(seed, density.device):
        starts = [*extra, standard(density)]
        with clock.part("the starts", share=STARTS_SHARE):
            starts = portfolio(density, seed=seed, extra=extra) if lack is None else [lack]
        run.modes = [start for start in starts if start.evidence is not None]
        close = [start for start in starts if start.elbo >= starts[0].elbo - CLOSE]
        starts = close[run.number % len(close) :] + close[: run.number % len(close)]
        guide = run.guide = plan.guide(density)
        guide.start_at(starts[0].loc, starts[0].scale)
        trained = list(density.parameters().values()) if plan.train_model else []
        winner: Entrant | None = None
        with clock.part("the races", share=RACE_SHARE):
            winner, field_ = race(guide, density, starts, share(plan.max_steps), seed=seed, extra=trained)
            run.history += [{"run": run.number, **entrant.entry} for entrant in field_]
            del field_  # the losers' flows
        if winner is None:
            return
        report = _reporter(plan.bar)
        trainer, budget = winner.trainer, Budget(plan.max_steps, clock)
        left = Budget(plan.max_steps - len(trainer.losses), clock)
        run.take("first round", trainer, assess(guide.flow, density, train(trainer, left, seed=seed, report=report)))
        assert run.best is not None
        if plan.escalate and not plan.train_model and not run.best.enough:
            if plan.refine is not None:
                names = coordinate_names(density.structure)
                with clock.part("a sampler in the place of another round"):
                    run.chains = attempt(guide._single, density, names, plan.draws, seed=seed, bar=plan.bar)
            if run.chains is not None:
                return
            more = rounds(guide, density, trainer, run.best, winner.start, budget, seed=seed, report=report)
            for name, trainer, outcome in more:
                run.take(name, trainer, outcome)
                if outcome.enough:
                    break


def _reporter(bar: Bar) -> Callable[[int, float, str], None]:
    return lambda done, elbo, state: bar.show(f"{done} steps, ELBO {elbo:.2f}, {state}")


def _tails(dim: int) -> float:
    """Degrees of freedom of the base: a Student-t costs about 0.94 D / df^2 nats where the target is Gaussian."""
    return max(15.0, 2.0 * dim)
