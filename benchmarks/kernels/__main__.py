"""Hamiltonian against microcanonical moves: effective draws of the worst coordinate for a thousand gradients.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --only radon "funnel, 10" --seeds 3

64 chains in eight superchains move in the latent space of a flow of a short fit, the same for all kernels, or in the
model's coordinates, standardized. Step size and trajectory length are adapted by the same rules. After warm-up, each
kernel makes the same number of moves, and independent proposals are left out. ``microcanonical`` is MAMS with the
acceptance that Hamiltonian moves are held to; ``microcanonical .9`` with that of its authors. A table is printed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.kernels.targets import TARGETS, prepared
from benchmarks.markdown import table
from pyro_flows.inference.chains import adaptation, sampler
from pyro_flows.inference.chains.hmc import hamiltonian, microcanonical
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.sampler import Sampler
from pyro_flows.support.numbers import mixing

KERNELS = {
    "Hamiltonian": (hamiltonian, adaptation.WANTED),
    "microcanonical": (microcanonical, adaptation.WANTED),
    "microcanonical .9": (microcanonical, 0.9),
}
CHAINS, MOVES = 64, 200


@torch.no_grad()
def run(latent: Latent, names: Sequence[str], starts: Tensor, kernel: str, *, seed: int) -> dict[str, Any]:
    """Warm chains up, move them, and return what they came to."""
    move, wanted = KERNELS[kernel]
    given: dict[str, Any] = {"chains": CHAINS, "kept": 10 * MOVES, "seed": seed, "independence": 0}
    with mock.patch.object(sampler, "microcanonical", move), mock.patch.object(adaptation, "WANTED", wanted):
        chains = Sampler.begin(latent, names, starts, **given)
        before = latent.density.evaluations
        while chains.numbers["fixed_at"] is None:
            chains._warm_up()
        warmed = latent.density.evaluations
        for _ in range(MOVES):
            chains._keep(chains._sweep())
    gradients = latent.density.evaluations - warmed
    found = chains.chains()
    values = torch.cat([found.z.double(), found.stats["lp"].double()[..., None]], -1)
    figures = mixing.chain_diagnostics(values, chains.superchain)
    return {
        "bulk": 1000.0 * float(figures["ess_bulk"][:-1].min()) / gradients,
        "tail": 1000.0 * float(figures["ess_tail"][:-1].min()) / gradients,
        "lp": 1000.0 * float(torch.minimum(figures["ess_bulk"], figures["ess_tail"])[-1]) / gradients,
        "r_hat": float(figures["r_hat"].max()),
        "acceptance": float(found.stats["acceptance_rate"].mean()),
        "leaps": float(found.stats["n_steps"].mean()),
        "warm-up": warmed - before,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", type=records.positive, default=1)
    options = parser.parse_args(arguments)
    rows = []
    for name in options.only:
        made = prepared(name, 0)
        for kernel in KERNELS:
            found = [run(*made, kernel, seed=seed) for seed in range(options.seeds)]
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            figures = [
                f"{middle[key]:.3g}" for key in ("bulk", "tail", "lp", "r_hat", "acceptance", "leaps", "warm-up")
            ]
            rows.append([name, str(made[0].dim), kernel, *figures])
            print("  ".join(rows[-1]), flush=True)
    header = [
        "target",
        "D",
        "kernel",
        "bulk",
        "tail",
        "log density",
        "R-hat",
        "acceptance",
        "leaps",
        "gradients of warm-up",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
