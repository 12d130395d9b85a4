"""Are answers of an amortized flow usable and right, how fast are they, and are strange data named?

    python -m benchmarks.amortized --only "eight schools" --sets 200

A flow is trained for each model, once. Then 200 new data sets are drawn from the model, and each is answered. An answer
is usable if its verdict is not ``unreliable``, and right if each mean is within 0.1 standard deviations, and each
standard deviation within 10 %, of the exact ones: those of a closed form, or sums over grids. The first data set is
compared with ``pf.fit`` too. Each data set is then changed in one of three ways, so that the prior does not predict it
any more: all values far off, one value, or every other one. Other packages are trained on the same simulations, for as
much time; they have no verdict, so that all of their answers count as usable. Those that are not installed are left out
with a sentence. Seconds are processor time of one thread. One row of the CSV file is one model and one method; a row of
the same version is not done again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version as version_of
from typing import Any

import torch
from scipy.stats import kstest
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.amortized.models import TASKS, Task, values
from benchmarks.amortized.peers import PEERS, installed
from pyro_flows.amortization.amortize import REFERENCE
from pyro_flows.amortization.amortized import OUTSIDE
from pyro_flows.amortization.building import exchangeable_rows, scale_of, simulate
from pyro_flows.amortization.form import bound

OUT = records.RESULTS / "amortized.csv"
FIELDS = (
    *("model", "method", "data_sets", "simulations", "steps", "version", "train_cpu_seconds", "usable", "right"),
    *(
        "lies",
        "verdicts",
        "ms_median",
        "ms_95",
        "ess_median",
        "compared_with_fit",
        "agree_with_fit",
        "p_value",
        "uniform",
    ),
    *("mean_off", "sd_off", "false_alarms", "changed", "named", "changed_ok", "machine", "software"),
)
MEAN, SD = 0.1, math.log(1.1)  # sds, and log ratio of sds, that count as right
FITTED = 1  # data sets that are fitted too
OURS = "pyro_flows"
DRAWS = 4000  # of an answer
FAR = 1000.0  # robust standard deviations of the predicted data
CHANGES = ("all", "one", "every other")


def changed(y: Tensor, scale: float, kind: str, number: int) -> Tensor:
    """Return data that the prior does not predict: whole numbers stay whole, and counts stay counts."""
    size = torch.full_like(y, round(FAR * scale))
    place = torch.arange(len(y)).reshape(-1, *[1] * (y.dim() - 1))
    if kind == "one":
        return torch.where(place == number % len(y), y + size, y)
    return y + size if kind == "all" else torch.where(place % 2 == 0, y + size, y)


def moments(draws: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations (V,) of draws (S, V)."""
    if weights is None:
        return draws.mean(0), draws.std(0)
    mean = weights @ draws
    return mean, (weights @ (draws - mean).square()).sqrt()


def largest_errors(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the largest error of a mean, in standard deviations, and that of a log standard deviation."""
    (mean, sd), (true_mean, true_sd) = found, reference
    return float(((mean - true_mean) / true_sd).abs().max()), float((sd / true_sd).log().abs().max())


def is_right(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> bool:
    """Whether all means and standard deviations are those of the reference."""
    return all(error <= most for error, most in zip(largest_errors(found, reference), (MEAN, SD), strict=True))


def by_fit(task: Task, y: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return what ``pf.fit`` comes to."""
    posterior = pf.fit(task.model, *task.with_data(y), draws=8000, progress=False)
    return moments(values(posterior.samples, names))


def uniformity(ranks: Tensor) -> float:
    """Return the p-value of uniformity of shares (N, V) of draws below the truth, of all columns by Bonferroni."""
    found = [float(kstest(column, "uniform").pvalue) for column in ranks.T.numpy()]
    return min(1.0, len(found) * min(found))


@cache
def data_sets(name: str, sets: int) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Return the names of the latents, new data sets, and the parameters that they were drawn with."""
    density = pf.LogDensity(TASKS[name].model, TASKS[name].args)
    drawn = density.prior(sets, seed=1)
    assert drawn is not None
    return density.names, drawn["y"], values(drawn, density.names)


@cache
def references(name: str, sets: int) -> list[tuple[Tensor, Tensor]]:
    """Return the exact answers to these data sets."""
    return [TASKS[name].exact(y) for y in data_sets(name, sets)[1]]


def summary(seconds: Sequence[float], ranks: Sequence[Tensor], errors: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the columns that rows of all methods have, given the largest errors of each usable answer."""
    times, p_value = torch.tensor(seconds), uniformity(torch.stack(list(ranks)))
    usable, right = len(errors), sum(mean <= MEAN and sd <= SD for mean, sd in errors)
    found: dict[str, Any] = {"usable": usable, "right": right, "lies": usable - right}
    if errors:
        mean_off, sd_off = torch.tensor(errors).median(0).values.tolist()
        found.update(mean_off=f"{mean_off:.3f}", sd_off=f"{math.expm1(sd_off):.3f}")
    found.update(ms_median=f"{1e3 * float(times.median()):.0f}", ms_95=f"{1e3 * float(times.quantile(0.95)):.0f}")
    found.update(p_value=f"{p_value:.3g}", uniform=p_value > 0.01)
    return {**found, "machine": records.machine(), "software": records.software()}


def measure_peer(name: str, peer: str, sets: int, simulations: int, seconds: float) -> dict[str, Any]:
    """Return the row of another package, which is trained for so many seconds on the simulations of ``pf.amortize``."""
    task = TASKS[name]
    torch.set_num_threads(1)
    read = simulate(task.model, bound(task.model, task.args, {}), None, simulations, REFERENCE, seed=0)
    scale = scale_of(read, exchangeable_rows(read))
    features = scale(read.form.rows(read.observed)).float()
    answer, trained = PEERS[peer](read.z[REFERENCE:].float(), features[REFERENCE:], seconds)
    names, data, truths = data_sets(name, sets)
    times, ranks, errors = [], [], []
    for y, truth, reference in zip(data, truths, references(name, sets), strict=True):
        one = scale(read.form.rows({"y": y[None]}))[0].float()
        began = time.process_time()
        z = answer(one, DRAWS)
        times.append(time.process_time() - began)
        draws = values(read.density.constrain(z.to(read.density.dtype)), names)
        ranks.append((draws < truth).double().mean(0))
        errors.append(largest_errors(moments(draws), reference))
    row = {"model": name, "method": peer, "data_sets": sets, "simulations": simulations, "version": version_of(peer)}
    return {**row, "train_cpu_seconds": f"{trained:.0f}", **summary(times, ranks, errors)}


def measure(name: str, sets: int, simulations: int, version: str) -> dict[str, Any]:
    """Return the row of one model."""
    task = TASKS[name]
    torch.set_num_threads(1)
    began = time.process_time()
    amortized = pf.amortize(task.model, *task.args, simulations=simulations, progress=False)
    trained = time.process_time() - began
    names, data, truths = data_sets(name, sets)
    scale = float((data - data.median()).abs().median())
    statuses: Counter[str] = Counter()
    seconds, shares, ranks, errors, alarms, agree = [], [], [], [], 0, 0
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
            errors.append(largest_errors(moments(draws), references(name, sets)[number]))
        if number < FITTED:
            agree += is_right(moments(draws), by_fit(task, y, names))
    named, called_ok = 0, 0
    for number, y in enumerate(data):
        strange = amortized(*task.with_data(changed(y, scale, CHANGES[number % len(CHANGES)], number)))
        named += is_named(strange)
        called_ok += strange.verdict.status == "ok"
    row: dict[str, Any] = {"model": name, "method": OURS, "data_sets": sets, "simulations": simulations}
    row.update(version=version, steps=amortized.settings["steps"], train_cpu_seconds=f"{trained:.0f}")
    row.update(verdicts=", ".join(f"{count} {one}" for one, count in sorted(statuses.items())))
    row.update(ess_median=f"{float(torch.tensor(shares).median()):.2f}", compared_with_fit=min(FITTED, sets))
    row.update(agree_with_fit=agree, false_alarms=alarms, changed=sets, named=named, changed_ok=called_ok)
    return {**row, **summary(seconds, ranks, errors)}


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
    parser.add_argument("--methods", nargs="+", choices=[OURS, *PEERS], default=[OURS, *PEERS])
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--simulations", type=int, default=200_000)
    parser.add_argument("--out", type=type(OUT), default=OUT)
    options = parser.parse_args(arguments)
    version = records.code_version()
    rows = records.start(options.out, FIELDS)
    done = {(row["model"], row["method"], row["data_sets"], row["version"]) for row in rows}
    methods = installed(options.methods)
    for name in options.only:
        for method in methods:
            made_by = version if method == OURS else version_of(method)
            if (name, method, str(options.sets), made_by) in done:
                continue
            if method == OURS:
                row = measure(name, options.sets, options.simulations, version)
            else:
                seconds = [row["train_cpu_seconds"] for row in records.read(options.out) if is_ours(row, name)]
                if not seconds:
                    print(f"{name}: {method} needs the row of {OURS}, which tells how long to train.")
                    continue
                row = measure_peer(name, method, options.sets, options.simulations, float(seconds[-1]))
            records.append(options.out, FIELDS, row)
            print(f"{name}: {method}: {row['right']} of {row['usable']} right, {row['ms_median']} ms", flush=True)


def is_ours(row: records.Row, name: str) -> bool:
    """Whether a row is that of ``pf.amortize`` and of a model."""
    return row["method"] == OURS and row["model"] == name
