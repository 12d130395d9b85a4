"""``prior_from``: a prior that is fitted to the draws of a posterior, a flow on the supports of sites."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyro
from torch import Tensor, nn

from pyro_flows.fitting.fit import fit
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe_json import not_rebuilt, restored, to_json
from pyro_flows.priors.errors import PriorError
from pyro_flows.priors.making import make, sites_of
from pyro_flows.priors.parts import Part, PriorDistribution, pieces
from pyro_flows.support import checks
from pyro_flows.support.files.bundles import Bundle, plain
from pyro_flows.support.files.untrusted import check_numbers, packed, reading, require, unpacked
from pyro_flows.support.process.warnings import outside
from pyro_flows.support.thresholds import PRIOR_ERROR_MOST

if TYPE_CHECKING:
    from pyro_flows.inference.record import Record

TENSORS, TEXT = "prior.pt", "prior.json"
FILES = Bundle("prior", "pyro_flows prior", TEXT, (TENSORS,))


@checks.methods
class FittedPrior(nn.Module):
    r"""A flow on the supports of one or several sites; ``prior()`` is a Pyro distribution with one event.

    .. math:: \theta = c(z), \qquad z \sim q, \qquad \log p(\theta) = \log q(z) - \log |d\theta / dz|

    with c the bijections onto the supports. Of one site, the event is its value, the axes of its plates included:
    ``theta = pyro.sample("theta", prior())`` stands outside of the plates. Of several sites, the event is a vector of
    all; :meth:`sample` draws it and names its parts. Parameters do not train, and no gradient goes to them.

    In a chain of batches, the prior of link k has the errors of all links so far,

    .. math:: e_k^2 = e_{k-1}^2 + \epsilon_k^2, \qquad s_k^2 = s_{k-1}^2 + \sigma_k^2

    with e of a mean, in sds, and s of a log sd. :math:`\epsilon` and :math:`\sigma` are the Monte Carlo errors of the
    posterior's draws and of the flow's, and what other differences of shape do to posteriors of further data. Draws of
    a posterior's own flow have weights. Over data that tell of all coordinates alike, the mean square of an error of a
    mean, in sds, is at most :math:`(S / \text{ESS} - 1) / 2`, and that of a log sd half of it. No error is taken to
    fade with further data. Both are stated so that all coordinates are within them with 95 %, for posteriors that are
    about normal, and for data that the model may have made. They say nothing of a model that is wrong, or of batches
    that are not independent given the sites.

    Attributes:
        flow: over the unconstrained coordinates.
        parts: the sites, each with ``name``, ``shape``, ``support`` and ``dims``.
        verdict: of the posterior that it was fitted to, one sentence.
        status: of that verdict.
        links: how many posteriors, one after the other, it comes from.
        mean_error: how far a mean may be off, in sds of its unconstrained coordinate, over all links; infinite after a
            posterior that is unreliable, and where a flow of draws has an ESS/S below 0.5 under the posterior.
        sd_error: how far the logarithm of an sd may be off.

    Cost: a pass of the flow for each draw or density.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> prior = pf.prior_from(posterior, "mu", max_epochs=1)
    >>> prior.sites, prior().sample((5,)).shape
    (('mu',), torch.Size([5]))
    """

    def __init__(self, flow: Flow, parts: Sequence[Part], *, status: str, verdict: str, error: PriorError) -> None:
        super().__init__()
        self.flow = flow.requires_grad_(False)
        self.parts = tuple(parts)
        self.status, self.verdict = status, verdict
        self.mean_error, self.sd_error, self.links = error
        self.eval()  # else pyro.module warns of each parameter that is not trained

    @classmethod
    def _of(cls, posterior: Record, names: Sequence[str], *, by: str = "prior_from", **options: Any) -> FittedPrior:
        """Make a prior of some latent sites; warn of one that may be too far off."""
        flow, parts, error = make(posterior, names, **options)
        posterior._hand_on(f"{by}()")
        found = cls(flow, parts, status=posterior.verdict.status, verdict=str(posterior.verdict), error=error)
        if max(found.mean_error, found.sd_error) > PRIOR_ERROR_MOST and found.status != "unreliable":
            warnings.warn(
                f"{by}: {found._how_far()}. Fit with more draws (draws=20_000), or refit all data at once by "
                "prior.refresh(model, *data).",
                stacklevel=outside(),
            )
        return found

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(part.name for part in self.parts)

    def forward(self) -> PriorDistribution:
        """Return the distribution, without batch axes."""
        return PriorDistribution(self.flow, self.parts, PriorError(self.mean_error, self.sd_error, self.links))

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Return the values ``{site: (..., *shape)}`` of one draw or several of the distribution."""
        return dict(zip(self.sites, pieces(self.parts, value), strict=True))

    def sample(self, name: str = "prior") -> dict[str, Tensor]:
        """Draw all sites inside of a model, as the site ``name`` and a deterministic site for each of several.

        Of one site, its own name is taken instead of ``name``.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = pf.diagnose(model, lambda y: pyro.sample("mu", dist.Normal(0.5, 0.5**0.5)), torch.tensor(1.0))
        >>> prior = pf.prior_from(posterior, max_epochs=3)
        >>> list(prior.sample())
        ['mu']
        """
        if len(self.parts) == 1:
            return {self.sites[0]: pyro.sample(self.sites[0], self())}
        values = self.split(pyro.sample(name, self()))
        return {own.name: pyro.deterministic(own.name, values[own.name], len(own.shape)) for own in self.parts}

    def refresh(self, model: Callable[..., object], *args: object, **options: Any) -> FittedPrior:
        """Fit all data at once, and return the prior of the same sites, without the errors of the chain.

        It is :func:`fit` of the model with its first prior, then :func:`prior_from`.

        Args:
            model: with the sites as latent sites, or with an earlier fitted prior of them.
            args: its positional arguments: the data of all batches.
            options: of :func:`fit`, ``model_kwargs`` and ``seed`` among them.

        Returns:
            A :class:`FittedPrior` of one link; it is this one that you go on with.

        Raises:
            ValueError: if the model's sites are others, or have other shapes, and as :func:`fit` and
                :func:`prior_from` do.

        Cost: that of :func:`fit`, and of :func:`prior_from`.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y, prior):
        ...     mu = pyro.sample("mu", prior())
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> first_batch, second, first = torch.randn(20), torch.randn(20), lambda: dist.Normal(0.0, 10.0)
        >>> prior = pf.prior_from(pf.fit(model, first_batch, first, progress=False), max_epochs=2)
        >>> prior = prior.refresh(model, torch.cat([first_batch, second]), first, progress=False)
        >>> prior.links, list(prior.sample())
        (1, ['mu'])
        """
        posterior = fit(model, *args, **options)
        of = sites_of(posterior._need_density())
        names = [name for name, own in of.items() if set(own) <= set(self.sites)]
        if {site for name in names for site in of[name]} != set(self.sites):
            got = ", ".join(site for own in of.values() for site in own)
            raise ValueError(f"model: expected the latent sites {', '.join(self.sites)}, got {got}.")
        seed, progress = options.get("seed", 0), options.get("progress", True)
        found = self._of(posterior, names, by="refresh", seed=seed, max_epochs=None, progress=progress)
        shapes, before = ({part.name: tuple(part.shape) for part in prior.parts} for prior in (found, self))
        if shapes != before:
            raise ValueError(f"model: expected sites of the shapes {before}, got {shapes}.")
        return found

    def _how_far(self) -> str:
        if math.isinf(self.mean_error):
            return "its error is not known"
        after = "" if self.links == 1 else f" after {self.links} links"
        return (
            f"means may be off by {self.mean_error:.2f} sd, and sds by {100 * math.expm1(self.sd_error):.0f} %{after}"
        )

    def __str__(self) -> str:
        return (
            f"Prior of {', '.join(self.sites)}: {self.flow.dim} unconstrained coordinates, {self._how_far()}, from a "
            f"posterior that is {self.verdict}"
        )

    __repr__ = __str__

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a directory of tensors and JSON; :meth:`load` reads it.

        Raises:
            ValueError: if ``path`` holds other files, or the flow was changed so that it could not be rebuilt.
            OSError: if it cannot be written.
        """
        target = FILES.check_target(path)
        reason = not_rebuilt(self.flow)
        if reason is not None:
            raise ValueError(f"flow: {reason}.")
        text = {
            "flow": to_json(self.flow),
            "parts": [part.describe() for part in self.parts],
            **{name: getattr(self, name) for name in ("status", "verdict", "mean_error", "sd_error", "links")},
        }
        state = {name: value.detach().cpu() for name, value in self.flow.state_dict().items()}
        FILES.write(target, plain(text), {TENSORS: packed(state)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedPrior:
        """Read what :meth:`save` wrote. No code is run: only tensors and JSON are read.

        Raises:
            ValueError: if the directory is no saved prior, is damaged, or of another format version.
        """
        text, contents = FILES.read(path)
        with reading(path, TENSORS, TEXT):
            flow = restored(text["flow"], unpacked(contents[TENSORS]))
            check_numbers(text["parts"], flow.state_dict())
            parts = [Part.read(part, flow._like.dtype) for part in text["parts"]]
            require(sum(part.size for part in parts) == flow.dim, "its sites have another number of coordinates")
            error = PriorError(float(text["mean_error"]), float(text["sd_error"]), int(text["links"]))
            require(error.mean >= 0.0 and error.sd >= 0.0 and error.links >= 1, "its errors are no errors")
            return cls(flow, parts, status=str(text["status"]), verdict=str(text["verdict"]), error=error)


@checks.options
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
    latent sites of a posterior that is ``ok`` or ``corrected``, in coordinates that are the sites' own, it is the
    posterior's flow, trained on where weights would still change it. (Of a corrected one, only if that comes close
    enough.) At the end, the flow is moved to the means and sds of the weighted draws, if that makes them likelier.

    A site that the fit takes for an angle, since the density has a period of one turn, is brought into the turn about
    its mean direction. Its prior is one on the line, so that later draws may lie beyond :math:`\pi`.

    In a chain, errors of all posteriors so far add up. :attr:`FittedPrior.mean_error` and
    :attr:`FittedPrior.sd_error` say how far the prior may be off, see there.

    Args:
        posterior: of :func:`fit`, :func:`diagnose`, :func:`from_mcmc` or :func:`load` with its model.
        sites: latent sites, together in one event, in the model's order; all by default. An earlier prior of several
            sites is named by its own site or by all of these.
        seed: the same seed gives the same prior.
        max_epochs: bound on the passes through the draws, 75 by default; held-out draws may stop training before.
        progress: show a bar.

    Returns:
        A :class:`FittedPrior`. In a model, write ``pyro.sample("theta", prior())``.

    Raises:
        ValueError: for a name that is no latent site, for a site with a support that depends on other latents or that
            has no name, with masked-out entries, or for fewer than a hundred draws.

    Warns:
        UnreliableWarning: if the verdict is unreliable.
        UserWarning: if means may be off by more than 0.15 sd, or sds by more than 15 %, or if the error is not known.

    Cost: two seconds for 20 000 draws of one coordinate, ten for those of ten, which are drawn anew where
    there is a guide; where the posterior's flow is taken, next to nothing, or 500 steps of training, fewer where an
    evaluation costs much.

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
    of = sites_of(density)
    for name in wanted:
        checks.choice("sites", name, {*of, *(part for parts in of.values() for part in parts)})
    names = [name for name, parts in of.items() if name in wanted or set(parts) <= set(wanted)]
    if lost := set(wanted) - {*names, *(part for name in names for part in of[name])}:
        whole = next(name for name, parts in of.items() if lost & set(parts))
        raise ValueError(
            f"sites: expected all sites of the prior {whole!r} ({', '.join(of[whole])}), got {', '.join(wanted)}."
        )
    return FittedPrior._of(posterior, names, seed=seed, max_epochs=max_epochs, progress=progress)
