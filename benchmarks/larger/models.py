"""Pyro models of 8 to 1002 latents as statisticians write them, with their data, and long runs to compare with.

Radon with slopes, germinated seeds, correlated effects with an LKJ prior and item response are those of
:mod:`benchmarks.named.models`; here are the other five. NumPyro's ports are in
:mod:`benchmarks.larger.numpyro_models`, the means and standard deviations of long runs in ``reference.json``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.named import models as named
from benchmarks.named.models import ONE, ZERO, Data, real
from benchmarks.posteriors.models import Problem
from pyro_flows import LogDensity

REFERENCE = Path(__file__).resolve().parent / "reference.json"

# models --------------------------------------------------------------------------------------------------------------


def surgical(r: Tensor, n: Tensor) -> None:
    """Deaths in heart surgery of babies at twelve hospitals (BUGS examples), centered, with the priors of BUGS."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 1000.0))
    variance = pyro.sample("variance", dist.InverseGamma(0.001 * ONE, 0.001 * ONE))
    with pyro.plate("hospital", len(r)):
        b = pyro.sample("b", dist.Normal(mu, variance.sqrt()))
        pyro.sample("r", dist.Binomial(n, logits=b), obs=r)


def surgical_data() -> Data:
    """Deaths and operations at each hospital."""
    died = [0, 18, 8, 46, 8, 13, 9, 31, 14, 8, 29, 24]
    return real(died), real([47, 148, 119, 810, 211, 196, 148, 215, 207, 97, 256, 360])


def horseshoe(x: Tensor, y: Tensor) -> None:
    """A regression of which few coefficients matter (Carvalho, Polson and Scott 2010), centered."""
    tau = pyro.sample("tau", dist.HalfCauchy(ONE))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * ONE))
    with pyro.plate("column", x.shape[1]):
        local = pyro.sample("local", dist.HalfCauchy(ONE))
        beta = pyro.sample("beta", dist.Normal(ZERO, tau * local))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def horseshoe_data() -> Data:
    """A hundred rows of thirty columns, four of which matter, simulated."""
    rng = np.random.default_rng(0)
    x, beta = rng.normal(size=(100, 30)), np.zeros(30)
    beta[:4] = [2.0, -1.5, 1.0, 0.5]
    return real(x), real(x @ beta + rng.normal(size=100))


def many_locals(y: Tensor) -> None:
    """Counts with a rate of their own each: as many local latents as rows."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(ONE))
    with pyro.plate("row", len(y)):
        log_rate = pyro.sample("log_rate", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def many_locals_data(rows: int) -> Data:
    """Counts, simulated: 3.5 on average."""
    rng = np.random.default_rng(3)
    return (real(rng.poisson(np.exp(rng.normal(1.0, 0.7, rows)))),)


def stochastic_volatility(y: Tensor) -> None:
    """Returns whose log variance is an autoregression (Kim, Shephard and Chib 1998), as Stan's user's guide writes it.

    ``h_1 ~ normal(mu, sigma / sqrt(1 - phi^2)), h_t ~ normal(mu + phi (h_{t-1} - mu), sigma), y_t ~ normal(0,
    exp(h_t / 2))``, in terms of standard normal innovations.
    """
    mu = pyro.sample("mu", dist.Normal(ZERO, 5.0))
    persistence = pyro.sample("persistence", dist.Beta(20.0 * ONE, 1.5 * ONE))
    sigma = pyro.sample("sigma", dist.HalfCauchy(ONE))
    phi = 2.0 * persistence - 1.0
    with pyro.plate("day", len(y)):
        innovation = pyro.sample("innovation", dist.Normal(ZERO, 1.0))
        h = [mu + sigma * innovation[0] / (1.0 - phi**2).sqrt()]
        for t in range(1, len(y)):
            h.append(mu + phi * (h[-1] - mu) + sigma * innovation[t])
        pyro.sample("y", dist.Normal(ZERO, (0.5 * torch.stack(h)).exp()), obs=y)


def stochastic_volatility_data(days: int) -> Data:
    """Returns in per cent, simulated: persistence 0.95, innovations of sd 0.3."""
    rng = np.random.default_rng(4)
    h = [-0.5 + 0.3 / math.sqrt(1.0 - 0.95**2) * rng.normal()]
    for _ in range(days - 1):
        h.append(-0.5 + 0.95 * (h[-1] + 0.5) + 0.3 * rng.normal())
    return (real(np.exp(0.5 * np.array(h)) * rng.normal(size=days)),)


def lotka_volterra(y: Tensor, times: Tensor) -> None:
    """Hares and lynxes (Hudson's Bay Company; Carpenter 2018): Runge-Kutta steps between ``times``, all in a loop.

    ``du/dt = (a - b v) u, dv/dt = (d u - c) v``; of the states at ``times``, every tenth is observed with lognormal
    errors.
    """
    rates = pyro.sample("rates", dist.LogNormal(real([0.0, -3.5, 0.0, -3.5]), 0.5).to_event(1))
    initial = pyro.sample("initial", dist.LogNormal(math.log(10.0) * ONE, 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-ONE, 1.0).expand([2]).to_event(1))
    a, b, c, d = rates[0], rates[1], rates[2], rates[3]

    def slope(state: Tensor) -> Tensor:
        return state * torch.stack([a - b * state[1], d * state[0] - c])

    step, states = float(times[1] - times[0]), [initial]
    for _ in range(len(times) - 1):
        state = states[-1]
        k1 = slope(state)
        k2 = slope(state + 0.5 * step * k1)
        k3 = slope(state + 0.5 * step * k2)
        k4 = slope(state + step * k3)
        states.append(state + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4))
    pyro.sample("y", dist.LogNormal(torch.stack(states)[::10].log(), sigma).to_event(2), obs=y)


def lotka_volterra_data() -> Data:
    """Pelts in thousands, hares and lynxes, of 1900 to 1920; 201 times, in years."""
    hares = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6]
    lynxes = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7]
    return real(np.stack([[*hares, 16.2, 24.7], [*lynxes, 10.1, 8.6]], 1)), real(np.linspace(0.0, 20.0, 201))


# all nine ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Larger:
    """A model and its data.

    ``mirrored`` names sites whose signs can all change together, the first one decides; ``centered`` models have a
    non-centered form in NumPyro, with the same sites.
    """

    model: Callable[..., None]
    data: Callable[[], Data]
    mirrored: tuple[str, ...] = ()
    centered: bool = False


MODELS = {
    "radon_slopes": Larger(named.radon_slopes, named.radon_data, centered=True),
    "seeds": Larger(named.seeds, named.seeds_data, centered=True),
    "surgical": Larger(surgical, surgical_data, centered=True),
    "lkj_effects": Larger(named.lkj_effects, named.lkj_data, centered=True),
    "horseshoe": Larger(horseshoe, horseshoe_data, centered=True),
    "many_locals": Larger(many_locals, functools.partial(many_locals_data, 1000)),
    "item_response": Larger(
        named.item_response, functools.partial(named.item_data, 200, 8), mirrored=("loading", "ability")
    ),
    "stochastic_volatility": Larger(stochastic_volatility, functools.partial(stochastic_volatility_data, 100)),
    "lotka_volterra": Larger(lotka_volterra, lotka_volterra_data),
}
HALF = 0.1  # that the share of draws on one side of mirrored modes may be off a half


def load(name: str) -> Problem:
    """Return a model and its data, without reference draws.

    Raises:
        LookupError: if the data come with a package that is not installed.
    """
    larger = MODELS[name]
    return Problem(name, larger.model, larger.data(), {}, None)


def folded(name: str, density: LogDensity, draws: Tensor) -> tuple[Tensor, float]:
    """Return draws (S, D) that are all on one side of mirrored modes, and the share that was there; a half for none."""
    mirrored = MODELS[name].mirrored
    if not mirrored:
        return draws, 0.5
    places = {latent.name: slice(latent.offset, latent.offset + latent.size) for latent in density.structure.latents}
    side = torch.where(draws[:, places[mirrored[0]]].mean(1, keepdim=True) < 0.0, -1.0, 1.0)
    draws = draws.clone()
    for site in mirrored:
        draws[:, places[site]] *= side
    return draws, float((side > 0.0).double().mean())


def moments(draws: Tensor) -> dict[str, Any]:
    """Return means and standard deviations (D,) to six digits, as lists."""
    return {
        what: [float(f"{value:.6g}") for value in values.tolist()]
        for what, values in (("mean", draws.mean(0)), ("sd", draws.std(0)))
    }


def compare(name: str, draws: Tensor) -> tuple[float, float, float]:
    """Compare draws (S, D) in the model's own unconstrained coordinates with the long run.

    Returns:
        The worst mean error in reference sds, the worst absolute log ratio of sds, both on one side of mirrored modes,
        and the share of draws on that side.
    """
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))[name]
    mean, sd = (torch.tensor(reference[what], dtype=torch.float64) for what in ("mean", "sd"))
    if not bool(torch.isfinite(draws).all()):
        return math.inf, math.inf, math.nan
    problem = load(name)
    draws, share = folded(name, LogDensity(problem.model, problem.args), draws.double())
    off = ((draws.mean(0) - mean).abs() / sd).max()
    return float(off), float((draws.std(0) / sd).log().abs().max()), share
