"""What a fit of a case is worth: errors against exact draws, and whether its verdict was right about them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from benchmarks.zoo.case import EXACT_DRAWS, Array, Case

MEAN, SD, MODE = 0.25, math.log(1.25), 0.1  # errors that a right fit may have: sds, log ratio of sds, mass
STRICT_MEAN, STRICT_SD, STRICT_MODE = 0.1, math.log(1.1), 0.05
NOISE = 3.0  # standard errors of both samples that are allowed for on top, for one figure; more for many
LOOSE_SD = 0.035  # relative standard error of a sample's sd above which quantiles are judged in its stead
QUANTILES = (0.05, 0.5, 0.95)
OUTCOMES = ("right", "lie", "alarm", "honest", "crash", "late")


@dataclass(frozen=True)
class Errors:
    """The worst errors of one sample. ``ratio`` is the worst in units of what a right fit may have (``strict``: less).

    ``mean`` and ``quantile`` are in exact sds, ``sd`` is an absolute log ratio, ``mode`` an absolute error of a mass
    and ``mode_share`` the error relative to the mass; ``where`` names what ``ratio`` is about. NaN where nothing was
    judged.
    """

    mean: float = math.nan
    sd: float = math.nan
    quantile: float = math.nan
    mode: float = math.nan
    mode_share: float = math.nan
    ratio: float = math.inf
    strict: float = math.inf
    where: str = ""


@dataclass(frozen=True)
class _Error:
    """One error: its kind, size, noise, and what is allowed."""

    kind: str
    value: float
    noise: float
    limit: float
    strict_limit: float
    where: str

    def ratio(self, limit: float, errors: float) -> float:
        """Return the error in units of a limit and of so many standard errors."""
        value = self.value / (limit + errors * self.noise)
        return math.inf if math.isnan(value) else value


def standard_errors(figures: int) -> float:
    """Return how many standard errors exact draws exceed as rarely in one of so many figures as they exceed 3 in one.

    A funnel of 350 leaves has 1050 quantiles. With 3 for each, exact draws were called wrong in 3 of 40 samples.
    """
    return float(norm.isf(norm.sf(NOISE) / max(1, figures)))


def compare(case: Case, samples: Mapping[str, Any], effective: float) -> Errors:
    """Return the worst errors of ``samples`` {site: (n, *shape)} that are worth ``effective`` independent draws."""
    mine = {name: np.asarray(samples[name], dtype=np.float64) for name in case.exact if name in samples}
    found: list[_Error] = []
    for name, exact in case.exact.items():
        if name not in mine or mine[name].shape[1:] != exact.shape[1:] or not np.isfinite(mine[name]).all():
            return Errors(where=f"{name} is not there, or not finite")
        flat, reference = (values.reshape(len(values), -1) for values in (mine[name], exact))
        if name in case.periods:
            flat, reference = _unwrapped(flat, reference, case.periods[name])
        found += _site_errors(name, flat, reference, effective, name in case.heavy)
    if case.regions is not None:
        found += _mode_errors(case.masses(mine), case.masses(case.exact), effective)
    if not found:
        return Errors(where="nothing to judge")
    errors = standard_errors(len(found))
    worst = max(found, key=lambda error: error.ratio(error.limit, errors))
    tops = {kind: max((e.value for e in found if e.kind == kind), default=math.nan) for kind in _KINDS}
    return Errors(
        **tops,
        ratio=worst.ratio(worst.limit, errors),
        strict=max(error.ratio(error.strict_limit, errors) for error in found),
        where=f"{worst.kind} of {worst.where}",
    )


_KINDS = ("mean", "sd", "quantile", "mode", "mode_share")


def _unwrapped(flat: Array, reference: Array, period: float) -> tuple[Array, Array]:
    """Move angles to within half a turn of their exact mean direction."""
    turn = 2.0 * np.pi / period
    centre = np.angle(np.exp(1j * turn * reference).mean(0)) / turn
    first, second = ((values - centre + period / 2) % period - period / 2 for values in (flat, reference))
    return first, second


def _site_errors(name: str, flat: Array, reference: Array, effective: float, heavy: bool) -> Iterator[_Error]:
    both = 1.0 / effective + 1.0 / EXACT_DRAWS
    mean, sd = reference.mean(0), reference.std(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        kurtosis = (((reference - mean) / sd) ** 4).mean(0)
        sd_noise = 0.5 * np.sqrt(np.maximum(kurtosis - 1.0, 0.0))
        mean_error = np.abs(flat.mean(0) - mean) / sd
        sd_error = np.abs(np.log(flat.std(0) / sd))
    for i in range(flat.shape[1]):
        where = f"{name}[{i}]"
        if sd[i] <= 1e-12 * abs(mean[i]):  # an entry that is known
            continue
        if heavy or not sd_noise[i] * math.sqrt(1.0 / 4000) <= LOOSE_SD:
            yield from _quantile_errors(where, flat[:, i], reference[:, i], both)
            continue
        yield _Error("mean", float(mean_error[i]), math.sqrt(both), MEAN, STRICT_MEAN, where)
        yield _Error("sd", float(sd_error[i]), float(sd_noise[i]) * math.sqrt(both), SD, STRICT_SD, where)


def _quantile_errors(where: str, mine: Array, exact: Array, both: float) -> Iterator[_Error]:
    low, high = np.quantile(exact, (0.25, 0.75))
    sd = max(float(high - low) / 1.349, 1e-300)
    for p in QUANTILES:
        noise = math.sqrt(p * (1.0 - p) * both)
        step = min(max(noise, 0.005), 0.04)
        below, at, above = np.quantile(exact, (p - step, p, p + step))
        slope = float(above - below) / (2.0 * step) / sd  # sds for each unit of probability
        error = abs(float(np.quantile(mine, p) - at)) / sd
        yield _Error("quantile", error, noise * slope, MEAN, STRICT_MEAN, f"{where} at {100 * p:.0f} %")


def _mode_errors(mine: Array, exact: Array, effective: float) -> Iterator[_Error]:
    for number, (share, mass) in enumerate(zip(mine, exact, strict=True)):
        noise = math.sqrt(mass * (1.0 - mass) * (1.0 / effective + 1.0 / EXACT_DRAWS))
        error = abs(float(share - mass))
        yield _Error("mode", error, noise, MODE, STRICT_MODE, f"region {number}")
        if mass > 0.02:
            yield _Error("mode_share", error / float(mass), 0.0, math.inf, math.inf, f"region {number}")


def outcome(case: Case, status: str, ratio: float, *, improper: bool = False) -> str:
    """Return what a fit with this verdict and this worst error is: right, lie, alarm or honest.

    Impossible data are right if they are called unreliable, and improper posteriors if they are called so too. A wrong
    fit is a lie unless it is called unreliable; a proper posterior that is called improper is an alarm.
    """
    unreliable = status == "unreliable"
    if case.impossible:
        return "right" if unreliable else "lie"
    if case.improper:
        return "lie" if not unreliable else "right" if improper else "honest"
    if improper:
        return "alarm"
    if ratio <= 1.0:
        return "alarm" if unreliable else "right"
    return "honest" if unreliable else "lie"


def outcome_of_error(case: Case, error: BaseException) -> str:
    """Return what an exception is: a ValueError is right for impossible data and honest for others; else a crash."""
    if isinstance(error, ValueError):
        return "right" if case.impossible else "honest"
    return "crash"


def figures(case: Case, posterior: Any) -> dict[str, Any]:
    """Return the columns of the results' file that describe a fit: verdict, errors, outcome."""
    verdict = posterior.verdict
    row: dict[str, Any] = {
        "status": verdict.status,
        "k_hat": verdict.k_hat,
        "ess_ratio": verdict.ess_ratio,
        "dim": posterior.z.shape[1],
        "rounds": " > ".join(str(stage["stage"]) for stage in posterior.history if stage["stage"] != "race"),
        "reasons": "; ".join(verdict.reasons)[:600],
    }
    improper = any("improper" in reason for reason in verdict.reasons)
    if case.draw is None:
        return {**row, "outcome": outcome(case, verdict.status, math.inf, improper=improper)}
    worth = len(posterior._used) if math.isnan(posterior.effective) else min(posterior.effective, len(posterior._used))
    samples = {name: values.detach().cpu().numpy() for name, values in posterior.samples.items()}
    found = compare(case, samples, max(float(worth), 100.0))
    row |= {f"{kind}_error": _number(getattr(found, kind)) for kind in _KINDS}
    row |= {"ratio": found.ratio, "strict_ratio": found.strict, "worst": found.where}
    if case.log_evidence is not None:
        row["evidence_error"] = abs(posterior.log_evidence - case.log_evidence)
    return {**row, "outcome": outcome(case, verdict.status, found.ratio, improper=improper)}


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else value
