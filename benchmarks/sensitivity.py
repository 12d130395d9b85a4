"""Halve and double the thresholds that decide, one at a time, and fit models on which they may decide otherwise.

    python -m benchmarks.sensitivity
    python -m benchmarks.sensitivity --names K_HAT_MOST SHIFT_MOST --each 3 --jobs 2

The models are those of the zoo whose stored fit was quick and not plainly good: its verdict is not ``ok``, or its k-hat
is above 0.4. A threshold near 1 (R-hat, a share from one half on) is changed by halving and doubling its distance to 1.
A row is one threshold with one factor: how many fits were right, alarms, honest and lies, and in how many the verdict,
or the method, is another one than with the threshold as it is (the row with the factor 1).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks import records
from benchmarks.markdown import about, table
from benchmarks.records import Row
from benchmarks.zoo import running as zoo_running
from pyro_flows.support import thresholds

OUT = records.RESULTS / "sensitivity.csv"
FIELDS = (
    *("name", "factor", "version", "value", "models", "right", "alarm", "honest", "lie", "crash", "changed"),
    *("seconds", "machine", "software"),
)
NAMES = (
    *("K_HAT_MOST", "K_HAT_GOOD", "ESS_SHARE_LEAST", "ESS_SHARE_PROMISING", "ESS_SHARE_GOOD", "ESS_SHARE_EVEN"),
    *("ESS_OF_CHAINS", "R_HAT_CONVERGED", "R_HAT_OF_SHORT_CHAINS", "SD_ERROR_OF_CHAINS"),
    *("DIVERGENT_SHARE_OF_CHAINS", "SHIFT_MOST", "SHIFT_SEEN", "MEAN_SHIFT_MOST", "SD_WIDENING_MOST"),
    *("EVIDENCE_GAP_GOOD", "EVIDENCE_GAP_OF_RUNS", "MISSED_MASS_SHARE", "DENSITY_GAP_OF_MODES"),
)
AS_IT_IS = "as it is"
FACTORS = (0.5, 2.0)
QUICK, EACH, DOUBTFUL = 4.5, 2, 0.4  # CPU seconds of a stored fit; models of a family; k-hat from which it is doubtful
OUTCOMES = ("right", "alarm", "honest", "lie", "crash")


def changed(name: str, value: float, factor: float) -> float:
    """Return a threshold halved or doubled; one near 1 by its distance to 1."""
    if name.startswith("R_HAT"):
        return 1.0 + (value - 1.0) * factor
    if name.startswith("ESS_SHARE") and value >= 0.5:
        return max(0.0, 1.0 - (1.0 - value) * factor)
    return type(value)(value * factor)


def put(name: str, value: float) -> int:
    """Give a threshold another value in each module that has it; return in how many."""
    before = getattr(thresholds, name)
    modules = [module for key, module in sys.modules.items() if key.startswith("pyro_flows.")]
    having = [module for module in modules if getattr(module, name, None) == before]
    for module in having:
        setattr(module, name, value)
    return len(having)


def models(rows: Sequence[Row], each: int = EACH) -> list[tuple[int, int]]:
    """Return seeds and numbers of quick models of the zoo whose fit was not plainly good, some of each family."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in sorted(rows, key=lambda row: (int(row["seed"]), int(row["number"]))):
        doubtful = row["status"] != "ok" or float(row["k_hat"] or 0.0) > DOUBTFUL
        if not row["error"] and doubtful and float(row["seconds"]) < QUICK:
            chosen = found.setdefault(row["family"], [])
            if len(chosen) < each and (key := (int(row["seed"]), int(row["number"]))) not in chosen:
                chosen.append(key)
    return sorted(key for chosen in found.values() for key in chosen)


@dataclass(frozen=True)
class Task:
    """One threshold with one factor, over all models."""

    name: str
    factor: float
    models: tuple[tuple[int, int], ...]


def work(task: Task) -> tuple[dict[str, Any], dict[str, str]]:
    """Fit all models with one threshold changed, in this process; return a row, and each model's verdict and method."""
    value = getattr(thresholds, task.name) if task.name != AS_IT_IS else 1.0
    if task.name != AS_IT_IS:
        put(task.name, changed(task.name, value, task.factor))
        value = changed(task.name, value, task.factor)
    counted: Counter[str] = Counter()
    answers, seconds = {}, 0.0
    for seed, number in task.models:
        row = zoo_running.fitted(seed, number)
        method = json.loads(row["ledger"]).get("method", "") if row["ledger"] else ""
        counted[row["outcome"]] += 1
        answers[f"{seed}/{number}"] = f"{row['status']}, {method}"
        seconds += float(row["seconds"])
    row = {
        "name": task.name,
        "factor": task.factor,
        "version": records.code_version(),
        "value": f"{value:.4g}",
        "models": len(task.models),
        **{outcome: counted[outcome] for outcome in OUTCOMES},
        "seconds": f"{seconds:.1f}",
        "machine": records.machine(),
        "software": records.software(),
    }
    return row, answers


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that the file lacks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sensitivity", description=__doc__)
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--each", type=int, default=EACH, help="models of a family")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args(arguments)
    chosen = tuple(models(records.read(zoo_running.OUT), given.each))
    had = {(row["name"], row["factor"]) for row in records.start(OUT, FIELDS)}
    tasks = [Task(name, factor, chosen) for name in given.names for factor in FACTORS if (name, str(factor)) not in had]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        usual: dict[str, str] = {}
        for row, answers in pool.map(work, [Task(AS_IT_IS, 1.0, chosen), *tasks] if tasks else []):
            usual = usual or answers
            row["changed"] = sum(answers[key] != usual[key] for key in usual)
            if (row["name"], str(row["factor"])) not in had:
                records.append(OUT, FIELDS, row)
            print(", ".join(f"{name} {row[name]}" for name in FIELDS[:12]), flush=True)


def section(rows: Sequence[Row]) -> str:
    """Return the text and the table of a page."""
    usual = next(row for row in rows if row["name"] == AS_IT_IS)
    header = ["threshold", "value", "right", "alarms", "honest", "lies", "other answers", "CPU seconds"]
    lines = [
        [
            row["name"] if row["name"] == AS_IT_IS else f"`{row['name']}`",
            "" if row["name"] == AS_IT_IS else row["value"],
            *(row[name] for name in ("right", "alarm", "honest", "lie")),
            "" if row["name"] == AS_IT_IS else row["changed"],
            f"{float(row['seconds']):.0f}",
        ]
        for row in rows
    ]
    text = (
        f"{usual['models']} models of the zoo whose stored fit took less than {QUICK} CPU seconds and was not plainly "
        f"good: its verdict is not `ok`, or its k-hat is above {DOUBTFUL}. Each threshold is halved and doubled, and "
        "all others stay as they are. A threshold near 1 is changed by its distance to 1. An alarm is a right result "
        "that is called `unreliable`, a lie is a wrong one that is called usable. An answer is another one if its "
        "verdict or its method is."
    )
    return f"{text}\n\n{table(header, lines)}\n\n{about(rows)}"


if __name__ == "__main__":
    main()
