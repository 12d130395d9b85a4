"""Draw the pictures of README, docs/gallery.md, docs/understand and docs/reference, and print the verdicts.

    python -m benchmarks.gallery --posteriordb PATH
    python -m benchmarks.gallery garch moons

Names are those of the posteriors (schools, garch, process, seeds, faithful) and of the other pictures (pairs,
moons, centering, tails, transforms, plots-posterior and others). A posterior whose data are absent is left out with a
sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.gallery import pictures, reference
from benchmarks.gallery.entries import ENTRIES

OTHERS = ("pairs", "moons", "centering", "tails", *reference.PICTURES)
DPI = 150


def draw(name: str, root: str | None) -> Figure:
    """Draw one picture, and print what the verdicts say."""
    if name == "moons":
        return pictures.moons()
    if name == "tails":
        return pictures.tails()
    if name in reference.PICTURES:
        return reference.PICTURES[name]()
    if name == "centering":
        return pictures.centering(ENTRIES["schools"](root))
    figure, found = pictures.schools_pairs() if name == "pairs" else pictures.compare(ENTRIES[name](root))
    for label, posterior in found.items():
        print(f"{name}, {label}: {posterior.verdict}")
    return figure


def compact(path: Path) -> None:
    """Store a picture with a palette: half of the bytes, and the same to the eye."""
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None, draw: Callable[[str, str | None], Figure] = draw) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*ENTRIES, *OTHERS]
    parser.add_argument("names", nargs="*", choices=[*known, []], default=known, metavar="NAME")
    parser.add_argument("--posteriordb", help="a checkout of posteriordb")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.names:
        try:
            figure = draw(name, options.posteriordb)
        except (LookupError, FileNotFoundError, ValueError) as error:
            print(f"{name}: left out, since {error}")
            continue
        prefix = "gallery-" if name in ENTRIES else ""
        path = options.out / f"{prefix}{name}.png"
        figure.savefig(path, dpi=DPI)
        compact(path)


if __name__ == "__main__":
    main()
