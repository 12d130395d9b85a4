"""The figure of ranks: ECDF differences with their simultaneous envelope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyro_flows._figures import BASE, FILLED, FLOW, INK, LINE, WIDTH, panels, styled
from pyro_flows.calibration.uniformity import Envelope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, HEIGHT = 3, 2.1  # inches
SHOWN = 30  # panels


@styled
def ecdf_figure(scalars: Mapping[str, np.ndarray], test: Envelope, prob: float) -> Figure:
    """Return a figure with a panel for each scalar, thirty at most: those with the smallest p-values."""
    p_values = {label: test.p_value(ranks) for label, ranks in scalars.items()}
    shown = list(scalars)
    if len(shown) > SHOWN:
        worst = sorted(shown, key=p_values.__getitem__)[:SHOWN]
        shown = [label for label in shown if label in worst]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = panels(len(shown), columns=columns, size=(WIDTH, HEIGHT * rows + 0.3))
    low, high = test.band(prob)
    at = np.concatenate([[0.0], test.at, [1.0]])
    for label, axis in zip(shown, axes, strict=True):
        ecdf = test.counts(scalars[label]) / test.simulations
        outside = bool(((ecdf < low) | (ecdf > high)).any())
        axis.fill_between(test.at, low - test.at, high - test.at, step="mid", color=FLOW, alpha=FILLED, lw=0)
        axis.axhline(0.0, color=LINE, lw=0.8)
        axis.plot(at, np.concatenate([[0.0], ecdf - test.at, [0.0]]), color=BASE if outside else FLOW, lw=1.4)
        axis.set_title(f"{label}  (p = {p_values[label]:.2g})", fontsize=8, color=INK)
        axis.set_xlim(0.0, 1.0)
    for axis in axes[-columns:]:
        axis.set_xlabel("fractional rank")
    figure.supylabel("ECDF difference", fontsize=9, color=INK)
    return figure
