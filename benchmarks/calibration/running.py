"""Are posteriors calibrated, and what do many fits side by side save?

    python -m benchmarks.calibration --only regression --method together --simulations 256

Methods: "together" (fits side by side), "one by one" (the same simulations, a fit after the other), and "AutoNormal"
(Pyro's mean field, trained by SVI). Seconds are processor time of one thread, so that other work on the machine counts
for little. One row of the CSV file is one model and method; a row of the same version is not done again. With "one by
one", ranks are compared with those of "together", by the mean distance of ranks over the number of draws, beside what
two sets of independent draws of one posterior would give.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flows as pf
from benchmarks import records
from benchmarks.calibration.models import MODELS

OUT = records.RESULTS / "calibration.csv"
METHODS = ("together", "one by one", "AutoNormal")
FIELDS = (
    *("model", "method", "simulations", "draws", "version", "cpu_seconds", "p_value", "smallest_p", "at", "uniform"),
    *("coverage_50", "coverage_95", "verdicts", "rank_distance", "expected_distance", "together_seconds"),
    *("machine", "software"),
)


def run(name: str, method: str, simulations: int) -> tuple[pf.Calibration, float]:
    """Return what one method comes to on one model, and its seconds of processor time."""
    model, args = MODELS[name]
    options: dict[str, Any] = (
        {"guide": AutoNormal, "steps": 500, "learning_rate": 0.03} if method == "AutoNormal" else {}
    )
    options |= {"together": method == "together", "simulations": simulations, "progress": False}
    torch.set_num_threads(1)
    began = time.process_time()
    found = pf.sbc(model, *args, **options)
    return found, time.process_time() - began


def distances(one: pf.Calibration, other: pf.Calibration) -> tuple[float, float]:
    """Return the mean distance of ranks over L, and what independent draws of one posterior would give.

    Two shares of L draws below a point of probability p differ by a normal of variance 2 p (1 - p) / L, and p is
    uniform: the mean absolute difference is sqrt(2 / pi) sqrt(2 / L) pi / 8.
    """
    pairs = [(one.ranks[name], other.ranks[name]) for name in one.ranks]
    distance = np.mean(np.concatenate([np.abs(a - b).ravel() for a, b in pairs])) / one.draws
    return float(distance), math.sqrt(2.0 / math.pi) * math.sqrt(2.0 / one.draws) * math.pi / 8.0


def measure(name: str, method: str, simulations: int, version: str) -> dict[str, Any]:
    """Return the row of one model and method."""
    found, seconds = run(name, method, simulations)
    p_values, coverage = found.p_values(), found.coverage()
    at = min(p_values, key=p_values.__getitem__)
    row: dict[str, Any] = {"model": name, "method": method, "simulations": simulations, "draws": found.draws}
    row.update(version=version, cpu_seconds=f"{seconds:.1f}", p_value=f"{found.p_value:.3g}", at=at)
    row.update(smallest_p=f"{p_values[at]:.3g}", uniform=found.is_uniform(0.01))
    row.update(coverage_50=f"{coverage['50%'].mean():.3f}", coverage_95=f"{coverage['95%'].mean():.3f}")
    row.update(verdicts=", ".join(f"{count} {status}" for status, count in found.statuses.items()))
    row.update(
        rank_distance="",
        expected_distance="",
        together_seconds="",
        machine=records.machine(),
        software=records.software(),
    )
    if method == "one by one":
        other, together = run(name, "together", simulations)  # right after it, so that both meet the same load
        distance, expected = distances(found, other)
        row.update(rank_distance=f"{distance:.4f}", expected_distance=f"{expected:.4f}")
        row.update(together_seconds=f"{together:.1f}")
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["together"])
    parser.add_argument("--simulations", type=int, default=256)
    parser.add_argument("--out", type=type(OUT), default=OUT)
    options = parser.parse_args(arguments)
    version = records.code_version()
    done = {
        (row["model"], row["method"], row["simulations"], row["version"]) for row in records.start(options.out, FIELDS)
    }
    for name in options.only:
        for method in options.method:
            if (name, method, str(options.simulations), version) in done:
                continue
            row = measure(name, method, options.simulations, version)
            records.append(options.out, FIELDS, row)
            print(f"{name}, {method}: {row['cpu_seconds']} s, p {row['p_value']}, {row['verdicts']}", flush=True)
