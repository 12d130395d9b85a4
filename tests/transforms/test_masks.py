"""Masks: who is kept, who moves, and that a sequence of them leaves nobody behind."""

import pytest
import torch

from pyro_flows.transforms import masks

DIMS = [1, 2, 3, 4, 7, 10, 101]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("make", [masks.half, masks.alternating, lambda d, **more: masks.random(d, seed=3, **more)])
def test_a_mask_and_its_flip_are_complements(make, dim):
    """Except in one dimension, where the only coordinate always moves."""
    mask, flipped = make(dim), make(dim, flip=True)
    assert mask.shape == flipped.shape == (dim,)
    assert mask.dtype == flipped.dtype == torch.bool
    if dim == 1:
        assert not mask.any()
        assert not flipped.any()
    else:
        assert (mask ^ flipped).all()
        assert mask.sum() == dim // 2


@pytest.mark.parametrize("dim", DIMS)
def test_random_masks_follow_their_seed_alone(dim):
    torch.manual_seed(0)
    first = masks.random(dim, seed=4)
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, masks.random(dim, seed=4))
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    if dim > 4:
        assert any(not torch.equal(first, masks.random(dim, seed=seed)) for seed in range(5))


@pytest.mark.parametrize("dim", DIMS)
def test_sequence(dim):
    """Each pair moves every coordinate; no two neighbors are equal."""
    for layers in (1, 2, 3, 4, 7, 16):
        sequence = masks.sequence(dim, layers)
        assert len(sequence) == layers
        for first, second in zip(sequence[::2], sequence[1::2], strict=False):
            assert (~first | ~second).all()
            assert dim == 1 or torch.equal(first, ~second)
        assert all(not mask.all() for mask in sequence)
        again, other = masks.sequence(dim, layers), masks.sequence(dim, layers, seed=1)
        assert all(torch.equal(one, two) for one, two in zip(sequence, again, strict=True))
        if dim > 4 and layers > 4:
            assert any(not torch.equal(one, two) for one, two in zip(sequence, other, strict=True))


@pytest.mark.parametrize("dim", [2, 3, 4, 7, 10])
def test_soon_any_two_coordinates_meet(dim):
    """In 16 layers each coordinate is kept while each other one moves: a direct dependence of any on any."""
    sequence = torch.stack(masks.sequence(dim, 16))
    meets = (sequence[:, :, None] & ~sequence[:, None, :]).any(0)
    assert (meets | torch.eye(dim, dtype=torch.bool)).all()


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, "3"])
def test_wrong_dim(dim):
    for make in (masks.half, masks.alternating, lambda d: masks.random(d, seed=0), lambda d: masks.sequence(d, 2)):
        with pytest.raises(ValueError, match="dim: expected an integer >= 1"):
            make(dim)


@pytest.mark.parametrize("layers", [0, -2, 1.5])
def test_wrong_number_of_layers(layers):
    with pytest.raises(ValueError, match="layers: expected an integer >= 1"):
        masks.sequence(3, layers)
