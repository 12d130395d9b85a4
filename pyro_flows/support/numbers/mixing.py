r"""How well chains mix: R-hat, nested R-hat and effective draws of all coordinates at once, without ArviZ.

The figures are those of ``arviz_stats``, to rounding. Its functions take one coordinate after the other: for a thousand
coordinates, that took longer than the chains themselves. Here ranks, variances and spectra of many coordinates are
computed together. The autocovariance is averaged over chains before it is transformed back.

References: Vehtari et al. 2021 (arXiv 1903.08008); Margossian et al. 2024, "Nested R-hat" (arXiv 2110.13017); Geyer
1992, "Practical Markov chain Monte Carlo".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LEAST_DRAWS = 4  # of a chain: halves of fewer have no variance
TOGETHER = 2**19  # numbers that are looked at together
SHORT = 256  # draws of half a chain


def r_hat(draws: Tensor) -> Tensor:
    """Return rank-normalized split R-hat (D,) of draws (C, N, D); it sees differences of location and of scale."""
    return _of_parts(draws, lambda part: _r_hat(*_scores(part)))


def nested_r_hat(draws: Tensor, superchain: Tensor) -> Tensor:
    """Return nested R-hat (D,) of draws (C, N, D), with the number of the superchain of each chain (C,)."""
    return _of_parts(draws, lambda part: _nested(*_scores(part), superchain))


def chain_diagnostics(draws: Tensor, superchain: Tensor | None = None) -> dict[str, Tensor]:
    """Return R-hat, nested R-hat and effective draws in bulk and tails, each (D,), of draws (C, N, D).

    R-hat of a single chain compares its halves. Without the number of the ``superchain`` of each chain (C,), each of
    equally many chains, there is no nested R-hat. NaN stands for a coordinate that is not finite everywhere, and for
    too few draws. Cost: two sorts of all draws, and a Fourier transform of three functions of them.
    """
    names = ("r_hat", "ess_bulk", "ess_tail", *(() if superchain is None else ("nested_r_hat",)))

    def figures(part: Tensor) -> Tensor:
        bulk, folded = _scores(part)
        compared = (bulk, folded) if part.shape[1] > 1 else _scores(_halved(part))
        levels = torch.from_numpy(np.quantile(part.flatten(1).numpy(), (0.05, 0.95), axis=1))
        low, high = (_effective(_halved((part <= level[:, None, None]).to(part))) for level in levels)
        one = {"r_hat": _r_hat(*compared), "ess_bulk": _effective(bulk), "ess_tail": torch.minimum(low, high)}
        if superchain is not None:
            one["nested_r_hat"] = _nested(bulk, folded, superchain)
        usable = torch.isfinite(part).flatten(1).all(1)
        return torch.where(usable, torch.stack([one[name] for name in names]), torch.nan).mT

    return dict(zip(names, _of_parts(draws, figures, len(names)).unbind(1), strict=True))


def effective(draws: Tensor) -> Tensor:
    """Return the effective numbers (D,) of draws (C, N, D) for their means; NaN for too few draws."""
    return _of_parts(draws, lambda part: _effective(_halved(part)))


def sd_errors(draws: Tensor) -> Tensor:
    """Return the standard errors of the sds of draws (C, N, D), each (D,) as a part of the sd; NaN for too few draws.

    By the delta method: half of the standard error of the variance, as a part of it.
    """

    def error(part: Tensor) -> Tensor:
        square = _away_squared(part)
        number, flat = _effective(_halved(square)), square.flatten(1)
        return 0.5 * flat.std(1) / (flat.mean(1) * number.sqrt())

    return _of_parts(draws, error)


def kurtoses(draws: Tensor) -> Tensor:
    """Return the kurtoses (D,) of draws (C, N, D): fourth moments about the mean, of unit sd; 3 for a normal."""
    squares = [_away_squared(part).flatten(1) for part in _parts(draws)]
    return torch.cat([square.square().mean(1) / square.mean(1).square() for square in squares])


def _away_squared(part: Tensor) -> Tensor:
    """Return squared distances of draws (D, C, N) from their means."""
    return (part - part.mean((1, 2), keepdim=True)).square()


def _of_parts(draws: Tensor, function: Callable[[Tensor], Tensor], *many: int) -> Tensor:
    """Return a number (D,) of each coordinate of draws (C, N, D), or so ``many``; NaN for too few draws.

    They are found for some coordinates at a time.
    """
    if draws.shape[1] < LEAST_DRAWS:
        return torch.full((draws.shape[2], *many), torch.nan, dtype=torch.float64)
    return torch.cat([function(part) for part in _parts(draws)])


def _parts(draws: Tensor) -> list[Tensor]:
    """Return draws (C, N, D) as (D, C, N), some coordinates at a time."""
    by_coordinate = draws.detach().double().cpu().permute(2, 0, 1)
    return list(by_coordinate.split(max(1, TOGETHER // max(draws.shape[0] * draws.shape[1], 1))))


def _halved(draws: Tensor) -> Tensor:
    """Cut each chain of (D, C, N) into halves, the first ones of all chains first; a middle draw is left out."""
    half = draws.shape[2] // 2
    return torch.cat([draws[..., :half], draws[..., draws.shape[2] - half :]], 1)


def _scores(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return normal scores (D, 2 C, N / 2) of the ranks of half chains, and of their distances from the median."""
    halves = _halved(draws)
    flat = halves.flatten(1)
    bulk, middle = _by_rank(flat)
    folded = _by_rank((flat - middle[:, None]).abs())[0]
    usable = torch.isfinite(flat).all(1)[:, None]
    both = [torch.where(usable, part, torch.nan).reshape(halves.shape) for part in (bulk, folded)]
    return both[0], both[1]


def _by_rank(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return normal scores (D, S) of the ranks of values (D, S), the same for equal ones, and medians (D,).

    Numpy sorts four times as fast as torch does.
    """
    values, size = flat.numpy(), flat.shape[1]
    order = np.argsort(values, 1)
    ordered = np.take_along_axis(values, order, 1)
    count = np.arange(size, dtype=np.int32)
    new = np.ones(values.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    begin = np.maximum.accumulate(np.where(new, count, 0), 1)
    end = np.full_like(begin, size - 1)
    end[:, :-1] = np.where(new[:, 1:], count[:-1], size)
    end = np.minimum.accumulate(end[:, ::-1], 1)[:, ::-1]
    twice = torch.arange(2 * size - 1, dtype=flat.dtype)  # the sum of both
    table = torch.special.ndtri((0.5 * twice + 1.0 - 0.375) / (size + 0.25)).numpy()
    found = np.empty_like(values)
    np.put_along_axis(found, order, table[begin + end], 1)
    return torch.from_numpy(found), torch.from_numpy(0.5 * (ordered[:, (size - 1) // 2] + ordered[:, size // 2]))


# R-hat ----------------------------------------------------------------------------------------------------------------


def _r_hat(*scores: Tensor) -> Tensor:
    found = []
    for part in scores:
        draws = part.shape[2]
        between = draws * part.mean(2).var(1)
        found.append(((between / part.var(2).mean(1) + draws - 1) / draws).sqrt())
    return torch.maximum(*found)


def _nested(bulk: Tensor, folded: Tensor, superchain: Tensor) -> Tensor:
    """Return the larger one of both R-hats of superchains (D,)."""
    ids = torch.cat([superchain.cpu(), superchain.cpu()])
    groups = torch.nn.functional.one_hot(torch.unique(ids, return_inverse=True)[1]).to(bulk)
    counts = groups.sum(0)
    if bool((counts != counts[0]).any()):
        raise ValueError(f"superchain: expected as many chains in each, got {counts.long().tolist()}.")
    found = []
    for part in (bulk, folded):
        mean, within = part.mean(2), part.var(2)
        center = mean @ groups / counts
        spread = (mean - center @ groups.mT).square() @ groups / (counts - 1.0).clamp_min(1.0)
        inside = (within @ groups / counts + spread).mean(1)
        found.append((1.0 + center.var(1) / inside).sqrt())
    return torch.maximum(*found)


# effective draws ------------------------------------------------------------------------------------------------------


def _effective(draws: Tensor) -> Tensor:
    """Return the effective number (D,) of draws (D, C, N) for their mean, by Geyer's initial monotone sequence."""
    chains, count = draws.shape[1:]
    centers = draws.mean(2, keepdim=True)
    covariance = _autocovariance(draws - centers)
    mean_var = covariance[:, :1] * count / (count - 1.0)
    total = mean_var * (count - 1.0) / count
    if chains > 1:
        total = total + centers[..., 0].var(1)[:, None]
    rho = 1.0 - (mean_var - covariance) / total
    rho[:, 0] = 1.0
    kept, last = _initial_positive(rho)
    tau = _monotone(kept, last)
    size = float(chains * count)
    found = size / tau.clamp_min(1.0 / math.log10(size))
    flat = draws.flatten(1)
    found = torch.where(rho.isnan().any(1), torch.nan, found)
    return torch.where(flat.amax(1) - flat.amin(1) < 1e-15, size, found)  # all draws are the same


def _autocovariance(away: Tensor) -> Tensor:
    """Return autocovariances (D, N), in the mean over chains, of draws (D, C, N) around the means of their chains.

    Of short chains, all products of two draws are summed by lag: this takes a tenth of the time of Fourier transforms.
    """
    chains, count = away.shape[1:]
    if count > SHORT:
        length = 1 << (2 * count - 1).bit_length()
        power = torch.fft.rfft(away, n=length).abs().square().mean(1)
        return torch.fft.irfft(power, n=length)[:, :count] / count
    found = []
    for part in away.split(max(1, TOGETHER // (2 * count * count))):
        products = torch.bmm(part.mT, part.flip(2))  # (D, N, N), the lag is that of a diagonal
        slanted = torch.nn.functional.pad(products, (0, count)).flatten(1)[:, : count * (2 * count - 1)]
        found.append(slanted.unflatten(1, (count, 2 * count - 1)).sum(1)[:, :count].flip(1))
    return torch.cat(found) / (chains * count)


def _initial_positive(rho: Tensor) -> tuple[Tensor, Tensor]:
    """Return autocorrelations (D, N) up to where the sum of a pair is negative, zeros from there, and the last lag."""
    count = rho.shape[1]
    kept = torch.zeros_like(rho)
    kept[:, :2] = rho[:, :2]
    even, odd = rho[:, 0].clone(), rho[:, 1].clone()
    time = torch.ones(len(rho), dtype=torch.long)
    for lag in range(1, count - 3, 2):
        active = (time == lag) & (even + odd > 0.0)
        if not bool(active.any()):
            break
        even, odd = torch.where(active, rho[:, lag + 1], even), torch.where(active, rho[:, lag + 2], odd)
        taken = (active & (even + odd >= 0.0))[:, None]
        kept[:, lag + 1 : lag + 3] = torch.where(taken, rho[:, lag + 1 : lag + 3], kept[:, lag + 1 : lag + 3])
        time = torch.where(active, lag + 2, time)
    last = time - 2
    place = (last + 1)[:, None]
    kept.scatter_(1, place, torch.where((even > 0.0)[:, None], even[:, None], kept.gather(1, place)))
    return kept, last


def _monotone(rho: Tensor, last: Tensor) -> Tensor:
    """Return the autocorrelation time (D,), of pairs whose sums do not rise."""
    for lag in range(1, int(last.max()) - 1, 2):
        before = rho[:, lag - 1] + rho[:, lag]
        rises = (lag <= last - 2) & (rho[:, lag + 1] + rho[:, lag + 2] > before)
        rho[:, lag + 1 : lag + 3] = torch.where(rises[:, None], 0.5 * before[:, None], rho[:, lag + 1 : lag + 3])
    lags = torch.arange(rho.shape[1])
    weights = torch.where(lags <= last[:, None], 2.0, 0.0) + torch.where(lags == last[:, None] + 1, 1.0, 0.0)
    return -1.0 + (weights * rho).sum(1)
