"""A variational autoencoder on scikit-learn's digits: what a flow as posterior, and one as prior, bring each.

    python -m benchmarks.priors.autoencoders --seeds 3
    python -m benchmarks.priors.autoencoders --epochs 240 --only "N(0, I), K = 0" "N(0, I), K = 10" "Real-NVP, K = 0"

The autoencoder is that of the notebook ``11_inside_pyro``: an image has six latents, and its 17 levels a pixel are
binomial given these. One thing is changed at a time: K planar maps after the encoder's Gaussian, with parameters of the
encoder; or a Real-NVP in the place of the prior N(0, I). All are trained alike, by the same number of steps. A row of
the CSV file is one training, judged on 297 other images: the ELBO, and the importance-weighted bound on the log
evidence by 1000 draws an image (Burda, Grosse and Salakhutdinov 2016, arXiv 1509.00519), in nats an image.
"""

from __future__ import annotations

import argparse
import ast
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

from benchmarks import records
from benchmarks.markdown import about, table
from benchmarks.records import Row
from pyro_flows import datasets

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebooks" / "11_inside_pyro.py"
OUT = records.RESULTS / "autoencoders.csv"
VARIANTS = {
    "N(0, I), K = 0": (0, False),
    "N(0, I), K = 10": (10, False),
    "N(0, I), K = 20": (20, False),
    "N(0, I), K = 40": (40, False),
    "Real-NVP, K = 0": (0, True),
    "Real-NVP, K = 40": (40, True),
}
PLAIN = "N(0, I), K = 0"
TRAINED, BATCH, SEEDS = 1500, 100, 3
EPOCHS, RATE = 80, 5e-3
DRAWS, TOGETHER = 1000, 50  # draws an image for the bound
GOAL = 1.0  # nats
KEY = ("variant", "seed", "version", "epochs")
FIELDS = ("variant", "seed", "version", "elbo", "bound", "trained", "epochs", "seconds", "error", "machine", "software")


def autoencoder(planar_layers: int, flow_prior: bool) -> Any:
    """Return the autoencoder of the notebook."""
    names: dict[str, Any] = {}
    tree = ast.parse(NOTEBOOK.read_text(encoding="utf-8"))
    kept = [part for part in tree.body if isinstance(part, (ast.Import, ast.ImportFrom)) or _is_of_model(part)]
    exec(compile(ast.Module(kept, []), str(NOTEBOOK), "exec"), names)
    return names["Autoencoder"](planar_layers, flow_prior)


def _is_of_model(part: ast.stmt) -> bool:
    sizes = isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "(LATENTS, WIDTH)"
    return sizes or (isinstance(part, ast.ClassDef) and part.name == "Autoencoder")


def images() -> tuple[Tensor, Tensor]:
    """Return the images to train on and the others, (N, 64) each."""
    every = datasets.digits()[0].float()
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    return every[:TRAINED], every[TRAINED:]


def learn(vae: Any, train: Tensor, epochs: int) -> None:
    """Train by Pyro's SVI."""
    decay = 0.1 ** (1 / (math.ceil(len(train) / BATCH) * epochs))
    svi = SVI(vae.model, vae.guide, ClippedAdam({"lr": RATE, "lrd": decay}), Trace_ELBO())
    for _ in range(epochs):
        for part in train[torch.randperm(len(train))].split(BATCH):
            svi.step(part)


@torch.no_grad()
def bounds(vae: Any, images: Tensor, draws: int = DRAWS) -> tuple[float, float]:
    """Return the ELBO and the importance-weighted bound, in nats an image."""
    posterior, ratios = vae.posterior(vae.encoder(images / 16.0)), []
    for _ in range(math.ceil(draws / TOGETHER)):
        z = posterior.sample((TOGETHER,))
        likelihood = torch.distributions.Binomial(16, logits=vae.decoder(z)).log_prob(images).sum(-1)
        ratios.append(vae.prior().log_prob(z) + likelihood - posterior.log_prob(z))
    ratio = torch.cat(ratios).double()
    return float(ratio.mean()), float((torch.logsumexp(ratio, 0) - math.log(len(ratio))).mean())


def measure(variant: str, seed: int, version: str, epochs: int = EPOCHS) -> Row:
    """Do one training and return its row."""

    def fill(row: dict[str, Any]) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        train, test = images()
        vae = autoencoder(*VARIANTS[variant])
        began = time.process_time()
        learn(vae, train, epochs)
        row["seconds"] = time.process_time() - began
        row["elbo"], row["bound"] = bounds(vae, test)
        row["trained"] = bounds(vae, train[:300])[1]

    row = {**dict.fromkeys(FIELDS, ""), "variant": variant, "seed": seed, "version": version, "epochs": epochs}
    return records.attempt(row, fill)


def section(rows: Sequence[Row]) -> str:
    """Return the text and the table, of the newest row of each training."""
    newest = {(row["variant"], row["epochs"], row["seed"]): row for row in rows if not row["error"]}
    body = []
    for epochs in sorted({epochs for _, epochs, _ in newest}, key=int):
        for variant in VARIANTS:
            mine = [row for (name, own, _), row in newest.items() if (name, own) == (variant, epochs)]
            if mine:
                gains = [float(row["bound"]) - float(newest[PLAIN, epochs, row["seed"]]["bound"]) for row in mine]
                means = [sum(float(row[key]) for row in mine) / len(mine) for key in ("elbo", "bound", "seconds")]
                gained = "" if variant == PLAIN else f"{sum(gains) / len(gains):.2f} ({min(gains):.2f})"
                cells = [f"{means[0]:.2f}", f"{means[1]:.2f}", gained, f"{means[2]:.0f}"]
                body.append([variant, str(epochs), str(len(mine)), *cells])
    rows = list(newest.values())
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    text = (
        "The mean over seeds, in nats an image, of 297 images that were not "
        f"trained on. The bound is the importance-weighted one by {DRAWS} draws. In brackets: the smallest gain of a "
        f"seed, over {PLAIN} after as many epochs. An epoch has {TRAINED} images."
    )
    header = ("prior, planar maps", "epochs", "seeds", "ELBO", "bound", "gain in the bound", "CPU s")
    return "\n\n".join([text, f"{about(rows)} pyro_flows {versions}.", table(header, body)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.priors.autoencoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=records.positive, default=SEEDS, help=f"trainings each (default: {SEEDS})")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="these variants only")
    parser.add_argument("--epochs", type=records.positive, default=EPOCHS, help=f"of a training (default: {EPOCHS})")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file")
    options = parser.parse_args(arguments)
    version = records.code_version()
    done = {tuple(row[name] for name in KEY) for row in records.start(options.out, FIELDS)}
    for seed in range(options.seeds):
        for variant in options.only:
            if (variant, str(seed), version, str(options.epochs)) not in done:
                row = measure(variant, seed, version, options.epochs)
                records.append(options.out, FIELDS, row)
                found = ", ".join(f"{key} {row[key]}" for key in ("elbo", "bound", "trained", "seconds", "error"))
                print(f"{variant}, seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    main()
