"""Posteriors of several modes: one call of ``fit``, against one run a mode.

    python -m benchmarks.modes
    python -m benchmarks.modes --only slcp_1 mixture --ways fit

- fit: as it comes, a mixture at all modes of a survey, or tables of independent coordinates, where these are enough.
- runs: the same without both, so that a run starts at each missed mode, weighted by evidence.

Rows are added to a CSV file as they are done.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.markdown import range_text
from benchmarks.modes import labels, sbi
from benchmarks.records import Row
from benchmarks.toys import targets
from pyro_flows.fitting import combine, methods

OUT = records.RESULTS / "modes.csv"
FIELDS = [
    "version", "target", "way", "seed", "dim", "status", "modes", "least", "most", "c2st", "evidence_error", "k_hat",
    "ess_ratio", "seconds", "reasons", "ledger", "error", "machine", "software",
]  # fmt: skip
LIMIT = 900.0  # seconds of the clock, for one run a mode
FOUND = 0.25  # of a mode's mass
COMPARED = 4000  # draws for the classifier


@dataclass(frozen=True)
class Problem:
    """A model, its data, a site, which mode each draw is in with what masses, and what else is known."""

    model: Callable[..., None]
    data: Callable[[], tuple[Any, ...]]
    site: str
    modes: Callable[[Tensor], Tensor]
    shares: tuple[float, ...]
    log_evidence: float | None = None
    reference: Callable[[], Tensor] | None = None


def _of_target(name: str) -> Problem:
    target = targets.TARGETS[name]
    assert target.modes is not None
    return Problem(target.model, tuple, "x", target.modes, target.shares, target.log_evidence)


def _of_sbibm(name: str, number: int) -> Problem:
    count = {"slcp": 4, "two_moons": 2}[name]
    data, reference = partial(sbi.observation, name, number), partial(sbi.reference, name, number)
    task = sbi.TASKS[name]
    return Problem(task.model, lambda: (data(),), "parameters", task.modes, (1.0 / count,) * count, None, reference)


PROBLEMS = {
    **{name: _of_target(name) for name in ("u1", "mixture", "many_well")},
    **{f"{name}_{number}": _of_sbibm(name, number) for name in ("two_moons", "slcp") for number in (1, 2, 3)},
    "labels": Problem(labels.labels, lambda: (labels.data(),), "places", labels.orders, (1.0 / 6.0,) * 6),
}


def fit(problem: Problem, way: str, seed: int) -> pf.Posterior:
    """Fit one problem in one way."""
    told: dict[str, Any] = {"seed": seed, "progress": False}
    if way == "fit":
        return pf.fit(problem.model, *problem.data(), **told)
    nothing: Any = lambda *_, **__: None  # noqa: E731
    told["max_seconds"] = LIMIT
    with mock.patch.object(methods, "multimodal", nothing), mock.patch.object(combine, "multimodal", nothing):
        return pf.fit(problem.model, *problem.data(), **told)


def run(task: tuple[str, str, int]) -> Row:
    """Fit one problem in one way with one seed; return its row."""
    name, way, seed = task

    def fill(row: dict[str, Any]) -> None:
        problem = PROBLEMS[name]
        began = time.process_time()
        posterior = fit(problem, way, seed)
        row.update(seconds=time.process_time() - began, dim=posterior.z.shape[1], status=posterior.verdict.status)
        row.update(k_hat=posterior.k_hat, ess_ratio=posterior.verdict.ess_ratio)
        row["reasons"] = "; ".join(posterior.verdict.reasons)[:300]
        draws = posterior.samples[problem.site].double()
        ratios = problem.modes(draws).double().mean(0) / torch.tensor(problem.shares).double()
        found = int((ratios > FOUND).sum())
        row.update(modes=f"{found} of {len(ratios)}", least=float(ratios.min()), most=float(ratios.max()))
        if problem.log_evidence is not None:
            row["evidence_error"] = abs(posterior.log_evidence - problem.log_evidence)
        if problem.reference is not None:
            row["c2st"] = sbi.c2st(problem.reference()[:COMPARED], draws[:COMPARED])

    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    row.update(version=records.code_version(), target=name, way=way, seed=seed)
    return records.attempt(row, fill)


def section(rows: Sequence[Row], table: Any, about: Any) -> str:
    """Return the section of ``docs/evidence/accuracy.md``."""
    rows = newest(rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["way"]), []).append(row)
    body = []
    for (target, way), kept in groups.items():
        masses = [float(row[name]) for row in kept for name in ("least", "most") if row[name]]
        modes = min((row["modes"] for row in kept if row["modes"]), key=lambda text: int(text.split()[0]), default="")
        dims = next((row["dim"] for row in kept if row["dim"]), "")
        verdicts = ", ".join(dict.fromkeys(row["status"] or "failed" for row in kept))
        figures = [_worst(kept, *column) for column in FIGURES]
        body.append([target, way, str(len(kept)), dims, modes, range_text(masses, 2), *figures, verdicts])
    header = ["target", "way", "seeds", "D", "modes", "masses", "C2ST", "log Z off", "k-hat", "ESS/S", "seconds"]
    text = (
        "Figures are those of the worst seed, seconds medians.\n\n"
        "`fit`: as it comes. `runs`: one run a mode instead, weighted by evidence, with "
        f"{LIMIT:.0f} seconds of the clock. "
        "A mode is found if it has 25 % of its mass; masses are relative to the right "
        "ones. C2ST is the accuracy of sbibm's classifier on 4000 draws of each kind, .5 if it cannot tell them apart. "
        f"Seconds are of the processor.\n\n{about(rows)} pyro_flows "
        f"{', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    return f"{text}\n\n{table([*header, 'verdicts'], body)}"


def newest(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each target, way and seed."""
    return list({(row["target"], row["way"], row["seed"]): row for row in rows}.values())


FIGURES: tuple[tuple[str, int, Callable[[list[float]], float]], ...] = (
    ("c2st", 3, max),
    ("evidence_error", 4, max),
    ("k_hat", 2, max),
    ("ess_ratio", 2, min),
    ("seconds", 1, statistics.median),
)


def _worst(rows: Sequence[Row], name: str, digits: int, of: Callable[[list[float]], float]) -> str:
    values = [float(row[name]) for row in rows if row[name] and math.isfinite(float(row[name]))]
    return f"{of(values):.{digits}f}" if values else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--ways", nargs="+", choices=("fit", "runs"), default=["fit", "runs"])
    parser.add_argument("--seeds", type=records.positive, default=3, help="from 0 on (default: 3)")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    known = {(row["version"], row["target"], row["way"], row["seed"]) for row in records.start(options.out, FIELDS)}
    version = records.code_version()
    for name, way, seed in product(options.only, options.ways, range(options.seeds)):
        if (version, name, way, str(seed)) in known:
            continue
        row = run((name, way, seed))
        records.append(options.out, FIELDS, row)
        print(f"{name} {way} {seed}: {row['status'] or row['error']}, {row['modes']}, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
