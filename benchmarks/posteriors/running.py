"""Fit the ported posteriors of posteriordb and compare with their reference draws.

    python -m benchmarks.posteriors --posteriordb PATH --seeds 5 --only kilpisjarvi --rivals --jobs 2

One row of the CSV file is one fit; it is written as soon as the fit is done. A fit that has a row of the same version
is not done again, so a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_flows
from benchmarks import records
from benchmarks.posteriors.judging import line, summary
from benchmarks.posteriors.models import NAMES, Problem, load
from benchmarks.posteriors.reference import ENVIRONMENT_VARIABLE, find_posteriordb
from benchmarks.posteriors.rivals import RIVALS, run
from benchmarks.records import Row
from pyro_flows import LogDensity, Posterior

OURS = "pyro_flows.fit"
DRAWS = 10_000
RIVALS_SEEDS = 3  # the first ones of ours
OUT = records.RESULTS / "posteriordb.csv"


FIELDS = (
    *("posterior", "method", "seed", "version", "dim", "status", "k_hat", "ess_ratio", "elbo", "elbo_gap"),
    *("raw_mean", "raw_sd", "used_mean", "used_sd", "gradient_evaluations", "steps", "seconds"),
    *("rounds", "why", "reasons", "ledger", "error", "machine", "software"),
)
KEY = ("posterior", "method", "seed", "version")


# ---- one fit ---------------------------------------------------------------------------------------------------------


def compare(draws: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the worst mean error, in reference sds, and the worst absolute log ratio of sds, over coordinates.

    Args:
        draws: (S, D), unconstrained.
        reference: (R, D), unconstrained.
    """
    if not bool(torch.isfinite(draws).all()):
        return math.inf, math.inf
    draws, reference = draws.double(), reference.double()
    sd = reference.std(0)
    mean_error = (draws.mean(0) - reference.mean(0)).abs() / sd
    return float(mean_error.max()), float((draws.std(0) / sd).log().abs().max())


@dataclass(frozen=True)
class Task:
    """One fit to be done; ``gradients`` is what our fit took, for rivals that get as many."""

    posterior: str
    method: str
    seed: int
    version: str
    root: str | None
    gradients: int = 0

    @property
    def named(self) -> dict[str, str]:
        """The columns that tell its row from others."""
        return {name: str(getattr(self, name)) for name in KEY}

    @property
    def key(self) -> tuple[str, ...]:
        """Their values."""
        return tuple(self.named.values())


def work(task: Task) -> Row:
    """Do one fit and return its row; an exception is recorded in the column ``error``."""

    def fill(row: dict[str, Any]) -> None:
        problem = load(task.posterior, task.root)
        began = time.monotonic()
        if task.method == OURS:
            found = pyro_flows.fit(problem.model, *problem.args, seed=task.seed, draws=DRAWS, progress=False)
        else:
            options: dict[str, Any] = {"gradients": task.gradients, "seed": task.seed, "draws": DRAWS}
            found = run(RIVALS[task.method], problem.model, problem.args, **options)
        row["seconds"] = found.settings.get("seconds", time.monotonic() - began)
        row.update(_figures(found, problem))

    return records.attempt({**dict.fromkeys(FIELDS, ""), **task.named}, fill)


def _figures(found: Posterior, problem: Problem) -> dict[str, Any]:
    """Compare in the model's own unconstrained coordinates, whichever the fit chose; rivals are given these."""
    density, log_evidence = LogDensity(problem.model, problem.args), problem.log_evidence
    reference = density.unconstrain(problem.reference)
    assert found.density is not None
    draws = [found.z, found._used]
    if found.density.structure.noncentered:
        draws = [density.unconstrain(found.density.constrain(z)) for z in draws]
    raw, used = (compare(z, reference) for z in draws)
    rounds = [stage for stage in found.history if stage["why"] is not None]
    return {
        "dim": found.z.shape[1],
        "status": found.verdict.status,
        "k_hat": found.k_hat,
        "ess_ratio": found.verdict.ess_ratio,
        "elbo": found.elbo,
        "elbo_gap": "" if log_evidence is None else log_evidence - found.elbo,
        "raw_mean": raw[0],
        "raw_sd": raw[1],
        "used_mean": used[0],
        "used_sd": used[1],
        "gradient_evaluations": found.settings["gradient_evaluations"],
        "steps": found.settings.get("steps", len(found.losses)),
        "rounds": " > ".join(str(stage["stage"]) for stage in rounds) or _rate(found),
        "why": " > ".join(str(stage.get("why", "")) for stage in rounds),
        "reasons": "; ".join(found.verdict.reasons),
    }


def _rate(found: Posterior) -> str:
    """Return the learning rate of a rival."""
    return f"learning rate {found.settings['rate']:g}" if "rate" in found.settings else ""


# ---- all of them -----------------------------------------------------------------------------------------------------


def method_version(method: str, ours: str) -> str:
    """Return what a row of ``method`` depends on: our code, and Pyro for a rival, which gets as many gradients."""
    return ours if method == OURS else f"pyro-{version('pyro-ppl')}, {ours}"


def bench(
    root: str | None,
    *,
    seeds: int,
    only: Sequence[str] = (),
    rivals: bool = False,
    out: Path = OUT,
    jobs: int = 1,
    do: Callable[[Task], Row] = work,
) -> list[Row]:
    """Do all fits that ``out`` does not have yet; return its rows of the present versions.

    Args:
        root: the checkout of posteriordb, see :func:`benchmarks.posteriors.reference.find_posteriordb`.
        seeds: how many seeds a posterior, from 0 on.
        only: full names of posteriors, or their parts after the dash; all by default.
        rivals: whether to do Pyro's guides too.
        out: the CSV file.
        jobs: how many processes, of one thread each.
        do: what does a fit.
    """
    names = [full_name(name) for name in only] or list(NAMES)
    ours = records.code_version()
    rows = {tuple(row[name] for name in KEY): row for row in records.start(out, FIELDS)}
    tasks = [Task(name, OURS, seed, ours, root) for name in names for seed in range(seeds)]
    wanted = {task.key for task in tasks}

    def followers(row: Row) -> list[Task]:
        """The rivals of a fit of ours that are to be done, now that its number of gradients is known."""
        found = []
        for method in RIVALS if rivals and row["method"] == OURS else ():
            if row["gradient_evaluations"] and int(row["seed"]) < RIVALS_SEEDS:
                gradients = int(row["gradient_evaluations"])
                seed, made = int(row["seed"]), method_version(method, ours)
                found.append(Task(row["posterior"], method, seed, made, root, gradients))
        wanted.update(task.key for task in found)
        return [task for task in found if task.key not in rows]

    queue = [task for task in tasks if task.key not in rows]
    queue += [task for key in [task.key for task in tasks] if key in rows for task in followers(rows[key])]
    for row in records.done(queue, do, jobs, followers):
        records.append(out, FIELDS, row)
        rows[tuple(row[name] for name in KEY)] = row
        print(line(row), flush=True)
    return [row for key, row in rows.items() if key in wanted]


def full_name(name: str) -> str:
    """Return the full name of a ported posterior.

    Raises:
        ValueError: if there is none of this name.
    """
    for full in NAMES:
        if name in (full, full.split("-", 1)[1]):
            return full
    raise ValueError(f"only: expected the name of a ported posterior, got {name!r}; choose from {', '.join(NAMES)}.")


# ---- what they say ---------------------------------------------------------------------------------------------------


# ---- command line ----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--posteriordb", metavar="PATH", help=f"checkout of posteriordb (else the variable {ENVIRONMENT_VARIABLE})"
    )
    parser.add_argument("--seeds", type=records.positive, default=5, help="seeds a posterior, from 0 on (default: 5)")
    parser.add_argument(
        "--only", metavar="NAME", action="append", default=[], help="only this posterior; can be repeated"
    )
    parser.add_argument("--rivals", action="store_true", help="Pyro's own guides too")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows; those in it are kept")
    parser.add_argument("--jobs", type=records.positive, default=1, help="processes, one thread each (default: 1)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posteriors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    if find_posteriordb(options.posteriordb) is None:
        parser.error("no posteriordb found; clone it and give its folder with --posteriordb")
    try:
        only = [full_name(name) for name in options.only]
    except ValueError as error:
        parser.error(str(error))
    choice = {"seeds": options.seeds, "only": only, "rivals": options.rivals}
    print(summary(bench(options.posteriordb, **choice, out=options.out, jobs=options.jobs)))
