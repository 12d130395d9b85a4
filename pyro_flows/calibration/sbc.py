"""``sbc``: whether posteriors of a model are calibrated, by simulation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Container, Iterator, Mapping

import torch

from pyro_flows.calibration.checkpoint import Finished
from pyro_flows.calibration.fit_many import Answers, Many, count
from pyro_flows.calibration.processes import check_jobs, run_all
from pyro_flows.calibration.ranks import LOG_DENSITY, GuideTask, Ranked, SamplerTask, ranks_of
from pyro_flows.calibration.result import Calibration
from pyro_flows.calibration.simulating import Simulated, simulate
from pyro_flows.calibration.wiring import Case
from pyro_flows.flows.recipe import AUTO, FlowLike
from pyro_flows.model.arguments import usable
from pyro_flows.model.dims import Labels
from pyro_flows.model.unchanged import digest_of
from pyro_flows.support import checks
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process.interrupts import STATE, interruptible
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive
from pyro_flows.support.process.threads import alone
from pyro_flows.support.process.warnings import outside


@checks.options
def sbc(
    model: Callable[..., object],
    *args: object,
    model_kwargs: Mapping[str, object] | None = None,
    data: Mapping[str, str | int] | None = None,
    kind: str = "prior",
    simulations: int = 200,
    draws: int = 999,
    guide: Callable[..., object] | None = None,
    steps: int = 1000,
    learning_rate: float = 0.01,
    sampler: Callable[..., object] | None = None,
    log_density: bool = True,
    flow: FlowLike = AUTO,
    layers: int | None = None,
    max_steps: int | None = None,
    escalate: bool = True,
    refine: str | bool = "auto",
    together: bool = True,
    jobs: int | None = None,
    amortized: Answers | None = None,
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
        amortized: as in :func:`fit_many`, with ``kind="prior"`` only. As a ``sampler`` it is checked by itself, without
            fits in the place of its unreliable answers.
        seed: of all randomness.
        checkpoint: a file that keeps finished simulations: a call that was stopped goes on from there, and comes to the
            same ranks. It belongs to one model, its data and options. It is written every ten seconds and at the end.
        progress: show what is being done, how many simulations are done, and about how long the others will take.

    Returns:
        A :class:`Calibration`. After Ctrl-C, SIGTERM or SIGHUP it is of the simulations that were
        finished, if there are any.

    Raises:
        ValueError: before any work, for a bad option; a model with factors or an improper prior, which cannot be
            simulated; a site whose argument is not found, or whose distribution depends on its own data; a checkpoint
            of another run. With ``kind="posterior"``, for a posterior at hand that is unreliable.

    Warns:
        UserWarning: after these signals, with the number of finished simulations.

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
    options: dict[str, object] = {"flow": flow, "layers": layers, "max_steps": max_steps}
    options |= {"escalate": escalate, "refine": refine, "draws": max(draws, 1000)}
    asked = {"kind": checks.choice("kind", kind, ("prior", "posterior")), "simulations": simulations, "draws": draws}
    asked |= {"seed": seed, "steps": steps, "learning_rate": learning_rate}
    if guide is not None and sampler is not None:
        raise ValueError("guide: expected a guide or a sampler, got both.")
    made = guide or sampler
    method = "fit" if made is None else str(getattr(made, "__name__", type(made).__name__))
    asked |= {"method": method, "log_density": log_density}
    if amortized is not None and kind != "prior":
        raise ValueError("amortized: expected kind='prior', for it knows the model with one data set, not with two.")
    check_jobs(jobs)
    case = Case(*usable(model, args, model_kwargs))
    with interruptible(), Bar("sbc", progress) as bar:
        with alone():
            simulated = simulate(model, case, data, asked, options, bar)
        many = Many(simulated.model, simulated.cases, options, derive(seed, "fits"), together, jobs, amortized)
        calibration = _run(simulated, many, asked, {"guide": guide, "sampler": sampler}, checkpoint, bar)
        bar.close(str(calibration))
        STATE.take()  # all that there is, is there
    finished = calibration.settings["finished"]
    if finished < simulations:
        rest = "" if checkpoint is None else " The same call goes on from the checkpoint."
        message = f"sbc: interrupted ({STATE.name}) after {finished} of {simulations} simulations.{rest}"
        warnings.warn(message, stacklevel=outside())
    return calibration


def _run(
    simulated: Simulated, many: Many, asked: Entries, makers: Entries, file: str | os.PathLike[str] | None, bar: Bar
) -> Calibration:
    """Rank the true values of all simulations that are not finished, and put everything together."""
    about = {**asked, **makers, "model": simulated.model}
    plain = {**asked, "options": {**many.options, "together": many.together}}
    plain |= {} if many.amortized is None else {"amortized": many.amortized}
    shapes = {name: tuple(simulated.truths[name].shape[1:]) for name in simulated.density.names}
    shapes |= {LOG_DENSITY: ()} if about["log_density"] else {}
    plain |= {"model and data": digest_of([simulated.truths, simulated.data])}  # these tell the model, and the seed
    kept, count = Finished(file, plain, shapes=shapes), asked["simulations"]
    found = dict(kept.done)
    bar.count(len(found), count)
    try:
        for number, ranked, final in _ranked(simulated, many, about, kept.done, bar):
            found[number] = ranked
            if final:
                kept.add(number, ranked)
            bar.count(len(found), count)
            if STATE.take():
                break
    except KeyboardInterrupt:
        if not found or STATE.count > 1:
            raise
    finally:
        STATE.hold(True)
        kept.write()
    return _result(simulated, dict(sorted(found.items())), {**asked, "finished": len(kept.done)})


def _ranked(
    simulated: Simulated, many: Many, about: Entries, done: Container[int], bar: Bar
) -> Iterator[tuple[int, Ranked, bool]]:
    """Yield the number and the ranks of each simulation that is not done, and whether they stay as they are.

    Those of an unreliable posterior, which is fitted again, are yielded too: to leave them out after Ctrl-C would be to
    leave out the failures.
    """
    draws, log_density, seed = about["draws"], about["log_density"], about["seed"]
    seeds = [derive(seed, f"ranks {number}") for number in range(len(simulated.cases))]
    if about["guide"] is None and about["sampler"] is None:
        for numbers in many.batches():
            if all(number in done for number in numbers):
                continue
            for number, posterior, final in many.fits(numbers, bar, done):
                if number not in done:
                    truth, seed = simulated.truth(number), seeds[number]
                    yield number, ranks_of(posterior, truth, draws, seed=seed, log_density=log_density), final
        return
    bar.watch(f"draws of {about['method']}")
    task = GuideTask if about["guide"] is not None else SamplerTask
    left = [number for number in range(len(simulated.cases)) if number not in done]
    tasks = [task(about, simulated.cases[number], simulated.truth(number), seeds[number]) for number in left]
    for number, ranks in zip(left, run_all(tasks, many.jobs), strict=True):
        yield number, ranks, True


def _result(simulated: Simulated, found: Mapping[int, Ranked], asked: Entries) -> Calibration:
    """Put the ranks of simulations together, with the names of their axes."""
    structure = simulated.density.structure
    labels = Labels(structure)
    layouts = {latent.name: labels.latent(latent) for latent in structure.latents}
    names = {site: labels.variable(site) for site in layouts}
    if asked["log_density"]:
        names[LOG_DENSITY] = LOG_DENSITY if LOG_DENSITY not in names.values() else f"{LOG_DENSITY}_"
    ranks = {site: torch.stack([one.ranks[site] for one in found.values()]) for site in names}
    arrays = {names[site]: layouts[site](ranks[site]) if site in layouts else ranks[site].numpy() for site in ranks}
    return Calibration(
        ranks=arrays,
        dims={names[site]: layout.dims for site, layout in layouts.items()},
        draws=asked["draws"],
        kind=asked["kind"],
        method=asked["method"],
        statuses=count(one.status for one in found.values()),
        settings=dict(asked),
    )
