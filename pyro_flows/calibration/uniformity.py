"""Whether ranks are uniform: the simultaneous envelope of their ECDF, coverage of intervals, symmetry."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

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


def covered(ranks: np.ndarray, draws: int, prob: float) -> tuple[float, float, float]:
    """Return how often central intervals of about this probability held the truth, how often they ought to, and the
    binomial standard error of that share.

    An interval leaves out equally many ranks at both ends, so its exact probability is a multiple of 2 / (L + 1) off.
    """
    cut = round(0.5 * (1.0 - prob) * (draws + 1))
    exact = 1.0 - 2.0 * cut / (draws + 1)
    share = float(((ranks >= cut) & (ranks <= draws - cut)).mean())
    return share, exact, float(np.sqrt(exact * (1.0 - exact) / len(ranks)))


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
