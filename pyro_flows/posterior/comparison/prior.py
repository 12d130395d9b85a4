"""Draws of a model before it has seen its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows.model.arguments import usable
from pyro_flows.model.batching import apart, filled_up, over_rows, possible_pieces, quiet, redrawn
from pyro_flows.model.faults import Faults, defined
from pyro_flows.model.handlers import Resample
from pyro_flows.model.sites import Site, is_data, is_deterministic, messages
from pyro_flows.support import checks
from pyro_flows.support.process.fallbacks import fallback
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone


@checks.options
def prior_predictive(
    model: Callable[..., object],
    *args: object,
    draws: int = 1000,
    seed: int = 0,
    model_kwargs: Mapping[str, object] | None = None,
) -> dict[str, Tensor]:
    r"""Draw from the prior and from the data that it predicts, before any fit: ``{name: (draws, *shape)}``.

    .. math:: \theta \sim p(\theta), \qquad y \sim p(y \mid \theta)

    All sites are there: latent ones, deterministic ones, and observed ones, drawn anew whether data are given or None.
    Discrete latents are drawn as they are. Factors are left out: they are no part of the prior.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        draws: how many.
        seed: the same seed gives the same draws; torch's own random state is left as it was.
        model_kwargs: its keyword arguments.

    Raises:
        ValueError: naming the site, for a distribution that cannot be drawn from, as that of an improper prior.

    Cost: one run of the model a draw, many at once where ``torch.func.vmap`` can.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    ...     with pyro.plate("count", 3):
    ...         pyro.sample("y", dist.Poisson(rate), obs=y)
    >>> drawn = pf.prior_predictive(model, None, draws=500)
    >>> drawn["rate"].shape, drawn["y"].shape
    (torch.Size([500]), torch.Size([500, 3]))
    """
    args, kwargs = usable(model, args, model_kwargs)
    seen = _Last()

    def one(_: Tensor) -> dict[str, Tensor]:
        with apart(), seen, defined(lambda: f"after site {seen.name!r}"):
            trace = poutine.trace(Resample()(model)).get_trace(*args, **kwargs)
        sites = {name: site for name, site in messages(trace).items() if site["type"] == "sample"}
        return {name: site["value"] for name, site in sites.items() if is_data(site) or is_deterministic(site)}

    def many(count: int) -> dict[str, Tensor]:
        rows = partial(over_rows, one, randomness="different", otherwise=partial(fallback, "drawn one by one"))
        found = possible_pieces(rows, torch.zeros(count), alone=partial(rows, batched=False), note=faults.add)
        return filled_up(list(found), faults)

    faults = Faults()
    with alone(), quiet(), torch.no_grad(), seeded(derive(seed, "prior")):
        try:
            return redrawn(many, draws)
        except NotImplementedError:
            raise ValueError(f"site {seen.name!r}: its prior, {seen.kind}, cannot be drawn from.") from None


class _Last(Messenger):
    """Remember which site was drawn last."""

    name = kind = ""

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
            fn = fn.base_dist
        self.name, self.kind = msg["name"], type(fn).__name__
