"""From the draws of a posterior to what a fitted prior is made of: its sites, a flow, and its error."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_flows.densities.fit_density import fit_density
from pyro_flows.densities.mixtures import choose, maximize
from pyro_flows.densities.standardizing import preprocess
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.flows.parts import location_scale
from pyro_flows.flows.recipe import BUILDERS, with_affine, with_mixture, with_preprocess
from pyro_flows.flows.recipe_json import not_rebuilt
from pyro_flows.inference.training import loop
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.inference.verdict.weighing import resample
from pyro_flows.model.charts import Circle
from pyro_flows.model.dims import Labels
from pyro_flows.model.faults import where_it_runs
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Latent, messages
from pyro_flows.model.supports import family, is_narrower, signature, support_of
from pyro_flows.posterior.comparison.draws import can_draw, is_of_guide, more
from pyro_flows.priors.errors import UNKNOWN, Errors, PriorError, Sample, accumulated, equal, matched
from pyro_flows.priors.parts import Part, PriorDistribution, coordinates, describe
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone
from pyro_flows.support.thresholds import ESS_SHARE_PROMISING, PRIOR_ERROR_MOST

if TYPE_CHECKING:
    from pyro_flows.inference.record import Record

DRAWS = 20_000
OWN_ERROR_MOST = 0.02  # of a posterior's own flow, in sds; above, it is trained on
STEPS, PARTICLES = 500, 256  # of this training, at most
EPOCHS = 75  # about 1300 steps: 20,000 steps, 40 s for three heavy tails, describe further draws no better
SEVERAL_MODES = 0.1  # nats a draw that a mixture gains on one Gaussian: two modes up to .7, skewness a tenth of that
DF = 100.0  # degrees of freedom of the mixture's parts at the start: an excess kurtosis of .06
BATCH = 1024  # draws a step: a posterior is near to a normal distribution, and noise of small batches takes it away


def make(
    posterior: Record, names: Sequence[str], *, seed: int, max_epochs: int | None, progress: bool
) -> tuple[Flow, list[Part], PriorError]:
    """Fit a flow to the draws to use of some sites; return it with these sites, and how far it may be off."""
    density = posterior._need_density()
    if len(posterior._used) < 100:
        raise ValueError(f"posterior: expected at least 100 draws, got {len(posterior._used)}.")
    earlier = _earlier(density)
    links = 1 + max((fn.error.links for fn in earlier.values()), default=0)
    seed = derive(seed, f"prior {links}")  # of the same numbers at each link, errors would not average out
    by_name = {name: parts_of(density, name) for name in names}
    flow, errors = _own(posterior, names, seed) or _of_draws(posterior, by_name, seed, max_epochs, progress)
    error = accumulated(errors, flow.dim, [fn.error for fn in earlier.values()])
    if posterior.verdict.status == "unreliable":
        error = UNKNOWN._replace(links=error.links)
    return flow, [part for own_parts in by_name.values() for part in own_parts], error


def _earlier(density: LogDensity) -> dict[str, PriorDistribution]:
    """Return the fitted priors of the latent sites that have one."""
    found = {name: family(messages(density.structure.trace)[name]["fn"]) for name in density.names}
    return {name: fn for name, fn in found.items() if isinstance(fn, PriorDistribution)}


def sites_of(density: LogDensity) -> dict[str, tuple[str, ...]]:
    """Return what each latent site stands for: itself, or the sites of an earlier fitted prior."""
    earlier = _earlier(density)
    named = {name: tuple(part.name for part in fn.parts) for name, fn in earlier.items() if len(fn.parts) > 1}
    return {name: named.get(name, (name,)) for name in density.names}


def parts_of(density: LogDensity, name: str) -> tuple[Part, ...]:
    """Return the parts of a latent site: itself, or those that it got from an earlier fitted prior."""
    latent = next(latent for latent in density.structure.latents if latent.name == name)
    fn = messages(density.structure.trace)[name]["fn"]
    earlier = family(fn)
    if isinstance(earlier, PriorDistribution) and len(earlier.parts) > 1:
        if len(latent.shape) > 1:
            raise ValueError(f"sites: {name!r} is a prior of several sites inside of a plate; write it outside.")
        return earlier.parts
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


def _draws(posterior: Record, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return draws to use, constrained, and their weights (S,): the more there are, the closer is the fit."""
    plenty = len(posterior._used) >= DRAWS or posterior.verdict.status == "unreliable"
    if plenty or not can_draw(posterior):
        ratio = posterior._used_log_p - posterior._used_log_q if is_of_guide(posterior) else None
        samples, like = posterior.samples, posterior._used
    else:
        found = more(posterior, DRAWS, seed=seed, purpose="prior")
        samples, ratio, like = posterior._need_model().constrain(found.z), found.ratio, found.z
    weights = equal(like) if ratio is None else psis(ratio.double())[0].exp().to(like.device)
    return samples, weights


def _in_one_turn(angles: Tensor, weights: Tensor) -> Tensor:
    """Return angles (S, ...) within half a turn of their mean direction: their support is the line, without a cut."""
    sines, cosines = (torch.tensordot(weights, part.double(), 1) for part in (angles.sin(), angles.cos()))
    center = torch.atan2(sines, cosines).to(angles)
    return center + torch.remainder(angles - center + math.pi, 2.0 * math.pi) - math.pi


def _repaired(z: Tensor) -> Tensor:
    """Return coordinates (S, D) in which draws rounded onto the edge of a support are replaced by the ones before."""
    finite = torch.isfinite(z).all(1)
    lost = 1.0 - float(finite.double().mean())
    if lost > 0.01:
        raise ValueError(
            f"posterior: {100 * lost:.1f} % of the draws lie at the edge of a support by rounding; fit in float64."
        )
    places = torch.where(finite, torch.arange(len(z), device=z.device), finite.int().argmax())
    return z[places.cummax(0).values].detach()


def _own(posterior: Record, names: Sequence[str], seed: int) -> tuple[Flow, Errors] | None:
    """Return the posterior's own flow, moved to weighted moments and trained on if that helps, and its errors.

    It has to be a flow of the sites to use, on their own supports. Draws that weights corrected may be so far from it
    that a flow fitted to these draws is closer.
    """
    density, flow = posterior._need_model(), posterior.flow
    usable = posterior.verdict.status in ("ok", "corrected") and not posterior._by_chains
    if not usable or not _is_whole(posterior, names) or not isinstance(flow, Flow) or not_rebuilt(flow) is not None:
        return None
    flow = copy.deepcopy(flow)
    with alone(), seeded(derive(seed, "moments of the prior"), density.device):
        found = [(matched(flow, _weighed(flow, density), own=True), flow)]
        if max(found[0][0]) > OWN_ERROR_MOST:
            longer = _trained(copy.deepcopy(flow).requires_grad_(True), density, seed)  # that of amortize is frozen
            found.append((matched(longer, _weighed(longer, density), own=True), longer))
    errors, flow = min(found, key=lambda one: max(one[0]))
    close = accumulated(errors, flow.dim, []).mean < PRIOR_ERROR_MOST
    return (flow, errors) if close or is_of_guide(posterior) else None


def _is_whole(posterior: Record, names: Sequence[str]) -> bool:
    """Whether the density is one of these sites alone, on their own supports, so that it weighs draws of a prior."""
    density = posterior._need_model()
    plain = not any(latent.noncentered or latent.chart is not None for latent in density.structure.latents)
    return plain and list(names) == list(density.names)


@torch.no_grad()
def _weighed(flow: Flow, density: LogDensity) -> Sample:
    """Return weighted draws of a flow: fewer where each takes a pass over all rows."""
    z, log_q = flow.draw(density.affordable(DRAWS) if density.by_rows else DRAWS)
    return Sample(z, psis((density(z) - log_q).double())[0].exp().to(z.device))


def _trained(flow: Flow, density: LogDensity, seed: int) -> Flow:
    """Train a posterior's own flow on, in place.

    What weights mend in a posterior, as the tails of a Gaussian, they do not mend in a prior, which may be far off
    where later data point to its tails.
    """
    trainer = Trainer(flow, density, learning_rate=loop.STEP_SIZE, batch=PARTICLES)
    steps = max(1, density.affordable(STEPS * PARTICLES) // PARTICLES)
    loop.train(trainer, loop.Budget(steps), seed=derive(seed, "training of the prior"), report=lambda *_: None)
    trainer.write()
    return flow


def _of_draws(
    posterior: Record, parts: Mapping[str, tuple[Part, ...]], seed: int, max_epochs: int | None, progress: bool
) -> tuple[Flow, Errors]:
    """Fit a flow to the draws to use, and move it to their moments; return it with its errors.

    In many coordinates, what differs between it and the posterior need not lie along axes, where shapes are compared.
    If its weights are poor, its errors are not known.
    """
    samples, weights = _draws(posterior, seed)
    angles = [latent.name for latent in posterior._need_model().structure.latents if isinstance(latent.chart, Circle)]
    samples = {**samples, **{name: _in_one_turn(samples[name], weights) for name in angles}}
    z = _repaired(torch.cat([coordinates(own, samples[name])[0] for name, own in parts.items()], -1))
    flow = _fitted(z, weights, seed, max_epochs, progress)
    with alone(), seeded(derive(seed, "moments of the prior"), z.device):
        mean, sd, bound = matched(flow, Sample.of(z, weights, posterior.chain_count), own=False)
        if _is_whole(posterior, list(parts)):
            weights = _weighed(flow, posterior._need_model()).weights
            bound = bound if float(weights.square().sum()) * len(weights) < 1.0 / ESS_SHARE_PROMISING else math.inf
        return flow, (mean, sd, bound)


def _fitted(z: Tensor, weights: Tensor, seed: int, max_epochs: int | None, progress: bool) -> Flow:
    """Fit a flow to weighted draws by maximum likelihood; copies of one draw are all trained on, or all held out.

    Of one coordinate it is a mixture, begun at Gaussians by expectation maximization, or one Gaussian if held-out draws
    do not tell them apart. Of several it is a Real-NVP, whose base is such a mixture if it gains much: of several
    modes, a Real-NVP alone is far off.
    """
    with alone(), seeded(derive(seed, "prior"), z.device):
        z = z[resample(weights.log(), len(z), seed=seed)]  # of equal weights, each draw once
        distinct, copies = torch.unique(z, dim=0, return_inverse=True)
        held_out = (torch.rand(len(distinct)) < 0.15).to(z.device)[copies]
        dim, train = z.shape[1], z[~held_out]
        scale = preprocess("whiten", [(train, None)])
        x, other = (scale.inverse_and_ladj(part)[0] for part in (train, z[held_out]))
        parts, one = choose(x, other)[0], maximize(x, 1, strength=1.0, steps=1, over=lambda: True)
        gains = (parts.terms(other).logsumexp(1) - one.terms(other).logsumexp(1)).double()
        least = SEVERAL_MODES if dim > 1 else float(gains.std()) / math.sqrt(len(gains))
        if dim == 1:
            flow = location_scale(1, base="normal", diagonal=True)
        else:
            flow = with_affine(BUILDERS["realnvp"](dim, network="robust", layers=4, base="normal"), "diagonal")
        flow, several = flow.to(z), float(gains.mean()) > least
        if several:
            flow = with_mixture(flow, components=len(parts.log_weights))
            assert isinstance(flow.mixture, MixtureBase)
            flow.mixture.log_df.data.fill_(math.log(DF))
            flow.mixture.assign(*parts)
        flow = with_preprocess(flow, scale)
    if dim == 1 and not several:
        return flow
    return fit_density(
        flow, train, validation=z[held_out], preprocess=None, start="identity",
        batch=max(1, min(BATCH, len(z) // 10)), seed=seed, max_epochs=EPOCHS if max_epochs is None else max_epochs,
        progress=progress,
    ).flow  # fmt: skip
