"""What the runs of a fit come to together."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyro_flows.fitting.attempt import Run
from pyro_flows.fitting.multimodal import MultimodalCandidate
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.modes.laplace_grid import Marginal
from pyro_flows.modes.missed_modes import Search
from pyro_flows.results.stage import Stage
from pyro_flows.verdict.chains import McmcDraws

Sampler = Flow | FlowMixture  # has ``draw`` and ``log_prob``


@dataclass
class Combined:
    """The runs and what they come to together.

    Attributes:
        runs: all of them, those too that are under way.
        plain: the flow of the best run, or a mixture of runs that disagree.
        sampler: the same, with copies at its images under exact symmetries where it lacks modes.
        history: an entry for each comparison.
        warnings: what speaks against the sampler.
        failures: what speaks against its weighted draws too.
        disagreements: of the runs, in words.
        search: for modes that the sampler lacks, None if there was no time for one.
        copies: how many copies of each flow the sampler holds, moved by exact symmetries, the flow itself included.
        added: how many runs were added since a mode was missed.
        multimodal: the mixture at all modes that were found, where it is the sampler.
        surveys: how often it was tried.
        slices: along a coordinate, where the sampler comes short of its tail.
        improper: what tells that the posterior has no finite integral.
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
    slices: Marginal | None = None
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
        """Chains that sufficed, unless a mixture, tables or slices took the place of the flow they began at.

        Chains that needed no trained flow may have moved among copies of a normal distribution, which is a mixture too.
        """
        replaced = self.multimodal is not None or isinstance(self.sampler, FlowMixture)
        return None if replaced and not self.best.sampled else self.best.chains
