"""Are answers of an amortized flow usable and right, how fast are they, and are strange data named?

    python -m benchmarks.amortized --only "eight schools" --sets 200

A flow is trained for each model, once. Then 200 new data sets are drawn from the model, and each is answered. An answer
is usable if its verdict is not ``unreliable``, and right if each mean is within 0.1 standard deviations, and each
standard deviation within 10 %, of the exact ones: those of a closed form, or sums over grids. The first data set is
compared with ``pf.fit`` too. Each data set is then changed in one of three ways, so that the prior does not predict it
any more: all values far off, one value, or every other one. Seconds are processor time of one thread. One row of the
CSV file is one model; a row of the same version is not done again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import kstest
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.amortized.models import TASKS, Task, values
from pyro_flows.amortization.amortized import OUTSIDE

OUT = records.RESULTS / "amortized.csv"
FIELDS = (
    *("model", "data_sets", "simulations", "steps", "version", "train_cpu_seconds", "usable", "right", "lies"),
    *("verdicts", "ms_median", "ms_95", "ess_median", "compared_with_fit", "agree_with_fit", "p_value", "uniform"),
    *("false_alarms", "changed", "named", "changed_ok", "machine", "software"),
)
MEAN, SD = 0.1, math.log(1.1)  # sds, and log ratio of sds, that count as right
FITTED = 1  # data sets that are fitted too
FAR = 1000.0  # robust standard deviations of the predicted data
CHANGES = ("all", "one", "every other")


def changed(y: Tensor, scale: float, kind: str, number: int) -> Tensor:
    """Return data that the prior does not predict: whole numbers stay whole, and counts stay counts."""
    size = torch.full_like(y, round(FAR * scale))
    if kind == "one":
        return torch.where(torch.arange(len(y)) == number % len(y), y + size, y)
    return y + size if kind == "all" else torch.where(torch.arange(len(y)) % 2 == 0, y + size, y)


def moments(draws: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations (V,) of draws (S, V)."""
    if weights is None:
        return draws.mean(0), draws.std(0)
    mean = weights @ draws
    return mean, (weights @ (draws - mean).square()).sqrt()


def is_right(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> bool:
    """Whether all means and standard deviations are those of the reference."""
    (mean, sd), (true_mean, true_sd) = found, reference
    return bool(((mean - true_mean).abs() <= MEAN * true_sd).all() and ((sd / true_sd).log().abs() <= SD).all())


def by_fit(task: Task, y: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return what ``pf.fit`` comes to."""
    posterior = pf.fit(task.model, *task.with_data(y), draws=8000, progress=False)
    return moments(values(posterior.samples, names))


def uniformity(ranks: Tensor) -> float:
    """Return the p-value of uniformity of shares (N, V) of draws below the truth, of all columns by Bonferroni."""
    found = [float(kstest(column, "uniform").pvalue) for column in ranks.T.numpy()]
    return min(1.0, len(found) * min(found))


def measure(name: str, sets: int, simulations: int, version: str) -> dict[str, Any]:
    """Return the row of one model."""
    task = TASKS[name]
    torch.set_num_threads(1)
    began = time.process_time()
    amortized = pf.amortize(task.model, *task.args, simulations=simulations, progress=False)
    trained = time.process_time() - began
    density = pf.LogDensity(task.model, task.args)
    drawn = density.prior(sets, seed=1)
    assert drawn is not None
    names, data = density.names, drawn["y"]
    truths = values(drawn, names)
    scale = float((data - data.median()).abs().median())
    statuses: Counter[str] = Counter()
    seconds, shares, ranks, usable, right, alarms, agree = [], [], [], 0, 0, 0, 0
    for number, y in enumerate(data):
        began = time.process_time()
        posterior = amortized(*task.with_data(y))
        seconds.append(time.process_time() - began)
        shares.append(posterior.verdict.ess_ratio)
        statuses[posterior.verdict.status] += 1
        draws = values(posterior.samples, names)
        ranks.append((draws < truths[number]).double().mean(0))
        alarms += is_named(posterior)
        if posterior.verdict.status != "unreliable":
            usable += 1
            right += is_right(moments(draws), task.exact(y))
        if number < FITTED:
            agree += is_right(moments(draws), by_fit(task, y, names))
    named, called_ok = 0, 0
    for number, y in enumerate(data):
        strange = amortized(*task.with_data(changed(y, scale, CHANGES[number % len(CHANGES)], number)))
        named += is_named(strange)
        called_ok += strange.verdict.status == "ok"
    times, p_value = torch.tensor(seconds), uniformity(torch.stack(ranks))
    row: dict[str, Any] = {"model": name, "data_sets": sets, "simulations": simulations, "version": version}
    row.update(steps=amortized.settings["steps"], train_cpu_seconds=f"{trained:.0f}", usable=usable, right=right)
    row.update(lies=usable - right, verdicts=", ".join(f"{count} {one}" for one, count in sorted(statuses.items())))
    row.update(ms_median=f"{1e3 * float(times.median()):.0f}", ms_95=f"{1e3 * float(times.quantile(0.95)):.0f}")
    row.update(ess_median=f"{float(torch.tensor(shares).median()):.2f}", compared_with_fit=min(FITTED, sets))
    row.update(agree_with_fit=agree, p_value=f"{p_value:.3g}", uniform=p_value > 0.01)
    row.update(false_alarms=alarms, changed=sets, named=named, changed_ok=called_ok)
    return {**row, "machine": records.machine(), "software": records.software()}


def is_named(posterior: pf.Posterior) -> bool:
    """Whether the verdict says that the prior does not predict the data."""
    return any(reason.startswith(OUTSIDE) for reason in posterior.verdict.reasons)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.amortized", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--simulations", type=int, default=200_000)
    parser.add_argument("--out", type=type(OUT), default=OUT)
    options = parser.parse_args(arguments)
    version = records.code_version()
    done = {(row["model"], row["data_sets"], row["version"]) for row in records.start(options.out, FIELDS)}
    for name in options.only:
        if (name, str(options.sets), version) in done:
            continue
        row = measure(name, options.sets, options.simulations, version)
        records.append(options.out, FIELDS, row)
        print(f"{name}: {row['verdicts']}, {row['right']} right, {row['ms_median']} ms", flush=True)
