"""When to stop: functionals of the guide on common random numbers, watched over windows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_flows.support.thresholds import EVIDENCE_GAP_NEGLIGIBLE, R_HAT_OF_SHORT_CHAINS

WINDOW = 10  # checks


def split_r_hat(series: Tensor) -> Tensor:
    r"""Split R-hat of each column of ``series`` (T, F): its halves as two chains, :math:`\sqrt{\hat V / W}`.

    Near 1 for a stationary series; a trend shows as a value well above. Reference: Gelman et al., *BDA3*, 11.4.

    >>> split_r_hat(torch.tensor([[0.0], [1.0], [0.0], [1.0]])).item() < 1.0
    True
    """
    half = len(series) // 2
    chains = torch.stack([series[:half], series[-half:]])
    within = chains.var(1).mean(0)
    between = half * chains.mean(1).var(0)
    pooled = (half - 1) / half * within + between / half
    tiny = torch.finfo(series.dtype).tiny
    return torch.where(
        within > tiny, (pooled / within.clamp_min(tiny)).sqrt(), torch.where(between > tiny, math.inf, 1.0)
    )


@dataclass
class Monitor:
    """Collects functionals of the guide and says when they have become stationary.

    The functionals are the ELBO (nats, without the lowest 2 % of the terms), and the mean and log sd of each coordinate
    in units of its present sd, all on the same noise each time, so that they move only when the guide does. The flow's
    weights are no functionals: they are not identified.
    """

    elbos: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # log evidence by the weights of the same draws, less their ELBO
    moments: list[Tensor] = field(default_factory=list)

    def add(self, z: Tensor, log_weights: Tensor) -> float:
        """Add one check: images (S, D) of the common noise and their log weights; return the ELBO."""
        terms = torch.nan_to_num(log_weights.double(), nan=-torch.inf).sort().values
        self.elbos.append(float(terms[int(0.02 * len(terms)) :].mean()))
        self.gaps.append(float(torch.logsumexp(terms, 0) - math.log(len(terms)) - terms.mean()))
        z = z.double()
        self.moments.append(torch.cat([z.mean(0), z.std(0).clamp_min(1e-300).log()]))
        return self.elbos[-1]

    @property
    def restless(self) -> bool:
        """Whether a mean or an sd moved by more than half an sd between the halves of the last window."""
        if len(self.moments) < WINDOW:
            return False
        return not float(_drift(self._series())[1:].max()) <= 0.5

    def promises(self, gap: float) -> bool:
        """Whether a larger sample is worth its cost: the weights leave a ``gap`` at most, and the ELBO hardly rises.

        The last two checks are compared with the two before them.
        """
        if len(self.elbos) < 4 or not self.gaps[-1] <= gap:
            return False
        before, after = self.elbos[-4:-2], self.elbos[-2:]
        return 0.5 * (sum(after) - sum(before)) <= max(EVIDENCE_GAP_NEGLIGIBLE, 0.25 * gap)

    def level(self) -> bool:
        """Whether the ELBO hardly rises any more: what is left may be the noise of steps of this size.

        The last three checks are compared with the three before them.
        """
        if len(self.elbos) < 6:
            return False
        rise = sum(self.elbos[-3:]) - sum(self.elbos[-6:-3])
        return rise / 3 <= 2.0 * EVIDENCE_GAP_NEGLIGIBLE

    def _series(self) -> Tensor:
        """The last window (T, 1 + 2 D): ELBO, means in present sds, log sds; relative to the last check."""
        elbos = torch.tensor(self.elbos[-WINDOW:], dtype=torch.float64)[:, None]
        moments = torch.stack(self.moments[-WINDOW:])
        dim = moments.shape[1] // 2
        scale = torch.cat([moments[-1, dim:].exp(), torch.ones(dim, dtype=moments.dtype, device=moments.device)])
        return torch.cat([elbos - elbos[-1], ((moments - moments[-1]) / scale).cpu()], dim=1)

    def stationary(self) -> tuple[bool, str]:
        """Whether the last window stands still, and the sentence that says so.

        A functional stands still if its two half-window means differ by less than it matters (0.02 nats of ELBO, 0.05
        posterior sds, 5 % of an sd), or by up to twenty times that while its split R-hat is at most 1.05. A slow climb
        is small in any window, so the ELBO's is also extrapolated: were the gap to shrink as one over the number of
        steps, what is left to be gained must be 0.02 nats at most, give or take its standard error.
        """
        if len(self.elbos) < WINDOW:
            return False, f"{len(self.elbos)} of {WINDOW} checks"
        series = self._series()
        if not bool(torch.isfinite(series[:, 0]).all()):
            return False, "the ELBO is not finite"
        drift = _drift(series)
        relative = torch.cat([drift[:1] / EVIDENCE_GAP_NEGLIGIBLE, drift[1:] / 0.05])
        moving = ~((relative < 1.0) | ((split_r_hat(series) <= R_HAT_OF_SHORT_CHAINS) & (relative < 20.0)))
        text = f"ELBO drift {float(drift[0]):.3f} nats, worst moment drift {float(drift[1:].max()):.3f} sd"
        return not bool(moving.any()) and self._left(series[:, 0]) <= EVIDENCE_GAP_NEGLIGIBLE, text

    def _left(self, window: Tensor) -> float:
        """What further steps would gain if the gap went as one over their number, less one standard error."""
        halves = window.reshape(2, -1)
        rise = halves[1].mean() - halves[0].mean()
        error = (halves.var(1).sum() / halves.shape[1]).sqrt()
        return float(rise - error) * len(self.elbos) / halves.shape[1]


def _drift(series: Tensor) -> Tensor:
    """The distance between the means of the two halves of a window (T, F), by functional."""
    return (series[: WINDOW // 2].mean(0) - series[-(WINDOW // 2) :].mean(0)).abs()
