"""Are samples digits? Flows of MNIST, without and with noise, and the share of their samples that a classifier names.

    python -m benchmarks.density.recognition --fits fits

A classifier names an image if one digit has a probability of .9. A plain one, trained on digits alone, names much that
is none. So there is a strict one too: it also knows a class of images that are stitched of quarters of four digits, and
names none of these. Both see training images with shifts and noise, so that they judge shapes. Samples of a flow that
was trained with noise are denoised. Those of a flow given the digit are as many of each digit, and its nats are those
of an image given its digit. With clusters, k-means parts the training images without their labels, and the flow is
given the cluster: a mixture of flows that share weights. A sample's cluster is drawn by its share, so nothing is given.
Nats are then a lower bound, log p(x, k) <= log p(x). A fit that is in the folder is not trained again.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

import pyro_flows as pf
from benchmarks import records
from benchmarks.density.problems import MNIST, MNIST_HINT, PROBLEMS, order
from benchmarks.density.running import spread
from benchmarks.markdown import about, table
from benchmarks.records import Row
from pyro_flows import datasets
from pyro_flows.support.datasets import Split

OUT = records.RESULTS / "recognition.csv"
PROBLEM, SHAPE, LEVELS, BATCH = "mnist images", (1, 28, 28), 256, 64
KNOWN, NAMED = 10, 0.9  # digits; probability from which on an image counts as named
EPOCHS, CLASSIFIED, SHIFT, BLUR = 4, 128, 2, 0.2  # of a classifier: images a step, pixels, largest sd of noise
STITCHED = 0.25  # share of such images that the strict classifier sees beside the digits
DRAWS, TEMPERATURES = 512, (1.0, 0.8)
IMAGES, GAUSSIAN = "test images", "Gaussian of the pixels"
KEY = ("variant", "seed", "budget", "temperature", "version")
FIELDS = (*KEY, "noise", "steps", "nats", "named", "strict", "accuracy", "strict accuracy", "machine", "software")


@dataclass(frozen=True)
class Variant:
    """Options of :func:`pyro_flows.multiscale_realnvp`, the noise, and how long it is trained, in CPU seconds.

    ``given`` says that images are conditional on their digit, ``clusters`` on one of so many clusters.
    """

    noise: float | None
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-3
    seconds: float = 80.0
    given: bool = False
    clusters: int = 0

    def flow(self) -> pf.Flow:
        """Return it, new; without noise it ends in a logit, as in the density benchmark."""
        options = {"levels": 2, "layers": 3, "hidden": (48, 48), "base": "normal", **self.options}
        options["context_dim"] = KNOWN if self.given else self.clusters
        return pf.multiscale_realnvp(SHAPE, alpha=0.05 if self.noise is None else None, **options)


DENSE: dict[str, Any] = {"hidden": (32, 32), "dense": (256, 256)}
WIDE: dict[str, Any] = {**DENSE, "dense": (512, 512)}
VARIANTS = {
    "no noise": Variant(None),
    "noise": Variant(0.1),
    "noise, wide dense": Variant(0.1, WIDE, 2e-3, 2400.0),
    "noise, wide dense, given the digit": Variant(0.1, WIDE, 2e-3, 2400.0, given=True),
    "noise, wide dense, 100 clusters": Variant(0.1, WIDE, 2e-3, 600.0, clusters=100),
    "noise, dense, three levels": Variant(0.1, {**DENSE, "levels": 3}),
}


# classifiers ----------------------------------------------------------------------------------------------------------


def classifier(images: Tensor, labels: Tensor, *, strict: bool, epochs: int = EPOCHS, seed: int = 0) -> nn.Module:
    """Train two convolutions and a hidden layer on bytes (N, 1, 28, 28); log probabilities of 10 digits come out.

    The strict one has an eleventh class of stitched images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2, padding=2)]
        net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU())
        net.append(nn.Linear(64, KNOWN + strict))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        steps = epochs * (len(images) // CLASSIFIED)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        for x, y in _batches(images, labels, epochs):
            if strict:
                other = stitched(x)[: round(STITCHED * len(x))]
                x, y = torch.cat([x, other]), torch.cat([y, y.new_full((len(other),), KNOWN)])
            x = x + BLUR * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def _batches(images: Tensor, labels: Tensor, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shifted images with values in [0, 1]."""
    side = images.shape[-1]
    for _ in range(epochs):
        for places in torch.randperm(len(images))[: len(images) // CLASSIFIED * CLASSIFIED].split(CLASSIFIED):
            top, left = torch.randint(2 * SHIFT + 1, (2,)).tolist()
            yield (
                pad(images[places].float() / (LEVELS - 1.0), (SHIFT,) * 4)[..., top : top + side, left : left + side],
                labels[places].long(),
            )


def stitched(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) of the quarters of four, with a random center."""
    height, width = images.shape[-2:]
    top, left = (int(torch.randint(side // 3, 2 * side // 3 + 1, ())) for side in (height, width))
    one, two, three, four = (images[torch.randperm(len(images))] for _ in range(4))
    upper = torch.cat([one[..., :top, :left], two[..., :top, left:]], -1)
    return torch.cat([upper, torch.cat([three[..., top:, :left], four[..., top:, left:]], -1)], -2)


@torch.no_grad()
def named(net: nn.Module, images: Tensor) -> float:
    """Return the share of images that have a digit of probability .9."""
    found = net(images.clamp(0.0, 1.0)).softmax(-1)[:, :KNOWN]
    return float((found.amax(1) >= NAMED).double().mean())


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose digit has the largest probability of the ten."""
    return float((net(images)[:, :KNOWN].argmax(1) == labels).double().mean())


# flows ----------------------------------------------------------------------------------------------------------------


def folder(name: str, seed: int, seconds: float) -> str:
    """Return the name of a fit's folder."""
    return f"{name}-{seed}-{seconds:g}".replace(", ", "-").replace(" ", "-")


def clustered(split: Split, count: int, seed: int) -> Split:
    """Return the cluster of each image, by k-means of the training images."""
    from sklearn.cluster import KMeans

    parts = [part.flatten(1).float().numpy() for part in (split.train, split.validation, split.test)]
    found = KMeans(count, random_state=seed).fit(parts[0])
    return Split(*(torch.from_numpy(found.predict(part)) for part in parts))


def columns(kinds: Tensor, width: int) -> Tensor:
    """Return the context of kinds (N,), a column for each (N, width)."""
    return one_hot(kinds.long(), width).float()


def fitted(
    name: str, split: Split, kinds: Split, seconds: float, seed: int, fits: Path | None, spent: float = 0.0
) -> pf.DensityFit:
    """Train a variant, given the kinds of images (digits or clusters) if it is conditional, or load it."""
    kept = None if fits is None else fits / folder(name, seed, seconds)
    if kept is not None and kept.exists():
        return pf.DensityFit.load(kept)
    variant = VARIANTS[name]
    torch.manual_seed(seed)
    flow, first = variant.flow(), spread(split.train[:500], LEVELS)
    context, held_out = None, split.validation[:2000]
    if flow.context_dim:
        context = columns(kinds.train, flow.context_dim)
        held_out = (held_out, columns(kinds.validation[:2000], flow.context_dim))
    about_first = None if context is None else context[:500]
    flow.bijection.start_from(first + (variant.noise or 0.0) * torch.randn_like(first), about_first)
    fit = pf.fit_density(
        flow, split.train, context=context, validation=held_out, levels=LEVELS, noise=variant.noise, batch=BATCH,
        learning_rate=variant.learning_rate, max_seconds=seconds - spent, clock="cpu", seed=seed, progress=False,
    )  # fmt: skip
    if kept is not None:
        fit.save(kept)
    return fit


def pictures(fit: pf.DensityFit, count: int, temperature: float = 1.0, clusters: Split | None = None) -> Tensor:
    """Return samples, denoised if the fit has noise; each given a cluster drawn by its share, or a digit in turn."""
    kinds, width = torch.arange(count) % KNOWN, fit.flow.context_dim
    if clusters is not None:
        kinds = clusters.train[torch.randint(len(clusters.train), (count,), generator=torch.Generator().manual_seed(0))]
    context = columns(kinds, width) if width else None
    drawn = fit.sample(count, context, temperature=temperature, seed=0)
    return fit.denoise(drawn, context) if fit.noise else drawn


def gaussian(train: Tensor, count: int) -> Tensor:
    """Return draws of a Gaussian with the mean and the covariance of images."""
    x = train[:20_000].flatten(1).double() / (LEVELS - 1.0)
    base = torch.distributions.MultivariateNormal(x.mean(0), x.mT.cov() + 1e-4 * torch.eye(x.shape[1]).to(x))
    return base.sample((count,)).float().unflatten(1, SHAPE)


def measure(names: Sequence[str], seconds: float | None, seed: int, fits: Path | None) -> Iterator[dict[str, Any]]:
    """Train the classifiers, then each variant; yield a row for each temperature, and two of what is no flow."""
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds, which are no training
    folder = Path(os.environ.get(MNIST, ""))
    split = PROBLEMS[PROBLEM].make(seed)
    train, test = (datasets.idx(next(iter(sorted(folder.glob(f"{part}-labels*"))))) for part in ("train", "t10k"))
    mixed = train[order(len(train), seed)]
    labels = Split(mixed[: len(split.train)], mixed[len(split.train) :], test)
    judges = {kind: classifier(split.train, labels.train, strict=kind == "strict") for kind in ("named", "strict")}
    images = split.test.float() / (LEVELS - 1.0)
    right = {kind: accuracy(judge, images, test) for kind, judge in judges.items()}
    common = {"seed": seed, "accuracy": f"{right['named']:.4f}", "strict accuracy": f"{right['strict']:.4f}"}

    def row(name: str, drawn: Tensor, **more: Any) -> dict[str, Any]:
        shares = {kind: f"{named(judge, drawn):.4f}" for kind, judge in judges.items()}
        return {**dict.fromkeys(FIELDS, ""), "variant": name, **common, **shares, **more}

    yield row(IMAGES, images)
    torch.manual_seed(seed)
    yield row(GAUSSIAN, gaussian(split.train, 2000))
    for name in names:
        budget, started = VARIANTS[name].seconds if seconds is None else seconds, time.process_time()
        clusters = clustered(split, VARIANTS[name].clusters, seed) if VARIANTS[name].clusters else None
        kinds = labels if clusters is None else clusters
        fit = fitted(name, split, kinds, budget, seed, fits, time.process_time() - started)
        width = fit.flow.context_dim
        nats = fit.nats(split.test[:2000], columns(kinds.test[:2000], width) if width else None)
        if clusters is not None:
            shares = clusters.train.bincount() / len(clusters.train)
            nats += float(shares.log()[clusters.test[:2000]].mean())
        for temperature in TEMPERATURES:
            drawn = pictures(fit, DRAWS, temperature, clusters)
            more = {"budget": f"{budget:g}", "temperature": temperature, "noise": fit.noise or ""}
            yield row(name, drawn, **more, steps=fit.settings["steps"], nats=f"{nats:.2f}")


# the table ------------------------------------------------------------------------------------------------------------


def section(rows: Sequence[Row]) -> str:
    """Return the text and the table, of the newest rows."""
    newest = list({tuple(row[name] for name in KEY[:-1]): row for row in rows}.values())
    told = ("variant", "budget", "steps", "nats", "noise")
    flows = list(dict.fromkeys(tuple(row[name] for name in told) for row in newest))
    body = []
    for name, budget, steps, nats, noise in flows:
        own = [row for row in newest if (row["variant"], row["budget"]) == (name, budget)]
        shares = [f"{100.0 * float(row[kind]):.0f}" for row in own for kind in ("named", "strict")]
        shares += [""] * (2 * len(TEMPERATURES) - len(shares))
        bits = "" if noise or not nats else f"{(math.log(LEVELS) - float(nats) / math.prod(SHAPE)) / math.log(2.0):.2f}"
        body.append([name, budget, steps, bits, f"{float(nats):.0f}" if noise else "", *shares])
    last = newest[-1]
    text = (
        f"Share of {DRAWS} samples in percent that a classifier names with a probability of {NAMED:g}, by the plain "
        f"one ({100.0 * float(last['accuracy']):.1f} % right on test images) and by the strict one "
        f"({100.0 * float(last['strict accuracy']):.1f} %), at temperatures {TEMPERATURES[0]:g} and "
        f"{TEMPERATURES[1]:g}. Bits a dimension are those of test images, nats those of noisy ones (σ = .1)."
    )
    head = ["", "CPU s", "steps", "bits", "nats", "T = 1", "strict", f"T = {TEMPERATURES[1]:g}", "strict"]
    versions = ", ".join(dict.fromkeys(row["version"] for row in newest))
    return "\n\n".join([text, f"{about(newest)} pyro_flows {versions}.", table(head, body)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density.recognition",
        description=f"{__doc__}\nSet {MNIST} to the folder of its files. {MNIST_HINT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="variants")
    parser.add_argument("--seconds", type=float, help="CPU seconds of each training (default: by variant)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fits", type=Path, help="folder to keep our fits in")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file")
    options = parser.parse_args(arguments)
    records.start(options.out, FIELDS)
    for row in measure(options.only, options.seconds, options.seed, options.fits):
        row.update(version=records.code_version(), machine=records.machine(), software=records.software())
        records.append(options.out, FIELDS, row)
        print(", ".join(f"{name} {row[name]}" for name in FIELDS[:10] if row[name] != ""), flush=True)


if __name__ == "__main__":
    main()
