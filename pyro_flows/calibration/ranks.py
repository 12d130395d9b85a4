"""Ranks of true values among posterior draws, from whatever makes the draws."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_flows.calibration.wiring import Case
from pyro_flows.fitting.diagnose import diagnose
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Model
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process.seeding import derive, seeded

LOG_DENSITY = "lp"  # ArviZ's name
STATUSES = ("ok", "corrected", "refined", "unreliable", "not judged")

Truth = dict[str, Tensor]


@dataclass(frozen=True)
class Ranked:
    """One simulation: the rank of each scalar among the draws, and the verdict on these, if there is one."""

    ranks: dict[str, Tensor]
    status: str


def ranks_of(
    posterior: Posterior, truth: Truth, draws: int, *, seed: int, log_density: bool, raw: bool = False
) -> Ranked:
    """Rank true values among draws of a posterior: those to use, or, with ``raw``, the guide's own.

    Draws of chains follow one another, so that as many as needed are picked at random from all.
    """
    density = posterior.density
    assert density is not None
    samples = density.constrain(posterior.z) if raw else posterior.samples
    log_p = posterior.log_p if raw else posterior._used_log_p
    picked = _picked(len(log_p), draws, seed=seed)
    kept = {name: samples[name][picked] for name in density.names}
    ranks = _ranks(kept, log_p[picked] if log_density else None, density, truth, seed=seed)
    return Ranked(ranks, posterior.verdict.status)


def ranks_among(
    found: Posterior | Entries, density: LogDensity, truth: Truth, draws: int, *, seed: int, log_density: bool
) -> Ranked:
    """Rank true values among draws ``{site: (S, *shape)}`` of another program, or those to use of a posterior."""
    kept = {}
    samples, status = (found.samples, found.verdict.status) if isinstance(found, Posterior) else (found, "not judged")
    for name in density.names:
        if name not in samples:
            raise ValueError(f"sampler: expected draws of all latent sites, none of {name!r}.")
        kept[name] = torch.as_tensor(samples[name], device=density.device)
        if len(kept[name]) < draws or kept[name].shape[1:] != truth[name].shape:
            expected = f"{draws} or more draws of {name!r}, each of shape {tuple(truth[name].shape)}"
            raise ValueError(f"sampler: expected {expected}, got shape {tuple(kept[name].shape)}.")
    picked = _picked(min(map(len, kept.values())), draws, seed=seed)
    kept = {name: value[picked] for name, value in kept.items()}
    with torch.no_grad():
        log_p = density(density.unconstrain(kept)) if log_density else None
    return Ranked(_ranks(kept, log_p, density, truth, seed=seed), status)


@torch.no_grad()
def _ranks(draws: Entries, log_p: Tensor | None, density: LogDensity, truth: Truth, *, seed: int) -> dict[str, Tensor]:
    """Return the ranks of true values among draws, and that of their log density among those of the draws."""
    found = {name: _rank(value, truth[name], seed=derive(seed, name)) for name, value in draws.items()}
    if log_p is not None:
        at_truth = density(density.unconstrain({name: truth[name][None] for name in density.names}))[0]
        found[LOG_DENSITY] = _rank(log_p, at_truth, seed=derive(seed, LOG_DENSITY))
    return found


def _picked(count: int, draws: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive(seed, "draws that are ranked among"))
    return torch.randperm(count, generator=generator)[:draws]


def _rank(draws: Tensor, truth: Tensor, *, seed: int) -> Tensor:
    """Return how many draws (L, *shape) are below the truth; ties count at random."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(ties.shape, generator=generator, dtype=torch.float64)
    return below.cpu() + (share * (ties.cpu() + 1)).long()


# other makers of draws ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A data set that something else than :func:`fit_many` makes draws for, and the true values behind it."""

    about: Entries
    case: Case
    truth: Truth
    seed: int


class GuideTask(Task):
    """Train a guide by Pyro's SVI on one data set, and rank true values among its own draws."""

    def __call__(self) -> Ranked:
        about, case = self.about, self.case
        with pyro.get_param_store().scope():
            guide = about["guide"](about["model"])
            with seeded(derive(self.seed, "svi")), torch.enable_grad():
                _train(about["model"], guide, case, steps=about["steps"], learning_rate=about["learning_rate"])
            options = {"draws": max(about["draws"], 100), "seed": self.seed, "progress": False}
            posterior = diagnose(about["model"], guide, *case.args, model_kwargs=case.kwargs, **options)
            draws, log_density = about["draws"], about["log_density"]
            return ranks_of(posterior, self.truth, draws, seed=self.seed, log_density=log_density, raw=True)


def _train(model: Model, guide: Model, case: Case, *, steps: int, learning_rate: float) -> None:
    """Train by Adam; the step size falls to a tenth on the way."""
    decay = 0.1 ** (1.0 / steps)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": learning_rate, "lrd": decay}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*case.args, **case.kwargs)


class SamplerTask(Task):
    """Call a user's function on one data set, and rank true values among the draws that it returns."""

    def __call__(self) -> Ranked:
        about, case = self.about, self.case
        with seeded(derive(self.seed, "sampler")):
            found = about["sampler"](*case.args, **case.kwargs)
        density, options = LogDensity(about["model"], case.args, case.kwargs), {"log_density": about["log_density"]}
        return ranks_among(found, density, self.truth, about["draws"], seed=self.seed, **options)
