r"""The posterior of ``lme4/InstEval`` without chains: a check of the long run of NUTS by sparse matrices.

    python -m benchmarks.crossed.exact --draws 1000

Ratings are normal, so that with :math:`H = Z^\top Z / \sigma^2 + D^{-1}` and :math:`g = Z^\top r / \sigma^2`

.. math:: \log p(y \mid \theta) = -\tfrac n2 \log 2 \pi \sigma^2 - \frac{r^\top r}{2 \sigma^2}
          + \tfrac12 g^\top H^{-1} g - \tfrac12 \log |H| - \tfrac12 \log |D|, \qquad r = y - \mu - \beta x,

and effects have means :math:`H^{-1} g` and covariances :math:`H^{-1}`, given :math:`\theta`. Z has the rows' students,
lecturers and departments, and students are eliminated first. Draws of a Student t distribution with the moments of the
long run are weighted by :math:`p(\theta) p(y \mid \theta)`, in coordinates :math:`\mu, \beta, \log \tau, \log \sigma`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import linalg, sparse, special

from benchmarks.crossed.reference import EFFECTS, REFERENCE, columns

Array = np.ndarray[Any, np.dtype[np.float64]]
DF, MIXED = 7.0, 200  # of the proposal; draws whose conditional moments of effects are averaged


class Ratings:
    """The marginal density of the six latents outside of plates."""

    def __init__(self, given: Mapping[str, Array]) -> None:
        rating, service = given["rating"], given["service"]
        self.counts = [int(given[name].max()) + 1 for name in EFFECTS]
        ones, rows = np.ones(len(rating)), np.arange(len(rating))
        parts = [
            sparse.csr_matrix((ones, (rows, given[name])), (len(rating), n))
            for name, n in zip(EFFECTS, self.counts, strict=True)
        ]
        first, rest = parts[0], sparse.hstack(parts[1:]).tocsr()
        self.of_first = np.asarray(first.sum(0)).ravel()
        self.across, self.of_rest = (first.T @ rest).tocsr(), (rest.T @ rest).toarray()
        self.fixed = np.stack([rating, ones, service], 1)
        self.sums = np.concatenate([first.T @ self.fixed, rest.T @ self.fixed])
        self.products = self.fixed.T @ self.fixed

    def __call__(self, theta: Array, *, moments: bool = False) -> tuple[float, Array, Array]:
        """Return the log density at ``theta`` (6,), and mean and variance (n,) of effects; empty unless asked for."""
        tau, sigma = np.exp(theta[2:5]), float(np.exp(theta[5]))
        weights = np.array([1.0, -theta[0], -theta[1]])
        g = self.sums @ weights / sigma**2
        prior = np.repeat(tau**-2.0, self.counts)
        head = self.counts[0]
        own = self.of_first / sigma**2 + prior[:head]
        links = sparse.diags(1.0 / own) @ self.across / sigma**2
        left = self.of_rest / sigma**2 + np.diag(prior[head:]) - ((self.across.T / sigma**2) @ links).toarray()
        root = linalg.cholesky(left, lower=True)
        pull = g[head:] - links.T @ g[:head]
        tail = linalg.cho_solve((root, True), pull)
        mean = np.concatenate([g[:head] / own - links @ tail, tail])
        volume = np.log(own).sum() + 2.0 * np.log(np.diag(root)).sum() - np.log(prior).sum()
        count = self.products[1, 1]
        value = -0.5 * count * np.log(2.0 * np.pi * sigma**2) - 0.5 * weights @ self.products @ weights / sigma**2
        value += 0.5 * g @ mean - 0.5 * volume
        value -= 0.5 * ((theta[0] / 5.0) ** 2 + theta[1] ** 2 + (tau**2).sum() + (sigma / 2.0) ** 2)
        value += theta[2:].sum()  # of the coordinates
        if not moments:
            return float(value), np.empty(0), np.empty(0)
        inverse = linalg.cho_solve((root, True), np.eye(len(root)))
        spread = np.asarray(links.multiply(links @ inverse).sum(1)).ravel()
        return float(value), mean, np.concatenate([1.0 / own + spread, np.diag(inverse)])


def weighted(density: Ratings, center: Array, scale: Array, draws: int, seed: int = 0) -> dict[str, Any]:
    """Return means and sds of latents outside of plates and of effects, by importance sampling, and what it took."""
    began, rng = time.process_time(), np.random.default_rng(seed)
    root = np.linalg.cholesky(scale)
    noise = rng.normal(size=(draws, 6)) / np.sqrt(rng.chisquare(DF, (draws, 1)) / DF)
    theta = center + noise @ root.T
    log_q = -0.5 * (DF + 6.0) * np.log1p((noise**2).sum(1) / DF)
    log_weights = np.array([density(row)[0] for row in theta]) - log_q
    weights = special.softmax(log_weights)
    values = np.concatenate([theta[:, :2], np.exp(theta[:, 2:])], 1)
    mean = weights @ values
    picked = rng.choice(draws, MIXED, p=weights)
    found = [density(row, moments=True)[1:] for row in theta[picked]]
    means, variances = (np.stack(parts) for parts in zip(*found, strict=True))
    return {
        "mean": mean,
        "sd": np.sqrt(weights @ (values - mean) ** 2),
        "effects": means.mean(0),
        "effect_sds": np.sqrt(variances.mean(0) + means.var(0)),
        "ess": 1.0 / (weights**2).sum(),
        "cpu_seconds": time.process_time() - began,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossed.exact",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args(arguments)
    long = json.loads(REFERENCE.read_text(encoding="utf-8"))
    center, scale = (np.array(long["unconstrained"][what]) for what in ("mean", "covariance"))
    found = weighted(Ratings(columns()), center, scale, options.draws)
    sites = long["sites"]
    outside, effects = ("mu", "beta", "tau", "sigma"), EFFECTS
    for what, names, mean, sd in (("globals", outside, "mean", "sd"), ("effects", effects, "effects", "effect_sds")):
        of_long = {part: np.concatenate([np.ravel(sites[name][part]) for name in names]) for part in ("mean", "sd")}
        off = np.abs(found[mean] - of_long["mean"]) / of_long["sd"]
        ratio = np.abs(np.log(found[sd] / of_long["sd"]))
        print(
            f"{what}: means {np.median(off):.3f}, most {off.max():.3f}; sds {np.median(ratio):.3f}, {ratio.max():.3f}"
        )
    print(f"effective draws {found['ess']:.0f} of {options.draws}, {found['cpu_seconds']:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
