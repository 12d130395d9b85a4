"""The mathematics of every transform: inverse, log-determinant, gradients, batches, the identity at the start."""

import pytest
import torch

import pyro_flows as pf
from pyro_flows.transforms.networks import ACTIVATIONS
from tests.invariants import (
    check_batching,
    check_gradients,
    check_identity,
    check_ladj,
    check_round_trip,
    close,
    jacobian,
)
from tests.registry import (
    FLOWS,
    HIDDEN,
    IMAGE_FLOWS,
    LARGE,
    SMALL,
    TYPICAL,
    built,
    each,
    make_flow,
    normal,
    randomize,
    unregistered,
)


def test_every_public_transform_and_builder_has_a_case():
    assert unregistered() == set()


@each(SMALL + LARGE)
def test_round_trip(case):
    """Closed forms to 1e-9, numeric inverses to 1e-7: rounding of float64 with room for the conditioning."""
    check_round_trip(case.make(), *case.inputs(20), case.tolerance)


@each(SMALL + LARGE)
def test_round_trip_in_float32(case):
    """To 1e-4: rounding of float32 (6e-8) times a conditioning of about 1000."""
    check_round_trip(case.make(dtype=torch.float32), *case.inputs(20, dtype=torch.float32), 1e-4)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("name", "tolerance"), [("nice", 1e-9), ("realnvp", 1e-9), ("spline", 1e-9), ("planar", 1e-7)])
def test_round_trip_of_32_layers(name, tolerance, dim):
    """Errors do not pile up over a deep stack; the noise is smaller, as 32 random layers soon are badly conditioned."""
    flow = make_flow(name, dim, layers=32, sd=0.05 if dim < 50 else 0.02)
    x = normal(20, dim, seed=1)
    assert (flow.bijection(x) - x).abs().max() > 0.1
    check_round_trip(flow.bijection, x, None, tolerance)


@each(SMALL + LARGE)
def test_log_determinant(case):
    """Against slogdet of the Jacobian by autograd, to the tolerance of the inverse."""
    check_ladj(case.make(), *case.inputs(4), case.tolerance)


@each(SMALL, slow=lambda case: case.shape in ((2,), (7,)))
def test_gradients(case):
    check_gradients(case.make(), *case.inputs(3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_each_activation(activation):
    layer = built(
        lambda: pf.transforms.AffineCoupling(3, context_dim=2, hidden=(4, 3), activation=activation),
        dtype=torch.float64,
        sd=0.3,
        seed=0,
    )
    check_gradients(layer, normal(2, 3, seed=1), normal(2, 2, seed=2), fast=False)


def is_made_of_others(case):
    """Stacks of layers, but for a flow of each kind of layer, and layers with a context: their parts are cases too."""
    stacks = (*FLOWS, *IMAGE_FLOWS, "Compose", "Inverse-Compose")
    kept = ("planar-3", "realnvp-3-context", "spline-3")
    return case.name not in kept and (case.name.startswith(stacks) or bool(case.context_dim))


@each(TYPICAL, slow=is_made_of_others)
def test_second_derivatives(case):
    """Hessians of log densities are right too: the inverse of a planar layer is differentiable twice."""
    t = case.make()
    x, context = case.inputs(2)
    x.requires_grad_()
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        assert torch.autograd.gradgradcheck(
            lambda point, *_, way=way: way(point, context), (x, *t.parameters()), fast_mode=True, atol=1e-6, rtol=1e-4
        )


@each(SMALL)
def test_vmap_equals_batching(case):
    check_batching(case.make(), *case.inputs(4))


# At the first forward-mode derivative of a process torch scripts its own formulas, and warns that scripting is old.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@each(case for case in SMALL if case.shape == (2,))
def test_torch_func_derivatives(case):
    """``torch.func`` sees the same Jacobian and the same gradient as autograd does."""
    t = case.make()
    x, context = case.inputs(3)
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        for row in range(3):
            given = None if context is None else context[row]
            expected = jacobian(lambda point, way=way, given=given: way(point, given)[0], x[row], 1)
            close(torch.func.jacrev(lambda point, way=way, given=given: way(point, given)[0])(x[row]), expected, 1e-9)
            close(torch.func.jacfwd(lambda point, way=way, given=given: way(point, given)[0])(x[row]), expected, 1e-9)


@each(case for case in SMALL + LARGE if case.identity)
def test_identity_at_the_start(case):
    """Exact up to the rounding of softplus(log(e - 1)) in the planar layer."""
    check_identity(case.start(), *case.inputs(4), 1e-14)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_affine_maps_start_where_they_are_told(context_dim):
    context = normal(5, 3, seed=1, dtype=torch.float32) if context_dim else None
    x = normal(5, 2, seed=2, dtype=torch.float32)
    loc, scale = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    tril = torch.tensor([[2.0, 0.0], [-3.0, 0.5]])
    diagonal = pf.transforms.DiagonalAffine(2, loc=loc, scale=scale, context_dim=context_dim, hidden=HIDDEN)
    correlated = pf.transforms.DiagonalAffine(2, loc=loc, scale=tril, context_dim=context_dim, hidden=HIDDEN)
    full = pf.transforms.LowerTriangularAffine(2, loc=loc, scale_tril=tril, context_dim=context_dim, hidden=HIDDEN)
    close(diagonal.forward_and_ladj(x, context)[0], loc + scale * x, 1e-6)
    for map_ in (full, correlated):
        close(map_.forward_and_ladj(x, context)[0], loc + x @ tril.T, 1e-6)


@each(TYPICAL)
def test_shapes(case):
    """``y`` is shaped like ``x``, ``ladj`` like its batch, in both directions; also for no and for empty batches."""
    t = case.make()
    for batch in ((), (1,), (5,), (4, 2), (0,)):
        x, context = case.inputs(*batch)
        for way in (t.forward_and_ladj, t.inverse_and_ladj):
            y, ladj = way(x, context)
            assert y.shape == (*batch, *case.shape)
            assert ladj.shape == batch
        y, ladj, score = t.forward_and_score(x, torch.ones_like(x), context)
        assert (y.shape, ladj.shape, score.shape) == ((*batch, *case.shape), batch, (*batch, *case.shape))


@each(case for case in SMALL if case.context_dim and case.shape != (7,))
def test_context_broadcasts(case):
    """Samples x batch against a batch of contexts: the same as repeating both to their common shape."""
    t = case.make()
    for points, contexts in (((), (4,)), ((6, 4), (4,)), ((6, 1), (4,)), ((4,), ()), ((6, 4), (6, 1))):
        check_broadcast(case, t, points, contexts)


def check_broadcast(case, t, points, contexts):
    x, _ = case.inputs(*points)
    context = normal(*contexts, case.context_dim, seed=3)
    batch = torch.broadcast_shapes(points, contexts)
    whole = x.expand(*batch, *case.shape).contiguous(), context.expand(*batch, -1).contiguous()
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        for got, expected in zip(way(x, context), way(*whole), strict=True):
            close(got, expected, 1e-10, way.__name__)
    score = normal(*x.shape, seed=4)
    expected = t.forward_and_score(whole[0], score.expand_as(whole[0]).contiguous(), whole[1])
    for got, value in zip(t.forward_and_score(x, score, context), expected, strict=True):
        close(got, value, 1e-10, "forward_and_score")


@each(TYPICAL)
def test_strided_input_is_welcome(case):
    """A transposed or expanded tensor gives what its copy gives."""
    t = case.make()
    x = case.inputs(5)[0].transpose(0, -1).contiguous().transpose(0, -1)
    context = normal(case.context_dim, seed=2).expand(5, -1) if case.context_dim else None
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        whole = way(x.contiguous(), None if context is None else context.contiguous())
        for got, expected in zip(way(x, context), whole, strict=True):
            close(got, expected, 1e-12)


def test_a_triangular_map_is_the_same_for_few_points_and_for_many():
    """Few go through its two matrices one after the other, many through their product."""
    start = 0.3 * normal(8, 8, seed=0).tril(-1) + torch.eye(8).double()
    layer = randomize(pf.transforms.LowerTriangularAffine(8, scale_tril=start), sd=0.2)
    x, score = normal(40, 8, seed=1), normal(40, 8, seed=2)
    whole = (*layer.forward_and_score(x, score), *layer.inverse_and_ladj(x))
    pieces = zip(x.split(4), score.split(4), strict=True)
    parts = [(*layer.forward_and_score(a, b), *layer.inverse_and_ladj(a)) for a, b in pieces]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(several), one, rtol=1e-12, atol=1e-12)
