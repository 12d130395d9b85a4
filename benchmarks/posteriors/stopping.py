"""What the automatic stop costs: the ELBO of a first round against the same one run ten times as long.

    python -m benchmarks.posteriors.stopping --posteriordb PATH --seeds 1 --only arK

Both use one seed, and their ELBOs 20 000 common draws of the base. One row of the CSV file is one posterior and seed; a
row of the same version is not done again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.posteriors.models import NAMES, Problem, load
from benchmarks.posteriors.running import full_name
from pyro_flows import LogDensity
from pyro_flows.fitting.fit import MAX_STEPS
from pyro_flows.fitting.state import recipe_for, tails
from pyro_flows.flows.recipe import begin_at
from pyro_flows.inference.starts.coordinates import choose_coordinates
from pyro_flows.inference.starts.portfolio import portfolio
from pyro_flows.inference.training.loop import BATCH, STEP_SIZE, Budget, train
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.support.process.seeding import seeded

OUT = records.RESULTS / "stopping.csv"
LONGER = 10
DRAWS = 20_000
LIMIT = 0.02  # nats
FIELDS = (
    *("posterior", "seed", "version", "steps", "elbo", "longer_steps", "longer_elbo", "lost", "error_of_lost"),
    *("seconds", "longer_seconds", "why", "machine", "software"),
)


def first_round(problem: Problem, *, seed: int, steps: int | None = None) -> tuple[int, torch.Tensor, float, str]:
    """Return steps, ELBO terms on common draws, seconds and why it ended; ``steps`` switches the automatic stop off."""
    began = time.monotonic()
    with seeded(seed):
        density, extra = LogDensity(problem.model, problem.args), []
        if density.structure.hierarchical:
            density, found, _ = choose_coordinates(density, seed=seed)
            extra = [] if found is None else [found]
        start = portfolio(density, seed=seed, extra=extra)[0]
        recipe = recipe_for("realnvp", {}).with_df(tails(density.dim))
        flow = recipe.build_for_latents(density.dim).to(start.loc)
        begin_at(flow, start.loc, start.scale)
        trainer = Trainer(flow, density, learning_rate=STEP_SIZE, batch=BATCH)
        left = Budget(steps or MAX_STEPS)
        result = train(trainer, left, seed=seed, report=lambda *_: None, settle=steps is None)
    with seeded(seed + 1), torch.no_grad():
        base = flow.base_distribution()
        noise = base.sample((DRAWS,))
        z, ladj = flow.bijection.forward_and_ladj(noise)
        terms = density(z) - base.log_prob(noise) + ladj
    return len(trainer.losses), terms, time.monotonic() - began, result.why


def measure(name: str, seed: int, root: str | None, version: str) -> dict[str, Any]:
    """Return the row of one posterior and seed."""
    problem = load(name, root)
    steps, terms, seconds, why = first_round(problem, seed=seed)
    longer_steps, longer, longer_seconds, _ = first_round(problem, seed=seed, steps=LONGER * steps)
    difference = longer - terms
    row: dict[str, Any] = {"posterior": name, "seed": seed, "version": version, "steps": steps, "why": why}
    row.update(elbo=float(terms.mean()), longer_steps=longer_steps, longer_elbo=float(longer.mean()))
    row.update(lost=float(difference.mean()))
    row.update(error_of_lost=float(difference.std()) / DRAWS**0.5, seconds=seconds, longer_seconds=longer_seconds)
    row.update(machine=records.machine(), software=records.software())
    return {
        key: f"{float(value):.6g}" if isinstance(value, (float, torch.Tensor)) else value for key, value in row.items()
    }


def summary(rows: Sequence[records.Row]) -> str:
    """Return in how many fits the stop cost little, and the worst of them."""
    lost = sorted(float(row["lost"]) for row in rows)
    small = sum(value <= LIMIT for value in lost)
    return (
        f"{small} of {len(lost)} fits lost at most {LIMIT} nats by the automatic stop; the worst {lost[-1]:.3f} nats."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posteriors.stopping",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--posteriordb", help="a checkout of posteriordb")
    parser.add_argument("--seeds", type=int, default=1, help="seeds a posterior (default: 1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these posteriors only")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    version = records.code_version()
    rows = {(row["posterior"], row["seed"], row["version"]): row for row in records.start(options.out, FIELDS)}
    wanted = [(full_name(name), str(seed), version) for name in options.only or NAMES for seed in range(options.seeds)]
    for key in wanted:
        if key not in rows:
            row = measure(key[0], int(key[1]), options.posteriordb, version)
            records.append(options.out, FIELDS, row)
            rows[key] = {name: str(value) for name, value in row.items()}
            print(
                f"{key[0]}, seed {key[1]}: lost {row['lost']} nats by stopping after {row['steps']} steps", flush=True
            )
    print(summary([rows[key] for key in wanted]))


if __name__ == "__main__":
    main()
