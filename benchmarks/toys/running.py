"""Fit toy targets whose log normalizers and moments are known, with ``fit`` as it comes.

    python -m benchmarks.toys --seeds 10 --only u1 --jobs 2

Rezende and Mohamed's four potentials with planar flows of 2, 8 and 32 layers, Neal's funnel in 10 dimensions (as a
hierarchical model, and as a mere density), a many-well in 32 and a mixture of 40 Gaussians in 2 (both also with
``runs=4``). One row of the CSV file is one fit; it is written as soon as the fit is done, and a fit that has a row of
the same version is not done again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_flows
from benchmarks import records
from benchmarks.records import Row
from benchmarks.toys.targets import TARGETS, Target
from pyro_flows import Posterior

DRAWS = 10_000
OUT = records.RESULTS / "toys.csv"
FOUND_SHARE = 0.25  # of a mode's exact mass that the draws must have for it to be found
WRONG_MEAN = 0.25  # sds by which a wrong fit misses some mean,
WRONG_SD = math.log(1.25)  # or some log sd

FIELDS = (
    *("target", "flow", "layers", "runs", "seed", "version", "status", "k_hat", "ess_ratio", "elbo", "elbo_gap"),
    *("modes", "of_modes", "sd_x0", "used_mean", "used_sd", "gradient_evaluations", "steps", "seconds"),
    *("layers_at_end", "rounds", "why", "reasons", "error", "machine", "software"),
)
KEY = ("target", "flow", "layers", "runs", "seed", "version")


@dataclass(frozen=True)
class Case:
    """A target, and the options of ``fit`` that it is fitted with."""

    target: str
    flow: str = "realnvp"
    layers: int = 8
    runs: int = 1


CASES = (
    *(Case(name, "planar", layers) for name in ("u1", "u2", "u3", "u4") for layers in (2, 8, 32)),
    Case("funnel"),
    Case("funnel_energy"),
    *(Case(name, runs=runs) for name in ("many_well", "mixture") for runs in (1, 4)),
)


@dataclass(frozen=True)
class Task:
    """One fit to be done."""

    case: Case
    seed: int
    version: str

    @property
    def named(self) -> dict[str, str]:
        """The columns that tell its row from others."""
        return {name: str(value) for name, value in {**asdict(self.case), **asdict(self)}.items() if name in KEY}

    @property
    def key(self) -> tuple[str, ...]:
        """Their values."""
        return tuple(self.named[name] for name in KEY)


# ---- one fit ---------------------------------------------------------------------------------------------------------


def modes_found(target: Target, z: Tensor) -> int:
    """Return how many modes hold at least a quarter of their exact mass among the draws ``z`` (S, D)."""
    if target.modes is None:
        return 0
    return int((target.modes(z).double().mean(0) >= FOUND_SHARE * torch.tensor(target.shares)).sum())


def errors(target: Target, z: Tensor) -> tuple[float, float]:
    """Return the worst mean error of ``z`` (S, D), in exact sds, and the worst absolute log ratio of sds."""
    mean, sd = torch.tensor(target.mean), torch.tensor(target.sd)
    leading = z[:, : len(mean)].double()
    return float(((leading.mean(0) - mean) / sd).abs().max()), float((leading.std(0) / sd).log().abs().max())


def work(task: Task) -> Row:
    """Do one fit and return its row; an exception is recorded in the column ``error``."""
    case = task.case
    options: dict[str, Any] = {"flow": case.flow, "layers": case.layers, "runs": case.runs}

    def fill(row: dict[str, Any]) -> None:
        target, began = TARGETS[case.target], time.monotonic()
        found = pyro_flows.fit(target.model, **options, seed=task.seed, draws=DRAWS, progress=False)
        row["seconds"] = time.monotonic() - began
        row.update(_figures(found, target))

    return records.attempt({**dict.fromkeys(FIELDS, ""), **task.named}, fill)


def _figures(found: Posterior, target: Target) -> dict[str, Any]:
    """ELBO, modes and the sd of x0 are those of raw draws, the errors those of the draws to use."""
    mean, sd = errors(target, found._used)
    rounds = list(found.history)
    return {
        "status": found.verdict.status,
        "k_hat": found.k_hat,
        "ess_ratio": found.verdict.ess_ratio,
        "elbo": found.elbo,
        "elbo_gap": target.log_evidence - found.elbo,
        "modes": modes_found(target, found.z) if target.modes else "",
        "of_modes": len(target.shares) or "",
        "sd_x0": float(found.z[:, 0].std()) if target.name.startswith("funnel") else "",
        "used_mean": mean,
        "used_sd": sd,
        "gradient_evaluations": found.settings["gradient_evaluations"],
        "steps": sum(stage["steps"] or 0 for stage in rounds),
        "layers_at_end": found.settings["sampler"].get("layers", ""),  # a mixture of Student-t distributions has none
        "rounds": " > ".join(str(stage["stage"]) for stage in rounds),
        "why": " > ".join(str(stage["why"] or "") for stage in rounds),
        "reasons": "; ".join(found.verdict.reasons),
    }


# ---- all of them -----------------------------------------------------------------------------------------------------


def bench(
    *, seeds: int, only: Sequence[str] = (), out: Path = OUT, jobs: int = 1, do: Callable[[Task], Row] = work
) -> list[Row]:
    """Do all fits that ``out`` does not have yet; return its rows of the present version.

    Args:
        seeds: how many seeds a case, from 0 on.
        only: names of targets, all by default.
        out: the CSV file.
        jobs: how many processes, of one thread each.
        do: what does a fit.

    Raises:
        ValueError: for an unknown target.
    """
    for name in only:
        if name not in TARGETS:
            raise ValueError(
                f"only: expected the name of a toy target, got {name!r}; choose from {', '.join(TARGETS)}."
            )
    version = records.code_version()
    rows = {tuple(row[name] for name in KEY): row for row in records.start(out, FIELDS)}
    cases = [case for case in CASES if not only or case.target in only]
    tasks = [Task(case, seed, version) for case in cases for seed in range(seeds)]
    for row in records.done([task for task in tasks if task.key not in rows], do, jobs):
        records.append(out, FIELDS, row)
        rows[tuple(row[name] for name in KEY)] = row
        print(line(row), flush=True)
    return [rows[task.key] for task in tasks]


def line(row: Row) -> str:
    """Return one line about one fit."""
    runs = "" if row["runs"] == "1" else f", {row['runs']} runs"
    head = f"{row['target']}, {row['flow']} {row['layers']}{runs}, seed {row['seed']}: "
    if row["error"]:
        return f"{head}{row['error']}"
    modes = f", {row['modes']} of {row['of_modes']} modes" if row["of_modes"] else ""
    sd = f", sd of x0 {float(row['sd_x0']):.2f}" if row["sd_x0"] else ""
    return (
        f"{head}{row['status']}; gap {float(row['elbo_gap']):.3f}{modes}{sd}, used {float(row['used_mean']):.3f} / "
        f"{float(row['used_sd']):.3f}, k-hat {float(row['k_hat']):.2f}, ESS/S {float(row['ess_ratio']):.2f}, "
        f"{row['gradient_evaluations']} gradients, {float(row['seconds']):.1f} s, {row['rounds']}"
    )


# ---- what they say ---------------------------------------------------------------------------------------------------


def wrong(row: Row) -> bool:
    """Whether a mode is missing, or the draws to use miss some mean by more than 0.25 sds or some sd by 25 %."""
    if row["error"]:
        return True
    return row["modes"] != row["of_modes"] or float(row["used_mean"]) > WRONG_MEAN or float(row["used_sd"]) > WRONG_SD


def newest(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    """Return the rows by case, of each case those of the version that was written last, one a seed."""
    found: dict[Case, dict[str, Row]] = {case: {} for case in CASES}
    for row in rows:
        case = Case(row["target"], row["flow"], int(row["layers"]), int(row["runs"]))
        kept = found.setdefault(case, {})
        if any(other["version"] != row["version"] for other in kept.values()):
            kept.clear()
        kept[row["seed"]] = row
    return {case: list(kept.values()) for case, kept in found.items() if kept}


def summary(rows: Sequence[Row]) -> str:
    """Return what the benchmark found, in one line."""
    failed = sum(bool(row["error"]) for row in rows)
    false = sum(wrong(row) and row["status"] == "ok" for row in rows)
    return f"{len(rows)} fits, {failed} of them failed; wrong and ok: {false}"


# ---- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=records.positive, default=5, help="seeds a case, from 0 on (default: 5)")
    parser.add_argument("--only", metavar="NAME", action="append", default=[], help="only this target; can be repeated")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows; those in it are kept")
    parser.add_argument("--jobs", type=records.positive, default=1, help="processes, one thread each (default: 1)")
    options = parser.parse_args(arguments)
    try:
        rows = bench(seeds=options.seeds, only=options.only, out=options.out, jobs=options.jobs)
    except ValueError as error:
        parser.error(str(error))
    print(summary(rows))
