"""``sbc``: whether posteriors of a model are calibrated, by simulation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._progress import Bar
from pyro_flows._seeding import derive
from pyro_flows._turns import alone
from pyro_flows.calibration.augmented import Augmented
from pyro_flows.calibration.cases import Case
from pyro_flows.calibration.checkpoint import Checkpoint, key_of
from pyro_flows.calibration.fit_many import Many
from pyro_flows.calibration.processes import check_jobs, run_all
from pyro_flows.calibration.ranks import LOG_DENSITY, GuideTask, Ranked, SamplerTask, ranks_of
from pyro_flows.calibration.result import Calibration, stacked
from pyro_flows.calibration.wiring import check_wiring, filled, wire
from pyro_flows.fitting.fit import MAX_SEED, fit
from pyro_flows.flows.recipe import AUTO, FlowLike
from pyro_flows.model.batching import usable
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import messages
from pyro_flows.results.dims import Labels

FIT_DRAWS = 1000  # at least
TASKS = 16  # of guides and samplers, between two writes of the checkpoint


@_checks.options
def sbc(
    model: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    kind: str = "prior",
    simulations: int = 200,
    draws: int = 999,
    guide: Callable[[Any], Any] | None = None,
    steps: int = 1000,
    learning_rate: float = 0.01,
    sampler: Callable[..., Any] | None = None,
    log_density: bool = True,
    flow: FlowLike = AUTO,
    layers: int | None = None,
    max_steps: int | None = None,
    escalate: bool = True,
    refine: str | bool = "auto",
    together: bool = True,
    jobs: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibration:
    r"""Check by simulation whether posteriors are calibrated: those of :func:`fit`, of any guide, or of any sampler.

    For each simulation, parameters are drawn from the prior and data given them,

    .. math:: \theta^* \sim p(\theta), \qquad y \sim p(y \mid \theta^*), \qquad
              \theta_1, \dots, \theta_L \sim q(\theta \mid y),

    and the rank of :math:`\theta^*` among the L draws is taken, for each scalar. If q is the posterior, ranks are
    uniform on 0, ..., L. With ``kind="posterior"``, :math:`\theta^*` comes from the posterior at the data in hand, and
    the posterior of these data and the simulated ones together is checked. That tells about the region that matters,
    and works where the prior is too wide to simulate from.

    Which sites are data: those that the model observes when it runs on the arguments. The argument that holds the data
    of a site is the one that it shares memory with, or the only one with equal values. An argument that is None
    (``def model(x, y=None)``) is tried with draws of each site.

    Args:
        model: a Pyro model. It draws its data when they are not observed, so it may have no factors.
        args: its positional arguments.
        model_kwargs: its keyword arguments.
        data: which argument holds the data of which site, ``{"obs": "y"}``, by name or position, where that is not
            found.
        kind: ``"prior"`` or ``"posterior"``.
        simulations: how many. For one parameter, at 1 %, 200 find an sd that is 25 % too small in nine runs of
            ten, 1000 one that is 15 % too small.
        draws: how many of each posterior, L; 999 makes bounds of 50, 80, 90 and 95 % intervals exact.
        guide: a function of the model that returns a Pyro guide (``AutoNormal``): each is trained by Pyro's SVI, and
            its own draws are ranked among, not corrected by weights.
        steps: of SVI.
        learning_rate: of SVI, Adam's; it falls to a tenth on the way.
        sampler: a function of the model's arguments that returns draws ``{site: (S, *shape)}``, or a
            :class:`Posterior`. Without guide and sampler, :func:`fit_many` fits, with the options that follow.
        log_density: whether the log density is ranked too: it sees correlations that no single parameter shows.
        flow: as in :func:`fit_many`.
        layers: likewise.
        max_steps: likewise.
        escalate: likewise.
        refine: likewise.
        together: likewise.
        jobs: processes, as in :func:`fit_many`; for guides and samplers too.
        seed: of all randomness.
        checkpoint: a file that keeps finished simulations: a call that was stopped goes on from there, and comes to the
            same ranks. It belongs to one model, its data and options.
        progress: show what is being done on one line.

    Returns:
        A :class:`Calibration`.

    Raises:
        ValueError: before any work, for a bad option; a model with factors or an improper prior, which cannot be
            simulated; a site whose argument is not found, or whose distribution depends on its own data; a checkpoint
            of another run. With ``kind="posterior"``, for a posterior at hand that is unreliable.

    Cost: as many fits as simulations, side by side where that can be.

    References: Talts et al. 2018 (arXiv 1804.06788); Säilynoja et al. 2025, "Posterior SBC" (arXiv 2502.03279); Modrák
    et al. 2023, on ranks of the log density (arXiv 2211.02383).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> def exact(y):
    ...     return {"mu": y / 2 + 0.5**0.5 * torch.randn(999)}
    >>> found = pf.sbc(model, torch.tensor(0.0), sampler=exact, simulations=100, progress=False)
    >>> found.is_uniform(), found.ranks["mu"].shape
    (True, (100,))
    """
    options: dict[str, Any] = {"flow": flow, "layers": layers, "max_steps": max_steps}
    options |= {"escalate": escalate, "refine": refine, "draws": max(draws, FIT_DRAWS)}
    asked = _asked(kind, simulations, draws, seed, steps, learning_rate, guide, sampler)
    asked["log_density"] = bool(log_density)
    check_jobs(jobs)
    bar = Bar("sbc", progress)
    case = Case(usable(args), usable(dict(model_kwargs or {})))
    with alone():
        simulated = _simulate(model, case, data, asked, options, bar)
    many = Many(simulated.model, simulated.cases, options, derive(seed, "fits"), together, jobs)
    return _run(simulated, many, asked, {"guide": guide, "sampler": sampler}, checkpoint, bar)


def _asked(
    kind: str, simulations: int, draws: int, seed: int, steps: int, learning_rate: float,
    guide: Callable[..., Any] | None, sampler: Callable[..., Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return what the caller asked for, if it can be done: plain values."""
    return {
        "kind": _checks.choice("kind", kind, ("prior", "posterior")),
        "simulations": _checks.integer("simulations", simulations, 10),
        "draws": _checks.integer("draws", draws, 9),
        "seed": _checks.integer("seed", seed, 0, MAX_SEED),
        "steps": _checks.integer("steps", steps, 1),
        "learning_rate": _checks.positive("learning_rate", learning_rate),
        "method": _method(guide, sampler),
    }


def _run(
    simulated: Simulated, many: Many, asked: Mapping[str, Any], makers: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None, bar: Bar,
) -> Calibration:  # fmt: skip
    """Rank the true values of all simulations that are not finished, and put everything together."""
    about = {**asked, **makers, "model": simulated.model}
    plain = {**asked, "options": {**many.options, "together": many.together}}
    kept = Checkpoint(checkpoint, key_of(plain, simulated.truths, simulated.data))
    count = asked["simulations"]
    for found in _batches(simulated, many, about, kept, bar):
        kept.add(found)
        bar.task = f"sbc, {len(kept.done)} of {count}"
    calibration = _result(simulated, [kept.done[number] for number in range(count)], asked)
    bar.close(str(calibration))
    return calibration


def _method(guide: Callable[..., Any] | None, sampler: Callable[..., Any] | None) -> str:
    """Return the name of what makes the draws."""
    if guide is not None and sampler is not None:
        raise ValueError("guide: expected a guide or a sampler, got both.")
    made = guide or sampler
    if made is not None and not callable(made):
        raise ValueError(f"guide, sampler: expected a function, got a {type(made).__name__}.")
    return "fit" if made is None else str(getattr(made, "__name__", type(made).__name__))


@dataclass(frozen=True)
class Simulated:
    """What is fitted: the model, its arguments with simulated data, and the true values (simulations, *shape)."""

    model: Callable[..., Any]
    density: LogDensity
    cases: list[Case]
    truths: dict[str, Tensor]
    data: dict[str, Tensor]

    def truth(self, number: int) -> dict[str, Tensor]:
        """Return the true values of one simulation."""
        return {name: values[number] for name, values in self.truths.items()}


def _simulate(
    model: Callable[..., Any], case: Case, data: Mapping[str, Any] | None, asked: Mapping[str, Any],
    options: Mapping[str, Any], bar: Bar,
) -> Simulated:  # fmt: skip
    """Draw parameters and data, and put the data into the arguments."""
    bar.watch("simulating")
    case = filled(model, case, data)
    density = LogDensity(model, case.args, case.kwargs)
    _check_model(density, asked["kind"])
    wiring = wire(density, case, data)
    count, seed = asked["simulations"], asked["seed"]
    if asked["kind"] == "prior":
        found = density.prior(count, seed=derive(seed, "simulations"))
        if found is None:
            raise ValueError("model: expected proper priors that can be drawn from. Take kind='posterior'.")
    else:
        found = _from_posterior(model, case, count, seed, options, bar)
    first = {name: values[0] for name, values in found.items()}
    check_wiring(density, wiring, first)
    cases = [wiring({name: found[name][number] for name in density.structure.observed}) for number in range(count)]
    truths = {name: found[name] for name in density.names}
    drawn = {name: found[name] for name in density.structure.observed}
    fitted = model if asked["kind"] == "prior" else Augmented(model, case)
    return Simulated(fitted, density, cases, truths, drawn)


def _check_model(density: LogDensity, kind: str) -> None:
    """Refuse models whose data cannot be simulated."""
    structure = density.structure
    factors = [name for name, site in messages(structure.trace).items() if isinstance(site.get("fn"), Unit)]
    if factors:
        raise ValueError(f"site {factors[0]!r}: a factor, so that the model cannot draw its own data.")
    if not structure.observed:
        raise ValueError(
            "model: expected observed sites, got none, so there are no data to simulate. Pass data, or name the "
            "argument that is None: data={'site': 'argument'}."
        )
    if kind == "posterior" and structure.enumerated:
        raise ValueError("kind: expected 'prior' for a model with enumerated latents.")


def _from_posterior(
    model: Callable[..., Any], case: Case, count: int, seed: int, options: Mapping[str, Any], bar: Bar
) -> dict[str, Tensor]:
    """Draw parameters from the posterior at the data in hand, and data given them."""
    bar.watch("the fit to the data in hand")
    given = {name: value for name, value in options.items() if value is not None}
    given["draws"] = max(4000, count)
    posterior = fit(model, *case.args, model_kwargs=case.kwargs, seed=derive(seed, "at hand"), progress=False, **given)
    if posterior.verdict.status == "unreliable" or posterior.density is None:
        raise ValueError(f"posterior at the data in hand: {posterior.verdict}")
    generator = torch.Generator().manual_seed(derive(seed, "true values"))
    picked = torch.randperm(len(posterior._used), generator=generator)[:count]
    drawn = posterior.density.predictive(posterior._used[picked], seed=derive(seed, "simulations"))
    return {**{name: values[picked] for name, values in posterior.samples.items()}, **drawn}


def _batches(
    simulated: Simulated, many: Many, about: Mapping[str, Any], kept: Checkpoint, bar: Bar
) -> Iterator[dict[int, Ranked]]:
    """Yield the ranks of those simulations that are not finished, batch by batch."""
    draws, log_density, seed = about["draws"], about["log_density"], about["seed"]
    seeds = [derive(seed, f"ranks {number}") for number in range(len(simulated.cases))]
    if about["guide"] is None and about["sampler"] is None:
        for numbers in many.batches():
            if all(number in kept.done for number in numbers):
                continue
            yield {
                number: ranks_of(posterior, simulated.truth(number), draws, seed=seeds[number], log_density=log_density)
                for number, posterior in many.fits(numbers, bar)
            }
        return
    task = GuideTask if about["guide"] is not None else SamplerTask
    left = [number for number in range(len(simulated.cases)) if number not in kept.done]
    for first in range(0, len(left), TASKS):
        numbers = left[first : first + TASKS]
        bar.watch(f"draws of {about['method']}")
        tasks = [task(about, simulated.cases[number], simulated.truth(number), seeds[number]) for number in numbers]
        yield dict(zip(numbers, run_all(tasks, many.jobs), strict=True))


def _result(simulated: Simulated, found: list[Ranked], asked: Mapping[str, Any]) -> Calibration:
    """Put the ranks of all simulations together, with the names of their axes."""
    structure = simulated.density.structure
    labels = Labels(structure)
    layouts = {latent.name: labels.latent(latent) for latent in structure.latents}
    names = {site: labels.variable(site) for site in layouts}
    if asked["log_density"]:
        names[LOG_DENSITY] = LOG_DENSITY if LOG_DENSITY not in names.values() else f"{LOG_DENSITY}_"
    listed = [one.status for one in found]
    statuses = {name: listed.count(name) for name in ("ok", "corrected", "refined", "unreliable", "not judged")}
    return Calibration(
        ranks=stacked([one.ranks for one in found], layouts, names),
        dims={names[site]: layout.dims for site, layout in layouts.items()},
        draws=asked["draws"],
        kind=asked["kind"],
        method=asked["method"],
        statuses={name: count for name, count in statuses.items() if count},
        settings=dict(asked),
    )
