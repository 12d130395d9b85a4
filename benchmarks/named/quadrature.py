"""The exact posterior of mean, persistence and scale of two stochastic volatilities, by quadrature.

    python -m benchmarks.named.quadrature
    python -m benchmarks.named.quadrature larger

Given these three, the log variances are a Markov chain. Its states are integrated out day after day on a fine grid,
where sums of smooth functions are nearly exact. The three lie on a grid too. It takes minutes, so ``gym.py`` has the
moments of its mean as numbers. ``larger`` is that of ``benchmarks/larger``.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from benchmarks.larger.models import stochastic_volatility_data
from benchmarks.named.gym import volatility_data

Array = NDArray[np.float64]


def log_likelihood(y: Array, mean: Array, logit: float, scale: float, low: float, high: float) -> Array:
    """Return log p(y) for each of several means (M,); log variances lie between ``low`` and ``high``."""
    step = min(0.8 * scale, 0.2)
    h = np.arange(low, high, step)
    seen = np.exp(-0.5 * (h + y[:, None] ** 2 * np.exp(-h)) - 0.5 * np.log(2.0 * np.pi))
    persistence, rest = np.tanh(0.5 * logit), 2.0 / (1.0 + np.exp(logit))  # their sum is one
    wide = scale / np.sqrt(rest * (1.0 + persistence))
    now = np.exp(-0.5 * ((h - mean[:, None]) / wide) ** 2) * (step / wide / np.sqrt(2.0 * np.pi)) * seen[0]
    room = 2 ** int(np.ceil(np.log2(len(h) + 2 * np.abs(rest * mean).max() / step + 64)))
    margin = (room - len(h)) // 2
    places = low + step * (np.arange(room) - margin)
    move = np.exp(-0.5 * ((places[:, None] - persistence * h) / scale) ** 2) * (step / scale / np.sqrt(2.0 * np.pi))
    shift = np.exp(-2j * np.pi * np.fft.rfftfreq(room, step) * rest * mean[:, None])  # by (1 - persistence) mean
    found = np.zeros(len(mean))
    for today in seen[1:]:
        moved = np.fft.irfft(np.fft.rfft(now @ move.T) * shift, room)[:, margin : margin + len(h)]
        now = np.maximum(moved, 0.0) * today
        most = np.maximum(now.max(1, keepdims=True), 1e-300)
        now /= most
        found += np.log(most[:, 0])
    return found + np.log(now.sum(1) + 1e-300)


def main(which: str = "named", coarse: float = 1.5) -> None:
    """Print moments of the model of ``gym.py`` or of ``benchmarks/larger``; a smaller ``coarse`` makes a finer grid."""
    named = which == "named"
    y = (volatility_data() if named else stochastic_volatility_data(100))[0].double().numpy()
    centre, spread, wide = (8.0, 1.5, 2.0) if named else (-1.0, 0.5, 1.0)  # the latter: of the scale's half-Cauchy
    place = np.arange(-4.2, 4.21, 0.06 * coarse)
    mean, weight = centre + spread * np.sinh(place), np.cosh(place)
    logits, logs = np.arange(-0.5, 14.01, 0.25 * coarse), np.arange(-2.6, 2.0, 0.16 * coarse)
    of_mean = -np.log1p((mean / 5.0) ** 2) if named else -0.5 * (mean / 5.0) ** 2
    of_logit = -20.0 * np.log1p(np.exp(-logits)) - 1.5 * np.log1p(np.exp(logits))  # Beta(20, 1.5)
    of_log = logs - np.log1p((np.exp(logs) / wide) ** 2)
    ends = centre - 11.0, np.log(y**2).max() + 9.0
    log_p = np.array([[log_likelihood(y, mean, at, np.exp(log), *ends) for log in logs] for at in logits])
    log_p += of_logit[:, None, None] + of_log[:, None] + of_mean
    p = np.exp(log_p - log_p.max()) * weight
    p /= p.sum()
    for name, values, kept in (
        ("persistence", np.tanh(0.5 * logits), p.sum((1, 2))),
        ("scale", np.exp(logs), p.sum((0, 2))),
        ("mean", mean, p.sum((0, 1))),
    ):
        middle = kept @ values
        sd = np.sqrt(kept @ (values - middle) ** 2)
        print(f"{name}: mean {middle:.4f}, sd {sd:.4f}, kurtosis {kept @ (values - middle) ** 4 / sd**4:.1f}")


if __name__ == "__main__":
    main("larger" if "larger" in sys.argv else "named")
