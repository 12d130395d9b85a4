"""What rows of fits say: which are right, how often, and the worst seed of each posterior."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.fingerprints import akin
from benchmarks.posteriors.models import NAMES
from benchmarks.records import Row

MEAN = 0.1  # a right fit: no mean is off by more, in reference standard deviations,
SD = math.log(1.1)  # and no log standard deviation by more
WRONG_MEAN = 0.25  # a wrong fit: some mean is off by more,
WRONG_SD = math.log(1.25)  # or some log standard deviation
SMALL_K = 0.7
LARGE_ESS = 0.1
SMALL_GAPS = (0.05, 0.1)


def right(row: Row, which: str) -> bool:
    """Whether ``which`` draws (``"raw"`` or ``"used"``) are within 0.1 sd in all means and 10 % in all sds."""
    return not row["error"] and float(row[f"{which}_mean"]) <= MEAN and float(row[f"{which}_sd"]) <= SD


def wrong(row: Row) -> bool:
    """Whether the draws to use are off by more than 0.25 sd in some mean or 25 % in some sd."""
    return bool(row["error"]) or float(row["used_mean"]) > WRONG_MEAN or float(row["used_sd"]) > WRONG_SD


def newest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows by method, of each method those of the version that was written last, one a posterior and seed.

    Two benchmarks that wrote to one file at the same time may both have done a fit.
    """
    rows = list(rows)
    last = {row["method"]: row["version"] for row in rows}
    found: dict[str, dict[tuple[str, str], Row]] = {method: {} for method in last}
    for row in rows:
        if akin(row["version"], last[row["method"]]):
            found[row["method"]][row["posterior"], row["seed"]] = row
    return {method: list(kept.values()) for method, kept in found.items()}


def by_posterior(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows by posterior, in the order of `NAMES`, then of appearance."""
    found: dict[str, list[Row]] = {name: [] for name in NAMES}
    for row in rows:
        found.setdefault(row["posterior"], []).append(row)
    return {name: kept for name, kept in found.items() if kept}


def worst(rows: Sequence[Row], column: str, *, smallest: bool = False) -> float:
    """Return the worst figure of several fits: the largest (``smallest``: the smallest), infinite for a failed one.

    NaN where the column is empty.
    """
    bad = -math.inf if smallest else math.inf
    values = [bad if row["error"] else float(row[column] or math.nan) for row in rows]
    values = [bad if math.isnan(value) and row[column] else value for value, row in zip(values, rows, strict=True)]
    return (min if smallest else max)(values)


@dataclass(frozen=True)
class Counts:
    """Figures of one method. Of posteriors, in their worst seeds, unless "fits" is in the name."""

    posteriors: int
    seeds: int
    fits: int
    failed_fits: int
    right_used: int
    right_raw: int
    small_k: int
    large_ess: int
    evidence_known: int
    small_gap: tuple[int, ...]
    wrong_and_ok_fits: int
    right_fits: int
    right_and_unreliable_fits: int
    gradients: float
    seconds: float


def count(rows: Sequence[Row]) -> Counts:
    """Count over the rows of one method."""
    groups = list(by_posterior(rows).values())
    gaps = [worst(group, "elbo_gap") for group in groups]
    known = [gap for gap in gaps if not math.isnan(gap)]
    good = [row for row in rows if not row["error"]]
    right_rows = [row for row in rows if right(row, "raw")]
    return Counts(
        posteriors=len(groups),
        seeds=max((len(group) for group in groups), default=0),
        fits=len(rows),
        failed_fits=len(rows) - len(good),
        right_used=sum(all(right(row, "used") for row in group) for group in groups),
        right_raw=sum(all(right(row, "raw") for row in group) for group in groups),
        small_k=sum(worst(group, "k_hat") < SMALL_K for group in groups),
        large_ess=sum(worst(group, "ess_ratio", smallest=True) >= LARGE_ESS for group in groups),
        evidence_known=len(known),
        small_gap=tuple(sum(gap <= limit for gap in known) for limit in SMALL_GAPS),
        wrong_and_ok_fits=sum(wrong(row) and row["status"] in ("ok", "refined") for row in rows),
        right_fits=len(right_rows),
        right_and_unreliable_fits=sum(row["status"] == "unreliable" for row in right_rows),
        gradients=median(good, "gradient_evaluations"),
        seconds=median(good, "seconds"),
    )


def median(rows: Iterable[Mapping[str, str]], column: str) -> float:
    """Return the median of a column, NaN where there are no rows."""
    values = [float(row[column]) for row in rows]
    return statistics.median(values) if values else math.nan


def summary(rows: Iterable[Row]) -> str:
    """Return what the benchmark found, method by method, as lines of text."""
    lines = []
    for method, kept in newest(rows).items():
        found = count(kept)
        gaps = ", ".join(
            f"{number} within {limit:g} nats" for number, limit in zip(found.small_gap, SMALL_GAPS, strict=True)
        )
        share = found.right_and_unreliable_fits / max(found.right_fits, 1)
        lines += [
            f"{method}: {found.posteriors} posteriors, {found.fits} fits, {found.failed_fits} of them failed",
            f"  right in the worst seed: {found.right_used} of {found.posteriors} with the draws to use, "
            f"{found.right_raw} with raw draws",
            f"  worst seed: k-hat below {SMALL_K} on {found.small_k}, ESS/S at least {LARGE_ESS} on {found.large_ess}",
            f"  ELBO gap in the worst seed, of {found.evidence_known} with known evidence: {gaps}",
            f"  wrong and ok: {found.wrong_and_ok_fits} fits; "
            f"right and unreliable: {found.right_and_unreliable_fits} of {found.right_fits} right fits ({share:.0%})",
            f"  median of a fit: {found.gradients:.0f} gradient evaluations, {found.seconds:.1f} s",
        ]
    return "\n".join(lines)


def line(row: Row) -> str:
    """Return one line about one fit."""
    head = f"{row['posterior']}, {row['method']}, seed {row['seed']}: "
    if row["error"]:
        return f"{head}{row['error']}"
    gap = f", gap {float(row['elbo_gap']):.3f}" if row["elbo_gap"] else ""
    return (
        f"{head}{row['status']}; raw {float(row['raw_mean']):.3f} / {float(row['raw_sd']):.3f}, "
        f"used {float(row['used_mean']):.3f} / {float(row['used_sd']):.3f}, k-hat {float(row['k_hat']):.2f}, "
        f"ESS/S {float(row['ess_ratio']):.2f}{gap}, {row['gradient_evaluations']} gradients, "
        f"{float(row['seconds']):.1f} s{', ' + row['rounds'] if row['rounds'] else ''}"
    )
