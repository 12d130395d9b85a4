"""The map to the scale of data: an exact affine bijection, and what it is measured to be."""

from contextlib import nullcontext

import pytest
import torch

import pyro_flows as pf
from pyro_flows.densities.standardizing import preprocess
from pyro_flows.transforms.fixed import Preprocess
from tests.invariants import check_batching, check_gradients, check_ladj, check_round_trip


def layer(*, full, context_dim, shape=(3,)):
    generator = torch.Generator().manual_seed(0)
    dim = torch.Size(shape).numel()

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    scale = draw(dim, dim) + 2.0 * torch.eye(dim) if full else draw(*shape).exp()
    return Preprocess(draw(*shape), scale, draw(context_dim, dim) if context_dim else None)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_invariants(full, context_dim, shape):
    t = layer(full=full, context_dim=context_dim, shape=shape)
    x = torch.randn(5, *shape, dtype=torch.float64)
    context = torch.randn(5, context_dim, dtype=torch.float64) if context_dim else None
    check_round_trip(t, x, context, 1e-9)
    check_ladj(t, x, context, 1e-9)
    check_gradients(t, x, context)
    check_batching(t, x, context)


def test_standardized_data_have_mean_zero_and_unit_scale_whatever_their_units():
    y = torch.randn(5000, 3) * torch.tensor([1e-6, 1.0, 1e6]) + torch.tensor([1.0, -5.0, 3e6])
    x, _ = preprocess("standardize", [(y[:2000], None), (y[2000:], None)]).inverse_and_ladj(y)
    # float32 knows data near 1 to 6e-8, which is 6 % of the first scale
    assert x.mean(0).abs().max() < 0.07
    assert (x.std(0) - 1.0).abs().max() < 0.01


def test_white_data_are_uncorrelated():
    factor = torch.tensor([[1.0, 0.0, 0.0], [100.0, 50.0, 0.0], [0.1, -0.1, 0.05]])
    y = torch.randn(20_000, 3) @ factor.T
    for shrink, tolerance in ((False, 1e-3), (True, 0.02)):
        x, _ = preprocess("whiten", [(y, None)], shrink=shrink).inverse_and_ladj(y)
        assert (torch.cov(x.T) - torch.eye(3)).abs().max() < tolerance


def test_correlations_of_few_points_are_shrunk():
    """Of independent coordinates: the less is known, the more."""
    y = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    found = [preprocess("whiten", [(y, None)], shrink=shrink).scale for shrink in (True, False)]
    off = [float((scale / scale.diagonal() - torch.eye(10)).abs().mean()) for scale in found]
    assert off[0] < 0.5 * off[1]
    assert torch.linalg.cond(found[0]) < 5 < torch.linalg.cond(found[1])


def test_a_context_of_classes_takes_out_the_mean_of_each():
    labels = torch.arange(300) % 3
    onehot = torch.nn.functional.one_hot(labels, 3).float()
    y = torch.randn(300, 2) + 10.0 * labels[:, None]
    for kind in ("standardize", "whiten"):
        x, _ = preprocess(kind, [(y, onehot)]).inverse_and_ladj(y, onehot)
        for label in range(3):
            assert x[labels == label].mean(0).abs().max() < 0.02
        assert (x.std(0) - 1.0).abs().max() < 0.02


def test_a_context_of_numbers_takes_out_its_linear_effect():
    context = 5.0 + torch.randn(400, 1)
    y = 3.0 * context + 0.5 * torch.randn(400, 2)
    for kind in ("standardize", "whiten"):
        x, _ = preprocess(kind, [(y, context)]).inverse_and_ladj(y, context)
        assert x.mean(0).abs().max() < 0.01
        assert (x.std(0) - 1.0).abs().max() < 0.02


def test_a_linear_effect_is_exact_where_noise_is_small_and_contexts_depend_on_each_other():
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    context = torch.cat([x, x.sum(1, keepdim=True), torch.ones(200, 1)], 1)
    made = preprocess("standardize", [(x.sum(1, keepdim=True) + 1e-4 * noise, context)])
    assert float(made.scale) == pytest.approx(1e-4, rel=0.15)
    assert float(made.slope.abs().max()) < 1.0


@pytest.mark.parametrize("columns", [50, 100])
def test_contexts_of_many_columns_are_not_learned_by_heart(columns):
    generator = torch.Generator().manual_seed(0)
    context, noise = torch.randn(60, columns, generator=generator), torch.randn(60, 1, generator=generator)
    made = preprocess("standardize", [(noise, context)])
    assert float(made.scale) > 0.7
    assert float(made.slope.square().sum()) < 0.3


def test_narrow_data_are_not_constant(recwarn):
    points = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        preprocess("standardize", [(1e-30 * points, None)]).scale, 1e-30 * points.std(0, correction=0)
    )
    assert not recwarn


def test_images_get_one_scale():
    y = torch.randn(500, 1, 2, 2) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scale = preprocess("standardize", [(y, None)], pooled=True).scale
    assert torch.equal(scale, scale.flatten()[0].expand(1, 2, 2))
    assert float(scale.flatten()[0]) == pytest.approx(30**0.5 / 2, rel=0.1)


def test_a_constant_coordinate_gets_the_narrowest_other_scale():
    y = torch.randn(400, 3) * torch.tensor([0.5, 1.0, 4.0])
    y[:, 1] = 7.0
    with pytest.warns(UserWarning, match="coordinate 1 is constant"):
        t = preprocess("standardize", [(y, None)])
    assert float(t.scale[1]) == pytest.approx(float(y[:, 0].std()), rel=0.01)
    with pytest.warns(UserWarning, match="3 of 3"):
        assert preprocess("standardize", [(torch.ones(5, 3), None)]).scale.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("scale", "slope", "message"),
    [
        (torch.tensor([1.0, 0.0]), None, "a positive diagonal"),
        (torch.tensor([1.0, -1.0]), None, "a positive diagonal"),
        (torch.zeros(2, 2), None, "that can be inverted"),
        (torch.ones(3), None, "expected shape"),
        (torch.ones(2), torch.ones(4, 3), "slope: expected shape"),
    ],
)
def test_bad_arguments(scale, slope, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(torch.zeros(2), scale, slope)


def test_bad_points_and_kinds():
    t = layer(full=False, context_dim=0)
    with pytest.raises(ValueError, match="Preprocess: expected shape"):
        t.forward_and_ladj(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Did you mean 'whiten'"):
        preprocess("white", [(torch.zeros(2, 4), None)])
    assert pf.Flow(t).event_shape == (3,)


@pytest.mark.parametrize("kind", ["standardize", "whiten"])
def test_both_ways_meet_after_a_change_of_dtype(kind):
    y = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3e-3, 700.0]) + 0.1
    layer = preprocess(kind, [(y, None)]).double()
    x, _ = layer.inverse_and_ladj(y.double())
    assert torch.allclose(layer.forward_and_ladj(x)[0], y.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("many", [9, 12])
def test_rows_of_few_different_values_are_named(many):
    y = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).repeat(many, 1)
    options = {"max_epochs": 1, "learning_rate": 0.01, "progress": False}
    copies = pytest.warns(UserWarning, match="648 rows have 60 different values") if many == 12 else nullcontext()
    with copies:
        pf.fit_density("nice", y, **options)
    pf.fit_density("nice", y, noise=0.1, **options)
