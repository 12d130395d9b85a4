"""Render the color emoji of a font as images of 32 x 32 pixels, one file for the benchmarks of image flows.

    python -m benchmarks.density.emoji NotoColorEmoji.ttf emoji.npy

The font is Noto Color Emoji (SIL Open Font License), in Debian's package ``fonts-noto-color-emoji``. Its bitmaps are
laid on white and made smaller. Needs ``fonttools`` and ``pillow``.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


def bitmaps(font: Path) -> Iterator[bytes]:
    """Yield the PNG image of each glyph, in the order of their names.

    Raises:
        ValueError: if the font holds no color bitmaps.
    """
    from fontTools.ttLib import TTFont

    with TTFont(font, lazy=True) as opened:
        if "CBDT" not in opened:
            raise ValueError(f"font: expected one with color bitmaps (a CBDT table), {str(font)!r} has none.")
        for strike in opened["CBDT"].strikeData:
            for name in sorted(strike):
                yield strike[name].imageData


def render(font: Path, size: int = 32) -> np.ndarray:
    """Return the emoji as bytes, ``(count, 3, size, size)``, without doubles."""
    from PIL import Image

    found = {}
    for content in bitmaps(font):
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert("RGBA")
        side = max(picture.size)
        sheet = Image.new("RGBA", (side, side), "white")
        sheet.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        small = np.asarray(sheet.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
        found[small.tobytes()] = small
    return np.stack(list(found.values())).transpose(0, 3, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density.emoji",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("font", type=Path, help="file of the font")
    parser.add_argument("out", type=Path, help="file to write, .npy")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side (default: 32)")
    options = parser.parse_args(arguments)
    images = render(options.font, options.size)
    np.save(options.out, images)
    print(f"{len(images)} images of {options.size} x {options.size} in {options.out}")


if __name__ == "__main__":
    main()
