"""Density estimation: our flows, those of zuko, nflows, normflows and Pyro, a Gaussian and a mixture of Gaussians.

    python -m benchmarks.density --only moons digits --seeds 0 1 2

All get the same data, split, number of layers, widths and CPU seconds of one thread, each in a process of its own.
What is already in the CSV file is not run again. Peers that are not installed are left out with a sentence. Beside the
results lies a log of our trainings: held-out nats by step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.density import peers as density_peers
from benchmarks.density.problems import CHEAP, PROBLEMS, Problem
from benchmarks.records import Row
from pyro_flows.support.datasets import Split

OUT = records.RESULTS / "density.csv"
FIELDS = ("problem", "method", "kind", "seed", "seconds", "test", "error", "best", "last", "steps", "dim", "version")
FIELDS += ("machine", "software")
LOG_FIELDS = ("problem", "kind", "seed", "seconds", "version", "step", "validation")
OURS, GAUSSIAN, MIXTURE = "pyro_flows", "Gaussian", "mixture of Gaussians"
COMPONENTS = (1, 2, 5, 10, 20, 50)
Result = dict[str, Any]


# one run --------------------------------------------------------------------------------------------------------------


def run(problem: Problem, method: str, kind: str, seed: int, seconds: float, keep: Path | None = None) -> Result:
    """Fit and test; return the mean log density of the test points, its standard error, the steps taken and more.

    ``keep`` is a folder for our fit, to draw from.
    """
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds, which are no training
    split = problem.make(seed)
    torch.manual_seed(seed)
    about = {"dim": split.train[0].numel()}
    if method == OURS:
        return about | _ours(problem, split, kind, seed, seconds, keep)
    train = spread(split.train, problem.levels).flatten(1)
    loc, scale = train.mean(0), train.std(0)
    if kind in problem.images:
        loc, scale = loc.mean().expand(loc.shape), train.std().expand(scale.shape)
    held_out, test = ((spread(part, problem.levels).flatten(1) - loc) / scale for part in split[1:])
    if method in (GAUSSIAN, MIXTURE):
        scores, steps = _humble((train - loc) / scale, held_out, test, (1,) if method == GAUSSIAN else COMPONENTS)
    else:
        made = density_peers.make(method, problem, kind, split.train.shape[1:])

        def rows(places: Tensor) -> Tensor:
            return (spread(split.train[places], problem.levels).flatten(1) - loc) / scale

        steps = density_peers.train(
            made, rows, held_out[:5000], points=len(train), batch=problem.batch, seconds=seconds
        )
        with torch.no_grad():
            scores = torch.cat([made[1](part) for part in test.split(500)])
    return about | _scored(scores.double() - scale.double().log().sum()) | {"steps": steps}


def spread(values: Tensor, levels: int | None) -> Tensor:
    return values if levels is None else (values + torch.rand(values.shape)) / levels


def _scored(scores: Tensor) -> Result:
    return {"test": round(float(scores.mean()), 5), "error": round(float(scores.std() / len(scores) ** 0.5), 5)}


def _ours(problem: Problem, split: Split, kind: str, seed: int, seconds: float, keep: Path | None) -> Result:
    flow = problem.flow(kind, split.train.shape[1:])
    if isinstance(flow, pf.Flow) and kind in problem.images:
        flow.bijection.start_from(spread(split.train[:500], problem.levels))
    fit = pf.fit_density(
        flow,
        split.train,
        validation=split.validation,
        levels=problem.levels,
        batch=problem.batch,
        max_seconds=seconds,
        clock="cpu",
        seed=seed,
        progress=False,
    )
    if keep is not None:
        fit.save(keep)
    scores = fit.log_prob(spread(split.test, problem.levels)).double()
    checks = fit.checks[:-1].tolist()  # the last one is of the weights that were chosen
    values = [value for _, value in checks]
    found = {"best": round(max(values), 3), "last": round(values[-1], 3)} if values else {}
    log = [(int(step), round(value, 3)) for step, value in checks]
    return _scored(scores) | {"steps": fit.settings["steps"], "log": log} | found


def _humble(train: Tensor, held_out: Tensor, test: Tensor, components: Sequence[int]) -> tuple[Tensor, int]:
    """Fit mixtures of Gaussians by scikit-learn; the best number of components by held-out points is kept."""
    from sklearn.mixture import GaussianMixture

    rows = train[:20_000].double().numpy()
    best = None
    for count in components:
        if count * train.shape[1] > len(rows):
            continue
        mixture = GaussianMixture(count, reg_covar=1e-3 if count > 1 else 1e-6, random_state=0).fit(rows)
        value = mixture.score(held_out.double().numpy())
        if best is None or value > best[0]:
            best = (value, mixture, count)
    assert best is not None
    return torch.as_tensor(best[1].score_samples(test.double().numpy())), best[2]


# all runs -------------------------------------------------------------------------------------------------------------


def plan(
    names: Sequence[str], methods: Sequence[str], seeds: Sequence[int], kinds: Sequence[str] | None = None
) -> list[tuple[str, str, str, int]]:
    """List the runs: problem, method, kind and seed."""
    return [
        (name, method, kind, seed)
        for name in names
        for seed in seeds
        for method in methods
        for kind in (PROBLEMS[name].kinds if method not in (GAUSSIAN, MIXTURE) else ("",))
        if not kind or kinds is None or kind in kinds
        if method not in density_peers.PEERS or density_peers.has(method, kind)
    ]


def installed(methods: Iterable[str]) -> list[str]:
    """Return those methods whose package is there, and say which are left out."""
    packages = {GAUSSIAN: "sklearn", MIXTURE: "sklearn", OURS: "pyro_flows"}
    found = []
    for method in methods:
        package = packages.get(method, method.lower())
        if importlib.util.find_spec(package):
            found.append(method)
        else:
            print(f"{method}: left out, since {package} is not installed.")
    return found


def bench(
    names: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    out: Path,
    kinds: Sequence[str] | None = None,
    seconds: float | None = None,
    fits: Path | None = None,
) -> None:
    """Run what is not in ``out`` yet, each in a process of its own; keep our fits in the folder ``fits``."""
    done = {key(row) for row in records.start(out, FIELDS)}
    log = out.with_name(f"{out.stem}_log.csv")
    records.start(log, LOG_FIELDS)
    version = records.code_version()
    for name, method, kind, seed in plan(names, methods, seeds, kinds):
        allowed = PROBLEMS[name].seconds if seconds is None else seconds
        row: dict[str, object] = {"problem": name, "method": method, "kind": kind, "seed": seed, "seconds": allowed}
        row["version"] = version if method == OURS else ""
        if key({field: str(value) for field, value in row.items()}) in done:
            continue
        given = ["--one", name, method, kind, str(seed), str(allowed)]
        found = records.by_process("benchmarks.density", given if fits is None else [*given, "--fits", str(fits)])
        if found is None:
            continue
        row.update(found)
        for step, value in _thinned(row.pop("log", [])):
            about = {field: row[field] for field in LOG_FIELDS[:5]}
            records.append(log, LOG_FIELDS, {**about, "step": step, "validation": value})
        row.update(machine=records.machine(), software=records.software())
        records.append(out, FIELDS, row)
        print(f"{name}, {method} {kind}, seed {seed}: {row['test']} nats, {row['steps']} steps", flush=True)


def _thinned(log: Any, most: int = 20) -> list[Any]:
    """Return about ``most`` entries of a log, the last among them."""
    return list(log[:: -max(1, len(log) // most)])[::-1]


def key(row: Row) -> tuple[str, ...]:
    """What makes two rows the same run: ours counts anew with each version of the code."""
    return tuple(row[field] for field in ("problem", "method", "kind", "seed", "seconds", "version"))


def means(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], tuple[float, float, int]]:
    """Return mean and worst nats and the number of seeds, by problem, seconds, method and kind. Last rows count."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        name = (row["problem"], row["seconds"], row["method"], row["kind"])
        found.setdefault(name, {})[row["seed"]] = float(row["test"])
    return {
        name: (statistics.fmean(by_seed.values()), min(by_seed.values()), len(by_seed))
        for name, by_seed in found.items()
    }


def _one(name: str, method: str, kind: str, seed: str, seconds: str, fits: Path | None) -> None:
    began = time.process_time()
    keep = None if fits is None else fits / f"{name}-{kind}-{seed}-{seconds}".replace(" ", "-")
    found = run(PROBLEMS[name], method, kind, int(seed), float(seconds), keep)
    print(json.dumps(found))
    print(f"{time.process_time() - began:.1f} CPU seconds with data and test", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everyone = [OURS, *density_peers.PEERS, GAUSSIAN, MIXTURE]
    kinds = list(dict.fromkeys(kind for problem in PROBLEMS.values() for kind in problem.kinds))
    parser.add_argument("--only", nargs="+", choices=list(PROBLEMS), default=CHEAP, help="problems")
    parser.add_argument("--methods", nargs="+", choices=everyone, default=everyone, help="methods (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=kinds, help="kinds of flows (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, help="CPU seconds of each run (default: by problem)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, which is added to")
    parser.add_argument("--fits", type=Path, help="folder to keep our fits in, to draw from")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        _one(*options.one, options.fits)
        return
    bench(
        options.only,
        installed(options.methods),
        options.seeds,
        out=options.out,
        kinds=options.kinds,
        seconds=options.seconds,
        fits=options.fits,
    )
