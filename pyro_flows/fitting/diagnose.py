"""The verdict for any Pyro guide, and for draws of another sampler, such as Pyro's MCMC."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from torch import Tensor

from pyro_flows.fitting.hierarchical import diagnose_hierarchical
from pyro_flows.fitting.programs import check_sites, from_traces, random_sites, run_guide, space_of
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.guides.hierarchical import AutoHierarchicalFlow
from pyro_flows.inference.chains.search import noted
from pyro_flows.inference.modes.missed_modes import Search, missed_modes
from pyro_flows.inference.modes.missed_regions import Score
from pyro_flows.inference.modes.truncated_tails import with_truncated_tails
from pyro_flows.inference.modes.under_covered import Space
from pyro_flows.inference.scoring import beyond_priors, infinite_places
from pyro_flows.inference.verdict.chains import McmcDraws
from pyro_flows.inference.verdict.deciding import SEARCHED_DRAWS, UNSEARCHED, Draw, judge_mcmc
from pyro_flows.inference.verdict.weighing import weigh
from pyro_flows.model.arguments import usable
from pyro_flows.model.batching import quiet
from pyro_flows.model.digits import ALLOWED, COMPARED
from pyro_flows.model.dims import coordinate_names
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import warn_if_nothing_observed
from pyro_flows.model.precision import LostDigits
from pyro_flows.model.sites import Model, Noncentered
from pyro_flows.model.unchanged import own
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support import checks
from pyro_flows.support.process import stages
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone, few_threads
from pyro_flows.support.thresholds import ESS_SHARE_LEAST

HIDDEN = f"{UNSEARCHED}, since auxiliary sites hide the guide's density at given points"
THIN = f"{UNSEARCHED}, since a first sample had poor weights"


@checks.options
def diagnose(
    model: Callable[..., object],
    guide: Callable[..., object] | MCMC,
    *args: object,
    model_kwargs: Mapping[str, object] | None = None,
    draws: int = 4000,
    seed: int = 0,
    progress: bool = True,
) -> Posterior:
    r"""Judge any Pyro guide as :func:`fit` judges its own: draws, weights, verdict, ArviZ.

    Draws :math:`\theta \sim q` are weighted by :math:`\tilde p(\theta) / q(\theta)`, in unconstrained coordinates
    :math:`\log q(z) = \log q(\theta) + \log |d\theta / dz|`. The guide is taken as it is, trained or not; one that has
    never run is run once, which makes its parameters. Draws come from ``get_posterior`` of continuous autoguides, else
    from running the guide.

    Args:
        model: a Pyro model.
        guide: a Pyro guide for it, function or module, over all its continuous latent sites. Auxiliary sites are
            allowed where the latent sites are a one-to-one function of them, as in Pyro's autoguides. A ``MCMC`` that
            has run is judged by :func:`from_mcmc`.
        args: positional arguments of both (the data).
        model_kwargs: keyword arguments of both.
        draws: how many draws to judge and keep, 100 at least.
        seed: the same seed gives the same result; Pyro's and torch's own random state is left as it was. Calls from
            several threads take turns, as those of :func:`fit` do.
        progress: show what is being done, as :func:`fit` does, if it takes more than two seconds.

    Returns:
        A :class:`Posterior`; read its ``verdict`` first.

    Cost: four times ``draws`` evaluations of model and guide, twice that if only a first sample has poor weights, and a
    search for missed modes: a second or two for small models.

    Source of k-hat: Vehtari et al. 2024 (arXiv 1507.02646).

    Raises:
        ValueError: for guides without a density (``AutoDelta``, an ``AutoLaplaceApproximation`` that is not finished),
            that lack latent sites of the model, have other ones, or hide their density behind auxiliary sites.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
    >>> def guide(y):
    ...     pyro.sample("x", dist.Normal(y / 2, 0.71))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=1000)
    >>> posterior.verdict.status, posterior.samples["x"].shape
    ('ok', torch.Size([1000]))
    """
    if isinstance(guide, MCMC):
        return from_mcmc(guide, model, *args, model_kwargs=model_kwargs, seed=seed)
    with alone(), Bar("diagnose", progress, quick=True) as bar:
        found = _diagnose(model, guide, *usable(model, *own(args, model_kwargs)), draws, seed, bar)
        bar.close(found.verdict.status)
    return found


def _diagnose(
    model: Model, guide: Model, args: tuple[object, ...], kwargs: dict[str, object], draws: int, seed: int, bar: Bar
) -> Posterior:  # fmt: skip
    bar.watch(stages.READING)
    if isinstance(guide, AutoHierarchicalFlow):
        with seeded(seed):
            guide.initialize(*args, **kwargs)
        if not guide.has_own:
            return diagnose_hierarchical(model, guide, args, kwargs, draws, seed, bar)
    noncentered: Noncentered = ()
    if isinstance(guide, AutoFlow):
        with seeded(seed):
            guide._initialize_from_store(*args, **kwargs)
            guide._catch_up()
        noncentered = guide._built_structure.noncentered
    density = LogDensity(model, args, kwargs, noncentered=noncentered)
    try:
        return _judged(density, model, guide, args, kwargs, draws, seed, bar)
    except LostDigits:
        density = density.in_double()
        if isinstance(guide, AutoFlow) and _same_coordinates(guide, density):
            guide = AutoFlow.of(copy.deepcopy(guide._flow).double(), density.structure, model, args, kwargs)
        return _judged(density, model, guide, args, kwargs, draws, seed, bar)


def _judged(
    density: LogDensity, model: Model, guide: Model, args: tuple[object, ...], kwargs: dict[str, object], draws: int,
    seed: int, bar: Bar,
) -> Posterior:  # fmt: skip
    """Draw from the guide and judge the draws.

    Raises:
        LostDigits: if single precision loses the digits of the log density at these, and double does not.
    """
    warn_if_nothing_observed(density.structure, density.trace_at, model, args, kwargs)
    with few_threads(density.numbers):
        with torch.no_grad(), seeded(seed, density.device):
            trace = run_guide(guide, args, kwargs)  # makes the parameters of a guide that has never run
        with torch.no_grad(), seeded(seed, density.device):
            score: Score | None
            space: Space | None = None
            if _same_coordinates(guide, density):
                draw, score = _from_distribution(guide, density, args, kwargs)
                space = space_of(guide, density, args, kwargs)
            else:
                check_sites(trace, density)
                draw, score = from_traces(guide, density, args, kwargs, random_sites(trace))
            with torch.no_grad(), seeded(derive(seed, "digits"), density.device):
                density.check_digits(draw(COMPARED)[0])

            def after_search(*, always: bool) -> Posterior:
                bar.watch(stages.MISSED)
                search = _searched(density, draw, score, space, seed, always=always)
                bar.watch(stages.JUDGING)
                with seeded(seed, density.device):  # both times the same draws
                    return from_draws(
                        density, draw, draws=draws, seed=seed, guide=guide, failures=search.failures,
                        notes=search.notes, history=noted(search), settings={"diagnosed": True},
                        losses=torch.zeros(0),
                    )  # fmt: skip

            found = after_search(always=False)
            unsearched = THIN in found.verdict.notes and found.verdict.status != "unreliable"
            return after_search(always=True) if unsearched else found  # the larger sample has good weights


def _searched(
    density: LogDensity, draw: Draw, score: Score | None, space: Space | None, seed: int, *, always: bool
) -> Search:
    """Search for modes that a guide misses; unless ``always``, only if a first sample has good weights.

    A guide with poor weights has too little mass in many places, none of which is a mode.
    """
    if score is None:
        return Search(notes=(HIDDEN,))
    with seeded(derive(seed, "a search"), density.device):
        z, log_q = draw(SEARCHED_DRAWS)
        weighing = weigh(z, density(z), log_q)
        if not (always or (weighing.k_hat < weighing.threshold and weighing.share >= ESS_SHARE_LEAST)):
            return Search(notes=(THIN,))
        search = missed_modes(density, [], z, log_q, score, seed=seed, space=space)
        return with_truncated_tails(search, density, lambda: (z, weighing.log_weights), seed=seed)


# continuous autoguides ------------------------------------------------------------------------------------------------


def _same_coordinates(guide: object, density: LogDensity) -> TypeGuard[AutoContinuous]:
    """Whether the guide's unconstrained vector is ours: same sites, sizes, and fixed bijections."""
    if not isinstance(guide, AutoContinuous) or guide.master is not None:
        return False
    ours = density.structure.layout
    if isinstance(guide, AutoFlow):
        return ours == guide._built_structure.layout
    theirs = [(name, shape.numel()) for name, shape in guide._unconstrained_shapes.items()]
    return ours == theirs and not density.structure.dependent


def _from_distribution(
    guide: AutoContinuous, density: LogDensity, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[Draw, Score]:
    if isinstance(guide, AutoLaplaceApproximation):
        raise ValueError(
            "guide: an AutoLaplaceApproximation is a point until it is finished; "
            "pass the guide that guide.laplace_approximation(*args) returns."
        )

    def draw(count: int) -> tuple[Tensor, Tensor]:
        with quiet(), density.precisely():
            posterior = guide.get_posterior(*args, **kwargs)
            z = posterior.rsample((count,))
            log_q = posterior.log_prob(z)
        return z.to(density.dtype), log_q.to(density.dtype)

    def score(z: Tensor) -> Tensor:
        with torch.no_grad(), quiet(), density.precisely():
            found: Tensor = guide.get_posterior(*args, **kwargs).log_prob(z)
        return found

    return draw, score


# draws of another sampler, as a posterior with a verdict --------------------------------------------------------------

NO_GUIDE = "the draws are Markov chains, no guide was fitted"


@checks.options
def from_mcmc(
    mcmc: object, model: Callable[..., object], *args: object, model_kwargs: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Posterior:  # fmt: skip
    r"""Judge the output of Pyro's ``MCMC``, and hand it over to ArviZ as a fit's.

    ``ok`` takes rank-normalized split R-hat below 1.01 in all unconstrained coordinates, at least 400 effective draws
    (bulk and tail), finite log densities, divergences in at most one draw of a thousand, and no mass lost where
    rounding, in the precision of the model, puts draws onto a bound. The many short chains of
    :meth:`Posterior.refine` may have 1.05: of N draws with autocorrelation time t, R-hat is about
    :math:`\sqrt{1 + (t - 1) / N}`, converged or not, and they are held to nested R-hat, which other chains have not.

    Args:
        mcmc: a ``pyro.infer.MCMC`` that has run; or draws of all latent sites, constrained,
            ``{name: (chains, draws, *shape)}``, from whatever sampler.
        model: the model that was sampled.
        args: its positional arguments (the data).
        model_kwargs: its keyword arguments.
        seed: of later predictive draws.

    Returns:
        A :class:`Posterior` whose ``samples`` are the chains, one after the other. ``chains`` holds them apart, with
        ``diverging`` in ``chains.stats`` where the sampler tells. ``summary`` has R-hat and effective sample sizes,
        ``to_arviz`` the dimensions (chain, draw), ``verdict.chains`` the figures. ``evidence`` is by bridge sampling.
        What belongs to a guide (``log_q``, ``k_hat``, ``ess``, ``elbo``, ``log_evidence``) is NaN; ``guide`` and
        ``flow`` are None.

    Raises:
        ValueError: naming the site, for one that was not sampled or has another shape in the model; for fewer than ten
            draws a chain; and for models that :class:`LogDensity` refuses.

    Cost: one evaluation of the model a draw.

    Reference: Vehtari et al. 2021, *Rank-normalization, folding, and localization: an improved R-hat*
    (arXiv 1903.08008).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> from pyro.infer import MCMC, NUTS
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> mcmc = MCMC(NUTS(model), num_samples=100, warmup_steps=50, disable_progbar=True)
    >>> mcmc.run(torch.tensor(1.3))
    >>> chains = pf.from_mcmc(mcmc, model, torch.tensor(1.3))
    >>> chains.samples["mu"].shape, chains.verdict.status  # a hundred draws are too few
    (torch.Size([100]), 'unreliable')
    """
    with alone():
        args, kwargs = usable(model, *own(args, model_kwargs))
        density = LogDensity(model, args, kwargs)
        warn_if_nothing_observed(density.structure, density.trace_at, model, args, kwargs)
        draws, diverging, sampler = _read(mcmc)
        values, count = _flat(draws, density)
        with torch.no_grad():
            density, z, failures, rounded = _with_digits(density, values)
            log_p, samples = density(z), density.constrain(z)
    failures = [*failures, *infinite_places(density, z, log_p)]
    failures += beyond_priors(density, z, torch.zeros_like(log_p))
    names = coordinate_names(density.structure)
    stats = {} if diverging is None else {"diverging": diverging.to(z.device)}
    chains = McmcDraws(z.reshape(count, -1, density.dim), stats, {}, {"method": "mcmc"})
    verdict = judge_mcmc(chains.z, log_p.reshape(count, -1), names, diverging)
    verdict = replace(verdict, reasons=(*failures, *verdict.reasons), notes=(*rounded, *verdict.notes))
    verdict = replace(verdict, status="unreliable") if failures else verdict
    nothing = torch.full_like(log_p, math.nan)
    return Posterior(
        samples=samples,
        z=z,
        log_p=log_p,
        log_q=nothing,
        log_weights=torch.full_like(log_p, -math.log(len(z))),
        _used=z,
        _used_log_p=log_p,
        _used_log_q=nothing,
        k_hat=math.nan,
        ess=math.nan,
        elbo=math.nan,
        log_evidence=math.nan,
        verdict=verdict,
        losses=torch.zeros(0),
        history=(),
        settings={"draws": len(z), "chains": count, "seed": seed, "noncentered": density.structure.noncentered},
        coordinates=tuple(names),
        guide=None,
        guide_name=sampler,
        flow=None,
        density=density,
        missing={"guide": NO_GUIDE, "flow": NO_GUIDE},
        chains=chains,
    )


def _with_digits(density: LogDensity, values: dict[str, Tensor]) -> tuple[LogDensity, Tensor, list[str], list[str]]:
    """Return a density that holds the digits of draws, the draws z (S, D), what speaks against them, and notes."""
    z = density.unconstrain(values)
    single = any(part.dtype == torch.float32 for part in values.values())  # so the sampler has lost digits
    failures, rounded = _on_bounds(density, z) if single else [], list[str]()
    if not density.rounding(z) <= ALLOWED:
        if single:
            lost, rounded = density.lost_digits(z)
            failures += lost
        density = density.in_double()
        z = density.unconstrain(values)
    return density, z, failures + ([] if single else _on_bounds(density, z)), rounded


def _on_bounds(density: LogDensity, z: Tensor) -> list[str]:
    """Say which site has too many draws on a bound: coordinates of such values return, those next to them do not."""
    return density.on_bounds(z + 0.1 * z.sign())


def _read(mcmc: object) -> tuple[dict[str, Tensor], Tensor | None, str]:
    """Return draws by site (chains, draws, *shape), which of them diverged (chains, draws), the sampler's name."""
    if isinstance(mcmc, Mapping):
        return {str(name): torch.as_tensor(value) for name, value in mcmc.items()}, None, "chains"
    if not hasattr(mcmc, "get_samples"):
        raise ValueError(f"mcmc: expected a pyro.infer.MCMC, or draws by site, got a {type(mcmc).__name__}.")
    draws = mcmc.get_samples(group_by_chain=True)
    if not draws:
        raise ValueError("mcmc: expected one that has run, this one has no samples. Call mcmc.run(*args) first.")
    sampler = type(getattr(mcmc, "kernel", mcmc)).__name__
    marks = [entry.get("divergences") for entry in getattr(mcmc, "_diagnostics", None) or [] if entry]
    first = next(iter(draws.values()))
    if len(marks) != len(first) or any(mark is None for mark in marks):
        return draws, None, sampler
    diverging = torch.zeros(first.shape[:2], dtype=torch.bool)
    for chain, places in enumerate(marks):
        diverging[chain, torch.as_tensor(list(places), dtype=torch.long)] = True
    return draws, diverging, sampler


def _flat(draws: Mapping[str, Tensor], density: LogDensity) -> tuple[dict[str, Tensor], int]:
    """Return the latent sites' draws, one chain after the other (S, *shape), and how many chains there are."""
    missing = [name for name in density.names if name not in draws]
    if missing:
        raise ValueError(
            f"mcmc: expected draws of all latent sites, {', '.join(map(repr, missing))} missing; there are "
            f"{', '.join(map(repr, draws))}."
        )
    sizes = {tuple(draws[name].shape[:2]) for name in density.names}
    shape = next(iter(sizes))
    if len(sizes) > 1 or len(shape) < 2:
        raise ValueError(f"mcmc: expected (chains, draws, *shape) alike for all sites, got {sorted(sizes)}.")
    for latent in density.structure.latents:
        if draws[latent.name].shape[2:] != latent.shape:
            got = tuple(draws[latent.name].shape[2:])
            raise ValueError(f"mcmc: site {latent.name!r} has shape {got}, in the model {tuple(latent.shape)}.")
    checks.integer("mcmc: draws of a chain", shape[1], 10)
    return {name: draws[name].flatten(0, 1).detach() for name in density.names}, shape[0]
