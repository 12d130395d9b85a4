"""Maps and flows of images: what is rearranged and where it goes; flows of images and signals as distributions."""

import inspect

import pytest
import torch
from pyro.distributions import TransformedDistribution

import pyro_flows as pf
from pyro_flows.flows.recipe import BUILDERS
from pyro_flows.flows.recipe_json import to_json
from pyro_flows.transforms import base, masks
from pyro_flows.transforms.networks import Dense, Network, RobustConvolution
from tests.invariants import check_path_gradient, check_score, close, jacobian
from tests.registry import HIDDEN, IMAGE, IMAGE_FLOWS, SIGNAL, SIGNAL_FLOWS, built, make_flow, normal
from tests.state_invariants import check_evaluations, copies

SHAPES = {**dict.fromkeys(IMAGE_FLOWS, IMAGE), **dict.fromkeys(SIGNAL_FLOWS, SIGNAL)}


def test_squeeze_keeps_blocks_together():
    """Each block of 2 x 2 becomes a pixel; in its channels, both halves are checkerboards of the image."""
    x = torch.arange(2 * 4 * 6, dtype=torch.float64).reshape(2, 4, 6)
    layer = pf.transforms.Squeeze((2, 4, 6))
    y, ladj = layer.forward_and_ladj(x)
    assert (y.shape, ladj) == ((8, 2, 3), 0.0)
    assert sorted(y[:, 1, 2].tolist()) == sorted(x[:, 2:, 4:].flatten().tolist())
    checkerboard = masks.checkerboard((2, 4, 6))
    assert set(y[:4].flatten().tolist()) == set(x[~checkerboard].tolist())
    assert torch.equal(layer.inverse_and_ladj(y)[0], x)
    assert torch.equal(layer.inv(y), x)


def test_squeeze_is_a_transform_that_changes_the_shape():
    layer = pf.transforms.Squeeze((2, 4, 6)).double()
    assert layer.event_shape == layer.inverse_shape((8, 2, 3)) == (2, 4, 6)
    assert layer.inv.event_shape == layer.forward_shape((2, 4, 6)) == layer.inv.inverse_shape((2, 4, 6)) == (8, 2, 3)
    flow = pf.Flow(layer).double()
    assert (flow.base_shape, flow.event_shape, flow.dim) == ((2, 4, 6), (8, 2, 3), 48)
    distribution = flow()
    assert (distribution.batch_shape, distribution.event_shape) == ((), (8, 2, 3))
    y = distribution.rsample((5,))
    close(distribution.log_prob(y), flow.base_distribution().log_prob(layer.inv(y)), 1e-12)
    x = normal(3, 2, 4, 6, seed=1)
    score = normal(3, 2, 4, 6, seed=2)
    close(layer.forward_and_score(x, score)[2], layer(score), 0.0)
    close(base.Bijection.forward_and_score(layer, x, score)[2], layer(score), 0.0)
    for sides in ((2, 3, 4), (2, 4, 3)):
        with pytest.raises(ValueError, match="dim: expected an even height and width"):
            pf.transforms.Squeeze(sides)
    with pytest.raises(ValueError, match=r"Squeeze: expected a tensor of shape \(\.\.\., 8, 2, 3\)"):
        layer.inverse_and_ladj(x)


def test_chains_see_through_changes_of_shape():
    squeeze = pf.transforms.Squeeze((1, 4, 4))
    chain = pf.transforms.Compose([squeeze, pf.transforms.ActNorm((4, 2, 2)), pf.transforms.Squeeze((4, 2, 2))])
    assert (chain.event_shape, chain.forward_shape((7, 1, 4, 4))) == ((1, 4, 4), (7, 16, 1, 1))
    assert chain.inverse_shape((7, 16, 1, 1)) == (7, 1, 4, 4)
    with pytest.raises(ValueError, match=r"layer 1 \(ActNorm\) expects .*\(1, 4, 4\), but gets \(4, 2, 2\)"):
        pf.transforms.Compose([squeeze, pf.transforms.ActNorm((1, 4, 4))])
    with pytest.raises(ValueError, match="layers: "):
        pf.transforms.Compose([pf.transforms.Rescale(2), pf.transforms.Rescale(3)])


def test_multi_scale_leaves_half_alone():
    coarse = built(lambda: pf.transforms.AffineCoupling((2, 2, 2), hidden=HIDDEN), dtype=torch.float64, sd=0.3, seed=0)
    layer = pf.transforms.MultiScale(coarse)
    x = normal(5, 4, 2, 2, seed=1)
    y, ladj = layer.forward_and_ladj(x)
    close(y[:, :2], x[:, :2], 0.0)
    expected = coarse.forward_and_ladj(x[:, 2:])
    close(y[:, 2:], expected[0], 0.0)
    close(ladj, expected[1], 0.0)
    for bad in (pf.transforms.Squeeze((1, 2, 2)), torch.nn.Linear(2, 2), pf.transforms.Bijection()):
        with pytest.raises(ValueError, match=r"^coarse: "):
            pf.transforms.MultiScale(bad)


@pytest.mark.parametrize("mask", [masks.checkerboard, masks.channels], ids=["checkerboard", "channels"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "kind", [pf.transforms.AdditiveCoupling, pf.transforms.AffineCoupling, pf.transforms.SplineCoupling]
)
def test_kept_pixels_stay_and_the_rest_depend_on_them_alone(kind, flip, mask):
    """Exactly, both ways; and each moved pixel depends on itself and on kept ones only."""
    kept = mask(IMAGE, flip=flip)
    layer = built(lambda: kind(IMAGE, mask=kept, hidden=HIDDEN), dtype=torch.float64, sd=0.2, seed=0)
    x = normal(3, *IMAGE, seed=1)
    for way in (layer.forward_and_ladj, layer.inverse_and_ladj):
        y, _ = way(x)
        assert torch.equal(y[:, kept], x[:, kept])
        assert ((y != x)[:, ~kept]).all()
    matrix = jacobian(lambda point: layer.forward_and_ladj(point)[0], x, 3).abs().amax(0)
    across = matrix[~kept.flatten()][:, ~kept.flatten()]
    assert (across - torch.diag(across.diagonal())).max() == 0.0
    assert (matrix[~kept.flatten()][:, kept.flatten()].amax(1) > 0.0).all()


def test_masks_of_images_are_complements():
    for make in (masks.checkerboard, masks.channels):
        mask, flipped = make((3, 4, 5)), make((3, 4, 5), flip=True)
        assert mask.dtype == torch.bool
        assert (mask ^ flipped).all()
        assert mask.any()
    board = masks.checkerboard((1, 3, 3))[0]
    assert (board[1:] ^ board[:-1]).all()
    assert (board[:, 1:] ^ board[:, :-1]).all()
    for make, bad in ((masks.channels, (1, 2, 2)), (masks.checkerboard, 4), (masks.checkerboard, (2, 2))):
        with pytest.raises(ValueError, match=r"^shape: "):
            make(bad)


def test_a_1x1_convolution_is_one_matrix_for_all_pixels():
    layer = built(lambda: pf.transforms.Conv1x1(IMAGE, seed=1), dtype=torch.float64, sd=0.3, seed=0)
    x = normal(5, *IMAGE, seed=1)
    units = torch.eye(2, dtype=torch.float64)[:, :, None, None].expand(2, *IMAGE)
    weight = layer(units)[:, :, 0, 0].T
    close(layer(x), torch.nn.functional.conv2d(x, weight[:, :, None, None]), 1e-12)
    close(layer.forward_and_ladj(x)[1], 16 * torch.linalg.slogdet(weight)[1].expand(5), 1e-12)


@pytest.mark.parametrize("dim", [3, 7])
def test_lu_permutations_start_as_permutations(dim):
    layer = pf.transforms.LULinear(dim, seed=2)
    x = torch.arange(float(dim))
    assert sorted(layer(x).tolist()) == x.tolist()
    assert not torch.equal(layer(x), x)


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", SHAPES)
class TestFlows:
    def test_starts_as_its_base(self, name, context_dim):
        """Up to a permutation of the pixels, which the base does not see."""
        flow = make_flow(name, SHAPES[name], context_dim=context_dim, sd=0.0)
        y, context = normal(6, *SHAPES[name], seed=1), normal(6, 3, seed=2) if context_dim else None
        close(flow.log_prob(y, context), flow.base_distribution().log_prob(y), 1e-12)

    def test_draws_and_scores_agree(self, name, context_dim):
        flow = make_flow(name, SHAPES[name], context_dim=context_dim, sd=0.1)
        batch, context = ((4,), normal(4, 3, seed=1)) if context_dim else ((), None)
        distribution = flow(context)
        assert isinstance(distribution, TransformedDistribution)
        assert (distribution.batch_shape, distribution.event_shape) == (batch, SHAPES[name])
        y, log_q = flow.rsample_and_log_prob((5, 2), context)
        assert (y.shape, log_q.shape) == ((5, 2, *batch, *SHAPES[name]), (5, 2, *batch))
        close(log_q, flow.log_prob(y.detach(), context), 1e-8)
        close(log_q, distribution.log_prob(y.detach()), 1e-8)
        assert distribution.rsample((5, 2)).shape == y.shape

    def test_one_evaluation_of_each_layer(self, name, context_dim):
        flow = make_flow(name, SHAPES[name], context_dim=context_dim, sd=0.1)
        distribution = flow(normal(3, seed=1) if context_dim else None)
        check_evaluations(flow, lambda: distribution.log_prob(distribution.rsample((4,))))

    def test_every_parameter_is_used(self, name, context_dim):
        flow = make_flow(name, SHAPES[name], context_dim=context_dim, sd=0.1)
        y, context = normal(50, *SHAPES[name], seed=1), normal(50, 3, seed=2) if context_dim else None
        flow.log_prob(y, context).sum().backward()
        for key, parameter in flow.named_parameters():
            assert parameter.grad.abs().sum() > 0.0, key

    def test_settings_rebuild_the_flow(self, name, context_dim):
        more = {} if name in SIGNAL_FLOWS else {"alpha": 0.1}
        flow = make_flow(name, SHAPES[name], context_dim=context_dim, dtype=torch.float32, sd=0.1, **more)
        settings = to_json(flow)
        assert settings.keys() == inspect.signature(BUILDERS[name]).parameters.keys() | {"builder"}
        twin = BUILDERS[settings.pop("builder")](**{**settings, "dim": list(settings["dim"])})
        assert twin.recipe == flow.recipe
        twin.load_state_dict(flow.state_dict())
        y, context = torch.full((2, *SHAPES[name]), 0.3), torch.ones(2, 3) if context_dim else None
        close(twin.log_prob(y, context), flow.log_prob(y, context), 0.0)

    def test_copies(self, name, context_dim):
        flow = make_flow(name, SHAPES[name], context_dim=context_dim, sd=0.1)
        other = make_flow(name, SHAPES[name], context_dim=context_dim, sd=0.2)
        y, context = normal(2, *SHAPES[name], seed=1), normal(2, 3, seed=2) if context_dim else None
        expected = flow.log_prob(y, context)
        for kind, twin in copies(flow, other):
            close(twin.log_prob(y, context), expected, 0.0, kind)


@pytest.mark.parametrize("name", SHAPES)
def test_path_gradient_vanishes_at_the_target(name):
    check_path_gradient(make_flow(name, SHAPES[name], sd=0.1))


@pytest.mark.parametrize("name", SHAPES)
def test_the_score_of_the_base_class_is_that_of_the_layers(name):
    """The default, through the inverse, works for events of any shape."""
    flow = make_flow(name, SHAPES[name], sd=0.1)

    class Default(pf.transforms.Inverse):
        forward_and_score = base.Bijection.forward_and_score

    check_score(Default(flow.bijection.inv), normal(3, *SHAPES[name], seed=1), None, 1e-9)


@pytest.mark.parametrize("name", IMAGE_FLOWS)
def test_pixels_across_the_image_meet(name):
    """Each output depends on many inputs, and no input is lost."""
    flow = make_flow(name, (1, 4, 4), sd=0.1)
    x = normal(8, 1, 4, 4, seed=1)
    matrix = jacobian(flow.bijection, x, 3).abs().amax(0)
    assert ((matrix > 0.0).sum(1) > 4).all()
    assert (matrix.amax(0) > 0.0).all()
    assert ((flow.bijection(x) - x).abs().amax(0) > 1e-6).all()


@pytest.mark.parametrize(("shape", "levels"), [((1, 6, 6), 2), ((1, 3, 5), 1), ((2, 1, 4), 1)])
def test_odd_sides_keep_their_checkerboards(shape, levels):
    """The last scale of those is parted as an image."""
    options = {"levels": levels, "layers": 1, "hidden": HIDDEN}
    flow = built(lambda: pf.multiscale_realnvp(shape, **options), dtype=torch.float64, sd=0.1, seed=0)
    x = normal(3, *shape, seed=1)
    y, ladj = flow.bijection.forward_and_ladj(x)
    close(flow.bijection.inverse_and_ladj(y)[0], x, 1e-10)
    matrix = jacobian(flow.bijection, x, 3)
    close(ladj, torch.linalg.slogdet(matrix)[1], 1e-10)
    assert ((y - x).abs().amax(0) > 1e-6).all()


def test_a_scale_parts_images_by_checkerboards_and_by_rows():
    """In the order of sampling; networks see squeezed images, so masks are laid out as images here."""
    shape = (2, 4, 4)
    flow = pf.multiscale_realnvp(shape, levels=2, layers=2, hidden=HIDDEN)
    found = [
        part.mask for part in flow.modules() if isinstance(part, pf.transforms.AffineCoupling) and part.dim == (8, 2, 2)
    ]
    board, even = masks.checkerboard(shape), (torch.arange(4) % 2 == 0)[:, None].expand(shape)
    unfold = pf.transforms.Squeeze(shape).inv
    expected = [even, ~even, board, ~board]
    assert [(unfold(mask.float()) == 1.0).tolist() for mask in found] == [part.tolist() for part in expected]


@pytest.mark.parametrize(("shape", "sides"), [((1, 8, 8), (2, 2)), ((1, 12, 12), (3, 3))])
def test_the_last_scale_may_be_dense(shape, sides):
    """Its perceptrons see all pixels of that scale, and convolutions are left above it."""
    levels = 2 if shape[1] == 8 else 3
    options = {"levels": levels, "layers": 1, "hidden": (4,), "dense": (5,)}
    flow = built(lambda: pf.multiscale_realnvp(shape, **options), dtype=torch.float64, sd=0.1, seed=0)
    kinds = [type(part) for part in flow.modules() if isinstance(part, Network)]
    assert kinds == [Dense] * 2 + [RobustConvolution] * 2 * (levels - 1)
    assert {part.sides for part in flow.modules() if isinstance(part, Dense)} == {sides}
    x = normal(3, *shape, seed=1)
    y, ladj = flow.bijection.forward_and_ladj(x)
    close(flow.bijection.inverse_and_ladj(y)[0], x, 1e-10)
    close(ladj, torch.linalg.slogdet(jacobian(flow.bijection, x, 3))[1], 1e-9)
    assert flow.recipe.options["dense"] == (5,)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("dim", lambda: pf.glow(4)),
        ("dim", lambda: pf.glow((1, 6, 8))),
        ("dim", lambda: pf.multiscale_realnvp((1, 5, 4))),
        ("dim", lambda: pf.multiscale_realnvp((4, 4))),
        ("dim", lambda: pf.multiscale_realnvp((1, 2, 2), levels=2)),
        ("dim", lambda: pf.transforms.Conv1x1(3)),
        ("dim", lambda: pf.transforms.AffineCoupling((2, 0, 2))),
        ("dim", lambda: pf.nice((1, 4, 4))),
        ("dim", lambda: pf.spline((1, 4, 4))),
        ("mask", lambda: pf.transforms.AffineCoupling((2, 2, 2), mask=torch.zeros(2, 2, 2))),
        ("mask", lambda: pf.transforms.AffineCoupling((2, 2, 2), mask=[True, False])),
        ("shape", lambda: pf.transforms.AffineCoupling((1, 2, 2))),
        ("dense", lambda: pf.multiscale_realnvp(IMAGE, dense=(0,))),
        ("dense", lambda: pf.multiscale_realnvp(IMAGE, dense=0)),
        ("network", lambda: pf.glow(IMAGE, network="mlp")),
        ("network", lambda: pf.realnvp(2, network="convolution")),
        ("hidden", lambda: pf.realnvp(2, network="residual", hidden=(4, 5))),
        ("hidden", lambda: pf.multiscale_realnvp(IMAGE, network="residual", hidden=())),
        ("mask", lambda: pf.realnvp(2, mask="alternate")),
    ],
)
def test_a_bad_argument_is_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()
