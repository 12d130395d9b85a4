"""The state of a fit: coordinates, one run, all runs together, and what each method is given."""

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
from pyro_flows.modes.missed_modes import Search
from pyro_flows.results.stage import Stage
from pyro_flows.starts.coordinates import Climbed
from pyro_flows.starts.start import Start
from pyro_flows.training.trainer import Trainer
from pyro_flows.verdict.chains import McmcDraws

Sampler = Flow | FlowMixture  # has ``draw`` and ``log_prob``


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

    ``trainer`` is that of the last round, with the losses of all; ``kept`` the entry of the ``best`` round in the
    history. ``chains`` are of a sampler that sufficed where the first round did not, or, if ``sampled``, before any
    training: these have gone through the search for modes they lack, and may have begun at ``copies`` of a flow at its
    images under exact symmetries. ``multimodal`` is a mixture at all modes that were found. ``improper`` tells that the
    posterior has no finite integral, so that nothing more was done.
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
        return (-1.0, -math.inf) if self.best is None else self.best.rank

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([] if self.trainer is None else self.trainer.losses)

    def note(self, stage: Stage) -> Stage:
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
    """What an attempt of a method is given: all that it finds is in ``run`` at once, so that Ctrl-C loses nothing.

    ``missed_mode`` is where the runs before missed a mode, if they did: this run begins there. ``starts`` are the best
    first.
    """

    plan: Plan
    prepared: Prepared
    run: Run
    seed: int
    missed_mode: Start | None = None
    starts: Sequence[Start] = ()

    @property
    def density(self) -> LogDensity:
        return self.prepared.density

    @property
    def from_scratch(self) -> bool:
        """Whether other methods than a flow may answer: the run begins anywhere, and the model stays as it is."""
        return self.missed_mode is None and not self.plan.train_model

    @property
    def goes_on(self) -> bool:
        """Whether a flow was trained, is not enough, and more may be tried."""
        best = self.run.best
        asked = self.plan.escalate and not self.plan.train_model
        return asked and best is not None and not (best.enough or self.run.improper)


@dataclass
class Combined:
    """The runs and what they come to together.

    ``plain`` is the flow of the best run, or a mixture of runs that disagree; ``sampler`` the same with copies at its
    images under exact symmetries where it lacks modes, ``copies`` of each flow; ``multimodal`` the mixture at all modes
    that were found, where it is the sampler, and ``surveys`` how often it was tried. ``search`` is None if there was no
    time for one.
    """

    runs: list[Run] = field(default_factory=lambda: [Run(0)])
    plain: Sampler | None = None
    sampler: Sampler | None = None
    history: list[Stage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    search: Search | None = None
    copies: int = 1
    added: int = 0
    multimodal: MultimodalCandidate | None = None
    surveys: int = 0
    improper: list[str] = field(default_factory=list)

    @property
    def kept(self) -> list[Run]:
        """The runs that can be compared; if there are none, those that got anywhere."""
        weighed = [run for run in self.runs if run.best is not None and run.best.weighed]
        return weighed or [run for run in self.runs if run.best is not None] or self.runs

    @property
    def best(self) -> Run:
        """The run with the best verdict, then the best ELBO."""
        return max(self.kept, key=lambda run: run.rank)

    @property
    def chains(self) -> McmcDraws | None:
        """Chains that sufficed, unless a mixture or tables took the place of the flow they began at.

        Chains that needed no trained flow may have moved among copies of a normal distribution, which is a mixture too.
        """
        replaced = self.multimodal is not None or isinstance(self.sampler, FlowMixture)
        return None if replaced and not self.best.sampled else self.best.chains
