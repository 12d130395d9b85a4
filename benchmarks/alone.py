"""Fits by a flow alone: is its own answer right, what does it cost, and does the verdict know?

    python -m benchmarks.alone --posteriordb PATH
    python -m benchmarks.alone --kinds larger wide --only radon 3000

``fit(flow="realnvp", refine=False)`` takes a flow, trained or at its start, and no Markov chains. The models are the
ported posteriors of posteriordb, the nine larger ones, and latents that are observed with their neighbors, of which
there are 500, 1000 and 3000, with a known posterior. Draws are compared with reference draws, a long run, or the closed
form. One row of the CSV file is one fit in a process of its own with one thread. A row of the same version is kept.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pyro_flows as pf
from benchmarks import records
from benchmarks.larger import models as larger
from benchmarks.markdown import about, number, table
from benchmarks.posteriors.judging import right
from benchmarks.posteriors.models import NAMES, load
from benchmarks.posteriors.running import compare
from benchmarks.records import Row
from benchmarks.scale import numbers
from pyro_flows import LogDensity, Posterior

OUT = records.RESULTS / "alone.csv"
FIELDS = (
    *("kind", "model", "seed", "version", "dim", "status", "method", "raw_mean", "raw_sd", "used_mean", "used_sd"),
    *("k_hat", "ess_ratio", "gradients", "seconds", "megabytes", "reasons", "error", "machine", "software"),
)
MODELS = {"posteriordb": tuple(NAMES), "larger": tuple(larger.MODELS), "wide": ("500", "1000", "3000")}
TITLES = {"posteriordb": "posteriordb", "larger": "larger models", "wide": "latents observed with their neighbor"}
OPTIONS: dict[str, Any] = {"flow": "realnvp", "refine": False, "draws": 4000, "progress": False}


def fitted(
    kind: str, name: str, seed: int, root: str | None, limit: float | None
) -> tuple[Posterior, list[tuple[float, float]]]:
    """Fit a model by a flow alone; return its errors of means and of log sds, by raw draws and by those to use."""
    options = {**OPTIONS, "seed": seed, "max_seconds": math.inf if limit is None else limit}
    if kind == "wide":
        known = numbers.problem("latents", float(name), torch.float32)
        found = pf.fit(known.model, *known.args, **options)
        used = numbers.errors(found, known)
        return found, [used, used]
    problem = load(name, root) if kind == "posteriordb" else larger.load(name)
    found, density = pf.fit(problem.model, *problem.args, **options), LogDensity(problem.model, problem.args)
    assert found.density is not None
    draws = [density.unconstrain(found.density.constrain(z)) for z in (found.z, found._used)]
    if kind == "larger":
        return found, [larger.compare(name, z)[:2] for z in draws]
    return found, [compare(z, density.unconstrain(problem.reference)) for z in draws]


def work(kind: str, name: str, seed: int, version: str, root: str | None, limit: float | None = None) -> Row:
    """Do one fit and return its row; an exception is recorded in the column ``error``."""

    def fill(row: dict[str, Any]) -> None:
        began = time.process_time()
        found, (raw, used) = fitted(kind, name, seed, root, limit)
        row.update(seconds=time.process_time() - began, dim=found.z.shape[1], status=found.verdict.status)
        row.update(method=found.method, k_hat=found.k_hat, ess_ratio=found.verdict.ess_ratio)
        row.update(raw_mean=raw[0], raw_sd=raw[1], used_mean=used[0], used_sd=used[1])
        row.update(gradients=found.settings["gradient_evaluations"], reasons="; ".join(found.verdict.reasons))
        row["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    key = {"kind": kind, "model": name, "seed": str(seed), "version": version}
    return records.attempt({**dict.fromkeys(FIELDS, ""), **key}, fill)


def section(rows: Sequence[Row]) -> str:
    """Return the text and the table."""
    rows = list({(row["kind"], row["model"], row["seed"]): row for row in rows}.values())
    said = []
    for kind, title in TITLES.items():
        own = [row for row in rows if row["kind"] == kind]
        count = sum(right(row, "used") for row in own)
        usable = [row for row in own if row["status"] in ("ok", "corrected")]
        wrong = sum(not right(row, "used") for row in usable)
        if own:
            said.append(f"- {title}: {count} of {len(own)} right, {len(usable)} usable, {wrong} of these not right.")
    text = (
        '`fit(flow="realnvp", refine=False)`: no Markov chains. Right are draws to use whose means are within 0.1 sd '
        f"and whose sds are within 10 %, in the worst coordinate. Seconds are of one thread's processor time.\n\n"
        f"{about(rows)} pyro_flows {', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    header = ("model", "D", "verdict", "method", "mean", "sd", "k-hat", "ESS/S", "gradients", "CPU s", "MB")
    lines = [
        [
            row["model"],
            row["dim"],
            row["error"][:40] or row["status"],
            row["method"],
            *(number(float(row[name] or "nan"), 2) for name in ("used_mean", "used_sd", "k_hat", "ess_ratio")),
            *(number(float(row[name] or "nan"), 0) for name in ("gradients", "seconds", "megabytes")),
        ]
        for row in rows
    ]
    return "\n\n".join([text, "\n".join(said), table(header, lines)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alone", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posteriordb", metavar="PATH", help="a checkout of posteriordb")
    parser.add_argument("--kinds", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models only")
    parser.add_argument("--seeds", type=records.positive, default=1, help="seeds a model, from 0 on (default: 1)")
    parser.add_argument("--max-seconds", type=float, help="of a fit, by the clock")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows")
    options = parser.parse_args(arguments)
    version = records.code_version()
    done = {(row["kind"], row["model"], row["seed"], row["version"]) for row in records.start(options.out, FIELDS)}
    for kind in options.kinds:
        for name in MODELS[kind]:
            for seed in range(options.seeds):
                left_out = (options.only and name not in options.only) or (kind, name, str(seed), version) in done
                if left_out:
                    continue
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(work, (kind, name, seed, version, options.posteriordb, options.max_seconds))
                records.append(options.out, FIELDS, row)
                print(f"{kind} {name}: {row['error'] or row['status']}, right {right(row, 'used')}", flush=True)


if __name__ == "__main__":
    main()
