"""Milliseconds of one step of maximum likelihood, in CPU time of one thread: ours, peers and a bare loop.

    python -m benchmarks.density.speed

Eight affine couplings in the plane with networks of 64 x 64, 512 points a step: as ``fit_density`` trains them, and as
zuko and Pyro do. NICE on images of 784 pixels, 4 couplings of 3 x 512, 200 a step: against a loop of plain torch that
does nothing else. All take turns, so that a busy machine slows all of them; the median of the rounds is shown.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import pyro_flows as pf
from benchmarks.density import peers as density_peers
from pyro_flows.densities.ascent import Ascent, rouse
from pyro_flows.densities.points import rows
from pyro_flows.densities.standardizing import preprocess
from pyro_flows.densities.training import AVERAGE_EVERY

Step = Callable[[], object]


def ours(flow: pf.Flow, data: Tensor, batch: int, levels: int | None = None) -> Step:
    """Return a step as ``fit_density`` takes it: batch, noise, loss, gradient, clipping, update, average."""
    source = rows("data", data, None, torch.zeros(()))
    if levels is not None:
        source = source.quantized(levels)
    layer = preprocess("standardize", source.first(5000).ordered(5000))
    flow = pf.Flow(pf.transforms.Compose([*flow.bijection.layers, layer]), base=flow.base)  # type: ignore[union-attr]
    rouse(flow)
    ascent = Ascent(flow, source, [], batch=batch)
    batches = _forever(source, batch)

    def step() -> None:
        ascent.step(*next(batches), 1e-4)
        ascent.state.steps += 1
        if ascent.state.steps % AVERAGE_EVERY == 0:
            ascent.update_average()

    return step


def _forever(source: object, batch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    while True:
        yield from source.shuffled(batch)  # type: ignore[attr-defined]


def peer(name: str, data: Tensor, batch: int, layers: int, hidden: tuple[int, ...]) -> Step:
    """Return a step of a peer with the recipe that the density benchmark trains it by."""
    parameters, log_prob = density_peers.PEERS[name]("affine", data.shape[1], layers, hidden, 8)
    optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(data[torch.randint(len(data), (batch,))]).mean()).backward()
        nn.utils.clip_grad_norm_(parameters, 50.0)
        optimizer.step()

    return step


def bare_nice(data: Tensor, batch: int, hidden: Sequence[int]) -> Step:
    """Return a step of the same NICE in plain torch, with the fused Adam; ``data`` are bytes."""
    half = data.shape[1] // 2
    sizes = [half, *hidden]
    nets = nn.ModuleList(
        nn.Sequential(
            *(part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())),
            nn.Linear(sizes[-1], half),
        )
        for _ in range(4)
    )
    scale = nn.Parameter(torch.zeros(data.shape[1]))
    parameters = [*nets.parameters(), scale]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    loc, spread = 0.13, 0.3

    def step() -> None:
        optimizer.zero_grad()
        y = (data[torch.randint(len(data), (batch,))] + torch.rand(batch, data.shape[1])) / 256.0
        first, second = ((y - loc) / spread).unflatten(-1, (-1, 2)).unbind(-1)
        for number, net in enumerate(nets):
            if number % 2:
                first = first - net(second)
            else:
                second = second - net(first)
        x = torch.cat([first, second], -1) * torch.exp(-scale)
        loss = (scale.sum() + data.shape[1] * math.log(spread)) - (2.0 * logsigmoid(x) - x).sum(-1).mean()
        loss.backward()
        optimizer.step()

    return step


def measure(steps: dict[str, Step], rounds: int, each: int) -> dict[str, float]:
    """Return milliseconds of CPU time a step, the median over rounds in which all take turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            for _ in range(each):
                step()
            found[name].append(1000.0 * (time.process_time() - began) / each)
    return {name: statistics.median(times) for name, times in found.items()}


def plane(rounds: int = 15, each: int = 20, names: Sequence[str] = ("zuko", "Pyro")) -> dict[str, float]:
    """Time the flows in the plane."""
    torch.manual_seed(0)
    data, hidden = pf.datasets.toy("moons", 20_000), (64, 64)
    flow = pf.realnvp(2, layers=8, hidden=hidden, activation="relu", mask="alternating")
    steps = {"pyro_flows": ours(flow, data, 512)}
    return measure(steps | {name: peer(name, data, 512, 8, hidden) for name in names}, rounds, each)


def images(rounds: int = 15, each: int = 5) -> dict[str, float]:
    """Time NICE on random bytes: the time does not depend on what the images show."""
    torch.manual_seed(0)
    data, hidden = torch.randint(256, (5000, 784), dtype=torch.uint8), (512,) * 3
    flow = pf.nice(784, layers=4, hidden=hidden, activation="relu", mask="alternating", base="logistic")
    return measure({"pyro_flows": ours(flow, data, 200, 256), "bare loop": bare_nice(data, 200, hidden)}, rounds, each)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each (default: 15)")
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    for what, found in (("plane", plane(rounds)), ("images", images(rounds))):
        best = min(value for name, value in found.items() if name != "pyro_flows")
        words = ", ".join(f"{name} {value:.2f} ms" for name, value in found.items())
        print(f"{what}: {words}; ours is {found['pyro_flows'] / best:.0%} of the fastest other")


if __name__ == "__main__":
    main()
