"""Planar flows of 1, 2, 4 and 10 layers bent onto a ring-shaped density, from a Gaussian and from a uniform square.

    python -m benchmarks.toys.planar

The potential is the first of Rezende and Mohamed's, two arcs of a ring; the objective is the reverse divergence
KL(q || p), trained on tempered densities first, and reported in nats on fresh draws.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from pyro_flows import plots

LOG_Z = 1.8775
LAYERS, BASES = (1, 2, 4, 10), ("normal", "uniform")
OUT = records.RESULTS / "planar.csv"
FIELDS = ("base", "layers", "seed", "gap", "error", "seconds", "version", "machine", "software")


def log_density(z: Tensor) -> Tensor:
    """Return ``-U(z)``: a ring of radius 2, denser on its left and on its right."""
    ring = 0.5 * ((z.norm(dim=-1) - 2.0) / 0.4).square()
    sides = torch.stack([-0.5 * ((z[..., 0] - side) / 0.6).square() for side in (2.0, -2.0)])
    return torch.logsumexp(sides, 0) - ring


def train(layers: int, base: str, seed: int, steps: int = 8000, batch: int = 256) -> pf.Flow:
    """Fit by Adam, with a step size that falls along a cosine and an inverse temperature that rises to 1 half-way."""
    torch.manual_seed(seed)
    flow = pf.planar(2, layers=layers, base=base)
    with torch.no_grad():
        for parameter in flow.parameters():  # planar maps that all start alike stay alike
            parameter.add_(0.3 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(flow.parameters())
    for step in range(steps):
        heat = min(1.0, 0.05 + 2.0 * step / steps)
        y, log_q = flow.rsample_and_log_prob((batch,))
        optimizer.zero_grad()
        (log_q - heat * log_density(y)).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimizer.step()
    return flow


@torch.no_grad()
def gap(flow: pf.Flow, draws: int = 50_000) -> tuple[float, float]:
    """Return KL(q || p) in nats, and its standard error."""
    y, log_q = flow.rsample_and_log_prob((draws,))
    terms = (log_q - log_density(y)).double() + LOG_Z
    return float(terms.mean()), float(terms.std() / draws**0.5)


def bench(seeds: Sequence[int], *, out: Path, figures: Path | None = None, steps: int = 8000) -> None:
    """Run what is not in ``out`` yet, and draw each flow layer by layer into the folder ``figures``."""
    torch.set_num_threads(1)
    version = records.code_version()
    done = {(row["base"], row["layers"], row["seed"], row["version"]) for row in records.start(out, FIELDS)}
    for base in BASES:
        for layers in LAYERS:
            for seed in seeds:
                if (base, str(layers), str(seed), version) in done:
                    continue
                began = time.process_time()
                flow = train(layers, base, seed, steps)
                value, error = gap(flow)
                row = {"base": base, "layers": layers, "seed": seed, "gap": f"{value:.4f}", "error": f"{error:.4f}"}
                about = {"version": version, "machine": records.machine(), "software": records.software()}
                records.append(out, FIELDS, {**row, "seconds": f"{time.process_time() - began:.1f}", **about})
                print(f"{base}, {layers} layers, seed {seed}: {value:.4f} nats above the density's own", flush=True)
                if figures is not None:
                    figures.mkdir(parents=True, exist_ok=True)
                    plots.plot_layers(flow).savefig(figures / f"planar-{base}-{layers}-{seed}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toys.planar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, which is added to")
    parser.add_argument("--figures", type=Path, help="folder for a figure of each flow, layer by layer")
    options = parser.parse_args(arguments)
    bench(options.seeds, out=options.out, figures=options.figures)


if __name__ == "__main__":
    main()
