"""The verdict for any Pyro guide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from torch import Tensor

from pyro_flows import _checks, _stages
from pyro_flows._progress import Bar
from pyro_flows._seeding import derive, seeded
from pyro_flows._threads import few_threads
from pyro_flows._turns import alone
from pyro_flows.correction.search import noted
from pyro_flows.fitting.hierarchical import diagnose_hierarchical
from pyro_flows.fitting.mcmc import from_mcmc
from pyro_flows.fitting.programs import check_sites, from_traces, random_sites, run_guide, space_of
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.guides.hierarchical import AutoHierarchicalFlow
from pyro_flows.model.arguments import usable
from pyro_flows.model.batching import quiet
from pyro_flows.model.digits import COMPARED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import warn_if_nothing_observed
from pyro_flows.model.precision import LostDigits
from pyro_flows.model.sites import Model, Noncentered
from pyro_flows.model.unchanged import own
from pyro_flows.modes.missed_modes import Search, missed_modes
from pyro_flows.modes.missed_regions import Score
from pyro_flows.modes.truncated_tails import with_truncated_tails
from pyro_flows.modes.under_covered import Space
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.verdict.deciding import SEARCHED_DRAWS, Draw
from pyro_flows.verdict.mcmc import UNSEARCHED
from pyro_flows.verdict.thresholds import ESS_SHARE_LEAST
from pyro_flows.verdict.weighing import weigh

HIDDEN = f"{UNSEARCHED}, since auxiliary sites hide the guide's density at given points"
THIN = f"{UNSEARCHED}, since a first sample had poor weights"


@_checks.options
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
    bar.watch(_stages.READING)
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
        if isinstance(guide, AutoFlow):
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
                bar.watch(_stages.MISSED)
                search = _searched(density, draw, score, space, seed, always=always)
                bar.watch(_stages.JUDGING)
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
        if not (always or (weighing.k_hat < weighing.threshold and weighing.ess >= ESS_SHARE_LEAST * len(z))):
            return Search(notes=(THIN,))
        search = missed_modes(density, [], z, log_q, score, seed=seed, space=space)
        return with_truncated_tails(search, density, lambda: (z, weighing.log_weights), seed=seed)


# continuous autoguides ------------------------------------------------------------------------------------------------


def _same_coordinates(guide: object, density: LogDensity) -> TypeGuard[AutoContinuous]:
    """Whether the guide's unconstrained vector is ours: same sites, sizes, and fixed bijections."""
    if not isinstance(guide, AutoContinuous) or guide.master is not None:
        return False
    ours = {latent.name: latent.size for latent in density.structure.latents}
    if isinstance(guide, AutoFlow):
        return ours == {latent.name: latent.size for latent in guide._built_structure.latents}
    theirs = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}
    return list(ours.items()) == list(theirs.items()) and not density.structure.dependent


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
