"""What a fit has come to so far: the coordinates, a run, and what an attempt of a method is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from pyro_flows.fitting.multimodal import MultimodalCandidate
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.rounds import Round
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.model.log_density import LogDensity
from pyro_flows.results.stage import Stage
from pyro_flows.starts.coordinates import Climbed
from pyro_flows.starts.start import Start
from pyro_flows.training.trainer import Trainer
from pyro_flows.verdict.chains import McmcDraws


@dataclass
class Prepared:
    """The log density in the chosen coordinates, starts that were found on the way, and what was chosen.

    ``improper`` tells that the posterior has no finite integral, so that nothing is tried. ``as_read`` is the log
    density before any choice, ``climbed`` what paths in non-centered coordinates came to, if they were made.
    """

    density: LogDensity
    starts: list[Start] = field(default_factory=list)
    history: list[Stage] = field(default_factory=list)
    improper: list[str] = field(default_factory=list)
    climbed: Climbed | None = None
    as_read: LogDensity = field(init=False)

    def __post_init__(self) -> None:
        self.as_read = self.density

    def go_back(self) -> None:
        """Return to the coordinates that the model was read in; what was found in others is dropped."""
        if self.as_read is not self.density:
            self.as_read.evaluations += self.density.evaluations
        self.density, self.starts, self.history = self.as_read, [], []


@dataclass
class Run:
    """What a run has come to so far.

    Attributes:
        number: of the run, from 0 on.
        trainer: of the last round, with the losses of all.
        best: the best round, and ``kept`` its entry in the history.
        modes: starts at modes.
        history: an entry for each stage.
        untrained: the flow that a race starts with.
        chains: of a sampler that sufficed where the first round did not, or before it.
        sampled: whether that was before any training: these chains have gone through the search for modes they lack.
        copies: of the flow that these chains began at, at its images under exact symmetries, if there are any.
        multimodal: a mixture at all modes that were found, tried in the place of training, or after the first round.
        improper: what tells that the posterior has no finite integral, so that nothing more was done.
    """

    number: int
    trainer: Trainer | None = None
    best: Round | None = None
    kept: Stage | None = None
    modes: list[Start] = field(default_factory=list)
    history: list[Stage] = field(default_factory=list)
    untrained: Flow | None = None
    chains: McmcDraws | None = None
    sampled: bool = False
    copies: FlowMixture | None = None
    multimodal: MultimodalCandidate | None = None
    improper: list[str] = field(default_factory=list)

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better."""
        return (-1.0, -math.inf) if self.best is None else self.best.rank

    @property
    def losses(self) -> torch.Tensor:
        """The negative ELBO of each step."""
        return torch.tensor([] if self.trainer is None else self.trainer.losses)

    def note(self, stage: Stage) -> Stage:
        """Add an entry to the history, and return it."""
        stage = replace(stage, run=self.number)
        self.history.append(stage)
        return stage

    def take(self, outcome: Round, trainer: Trainer) -> None:
        """Note a round, and keep it if it is the best so far."""
        stage = self.note(outcome.stage)
        if self.best is None or outcome.rank > self.best.rank:
            self.best, self.kept = outcome, stage
        self.trainer = trainer

    def flow(self, plan: Plan, density: LogDensity) -> Flow:
        """Return the flow of the best round; an untrained one, if there was no time for more."""
        if self.best is not None:
            return self.best.flow
        if self.untrained is None:
            self.untrained = plan.fresh(density)
        return self.untrained


@dataclass
class Attempt:
    """What an attempt of a method is given, and where it puts what it finds.

    Attributes:
        plan: what the caller asked for.
        prepared: the coordinates.
        run: all that is found is here at once, so that Ctrl-C or the end of the time loses nothing.
        seed: of the run.
        lack: where the runs before lack a mode, if they do: this run begins there.
        starts: the best first, once they are found.
    """

    plan: Plan
    prepared: Prepared
    run: Run
    seed: int
    lack: Start | None = None
    starts: Sequence[Start] = ()

    @property
    def density(self) -> LogDensity:
        """The log density in the coordinates chosen so far."""
        return self.prepared.density

    @property
    def from_scratch(self) -> bool:
        """Whether other methods than a flow may answer: the run begins anywhere, and the model stays as it is."""
        return self.lack is None and not self.plan.train_model

    @property
    def goes_on(self) -> bool:
        """Whether a flow was trained, is not enough, and more may be tried."""
        best = self.run.best
        asked = self.plan.escalate and not self.plan.train_model
        return asked and best is not None and not (best.enough or self.run.improper)
