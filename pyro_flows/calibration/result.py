"""What simulation-based calibration found, as a value."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_flows.support import arviz, checks
from pyro_flows.support.figures import BASE, FILLED, FLOW, INK, LINE, WIDTH, panels, styled
from pyro_flows.support.numbers.arrays import indexed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LEVEL = 0.01
SHOWN = 30  # panels at most


@checks.methods
@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    r"""Ranks of true values among posterior draws, over many simulations.

    If posteriors are right, the rank of each scalar is uniform on 0, ..., L. Too many ranks near both ends say that
    posteriors are too narrow; too many in the middle, too wide; too many at one end, that they are off to the other
    side: many high ranks mean that estimates are too low.

    Attributes:
        ranks: for each variable the ranks (simulations, \*shape), axes as ``dims`` names them; ``lp`` is the log
            density.
        dims: names of the axes of each variable, without the first.
        draws: L, how many draws each value was ranked among.
        kind: ``"prior"``, or ``"posterior"`` for calibration at the data in hand.
        method: what made the draws: ``"fit"``, a guide's name or a function's.
        statuses: how many fits had each verdict. Unreliable ones are ranked too: what is left out would bias the rest.
        settings: what :func:`sbc` was told or chose.

    Under a right posterior, :math:`\sum_l 1[\theta_l < \theta^*]` is uniform. Sources: Talts et al. 2018
    (arXiv 1804.06788); Säilynoja, Bürkner and Vehtari 2022 (arXiv 2103.10522). Cost: nothing is computed here but
    p-values, which take 20 000 uniform samples once.

    >>> import numpy as np, pyro_flows as pf
    >>> ranks = {"mu": np.arange(100)}
    >>> found = pf.Calibration(ranks, {"mu": ()}, 99, "prior", "fit", {"ok": 100}, {})
    >>> found.simulations, found.is_uniform()
    (100, True)
    """

    ranks: dict[str, np.ndarray] = field(repr=False)
    dims: dict[str, tuple[str, ...]]
    draws: int
    kind: str
    method: str
    statuses: dict[str, int]
    settings: dict[str, Any]

    @property
    def simulations(self) -> int:
        """How many simulations there are."""
        return len(next(iter(self.ranks.values())))

    def scalars(self, var_names: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return the ranks (simulations,) of each scalar, by a label such as ``theta[3]``.

        Raises:
            ValueError: for a name that is no variable.
        """
        names = [var_names] if isinstance(var_names, str) else list(self.ranks if var_names is None else var_names)
        found: dict[str, np.ndarray] = {}
        for name in names:
            values = self.ranks[checks.choice("var_names", name, self.ranks)]
            labels = indexed(name, map(range, values.shape[1:]))
            found |= dict(zip(labels, values.reshape(len(values), -1).T, strict=True))
        return found

    # figures --------------------------------------------------------------------------------------------------------

    def p_values(self, var_names: str | Sequence[str] | None = None) -> dict[str, float]:
        """Return the p-value of uniformity of each scalar, by the simultaneous envelope of its ECDF.

        Reference: Säilynoja, Bürkner and Vehtari 2022 (arXiv 2103.10522). None is below 1 / 20001.
        """
        test = envelope(self.simulations, self.draws)
        return {label: test.p_value(ranks) for label, ranks in self.scalars(var_names).items()}

    @property
    def p_value(self) -> float:
        """The p-value of uniformity of all scalars together, the smallest one times their number (Bonferroni)."""
        found = self.p_values()
        return min(1.0, min(found.values()) * len(found))

    def is_uniform(self, level: float = LEVEL) -> bool:
        """Whether uniformity of all scalars together is not rejected at this level."""
        return self.p_value >= level

    def coverage(self, var_names: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return a table: how often central intervals of 50, 80, 90 and 95 % held the true value.

        Columns ``50%`` and so on are shares of the simulations; ``50%_se`` and so on are the binomial standard errors
        that these shares have if intervals are right.
        """
        import pandas

        rows = {}
        for label, ranks in self.scalars(var_names).items():
            row: dict[str, float] = {}
            for prob in NOMINAL:
                share, error = covered(ranks, self.draws, prob)
                row |= {f"{prob:.0%}": share, f"{prob:.0%}_se": error}
            rows[label] = row
        return pandas.DataFrame.from_dict(rows, orient="index")

    def summary(self, var_names: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return a table, one row a scalar.

        Columns: ``p_uniform``, the p-value of uniformity; ``p_symmetric``, that of symmetry (VSBC: whether point
        estimates are unbiased, even if spreads are wrong); ``mean_rank`` over L, 0.5 if right; and the shares that
        central intervals cover.

        Reference: Yao, Vehtari, Simpson and Gelman 2018 (arXiv 1802.02538).
        """
        table, ranks = self.coverage(var_names), self.scalars(var_names)
        columns = [f"{prob:.0%}" for prob in NOMINAL]
        table = table[columns].copy()
        table.insert(0, "p_uniform", list(self.p_values(var_names).values()))
        table.insert(1, "p_symmetric", [symmetry(values, self.draws) for values in ranks.values()])
        table.insert(2, "mean_rank", [float(values.mean()) / self.draws for values in ranks.values()])
        return table

    # ArviZ and figures ----------------------------------------------------------------------------------------------

    def to_arviz(self) -> Any:
        """Return the ranks as an ArviZ object: group ``prior_sbc`` (or ``posterior_sbc``), dims (chain, draw, ...).

        A draw is a simulation, and there is one chain, as in the package simuk. ``az.plot_ecdf_pit`` of ArviZ 1.x reads
        the group as it is; ``az.plot_dist(..., group="prior_sbc", kind="hist")`` draws histograms of the ranks.
        """
        values = {name: ranks[None] for name, ranks in self.ranks.items()}
        group = arviz.dataset(values, self.dims)
        attrs: dict[str, str | float] = {
            "status": "uniform" if self.is_uniform() else "not uniform",
            "verdict": self._sentence(),
            "inference_library": "pyro_flows",
            "ranks_among": self.draws,
            "method": self.method,
        }
        return arviz.pack({f"{self.kind}_sbc": group}, attrs)

    def plot(self, var_names: str | Sequence[str] | None = None, *, prob: float = 0.95) -> Figure:
        """Draw, for each scalar, the difference between the ECDF of its ranks and a uniform one, with the envelope.

        A line that leaves the envelope of probability ``prob`` anywhere is not uniform at the level 1 - ``prob``.

        Raises:
            ValueError: for a ``prob`` that is not between 0 and 1.
        """
        return ecdf_figure(self.scalars(var_names), envelope(self.simulations, self.draws), prob)

    # text -----------------------------------------------------------------------------------------------------------

    def _sentence(self) -> str:
        found = self.p_values()
        worst = min(found, key=found.__getitem__)
        figures = f"smallest of {len(found)} p-values {found[worst]:.2g}, at {worst}; together {self.p_value:.2g}"
        if self.is_uniform():
            return f"uniform: no sign that posteriors are wrong ({figures})"
        return f"not uniform: posteriors are wrong ({figures})"

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.statuses.items())
        where = "" if self.kind == "prior" else " at the data in hand"
        among = f"ranks among {self.draws} draws of {self.method}"
        said = f"{self._sentence()}. {self.simulations} simulations{where}, {among}"
        bad = self.statuses.get("unreliable", 0)
        share = f" {bad} of the fits were unreliable ({bad / self.simulations:.0%}), and are ranked too." if bad else ""
        asked = self.settings.get("simulations", self.simulations)
        finished = self.settings.get("finished", asked)
        cut = f" The run was interrupted after {finished} of {asked} simulations." if finished < asked else ""
        return f"{said}; verdicts: {counts}.{share}{cut}"

    __repr__ = __str__  # what a REPL shows

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>{self.summary().round(3).to_html()}"


@styled
def ecdf_figure(scalars: Mapping[str, np.ndarray], test: Envelope, prob: float) -> Figure:
    """Return a figure with a panel for each scalar, thirty at most: those with the smallest p-values."""
    p_values = {label: test.p_value(ranks) for label, ranks in scalars.items()}
    shown = list(scalars)
    if len(shown) > SHOWN:
        worst = sorted(shown, key=p_values.__getitem__)[:SHOWN]
        shown = [label for label in shown if label in worst]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = panels(len(shown), columns=columns, size=(WIDTH, 2.1 * rows + 0.3))
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


# whether ranks are uniform: the simultaneous envelope of their ECDF, coverage of intervals, symmetry ------------------

POINTS = 100  # at most, at which an ECDF is looked at
NULLS = 20_000  # samples of the null distributions that p-values come from: none is below 1 in so many
CHUNK = 2000
NOMINAL = (0.5, 0.8, 0.9, 0.95)


class Envelope:
    r"""The simultaneous distribution of the ECDF of N uniform ranks among L draws.

    At :math:`z_j`, the share of the L + 1 ranks below a bound, :math:`N \hat F(z_j)` is binomial. The statistic is the
    smallest of its two-sided tail probabilities over all j,

    .. math:: \gamma = \min_j 2 \min\{P(B_j \le N \hat F(z_j)),\ P(B_j \ge N \hat F(z_j))\}, \qquad
              B_j \sim \operatorname{Bin}(N, z_j),

    and its null distribution comes from uniform samples. Bounds are multiples of 1 / (L + 1), so that the binomials are
    exact for ranks, which are whole numbers.

    Reference: Säilynoja, Bürkner and Vehtari 2022, "Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison" (arXiv 2103.10522).
    """

    def __init__(self, simulations: int, draws: int) -> None:
        from scipy.special import bdtr

        self.simulations, self.draws = simulations, draws
        count = min(POINTS, draws + 1)
        self.bounds = np.unique(np.arange(1, count) * (draws + 1) // count)  # ranks below which are counted
        self.at = self.bounds / (draws + 1)
        counts = np.arange(simulations + 1)
        below = bdtr(counts[None], simulations, self.at[:, None])
        above = 1.0 - np.concatenate([np.zeros((len(self.at), 1)), below[:, :-1]], 1)
        self._tails = 2.0 * np.minimum(below, above)
        generator = np.random.default_rng(0)  # one seed, since the null distribution is the same for all models
        cells = np.diff(np.concatenate([[0.0], self.at, [1.0]]))
        drawn = (generator.multinomial(simulations, cells, size=CHUNK) for _ in range(NULLS // CHUNK))
        self._null = np.sort(np.concatenate([self._statistic(part.cumsum(1)[:, :-1]) for part in drawn]))

    def _statistic(self, counts: np.ndarray) -> np.ndarray:
        return self._tails[np.arange(len(self.at)), counts].min(-1)

    def counts(self, ranks: np.ndarray) -> np.ndarray:
        """Return how many of the ranks (N,) are below each bound."""
        return np.searchsorted(np.sort(ranks), self.bounds, side="left")

    def p_value(self, ranks: np.ndarray) -> float:
        """Return the p-value of uniformity of ranks (N,)."""
        smaller = np.searchsorted(self._null, self._statistic(self.counts(ranks)), side="right")
        return float((1 + smaller) / (1 + len(self._null)))

    def band(self, prob: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest ECDF at ``at`` that the envelope of this probability contains."""
        gamma = np.quantile(self._null, 1.0 - prob)
        inside = self._tails >= gamma
        low = inside.argmax(1)
        high = inside.shape[1] - 1 - inside[:, ::-1].argmax(1)
        return low / self.simulations, high / self.simulations


@lru_cache(maxsize=8)
def envelope(simulations: int, draws: int) -> Envelope:
    """Return the envelope, a known one if there is one."""
    return Envelope(simulations, draws)


def covered(ranks: np.ndarray, draws: int, prob: float) -> tuple[float, float]:
    """Return how often central intervals of this probability held the truth, and the binomial standard error of that.

    A bound between two ranks counts a truth with the lower one in part, so that the share is right for any L.
    """
    cut = 0.5 * (1.0 - prob) * (draws + 1)
    from_end = np.minimum(ranks, draws - ranks)
    share = float(np.clip(from_end + 1.0 - cut, 0.0, 1.0).mean())
    return share, float(np.sqrt(prob * (1.0 - prob) / len(ranks)))


def symmetry(ranks: np.ndarray, draws: int) -> float:
    r"""Return the p-value of symmetry of the ranks (N,) about their middle.

    The statistic is the largest distance between the ECDFs of p and of 1 - p. Under symmetry each p is as likely as
    1 - p, so that its null distribution comes from random flips, whatever the spread of the ranks is.

    Reference: Yao, Vehtari, Simpson and Gelman 2018, "Yes, but did it work?: Evaluating variational inference" (arXiv
    1802.02538), who compare p and 1 - p.
    """
    away = ranks - 0.5 * draws
    away = away[away != 0.0]
    if not len(away):
        return 1.0
    order = np.argsort(-np.abs(away), kind="stable")
    found = np.abs(np.sign(away[order]).cumsum()).max()
    null = _walks(len(away))
    return float((1 + len(null) - np.searchsorted(null, found)) / (1 + len(null)))


@lru_cache(maxsize=32)
def _walks(steps: int) -> np.ndarray:
    """Return how far random walks of so many steps get from where they began, in order."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(NULLS // CHUNK):
        flips = 2 * generator.integers(0, 2, size=(CHUNK, steps), dtype=np.int32) - 1
        found.append(np.abs(flips.cumsum(1)).max(1))
    return np.sort(np.concatenate(found))
