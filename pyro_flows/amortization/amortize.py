"""``amortize``: one conditional flow for the posteriors of all data sets of a form."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from torch import nn

from pyro_flows.amortization.amortized import Amortized, Parts
from pyro_flows.amortization.building import LAYERS, exchangeable_rows, measured, networks, scale_of, simulate, stacked
from pyro_flows.amortization.files import probe
from pyro_flows.amortization.form import bound
from pyro_flows.densities.fit_density import fit_density
from pyro_flows.flows.recipe import with_preprocess
from pyro_flows.support import checks
from pyro_flows.support.process import journal
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone

BATCH = 512  # pairs a step: twice as many as of fewer take little more time
REFERENCE = 4096  # simulated data sets that others are compared with


@checks.options
def amortize(
    model: Callable[..., object],
    *args: object,
    model_kwargs: Mapping[str, object] | None = None,
    data: Mapping[str, str | int] | None = None,
    encoder: nn.Module | None = None,
    flow: str = "auto",
    layers: int | None = None,
    simulations: int | None = None,
    max_epochs: int = 10,
    max_seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Amortized:
    r"""Train one conditional flow for the posteriors of all data sets of a form: minutes once, then milliseconds each.

    Parameters and data are drawn from the model, :math:`\theta \sim p(\theta)`, :math:`y \sim p(y \mid \theta)`, and a
    flow is fitted to them by maximum likelihood,

    .. math:: \max_q\; \mathrm{E}_{p(\theta, y)} \log q(\theta \mid h(y)),

    where an encoder h makes some numbers of the data. The best q is the posterior, for all data sets at once. As the
    model has a density, each answer is weighed by it, judged, and corrected by importance resampling where needed; see
    :meth:`Amortized.posterior`.

    Args:
        model: a Pyro model with proper priors and without factors. It draws its data when they are not observed.
        args: its positional arguments. The data among them tell their form; their values do not matter. All other
            arguments (covariates, sizes) are fixed: the flow knows the model with these only.
        model_kwargs: its keyword arguments.
        data: which argument holds the data of which site, as for :func:`sbc`, where that is not found.
        encoder: a module that gets data in the shape of their site, ``(K, *shape)``, on a common scale, or a dict of
            these for several sites, and returns ``(K, width)``. It is copied, and trained with the flow. By default a
            perceptron of the data and of their principal components, each on a scale of its own, as a direction and the
            logarithm of a length. 16 or more exchangeable rows are put in order before, if each is one number. If not,
            there is a perceptron of each row, their mean, and another one, for which the order of rows does not matter.
        flow: the couplings, ``"spline"``, ``"realnvp"``, or ``"auto"``: splines in one or two dimensions.
        layers: how many; 4 splines or 6 affine ones by default.
        simulations: how many pairs of parameters and data to learn from; by default 200 000, or fewer if that were more
            than 1e8 numbers of data, and 10 000 at least.
        max_epochs: passes through these at most; the training ends earlier where held-out pairs do not gain any more.
        max_seconds: of the training, at most.
        checkpoint: a file that keeps the training, as that of :func:`fit_density` does; the simulations, which take
            less, are made again.
        seed: of all randomness.
        progress: show what is being done.

    Returns:
        An :class:`Amortized`.

    Raises:
        ValueError: for a model that cannot draw its data (factors, improper priors, nothing observed), a site whose
            argument is not found, simulations that are not finite, an encoder that returns another shape.

    Cost: the simulations, and a step of the flow for each 512 of them in each epoch; one to three minutes of one thread
    for ten parameters. Data sets of another size or with other covariates need a flow of their own.

    References: Papamakarios and Murray 2016 (arXiv 1605.06376); Radev et al. 2020 (arXiv 2003.06281); Li et al. 2024
    (arXiv 2409.04332).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> options = {"simulations": 2000, "max_epochs": 5, "progress": False}
    >>> amortized = pf.amortize(model, torch.zeros(4), **options)
    >>> amortized.posterior(torch.tensor([0.3, 1.4, -0.2, 0.9])).verdict.method
    'amortized flow'
    """
    checks.choice("flow", flow, ("auto", *LAYERS))
    checkpoint = journal.check(checkpoint)
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise ValueError(f"encoder: expected a torch module, got a {type(encoder).__name__}.")
    with alone(), Bar("amortize", progress) as bar:
        bar.watch("simulating")
        case = bound(model, args, dict(model_kwargs or {}))
        read = simulate(model, case, data, simulations, REFERENCE, seed=seed)
        rows = exchangeable_rows(read)
        scale = scale_of(read, rows)
        features = scale(read.form.rows(read.observed)).float()
        conditional = networks(read, features, encoder, rows, flow, layers, seed=seed)
        parts = Parts(read.form, scale, conditional, read.density, stacked(read))
        bar.close("simulated")
    start = with_preprocess(conditional.flow, measured(read, features, rows)).to(features)
    fitted = fit_density(
        start,
        read.z[REFERENCE:].float(),
        context=features[REFERENCE:],
        preprocess=None,
        max_epochs=max_epochs,
        max_seconds=max_seconds,
        batch=BATCH,
        checkpoint=checkpoint,
        seed=seed,
        progress=progress,
    )
    conditional.trained(fitted.flow)
    with alone(), seeded(derive(seed, "what the prior predicts"), read.density.device):
        held = {name: value[:REFERENCE] for name, value in read.observed.items()}
        reference = parts.predict(held)
    settings: dict[str, object] = {"simulations": len(read.z) - REFERENCE, "max_epochs": max_epochs, "seed": seed}
    settings |= {"flow": conditional.recipe.builder, "layers": conditional.recipe.options["layers"]}
    settings |= {name: fitted.settings[name] for name in ("steps", "epochs", "seconds")} | {"why": fitted.why}
    settings |= {"rows": rows, "encoder": "default" if encoder is None else type(encoder).__name__}
    return Amortized(model, fitted.losses, fitted.validation, settings, parts, reference, probe(read))
