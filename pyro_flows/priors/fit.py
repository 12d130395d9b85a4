"""``prior_from``: a fitted prior from the draws of a posterior."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows import _checks
from pyro_flows._seeding import derive, seeded
from pyro_flows._turns import alone
from pyro_flows.comparison.draws import can_draw, is_of_guide, more
from pyro_flows.density_estimation.fit_density import fit_density
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import BUILDERS
from pyro_flows.flows.recipe import with_affine as _append_affine
from pyro_flows.flows.recipe_json import not_rebuilt
from pyro_flows.model.faults import where_it_runs
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Latent, messages
from pyro_flows.model.supports import family, is_narrower, signature, support_of
from pyro_flows.priors.fitted import FittedPrior, PriorDistribution
from pyro_flows.priors.parts import Joint, Part, describe
from pyro_flows.results.dims import Labels

if TYPE_CHECKING:
    from pyro_flows.results.record import Record

LAYERS = 4
DRAWS = 20_000
BATCH = 1024  # draws a step: a posterior is near to a normal distribution, and noise of small batches takes it away
HELD_OUT = 0.15  # of the distinct draws
LEAST_DRAWS = 100
OFF = 0.1  # sds, and logarithms of ratios of sds, from which on a fit is warned of
CHECKED = 20_000  # draws of the flow
LOST = 0.01  # of the draws, at the edge of a support by rounding


@_checks.options
def prior_from(
    posterior: Record,
    sites: str | Sequence[str] | None = None,
    *,
    seed: int = 0,
    max_epochs: int | None = None,
    progress: bool = False,
) -> FittedPrior:
    r"""Fit a prior for new data to the draws to use of a posterior: a flow on the sites' own supports.

    .. math:: p(\theta \mid y_1, y_2) \propto p(y_2 \mid \theta)\, p(\theta \mid y_1)

    holds for data that are independent given :math:`\theta`; so posteriors of batches of data can be chained, each
    fitted with the one before as its prior. The flow is fitted by maximum likelihood to the draws, unconstrained;
    correlations between sites, skewness and tails are kept, which a multivariate normal or marginals lose. Of all
    latent sites of a posterior that is ``ok``, in coordinates that are the sites' own, it is the posterior's flow, from
    which its draws come.

    Args:
        posterior: of :func:`fit`, :func:`diagnose`, :func:`from_mcmc` or :func:`load` with its model.
        sites: latent sites, together in one event, in the model's order; all by default.
        seed: the same seed gives the same prior.
        max_epochs: bound on the passes through the draws; by default training stops by held-out draws.
        progress: show a bar.

    Returns:
        A :class:`FittedPrior`. In a model, write ``pyro.sample("theta", prior())``.

    Raises:
        ValueError: for a name that is no latent site, for a site with a support that depends on other latents or that
            has no name, with masked-out entries, or for fewer than a hundred draws.

    Warns:
        UnreliableWarning: if the verdict is unreliable.
        UserWarning: if the flow's means or sds are off by more than a tenth.

    Cost: a minute or two for 20 000 draws of ten coordinates, which are drawn anew where there is a guide; next to
    nothing where the posterior's flow is taken.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y, prior):
    ...     rate = pyro.sample("rate", prior())
    ...     with pyro.plate("day", len(y)):
    ...         pyro.sample("y", dist.Poisson(rate), obs=y)
    >>> first, second = torch.tensor([3.0, 5.0]), torch.tensor([4.0, 2.0])
    >>> guide = lambda y, prior: pyro.sample("rate", dist.Gamma(9.0, 3.0))
    >>> posterior = pf.diagnose(model, guide, first, lambda: dist.Gamma(1.0, 1.0), draws=1000)
    >>> prior = pf.prior_from(posterior, "rate", max_epochs=5)
    >>> prior().support, prior().sample().shape
    (GreaterThanEq(lower_bound=0.0), torch.Size([]))
    """
    density = posterior._need_density()
    wanted = density.names if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    if not wanted:
        raise ValueError("sites: expected one or more latent sites, got none.")
    for name in wanted:
        _checks.choice("sites", name, density.names)
    names = [name for name in density.names if name in wanted]
    if len(posterior._used) < LEAST_DRAWS:
        raise ValueError(f"posterior: expected at least {LEAST_DRAWS} draws, got {len(posterior._used)}.")
    parts = [part for name in names for part in _parts(density, name)]
    z = _coordinates(density, _samples(posterior, seed), names)
    flow = _own_flow(posterior, names) or _fitted(z, seed, max_epochs, progress)
    mean_shift, sd_shift = _shifts(flow, z, seed)
    posterior._hand_on("prior_from()")
    if mean_shift > OFF or sd_shift > OFF:
        warnings.warn(
            f"prior_from: means of the flow are off by up to {mean_shift:.2f} sd, sds by up to "
            f"{100 * sd_shift:.0f} %. Take more draws.",
            stacklevel=2,
        )
    status, verdict = posterior.verdict.status, str(posterior.verdict)
    return FittedPrior(flow, parts, status=status, verdict=verdict, mean_shift=mean_shift, sd_shift=sd_shift)


# the sites ------------------------------------------------------------------------------------------------------------


def _parts(density: LogDensity, name: str) -> tuple[Part, ...]:
    """Return the parts of a latent site: itself, or those that it got from an earlier fitted prior."""
    latent = next(latent for latent in density.structure.latents if latent.name == name)
    fn = messages(density.structure.trace)[name]["fn"]
    earlier = family(fn)
    if isinstance(earlier, PriorDistribution) and len(earlier.prior.parts) > 1:
        return earlier.prior.parts
    support = support_of(fn)
    if latent.mask is not None:
        raise ValueError(f"sites: {name!r} has entries that a mask leaves out; a prior of all of them is not known.")
    if _moves(density, name):
        raise ValueError(f"sites: the support of {name!r} depends on other latents, so a prior of its own has none.")
    try:
        if support is None or is_narrower(family(fn)):
            raise NotImplementedError(f"the support of a {type(family(fn)).__name__}")
        describe(support)
    except NotImplementedError as error:
        raise ValueError(f"sites: {name!r} cannot have a fitted prior: {error} has no name to be saved by.") from None
    lifted = len(latent.shape) - latent.event_dim
    whole = constraints.independent(support, lifted) if lifted else support
    return (Part(name, latent.shape, whole, _dims(density, latent)),)


def _moves(density: LogDensity, name: str) -> bool:
    """Whether the support of a site differs between two points."""
    with torch.no_grad():
        found = where_it_runs(density.trace_at, density.structure.points, 2)
    if len(found) < 2:
        return True
    first, second = (signature(messages(trace)[name]["fn"]) for trace in found)
    return len(first) != len(second) or any(
        not torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True)
    )


def _dims(density: LogDensity, latent: Latent) -> tuple[str | None, ...]:
    """Return the name of each axis of a site's value that a plate, or an earlier prior, named."""
    layout = Labels(density.structure).latent(latent)
    own = f"{Labels(density.structure).variable(latent.name)}_dim_"
    left = iter(layout.dims)
    names = [None if axis in layout.phantom else next(left) for axis in range(len(latent.shape))]
    return tuple(None if name is None or name.startswith(own) else name for name in names)


def _samples(posterior: Record, seed: int) -> dict[str, Tensor]:
    """Return draws to use, constrained: the more there are, the closer is the fit."""
    if not can_draw(posterior) or len(posterior._used) >= DRAWS or posterior.verdict.status == "unreliable":
        return posterior.samples
    return posterior._need_model().constrain(more(posterior, DRAWS, seed=seed, purpose="prior").z)


def _coordinates(density: LogDensity, samples: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the unconstrained coordinates (S, D) of the sites' draws, without non-centered ones or charts."""
    columns = []
    for name in names:
        value = samples[name]
        parts = _parts(density, name)
        pieces = Joint(parts).split(value) if len(parts) > 1 else [value]
        columns += [part.inverse(piece)[0] for part, piece in zip(parts, pieces, strict=True)]
    z = torch.cat(columns, -1).detach()
    finite = torch.isfinite(z).all(1)
    lost = 1.0 - float(finite.double().mean())
    if lost > LOST:
        raise ValueError(
            f"posterior: {100 * lost:.1f} % of the draws lie at the edge of a support by rounding; fit in float64."
        )
    return z[finite]


# the flow -------------------------------------------------------------------------------------------------------------


def _own_flow(posterior: Record, names: Sequence[str]) -> Flow | None:
    """Return the posterior's flow where it is the very distribution of the draws to use, on the sites' own supports."""
    density, flow = posterior._need_model(), posterior.flow
    plain = not any(latent.noncentered or latent.chart is not None for latent in density.structure.latents)
    whole = plain and list(names) == list(density.names)
    if not whole or not is_of_guide(posterior) or not isinstance(flow, Flow) or not_rebuilt(flow) is not None:
        return None
    return copy.deepcopy(flow)


def _fitted(z: Tensor, seed: int, max_epochs: int | None, progress: bool) -> Flow:
    """Fit a flow by maximum likelihood; copies of one draw are all trained on, or all held out."""
    with alone(), seeded(derive(seed, "prior"), z.device):
        dim = z.shape[1]
        options = {"layers": LAYERS, "base": "normal"}
        inner = BUILDERS["planar"](1, **options) if dim == 1 else BUILDERS["realnvp"](dim, network="robust", **options)
        flow = _append_affine(inner, "diagonal").to(z)
        distinct, copies = torch.unique(z, dim=0, return_inverse=True)
        held_out = (torch.rand(len(distinct)) < HELD_OUT).to(z.device)[copies]
    found = fit_density(
        flow,
        z[~held_out],
        validation=z[held_out],
        preprocess="whiten",
        start="identity",
        batch=max(1, min(BATCH, len(z) // 10)),
        seed=seed,
        max_epochs=max_epochs,
        progress=progress,
    )
    return found.flow


@torch.no_grad()
def _shifts(flow: Flow, z: Tensor, seed: int) -> tuple[float, float]:
    """Return the largest differences of means, in sds, and of log sds between draws of the flow and those given."""
    with alone(), seeded(derive(seed, "check of the prior"), z.device), torch.no_grad():
        drawn = flow.draw(CHECKED)[0].double()
    given = z.double()
    spread = given.std(0)
    mean = float(((drawn.mean(0) - given.mean(0)) / spread).abs().max())
    sd = float((drawn.std(0) / spread).log().abs().max())
    return (mean, sd) if math.isfinite(mean) and math.isfinite(sd) else (math.inf, math.inf)
