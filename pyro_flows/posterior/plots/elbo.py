"""The ELBO of each step of a fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.record import Record
from pyro_flows.posterior.plots import parts
from pyro_flows.support.figures import FLOW, INK, LINE, WIDTH, panels, steps, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def plot_elbo(posterior: Record, *, width: float = WIDTH) -> Figure:
    """Draw the ELBO of each optimization step, with a running median, and that of the final draws (dashed).

    Each step's is the mean over the batch by which the flow is trained, each draw weighted for how it was drawn. The
    final one is of a new sample from the guide. Where several flows form a mixture, it is the mixture's, and the legend
    says so. Where training ended early and then went on, a dotted line is drawn.
    The vertical axis is chosen by the second half of the run, so that wild first steps do not flatten the rest.
    A fit whose start left nothing to train has no steps: then the final ELBO stands alone, and the title says so.

    Args:
        posterior: of :func:`~pyro_flows.fit`.
        width: inches.

    Raises:
        ValueError: if there are no steps to show, as after :func:`~pyro_flows.diagnose`.

    Cost: O(steps); the figure is drawn when it is shown or saved.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)
    >>> posterior = pf.fit(model, torch.tensor([1.3, 0.2]), layers=2, draws=400, progress=False)
    >>> len(pf.plots.plot_elbo(posterior).axes)
    1
    """
    elbo = -posterior.losses.detach().double().cpu().numpy()
    trained = "max_steps" in posterior.settings  # by fit, and not diagnosed
    if not len(elbo) and not trained:
        raise ValueError("posterior: expected one with optimization steps, got none (diagnose does not optimize).")
    figure, (axes,) = panels(1, size=(width, 3.6 if width > parts.NARROW else 2.9))
    if len(elbo):
        steps(axes, elbo, FLOW, "each step")
        at = np.arange(1, len(elbo) + 1)
        axes.plot(at, _running_median(elbo), color=FLOW, linestyle="-", linewidth=1.8, label="running median")
    supported = posterior.verdict.supports_evidence and math.isfinite(posterior.elbo)
    if supported:
        flow = posterior.flow
        of = f", of a mixture of {len(flow.components)}" if isinstance(flow, FlowMixture) else ""
        label = f"final {posterior.elbo:.2f}{of}"
        axes.axhline(posterior.elbo, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=3, label=label)
    axes.set(xlabel="optimization step", ylabel="ELBO (nats)")
    if len(elbo):
        axes.set_ylim(*_limits(elbo, posterior.elbo if supported else math.nan))
        _rounds(axes, posterior, len(elbo))
    else:
        axes.set(xticks=[], xlabel="no optimization steps")
    axes.legend(loc="lower right")
    what = "Evidence lower bound" if width > parts.NARROW else "ELBO"
    parts.title(axes, posterior, what if len(elbo) else f"{what}: nothing had to be trained")
    return figure


def _rounds(axes: Axes, posterior: Record, total: int) -> None:
    """Draw where training of the run that is shown went on: its stages follow each other."""
    trained = [stage for stage in posterior.history if stage.get("steps") and stage.get("k_hat") is not None]
    runs = [stage.get("run") for stage in trained if stage["stage"] == posterior.settings.get("round")]
    lengths = [int(stage["steps"]) for stage in trained if stage.get("run") in (runs[:1] or [None])]
    for begun in total - np.cumsum(lengths[::-1]):
        if 0.01 * total < begun < total and begun != total - sum(lengths):  # a stage that begins earlier is the first
            axes.axvline(float(begun), color=LINE, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median over a centered window of a twenty-fifth of the run, shorter at both ends."""
    import pandas

    half = max(1, round(len(values) / 50))
    finite = pandas.Series(np.where(np.isfinite(values), values, np.nan))
    return finite.rolling(2 * half + 1, center=True, min_periods=1).median().to_numpy()


def _limits(elbo: np.ndarray, final: float) -> tuple[float, float]:
    """Return the range of the second half of a run and of the final value, and what else fits in."""
    late = elbo[len(elbo) // 2 :]
    late = late[np.isfinite(late)] if np.isfinite(late).any() else np.array([0.0])
    low, middle, high = np.quantile(late, [0.01, 0.5, 0.99])
    if math.isfinite(final):
        low, high = min(low, final), max(high, final)
    spread = max(high - low, 1e-3 * abs(middle), 1e-6)
    start = float(np.quantile(elbo[np.isfinite(elbo)], 0.05)) if np.isfinite(elbo).any() else low
    return max(min(start, low) - 0.3 * spread, low - 4.0 * spread), high + 0.5 * spread
