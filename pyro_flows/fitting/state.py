"""What a fit was asked for, and its state: the log density in the chosen coordinates, its runs, and their sampler.

All that a method finds is in a run at once, so that Ctrl-C and a time limit lose nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from pyro_flows.fitting.multimodal import MultimodalCandidate
from pyro_flows.fitting.rounds import Round
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.recipe import AUTO, BUILDERS, VECTOR_BUILDERS, FlowLike, Recipe, latent_recipe
from pyro_flows.inference.modes.missed_modes import Search
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.coordinates import Climbed
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.inference.verdict.chains import McmcDraws
from pyro_flows.inference.verdict.deciding import CHECKED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support import checks
from pyro_flows.support.process.clock import Clock
from pyro_flows.support.process.progress import Bar

Sampler = Flow | FlowMixture  # has ``draw`` and ``log_prob``
USUAL = {
    "flow": AUTO,
    "layers": None,
    "max_steps": None,
    "max_seconds": math.inf,
    "train_model": False,
    "escalate": True,
    "refine": "auto",
    "runs": 1,
}
LIGHTER = (4.0, 1.0)  # times the base's degrees of freedom: what a nearly normal posterior bears, first
SHARE_OF_SECONDS = 0.5  # that are left, for each part of a fit, if there is a bound
TRAINED = "realnvp"  # where a fit is not told which flow


@dataclass(frozen=True)
class Plan:
    """The model with its arguments, the recipe of the flow, and what bounds the work: see :func:`fit`.

    ``automatic`` says that the choice of a flow was left open, so that other methods may take its place. At most
    ``checked`` draws are run with Pyro's checks of arguments on. ``asked`` are the options of the call that are not the
    usual ones, as JSON values.
    """

    model: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    recipe: Recipe
    draws: int
    seed: int
    runs: int
    max_steps: int
    train_model: bool
    escalate: bool
    refine: str | None
    clock: Clock
    bar: Bar
    automatic: bool = False
    checked: int = CHECKED
    asked: Mapping[str, object] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether other methods than a flow may answer: nobody has asked for one."""
        return self.automatic and self.escalate and self.runs == 1 and not self.train_model

    def fresh(self, density: LogDensity) -> Flow:
        """Return an untrained flow over the coordinates of ``density``.

        In one dimension couplings are affine, so that planar maps stand in for them.
        """
        recipe = replace(self.recipe, df=tails(density.dim))
        if density.dim == 1 and recipe.builder in ("realnvp", "nice"):
            recipe = replace(recipe, builder="planar")
        if not recipe.named:
            recipe = replace(recipe, builder=copy.deepcopy(recipe.builder))  # the caller's flow stays untrained
        return recipe.build_for_latents(density.dim).to(torch.zeros((), dtype=density.dtype, device=density.device))


def as_asked(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return those arguments of a fit that are options, and not the usual ones, as JSON values.

    A flow that was given stands as its kind in angle brackets: no name makes it again.
    """
    found = {name: value for name, value in arguments.items() if name in USUAL}
    if not isinstance(flow := found["flow"], str):
        found["flow"] = f"<{getattr(flow, '__name__', type(flow).__name__)}>"
    return {name: value for name, value in found.items() if value != USUAL[name]}


def recipe_for(flow: FlowLike, options: Mapping[str, object]) -> Recipe:
    """Return the recipe of the flow that a fit trains.

    Raises:
        ValueError, TypeError: as :func:`latent_recipe` does.
    """
    if isinstance(flow, str) and flow not in BUILDERS:
        checks.choice("flow", flow, (AUTO, *VECTOR_BUILDERS))
    trained: FlowLike = TRAINED if flow == AUTO else flow
    return latent_recipe(trained, options, affine="auto", base="student_t", df=15.0)


def tails(dim: int) -> float:
    """Return the base's degrees of freedom: a Student-t costs about 0.94 D / df^2 nats where the target is Gaussian."""
    return max(15.0, 2.0 * dim)


@dataclass(eq=False)
class Run:
    """What a method is given, and what the methods of a run have come to.

    Attributes:
        state: of the whole fit.
        plan: what the caller asked for; a run that is added at a missed mode does not escalate.
        number: of the run, from 0 on; each has a seed of its own.
        missed_mode: where the runs before missed a mode, if they did: this run begins there.
        starts: the best first.
        modes: starts with an estimate of their evidence.
        trainer: that of the last round, with the losses of all.
        best: the best round so far.
        history: the entries of this run.
        untrained: a flow, if there was no time for more.
        chains: of a sampler that sufficed where the first round did not, or, if ``sampled``, before any training: these
            have gone through the search for modes they lack.
        copies: of a flow at its images under exact symmetries, where such chains began at them.
        multimodal: a mixture at all modes that were found.
        improper: why the posterior has no finite integral, if that was seen; then nothing more was done.
    """

    state: FitState = field(repr=False)
    plan: Plan
    number: int = 0
    missed_mode: Start | None = None
    starts: Sequence[Start] = ()
    modes: list[Start] = field(default_factory=list)
    trainer: Trainer | None = None
    best: Round | None = None
    history: list[Stage] = field(default_factory=list)
    untrained: Flow | None = None
    chains: McmcDraws | None = None
    sampled: bool = False
    copies: FlowMixture | None = None
    multimodal: MultimodalCandidate | None = None
    improper: list[str] = field(default_factory=list)

    @property
    def density(self) -> LogDensity:
        return self.state.density

    @property
    def seed(self) -> int:
        return self.plan.seed + self.number

    @property
    def from_scratch(self) -> bool:
        """Whether other methods than a flow may answer: the run begins anywhere, and the model stays as it is."""
        return self.missed_mode is None and not self.plan.train_model

    @property
    def goes_on(self) -> bool:
        """Whether a flow was trained, is not enough, and more may be tried."""
        asked = self.plan.escalate and not self.plan.train_model
        return asked and self.best is not None and not (self.best.enough or self.improper)

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

    def take(self, outcome: Round, trainer: Trainer | None = None) -> None:
        """Note a round, trained or not, and keep it if it is the best so far."""
        outcome = replace(outcome, stage=self.note(outcome.stage))
        if self.best is None or outcome.rank > self.best.rank:
            self.best = outcome
        self.trainer = trainer

    def flow(self) -> Flow:
        """Return the flow of the best round; an untrained one, if there was no time for more."""
        if self.best is not None:
            return self.best.flow
        if self.untrained is None:
            self.untrained = self.plan.fresh(self.density)
        return self.untrained


@dataclass(eq=False)
class FitState:
    """What a fit has come to.

    Attributes:
        plan: what the caller asked for.
        density: the log density in the chosen coordinates.
        starts: those that were found as coordinates were chosen.
        climbed: what paths in non-centered coordinates came to, if they were made.
        as_read: the log density before any choice.
        runs: one at least.
        improper: why the posterior has no finite integral, if that was seen; then nothing more is tried.
        plain: the flow of the best run, or a mixture of runs that disagree.
        sampler: the same, with copies at its images under exact symmetries where it lacks modes.
        copies: how many there are of each flow.
        multimodal: the mixture at all modes that were found, where it is the sampler.
        surveys: how often such a mixture was tried.
        added: how many runs were added at missed modes.
        search: the last search for missed modes; None if there was no time for one.
        history: the entries on coordinates and on all runs together.
        failures: what speaks against the draws of a volume-preserving flow.
        disagreements: of the runs.
    """

    plan: Plan
    density: LogDensity
    starts: list[Start] = field(default_factory=list)
    climbed: Climbed | None = None
    as_read: LogDensity = field(init=False)
    runs: list[Run] = field(init=False)
    improper: list[str] = field(default_factory=list)
    plain: Sampler | None = None
    sampler: Sampler | None = None
    copies: int = 1
    multimodal: MultimodalCandidate | None = None
    surveys: int = 0
    added: int = 0
    search: Search | None = None
    history: list[Stage] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.as_read, self.runs = self.density, [Run(self, self.plan)]

    def go_back(self) -> None:
        """Return to the coordinates that the model was read in; what was found in others is dropped."""
        if self.as_read is not self.density:
            self.as_read.evaluations += self.density.evaluations
        self.density, self.starts, self.history = self.as_read, [], []

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
