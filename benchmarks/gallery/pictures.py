"""The pictures: pairs of the gallery, flows on two moons, coordinates of a hierarchical site, a tail transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

import pyro_flows as pf
from benchmarks.gallery.entries import Entry
from pyro_flows.cli import eight_schools
from pyro_flows.posterior.export.arviz_groups import posterior_group
from pyro_flows.posterior.plots.parts import raw, scalar
from pyro_flows.support.figures import FLOW, INK, color_of, panels, styled
from pyro_flows.transforms.base import Bijection

STEPS, RATES = 5000, (0.003, 0.01, 0.03)  # of the Gaussian guide; the rate with the best ELBO is taken
EDGE = -0.6  # of log tau, below which the shares of draws are told
CHAINS = 10  # of reference draws
MOONS = {
    "additive": lambda: pf.nice(2, layers=8),
    "affine": lambda: pf.realnvp(2, layers=8),
    "spline": lambda: pf.spline(2, layers=8),
    "planar": lambda: pf.planar(2, layers=32),
}
WIDTH = 3.7  # inches, to be read on a phone


def gaussian(entry: Entry, start: Mapping[str, Tensor], seed: int = 0) -> pf.Posterior:
    """Train Pyro's full-rank Gaussian guide by Pyro's SVI from the posterior's medians, at the best of three rates."""
    return max((_trained(entry, start, rate, seed) for rate in RATES), key=lambda found: found.elbo)


def _trained(entry: Entry, start: Mapping[str, Tensor], rate: float, seed: int) -> pf.Posterior:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoMultivariateNormal(entry.model, init_loc_fn=init_to_value(values=dict(start)))
    svi = SVI(entry.model, guide, Adam({"lr": rate}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step(*entry.args)
    found = pf.diagnose(entry.model, guide, *entry.args, seed=seed)
    pyro.clear_param_store()
    return found


def _chains(draws: Mapping[str, Tensor], names: set[str]) -> dict[str, np.ndarray]:
    """Reference draws (S, *shape) as chains."""
    kept = {name: values.numpy() for name, values in draws.items() if name in names}
    return {name: values.reshape(CHAINS, -1, *values.shape[1:]) for name, values in kept.items()}


def compare(entry: Entry) -> tuple[Figure, dict[str, pf.Posterior]]:
    """Draw the fit's draws under the regions of the Gaussian guide and, where there are any, of reference draws."""
    posterior = pf.fit(entry.model, *entry.args, progress=False)
    medians = {name: values.quantile(0.5, dim=0) for name, values in posterior.samples.items()}
    found = {"fit": posterior, "full-rank Gaussian guide": gaussian(entry, medians)}
    if entry.reference is not None:
        draws = _chains(entry.reference, set(posterior.samples))
        found["reference draws"] = pf.from_mcmc(draws, entry.model, *entry.args)
    return pf.plots.plot_pairs(found, *entry.pair, transform=dict(entry.transform) or None, width=4.6), found


def schools_pairs() -> tuple[Figure, dict[str, pf.Posterior]]:
    """README's picture: mu against log tau of the eight schools, regions of equal levels, and shares below an edge."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    entry = Entry(eight_schools, (y, sigma), ("mu", "tau"), {"tau": torch.log})
    posterior = pf.fit(entry.model, *entry.args, progress=False)
    medians = {name: values.quantile(0.5, dim=0) for name, values in posterior.samples.items()}
    guide = gaussian(entry, {name: medians[name] for name in ("mu", "tau", "eta")})
    labels = ("fit", "full-rank Gaussian guide")
    about = {"compare": guide, "transform": dict(entry.transform), "labels": labels}
    figure = pf.plots.plot_pairs(posterior, *entry.pair, **about)
    _tell_shares(figure, {"fit": posterior_group(posterior), "guide": raw(guide)})
    return figure, dict(zip(labels, (posterior, guide), strict=True))


@styled
def _tell_shares(figure: Figure, draws: Mapping[str, Any]) -> None:
    """Draw a line at the edge, and write which share of the draws lies below."""
    axis = figure.axes[0]
    shares = {name: np.mean(scalar(each, "tau", {"tau": torch.log}) < EDGE) for name, each in draws.items()}
    told = ", ".join(f"{share:.0%} of the {name}'s draws".replace("%", " %") for name, share in shares.items())
    axis.axhline(EDGE, color=INK, linewidth=0.8, linestyle=":")
    axis.text(0.99, 0.02, f"below log tau = {EDGE:g}:\n{told}", transform=axis.transAxes, ha="right", va="bottom")


def moons(epochs: int = 150) -> Figure:
    """Four kinds of flow on two moons, each trained for as many passes over the data."""
    return _moons({name: _fit_moons(name, epochs) for name in MOONS})


def _fit_moons(name: str, epochs: int) -> tuple[Tensor, float]:
    """Draws of one fitted flow, and its mean log density of test points."""
    data = pf.datasets.toy("moons", 6000, seed=0)
    fitted = pf.fit_density(MOONS[name](), data[:5000], max_epochs=epochs, seed=0, progress=False)
    return fitted.sample(1500, seed=1), float(fitted.log_prob(data[5000:]).mean())


@styled
def _moons(found: dict[str, tuple[Tensor, float]]) -> Figure:
    figure, axes = panels(len(found), columns=2, size=(WIDTH, 0.78 * WIDTH))
    for axis, (name, (points, score)) in zip(axes, found.items(), strict=True):
        axis.scatter(*points.T.numpy(), s=2.0, color=FLOW, alpha=0.5, linewidths=0.0)
        axis.set_title(f"{name}: {score:.3f} nats")
        axis.set_aspect("equal")
        axis.set_xlim(-1.6, 2.6)
        axis.set_ylim(-1.1, 1.6)
        axis.axis("off")
    return figure


def centering(entry: Entry) -> Figure:
    """The same draws in centered and in fitted coordinates, against the log of the scale."""
    posterior = pf.fit(entry.model, *entry.args, progress=False)
    fitted = posterior.to_arviz(predictive=False)["unconstrained_posterior"]["theta"]
    draws = {"theta[0]": posterior.samples["theta"][:, 0].numpy(), "theta[0], fitted": fitted.to_numpy()[0, :, 0]}
    return _centering(posterior.samples["tau"].log().numpy(), draws)


@styled
def _centering(log_scale: np.ndarray, draws: dict[str, np.ndarray]) -> Figure:
    figure, axes = panels(2, columns=2, size=(WIDTH, 0.58 * WIDTH))
    for axis, (label, values) in zip(axes, draws.items(), strict=True):
        axis.scatter(values, log_scale, s=2.0, color=FLOW, alpha=0.4, linewidths=0.0)
        axis.set_xlim(*np.quantile(values, [0.002, 0.998]))
        axis.set_ylim(-4.0, 3.5)
        axis.set_xlabel(label)
        axis.set_ylabel("log tau")
    return figure


@styled
def tails() -> Figure:
    """The tail transform, heavier on the left and lighter on the right, and the density that it makes of a normal."""
    layer = pf.transforms.SinhArcsinh(1)
    with torch.no_grad():
        powers = [0.6, -0.4, -0.5, -0.4]  # log k and log c on the left, the same on the right
        layer.load_state_dict({"conditioner.values": torch.tensor(powers)})
        x = torch.linspace(-5.0, 5.0, 801)[:, None]
        y, ladj = _evaluate(layer, x)
    figure, axes = panels(2, columns=2, size=(WIDTH, 0.58 * WIDTH))
    axes[0].plot(x, x, color="#8A8A8A", linestyle=":")
    axes[0].plot(x, y, color=FLOW)
    axes[0].set(xlabel="x, normal", ylabel="y", xlim=(-4, 4), ylim=(-12, 6))
    log_q = -0.5 * x[:, 0].square() - 0.9189 - ladj
    axes[1].plot(x, -0.5 * x[:, 0].square() - 0.9189, color="#8A8A8A", linestyle=":", label="normal")
    axes[1].plot(y[:, 0], log_q, color=color_of(0)[0], label="after it")
    axes[1].set(xlabel="y", ylabel="log density", xlim=(-12, 6), ylim=(-13, 0))
    axes[1].legend(loc="lower center")
    return figure


def _evaluate(layer: Bijection, x: Tensor) -> tuple[Tensor, Tensor]:
    """The map and its log determinant, without gradients."""
    y, ladj = layer.forward_and_ladj(x)
    return y.detach(), ladj.detach()
