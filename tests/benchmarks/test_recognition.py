"""The benchmark of samples that a classifier names: stitched images, classifiers, a fit that is kept, the table."""

import pytest
import torch

from benchmarks.density import recognition
from pyro_flows.support.datasets import Split


def blobs(count, seed=0):
    """Ten classes of bytes: a bright square of four pixels a side, at a place of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = torch.zeros(count, *recognition.SHAPE, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 6 * (label // 4) + 4, 6 * (label % 4) + 2
        image[0, top : top + 4, left : left + 4] = 255
    return images, labels


def test_stitched_images_have_quarters_of_others():
    images = torch.arange(1.0, 9.0)[:, None, None, None].expand(8, 1, 9, 12)
    torch.manual_seed(0)
    found = recognition.stitched(images)
    assert found.shape == images.shape
    corners = torch.stack([found[:, 0, top, left] for top in (0, -1) for left in (0, -1)])
    assert all(sorted(corner.tolist()) == list(range(1, 9)) for corner in corners)
    assert (corners[1:] != corners[:1]).any(1).all()
    assert {len(image.unique()) for image in found} <= {1, 2, 3, 4}


@pytest.mark.slow
def test_a_fit_given_the_digit_draws_that_digit(monkeypatch):
    images, digits = blobs(3000)
    split, labels = (Split(whole[:2500], whole[2500:2700], whole[2700:]) for whole in (images, digits))
    small = {"hidden": (16,), "layers": 1, "dense": (64,)}
    monkeypatch.setitem(recognition.VARIANTS, "given", recognition.Variant(0.3, small, given=True))
    fit = recognition.fitted("given", split, labels, 20.0, 0, None)
    drawn = recognition.pictures(fit, 200)
    bright = torch.stack([image.double().mean(0) for image in split.train.split(1)])
    means = torch.stack([bright[labels.train == digit].mean(0).flatten() for digit in range(10)])
    nearest = (drawn.flatten(1).double() * 255.0 @ means.mT).argmax(1)
    assert float((nearest == torch.arange(200) % 10).double().mean()) > 0.9
