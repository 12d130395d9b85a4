"""Synthetic images for a classifier that has seen few: a conditional flow, a Gaussian of each class, mixup, and none.

    python -m benchmarks.density.augmentation --seeds 5

scikit-learn's digits, 10, 30 or 100 labels a class, accuracies on 797 other images. The methods are those of
``examples/augmentation.py``: blends of real images in the latent space of a flow given the class, 100 a class; and as
many draws of a Gaussian of each class with a shrunk covariance. Mixup (Zhang et al. 2018, arXiv 1710.09412) makes 1000
convex combinations of two images, with weights of a Beta(0.2, 0.2) distribution; each stands with both labels and these
weights, or with the larger one's label for nearest neighbors, which take no weights. What a method adds has the weight
of all real images together. Otherwise the loss would have up to eleven times as many terms beside the same penalty, and
a logistic regression would lose accuracy by that alone. A row of the CSV file is one seed, with its own images, one
method and one classifier.
"""

from __future__ import annotations

import argparse
import functools
import math
import runpy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.markdown import about, table
from benchmarks.records import Row

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "augmentation.py"
OUT = records.RESULTS / "augmentation.csv"
LABELS, SEEDS, EPOCHS = (10, 30, 100), 5, 300
NONE, FLOW, GAUSSIAN, MIXUP = "no augmentation", "conditional flow", "class Gaussian", "mixup"
METHODS = (NONE, FLOW, GAUSSIAN, MIXUP)
MIXED, CONCENTRATION = 1000, 0.2  # images; parameter of the Beta distribution
KEY = ("labels", "seed", "method", "classifier", "version")
FIELDS = (*KEY, "accuracy", "seconds", "error", "machine", "software")
Set = tuple[Tensor, Tensor, Tensor]  # images, labels, weights


@functools.cache
def example() -> dict[str, Any]:
    """Return the names of the example."""
    return runpy.run_path(str(EXAMPLE))


def mixup(images: Tensor, labels: Tensor, seed: int) -> Set:
    """Return combinations of two images, each with both labels and their weights."""
    generator = np.random.default_rng(seed)
    first, second = (torch.as_tensor(generator.integers(len(images), size=MIXED)) for _ in range(2))
    share = torch.as_tensor(generator.beta(CONCENTRATION, CONCENTRATION, MIXED), dtype=images.dtype)
    mixed = share[:, None] * images[first] + (1.0 - share[:, None]) * images[second]
    return mixed.repeat(2, 1), torch.cat([labels[first], labels[second]]), torch.cat([share, 1.0 - share])


def synthetic(method: str, images: Tensor, labels: Tensor, seed: int, epochs: int) -> Set | None:
    """Return what a method adds to the real images."""
    if method == NONE:
        return None
    if method == MIXUP:
        return mixup(images, labels, seed)
    make = example()["blends" if method == FLOW else "gaussians"]
    fake, digits = make(images, labels, *((epochs,) if method == FLOW else ()), seed=seed)
    return fake, digits, torch.ones(len(fake))


def weighted(real: tuple[Tensor, Tensor], added: Set) -> Set:
    """Return real and added images, whose weights have the same sum for the two kinds."""
    images, labels, weights = added
    each = torch.cat([torch.ones(len(real[0])), weights * (len(real[0]) / weights.sum())])
    return torch.cat([real[0], images]), torch.cat([real[1], labels]), each


def accuracy(name: str, real: tuple[Tensor, Tensor], added: Set | None, test: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of a classifier by its name in the example.

    Nearest neighbors take no weights, so of two labels of an image they get the likelier one.
    """
    images, labels, weights = (*real, torch.ones(len(real[0])))
    if added is not None:
        kept = added[2] > (0.5 if name == "1-NN" else 0.0)
        images, labels, weights = weighted(real, (added[0][kept], added[1][kept], added[2][kept]))
    argument = {"SVM": "sample_weight", "logistic": "logisticregression__sample_weight"}.get(name)
    given = {} if argument is None else {argument: weights.numpy()}
    return float(example()["CLASSIFIERS"][name].fit(images, labels, **given).score(*test))


def measure(labels: int, seed: int, method: str, version: str, epochs: int = EPOCHS) -> list[Row]:
    """Do one method with one set of images; return a row for each classifier."""
    real, test = example()["draw_split"](labels, seed)
    began, added = time.process_time(), None
    row: dict[str, Any] = {**dict.fromkeys(FIELDS, ""), "labels": labels, "seed": seed, "method": method}
    row["version"] = version

    def fill(row: dict[str, Any]) -> None:
        nonlocal added
        added = synthetic(method, *real, seed, epochs)
        row["seconds"] = time.process_time() - began

    row = records.attempt(row, fill)
    if row["error"]:
        return [row]
    return [
        {**row, "classifier": name, "accuracy": f"{accuracy(name, real, added, test):.6g}"}
        for name in example()["CLASSIFIERS"]
    ]


def section(rows: Sequence[Row]) -> str:
    """Return the text and the table, of the newest rows."""
    newest = list({tuple(row[name] for name in KEY[:-1]): row for row in rows if not row["error"]}.values())
    classifiers = dict.fromkeys(row["classifier"] for row in newest)
    kinds = [(int(labels), name) for labels in dict.fromkeys(row["labels"] for row in newest) for name in classifiers]
    gains = {
        (labels, name, method): _gain(
            [row for row in newest if (int(row["labels"]), row["classifier"]) == (labels, name)], method
        )
        for labels, name in kinds
        for method in METHODS
    }
    body = [
        [f"{labels} a class, {name}", *(_cell(*gains[labels, name, method]) for method in METHODS)]
        for labels, name in kinds
    ]
    below = [kind for kind in kinds if gains[*kind, FLOW][0] < -gains[*kind, FLOW][1]]
    few = [kind for kind in kinds if kind[0] == min(LABELS)]
    best = sum(all(gains[*kind, FLOW][0] > gains[*kind, other][0] for other in (GAUSSIAN, MIXUP)) for kind in few)
    worse = ", ".join(f"{labels} a class, {name}" for labels, name in below) or "nowhere"
    text = (
        "Accuracy without augmentation, and the change by each method, in percentage points: means over "
        f"{len({row['seed'] for row in newest})} seeds, with standard errors of the change, seed by seed. The flow is "
        f"below no augmentation by more than a standard error: {worse}. "
        f"With {min(LABELS)} labels a class, it is better than both others for {best} of {len(few)} classifiers."
    )
    versions = ", ".join(dict.fromkeys(row["version"] for row in newest))
    return "\n\n".join([text, f"{about(newest)} pyro_flows {versions}.", table(("labels, classifier", *METHODS), body)])


def _gain(rows: Sequence[Row], method: str) -> tuple[float, float]:
    """Return the mean change of the accuracy and its standard error; of no augmentation, the accuracy itself."""
    known = {(row["seed"], row["method"]): 100.0 * float(row["accuracy"]) for row in rows}
    found = [
        value - (0.0 if method == NONE else known[seed, NONE]) for (seed, of), value in known.items() if of == method
    ]
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan


def _cell(mean: float, error: float) -> str:
    return f"{mean:.1f} ± {error:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density.augmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=records.positive, default=SEEDS, help=f"of images and fits (default: {SEEDS})")
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS, help="labels a class")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="these methods only")
    parser.add_argument("--epochs", type=records.positive, default=EPOCHS, help="of the flow at most")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file")
    options = parser.parse_args(arguments)
    version = records.code_version()
    done = {
        tuple(row[name] for name in ("labels", "seed", "method", "version"))
        for row in records.start(options.out, FIELDS)
    }
    for seed in range(options.seeds):
        for labels in options.labels:
            for method in options.methods:
                if (str(labels), str(seed), method, version) in done:
                    continue
                for row in measure(labels, seed, method, version, options.epochs):
                    records.append(options.out, FIELDS, row)
                    print(
                        ", ".join(f"{name} {row[name]}" for name in (*KEY[:-1], "accuracy", "seconds", "error")),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
