"""Time one SVI step of a Real-NVP guide: ours in Pyro's SVI, ours as ``fit`` trains it, and Pyro's own.

    python -m benchmarks.steps

20 dimensions, 8 couplings with hidden layers (32, 32), 64 particles, float32, one thread. Each step draws, scores,
takes the gradient and updates with Adam. The three take turns, in rotating order.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from benchmarks import records
from benchmarks.records import Row
from benchmarks.rivals import COUPLINGS, HIDDEN, PARTICLES, couplings
from pyro_flows import AutoRealNVP, LogDensity
from pyro_flows.training import Trainer

DIM = 20
LEARNING_RATE = 1e-3
OUT = records.RESULTS / "steps.csv"
FIELDS = ("method", "round", "position", "milliseconds", "version", "machine", "software")
SVI_OURS, FIT_OURS, SVI_PYRO = "AutoRealNVP in Pyro's SVI", "AutoRealNVP as fit trains it", "AutoNormalizingFlow (Pyro)"

Step = Callable[[], object]


def model(y: Tensor) -> None:
    """``theta ~ normal(0, I), y_i ~ student_t(5; theta_i + theta_{i-1} / 2, 0.5)``, i cyclic: nearly Gaussian."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    pyro.sample("y", dist.StudentT(5.0, theta + 0.5 * theta.roll(1, -1), 0.5).to_event(1), obs=y)


def steps() -> dict[str, Step]:
    """Return what takes one step, by method."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    y = torch.linspace(-1.0, 1.0, DIM)

    def svi(guide: Callable[..., object]) -> Step:
        elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
        inference = SVI(model, guide, Adam({"lr": LEARNING_RATE}), elbo)
        return lambda: inference.step(y)

    ours = AutoRealNVP(model, layers=COUPLINGS, hidden=HIDDEN)
    fitted = AutoRealNVP(model, layers=COUPLINGS, hidden=HIDDEN).initialize(y)
    trainer = Trainer(fitted.flow, LogDensity(model, (y,)), learning_rate=LEARNING_RATE, batch=PARTICLES)
    return {
        SVI_OURS: svi(ours),
        FIT_OURS: lambda: trainer.step(LEARNING_RATE),
        SVI_PYRO: svi(AutoNormalizingFlow(model, couplings)),
    }


def measure(rounds: int = 7, count: int = 30, warm_up: int = 20) -> list[dict[str, object]]:
    """Return one row a round and method: mean milliseconds of ``count`` steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = steps()
        for step in taken.values():
            _time(step, warm_up)
        rows: list[dict[str, object]] = []
        about = {"version": records.code_version(), "machine": records.machine(), "software": records.software()}
        names = list(taken)
        for round_ in range(rounds):
            shift = round_ % len(names)
            for position, name in enumerate(names[shift:] + names[:shift]):
                milliseconds = f"{1e3 * _time(taken[name], count) / count:.4f}"
                rows.append(
                    {"method": name, "round": round_, "position": position, "milliseconds": milliseconds, **about}
                )
    finally:
        torch.set_num_threads(before)
        pyro.clear_param_store()
    return rows


def _time(step: Step, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - began


def medians(rows: Iterable[Row]) -> dict[str, tuple[float, float]]:
    """Return the median milliseconds of a step and the median ratio to Pyro's in the same round, by method."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["method"], {})[row["round"]] = float(row["milliseconds"])
    theirs = times[SVI_PYRO]
    return {
        name: (
            statistics.median(found.values()),
            statistics.median(value / theirs[round_] for round_, value in found.items()),
        )
        for name, found in times.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--steps", type=int, default=30, help="steps a round and method (default: 30)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, written anew")
    options = parser.parse_args(arguments)
    records.write(options.out, FIELDS, measure(options.rounds, options.steps))
    for name, (milliseconds, ratio) in medians(records.read(options.out)).items():
        print(f"{name}: {milliseconds:.2f} ms a step, {ratio:.2f} times Pyro's")


if __name__ == "__main__":
    main()
