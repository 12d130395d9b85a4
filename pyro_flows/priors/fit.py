"""``prior_from``: a fitted prior from the draws of a posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyro_flows import _checks
from pyro_flows.priors.fitted import FittedPrior

if TYPE_CHECKING:
    from pyro_flows.results.record import Record


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
    which its draws come, trained on where weights would still change it. At the end, the flow is moved to the means
    and sds of the weighted draws.

    In a chain, errors of all posteriors so far add up. :attr:`FittedPrior.mean_error` and
    :attr:`FittedPrior.sd_error` say how far the prior may be off, see there.

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
        UserWarning: if means may be off by more than 0.15 sd, or sds by more than 15 %.

    Cost: a minute or two for 20 000 draws of ten coordinates, which are drawn anew where there is a guide; where the
    posterior's flow is taken, next to nothing, or 500 steps of training.

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
    return FittedPrior._of(posterior, names, seed=seed, max_epochs=max_epochs, progress=progress)
