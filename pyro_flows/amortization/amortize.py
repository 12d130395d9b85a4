"""``amortize``: one conditional flow for the posteriors of all data sets of a form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flows import _checks
from pyro_flows._fallbacks import fallback
from pyro_flows._progress import Bar
from pyro_flows._seeding import derive, seeded
from pyro_flows._turns import alone
from pyro_flows.amortization.amortized import Amortized, predicted, rows_exchange
from pyro_flows.amortization.form import Form, Scale, bound
from pyro_flows.amortization.networks import FLOW, Conditional, Pooled, Shaped, perceptron
from pyro_flows.calibration.simulating import check_model
from pyro_flows.calibration.wiring import check_wiring, filled, wire
from pyro_flows.density_estimation.fit_density import fit_density
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.vectors import realnvp, spline
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import NotStackable, Stack

BUILDERS = {"spline": (spline, 4), "realnvp": (realnvp, 6)}  # with how many layers
SPLINES_UP_TO = 2  # dimensions: a spline bends a single one too, and takes three times as long
BATCH = 512  # pairs a step: twice as many as of fewer take little more time
REFERENCE = 4096  # simulated data sets that others are compared with
TOGETHER = 2**19  # numbers of data and draws that are handled at once there
STACKED = 8  # data sets that tell which arguments are inputs of the recorded graph
SET = 16  # rows, from which on exchangeable ones are pooled
COMPARED = 8  # points at which rows are exchanged
LOST_SHARE = 0.05  # of the simulations that may have parameters or data that are not finite


@_checks.options
def amortize(
    model: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    encoder: nn.Module | None = None,
    flow: str = "auto",
    layers: int | None = None,
    simulations: int = 200_000,
    max_epochs: int = 10,
    max_seconds: float | None = None,
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
            these for several sites, and returns ``(K, width)``. By default a perceptron; where rows are exchangeable,
            16 or more, a perceptron of each row, their mean, and another one, for which the order of rows does not
            matter.
        flow: the couplings, ``"spline"``, ``"realnvp"``, or ``"auto"``: splines in one or two dimensions.
        layers: how many; 4 splines or 6 affine ones by default.
        simulations: how many pairs of parameters and data to learn from.
        max_epochs: passes through these at most; the training ends earlier where held-out pairs do not gain any more.
        max_seconds: of the training, at most.
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
    _checks.choice("flow", flow, ("auto", *BUILDERS))
    layers = None if layers is None else _checks.integer("layers", layers, 1)
    _checks.integer("simulations", simulations, 1000)
    _checks.integer("seed", seed, 0)
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise ValueError(f"encoder: expected a torch module, got a {type(encoder).__name__}.")
    with alone(), Bar("amortize", progress) as bar:
        bar.watch("simulating")
        density, form, drawn = _simulated(model, bound(model, args, dict(model_kwargs or {})), data, simulations, seed)
        z, observed = _finite(density, form, drawn)
        rows = form.rows(observed)
        sizes = [int(keep.sum()) for keep in form.keep.values()]
        exchangeable = _exchangeable(density, form, z)
        scale = Scale(rows, sizes, exchangeable=exchangeable)
        features = scale(rows)
        with seeded(derive(seed, "networks"), density.device):
            made = _encoder(encoder, form, sizes, exchangeable)
            width = made(features[:2].float()).shape[-1]
            inner = _couplings(flow, density.dim, layers, width)
        conditional = Conditional(inner, made, features.shape[1])
        stack = _stacked(density, form, observed)
        bar.close("simulated")
    asked: dict[str, Any] = {"simulations": simulations, "max_epochs": max_epochs, "seed": seed}
    asked |= {"flow": inner.recipe.builder, "layers": inner.recipe.options["layers"]}
    fitted = fit_density(
        conditional.flow,
        z[REFERENCE:].float(),
        context=features[REFERENCE:].float(),
        max_epochs=max_epochs,
        max_seconds=max_seconds,
        batch=BATCH,
        seed=seed,
        progress=progress,
    )
    conditional.trained(fitted.flow)
    held = {name: value[:REFERENCE] for name, value in observed.items()}
    chunk = max(1, TOGETHER // (32 * density.numbers))
    with alone(), seeded(derive(seed, "what the prior predicts"), density.device):
        reference = predicted(stack, form, scale, conditional.flow, held, chunk)
    about = {name: fitted.settings[name] for name in ("steps", "epochs", "seconds")}
    settings = {**asked, **about, "why": fitted.why, "pooled": exchangeable > 1 and encoder is None}
    return Amortized(
        model, fitted.losses, fitted.validation, settings, form, scale, conditional, density, stack, reference
    )


def _couplings(flow: str, dim: int, layers: int | None, width: int) -> Flow:
    """Return couplings with a context of this width."""
    name = ("spline" if dim <= SPLINES_UP_TO else "realnvp") if flow == "auto" else flow
    builder, own = BUILDERS[name]
    return builder(dim, layers=layers or own, context_dim=width, **FLOW)


def _simulated(
    model: Callable[..., Any], case: Any, data: Mapping[str, Any] | None, simulations: int, seed: int
) -> tuple[LogDensity, Form, dict[str, Tensor]]:
    """Return the density at the data in hand, the form of data, and draws of all sites from the prior."""
    case = filled(model, case, data)
    density = LogDensity(model, case.args, case.kwargs, noncentered=True)
    check_model(density, "prior")
    wiring = wire(density, case, data)
    form = Form.of(wiring, density.structure.observed)
    drawn = density.prior(simulations + REFERENCE, seed=derive(seed, "simulations"))
    if drawn is None:
        raise ValueError("model: expected proper priors that can be drawn from, so that data can be simulated.")
    check_wiring(density, wiring, {name: values[0] for name, values in drawn.items()})
    return density, form, drawn


def _finite(density: LogDensity, form: Form, drawn: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return unconstrained parameters and data of the simulations in which all are finite."""
    z = density.unconstrain(drawn)
    fine = torch.isfinite(z).all(1) & torch.isfinite(form.rows(drawn)).all(1)
    lost = 1.0 - float(fine.double().mean())
    if lost > LOST_SHARE:
        raise ValueError(
            f"model: {lost:.0%} of the simulations have parameters or data that are not finite. Its priors are too "
            "wide to learn from: give narrower ones."
        )
    return z[fine], {name: drawn[name][fine] for name in form.keep}


def _exchangeable(density: LogDensity, form: Form, z: Tensor) -> int:
    """Return how many rows the data have, if these are 16 or more, and may come in any order; else 1."""
    observed = density.structure.observed
    sizes = {len(value) if value.dim() else 0 for value in observed.values()}
    if len(sizes) > 1 or max(sizes) < SET or not all(bool(keep.all()) for keep in form.keep.values()):
        return 1
    order = torch.randperm(max(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    return max(sizes) if rows_exchange(density, form, observed, z[:COMPARED], order) else 1


def _encoder(encoder: nn.Module | None, form: Form, sizes: Sequence[int], rows: int) -> nn.Module:
    if encoder is not None:
        return Shaped(encoder, form.keep)
    return perceptron(sum(sizes)) if rows == 1 else Pooled(rows, [size // rows for size in sizes])


def _stacked(density: LogDensity, form: Form, observed: Mapping[str, Tensor]) -> Stack | None:
    """Return the densities of some simulated data sets side by side; None where the model cannot do that."""
    cases = [form.wiring({name: value[number] for name, value in observed.items()}) for number in range(STACKED)]
    try:
        return Stack([density.beside(case.args, case.kwargs) for case in cases])
    except NotStackable as error:
        fallback("each data set has a graph of its own", error)
        return None
