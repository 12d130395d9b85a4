"""The pictures of docs/understand/densities.md: fits that the density benchmark has kept, planar flows trained here.

    python -m benchmarks.density --only mnist photos --methods pyro_flows --seeds 0 --fits fits
    python -m benchmarks.density --only emoji --methods pyro_flows --seeds 0 --seconds 600 --fits fits
    python -m benchmarks.density --only "mnist images" --methods pyro_flows --seeds 0 --seconds 2400 --fits fits
    python -m benchmarks.density.recognition --only "noise, wide dense" "noise, wide dense, given the digit" \
        "noise, wide dense, 100 clusters" --fits fits
    python -m benchmarks.density.gallery --fits fits --out docs/images

A picture whose fit or data are absent is left out with a sentence.
"""

from __future__ import annotations

import argparse
import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import pyro_flows as pf
from benchmarks.density import recognition
from benchmarks.density.problems import PROBLEMS
from benchmarks.toys import planar
from pyro_flows import plots

SHAPES = {"mnist": (28, 28), "fashion-mnist": (28, 28)}
CORNERS = {"mnist images": (0, 1, 2, 4), "emoji": (0, 1, 2, 3), "photos": (0, 1, 2, 3)}  # test images of the walks
LONGER = {("mnist images", "multiscale"): 2400.0, ("emoji", "multiscale"): 600.0}
NOISY = {
    "noise": "noise, wide dense",
    "clusters": "noise, wide dense, 100 clusters",
    "given": "noise, wide dense, given the digit",
}  # of the recognition benchmark
Drawn = dict[str, Callable[[], Figure]]


def planar_figure(base: str) -> Figure:
    """Ten planar layers, drawn one by one."""
    return plots.plot_layers(planar.train(10, base, 0), count=1500)


def points(problem: str, part: str, seed: int = 0) -> Tensor:
    """Return images of the benchmark's split in the unit cube, at the middle of their levels."""
    values = getattr(PROBLEMS[problem].make(seed), part)
    return (values.float() + 0.5) / 256.0


def samples(fit: pf.DensityFit, problem: str, clusters: int = 0, count: int = 64) -> Figure:
    """Draws of the flow, denoised if it is of noisy images; given the digits in turn, or clusters by their shares."""
    kinds = recognition.clustered(PROBLEMS[problem].make(0), clusters, 0) if clusters else None
    return plots.plot_images(recognition.pictures(fit, count, clusters=kinds), SHAPES.get(problem))


def neighbors(fit: pf.DensityFit, problem: str) -> Figure:
    """Draws of the flow beside the training images nearest to them."""
    return plots.plot_nearest(fit.sample(8, seed=1), points(problem, "train"), count=5, image_shape=SHAPES.get(problem))


def walk(fit: pf.DensityFit, problem: str, chosen: Sequence[int]) -> Figure:
    """A walk between four test images, which stand in the corners; figures of many such walks are printed."""
    print(f"{problem}: {walk_figures(fit, problem)}")
    corners = points(problem, "test")[list(chosen)]
    return plots.plot_interpolation(fit.flow, corners, image_shape=SHAPES.get(problem))


def inpainting(fit: pf.DensityFit, problem: str, rows: int = 6) -> Figure:
    """Test images; what the flow was shown of them, and what it made of it, without the lower half or half of all."""
    whole = points(problem, "test")[:rows]
    side = int(whole.shape[1] ** 0.5)
    upper = torch.arange(side * side) < side * side // 2
    sparse = (torch.arange(side)[:, None] + torch.arange(side)).flatten() % 2 == 0
    columns = [whole]
    for known in (upper, sparse):
        filled = plots.inpaint(fit.flow, whole, known, steps=600, step_size=0.02, bounds=(0.0, 1.0))
        columns += [torch.where(known, whole, 0.5), filled]
    return plots.plot_images(torch.stack(columns, 1).flatten(0, 1), SHAPES.get(problem), columns=len(columns))


@torch.no_grad()
def walk_figures(fit: pf.DensityFit, problem: str, walks: int = 50) -> str:
    """Say how far corners are from the images, and how far latents on the grid are from typical ones, as normal ones.

    What counts as typical is the median norm of single test images' latents, which differ among themselves.
    """
    images = points(problem, "test")[: 4 * walks]
    latents = plots.to_normal(fit.flow, fit.flow.bijection.inverse_and_ladj(images)[0])
    norms = latents.flatten(1).norm(dim=1)
    typical, off, shares = float(norms.median()), {torch.float32: 0.0, torch.float64: 0.0}, []
    for four, z in zip(images.split(4), latents.split(4), strict=True):
        for dtype in off:
            flow = copy.deepcopy(fit.flow).to(dtype)
            walk = plots.interpolate(flow, four.to(dtype), steps=8)
            corners = torch.stack([walk[0, 0], walk[0, -1], walk[-1, 0], walk[-1, -1]])
            off[dtype] = max(off[dtype], float((corners - four).abs().max()))
        shares.append(plots.over_grid(z, 8).flatten(0, 1).flatten(1).norm(dim=1) / typical)
    grid, own = torch.stack(shares), norms / typical
    return (
        f"corners off by {off[torch.float32]:.1e} (float32), {off[torch.float64]:.1e} (float64); norms of latents "
        f"against the typical one: images {_spread(own)}, on the grid {_spread(grid)}, median by place on the grid "
        f"{float(grid.median(0).values.min()):.3f} to {float(grid.median(0).values.max()):.3f}"
    )


def _spread(values: Tensor) -> str:
    low, high = values.double().flatten().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return f"{low:.3f} to {high:.3f} (9 of 10)"


def drawings(fits: Path) -> Drawn:
    """Name the pictures and how each is made."""

    def of(name: str, problem: str, draw: Callable[..., Figure], *more: object) -> Callable[[], Figure]:
        return lambda: draw(pf.DensityFit.load(fits / name), problem, *more)

    nice = "mnist-additive-0-600.0"
    found: Drawn = {f"planar-{base}": lambda base=base: planar_figure(base) for base in planar.BASES}  # type: ignore[misc]
    found["nice-samples"] = of(nice, "mnist", samples)
    found["nice-nearest"] = of(nice, "mnist", neighbors)
    found["nice-spectrum"] = lambda: plots.plot_spectrum(pf.DensityFit.load(fits / nice).flow)
    found["nice-inpainting"] = of(nice, "mnist", inpainting)
    found["nice-walk"] = of(nice, "mnist", walk, (0, 1, 2, 4))
    for short, variant in NOISY.items():
        own = recognition.VARIANTS[variant]
        fit = recognition.folder(variant, 0, own.seconds)
        found[f"mnist-{short}-samples"] = of(fit, "mnist images", samples, own.clusters)
    for problem, corners in CORNERS.items():
        short = problem.removesuffix(" images")
        for kind in ("multiscale", "glow"):
            seconds = LONGER.get((problem, kind), PROBLEMS[problem].seconds)
            fit = f"{problem}-{kind}-0-{seconds}".replace(" ", "-")
            found[f"{short}-{kind}-samples"] = of(fit, problem, samples)
            found[f"{short}-{kind}-walk"] = of(fit, problem, walk, corners)
    return found


def save(figure: Figure, file: Path) -> None:
    """Write a small PNG: a hundred pixels an inch, a palette of 128 colors."""
    content = io.BytesIO()
    figure.savefig(content, dpi=100)
    with Image.open(content) as opened:
        opened.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--fits", type=Path, default=Path("fits"), help="folder that the density benchmark kept fits in"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures")
    parser.add_argument("--only", nargs="+", help="names of pictures (default: all)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in drawings(options.fits).items():
        if options.only and name not in options.only:
            continue
        try:
            save(draw(), options.out / f"{name}.png")
        except (FileNotFoundError, ValueError) as error:
            print(f"{name}: left out. {error}")


if __name__ == "__main__":
    main()
