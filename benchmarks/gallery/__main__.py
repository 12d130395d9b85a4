"""Draw the pictures of docs/gallery.md and docs/understand, and print the verdicts.

    python -m benchmarks.gallery --posteriordb PATH
    python -m benchmarks.gallery garch moons

Names are those of the posteriors (schools, garch, process, seeds, faithful) and of the other pictures (moons,
centering, tails). A posterior whose data are absent is left out with a sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.gallery import pictures
from benchmarks.gallery.entries import ENTRIES

OTHERS = ("moons", "centering", "tails")
DPI = 150


def draw(name: str, root: str | None) -> Figure:
    """Draw one picture, and print what the verdicts say."""
    if name == "moons":
        return pictures.moons()
    if name == "tails":
        return pictures.tails()
    if name == "centering":
        return pictures.centering(ENTRIES["schools"](root))
    figure, found = pictures.compare(ENTRIES[name](root))
    for label, posterior in found.items():
        print(f"{name}, {label}: {posterior.verdict}")
    return figure


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
        figure.savefig(options.out / f"{prefix}{name}.png", dpi=DPI)


if __name__ == "__main__":
    main()
