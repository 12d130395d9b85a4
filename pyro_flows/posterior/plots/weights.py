"""The importance weights that a verdict rests on, and the tail from which k-hat comes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_flows.inference.record import Record
from pyro_flows.inference.verdict.psis import Tail, fit_tail
from pyro_flows.posterior.plots import parts
from pyro_flows.support.figures import BASE, FILLED, FLOW, INK, WIDTH, panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def plot_weights(posterior: Record, *, width: float = WIDTH) -> Figure:
    r"""Draw the log importance weights of the raw draws, and the largest weights with the Pareto tail fitted to them.

    Right, both axes are logarithmic: the share of draws with a larger weight than w, in units of the mean weight, and
    the fit :math:`P(w > x) = \frac MS (1 + \hat k (x - u) / \sigma)^{-1/\hat k}` to the M largest. The flatter the
    line, the heavier the tail: from :math:`\hat k = 0.5` on, weights have no variance, from 1 on no mean. The verdict's
    k-hat is of four times as many draws as are kept and shown; both are written.

    Args:
        posterior: of :func:`~pyro_flows.fit` or :func:`~pyro_flows.diagnose`.
        width: inches.

    Raises:
        ValueError: if there are no weights, as those of Markov chains from elsewhere, or if none is finite.

    Reference: Vehtari et al., *Pareto smoothed importance sampling*, JMLR 2024 (arXiv 1507.02646).

    Cost: a second at most; the figure is drawn when it is shown or saved.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> len(pf.plots.plot_weights(posterior).axes)
    2
    """
    ratios = (posterior.log_p - posterior.log_q).detach().double().cpu()
    finite = ratios[torch.isfinite(ratios)]
    if not len(finite):
        raise ValueError("posterior: expected draws of a guide with finite weights, got none (chains have no weights).")
    level = float(torch.logsumexp(finite, 0)) - math.log(len(ratios))  # log of the mean weight
    tail = fit_tail(ratios)
    narrow = width < parts.NARROW
    columns = 1 if narrow else 2
    figure, (left, right) = panels(2, columns=columns, size=(width, 5.6 if narrow else 3.4))
    _histogram(left, (finite - level).numpy(), len(ratios) - len(finite))
    _tail(right, (finite - level).numpy(), len(ratios), tail, float(finite.max()) - level)
    said = f"k-hat of these {len(ratios)} draws {tail.k_hat:.2f}\nthe verdict's {posterior.verdict.k_hat:.2f}, "
    right.set_title(f"{said}threshold {posterior.verdict.k_threshold:.2f}", loc="left", fontsize=8)
    parts.heading(figure, {"": posterior}, "Importance weights")
    return figure


def _histogram(axes: Axes, logs: np.ndarray, broken: int) -> None:
    low, high = np.quantile(logs, 0.001), logs.max()
    margin = 0.0 if high - low > 1e-9 else 0.01
    parts.histogram(axes, logs, np.linspace(low - margin, high + margin, 50))
    axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0, None)
    parts.silence(axes)
    axes.set_xlabel("log weight over the mean weight (nats)")
    axes.set_title(f"{broken} draws have weight 0" if broken else "equal weights would all stand at 0", fontsize=8)


def _tail(axes: Axes, logs: np.ndarray, count: int, tail: Tail, largest: float) -> None:
    """Draw the share of draws above each weight; the fit is of weights of which the largest is 1."""
    from scipy.stats import genpareto

    ordered = np.sort(logs)[::-1]
    shares = (np.arange(len(ordered)) + 0.5) / count
    shown = slice(0, min(len(ordered), 4 * max(tail.size, 1)))
    weights = np.exp(ordered[shown])
    axes.plot(weights, shares[shown], ".", color=FLOW, markersize=3, rasterized=True, label="draws")
    axes.set(xscale="log", yscale="log", xlabel="weight w over the mean weight", ylabel="share of larger weights")
    if math.isnan(tail.scale):
        axes.annotate("the largest weights are equal:\nno tail to fit", (0.05, 0.08), xycoords="axes fraction")
        return
    scale = math.exp(largest)
    span = np.geomspace(tail.cutoff * scale, max(weights.max(), tail.cutoff * scale * 1.001), 200)
    above = genpareto.sf((span / scale - tail.cutoff) / tail.scale, tail.k_hat)
    fitted = tail.size / count * np.where(above > 0, above, np.nan)
    axes.plot(span, fitted, color=BASE, linestyle="-", linewidth=1.6, label="Pareto tail, fitted")
    left, right = axes.get_xlim()
    axes.axvspan(tail.cutoff * scale, right, color=BASE, alpha=0.5 * FILLED, linewidth=0)
    axes.set_xlim(left, right)
    axes.set_ylim(0.3 / count, None)
    _few_ticks(axes)
    axes.legend(loc="lower left")


def _few_ticks(axes: Axes) -> None:
    """Write few numbers along the logarithmic axis of weights, which may span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    if decades > 2.0:
        return
    if decades <= 0.3:
        axes.set_xscale("linear")
        axes.locator_params(axis="x", nbins=4)
        return
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
