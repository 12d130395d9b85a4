"""The parts of a guide: the affine map and its start, one and odd dimensions, flows given in every form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_flows as pf
from tests.guides.test_guides import KINDS, each_kind
from tests.guides.test_guides_posterior import random_guide
from tests.invariants import close
from tests.models import normal, real


def flat(dim):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(dim, dtype=torch.float64), 1.0).to_event(1))

    return model


@pytest.mark.parametrize("affine", ["tril", "none"])
@pytest.mark.parametrize("dim", [1, 3, 5, 7])
@each_kind
def test_every_coordinate_can_move(kind, dim, affine):
    """One dimension and odd ones too, by the flow alone and with the affine map."""
    guide = random_guide(flat(dim), kind=kind, affine=affine)
    noise = normal(5, dim, seed=64)
    z, _ = guide.flow.bijection.forward_and_ladj(noise)
    assert ((z - noise).abs().amax(0) > 1e-3).all()
    assert guide.sample_posterior(2)["x"].shape == (2, dim)
    svi = SVI(flat(dim), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    after, _ = guide.flow.bijection.forward_and_ladj(noise)
    assert (after != z).any(0).all()


def test_affine_map_by_dimension_and_by_name():
    """Triangular up to 200 dimensions, diagonal above, or as asked for."""
    small, large = (KINDS["realnvp"](flat(dim)).initialize() for dim in (200, 201))
    assert isinstance(small.affine, pf.transforms.LowerTriangularAffine)
    assert isinstance(large.affine, pf.transforms.DiagonalAffine)
    assert isinstance(KINDS["realnvp"](flat(2), affine="diagonal").initialize().affine, pf.transforms.DiagonalAffine)
    assert KINDS["realnvp"](flat(2), affine="none").initialize().affine is None
    ends_in_one = pf.AutoFlow(flat(2), pf.transforms.LowerTriangularAffine(2), affine="none").initialize()
    assert ends_in_one.affine is None, "the user's own last layer is not the guide's"


def test_a_guide_starts_at_the_median_with_the_scale_asked_for():
    def model():
        pyro.sample("x", dist.Normal(real(5.0, -3.0), 0.01).to_event(1))
        pyro.sample("s", dist.LogNormal(real(2.0), 0.01))

    guide = KINDS["realnvp"](model, init_scale=0.1, base="normal").initialize()
    q = guide.get_posterior()
    expected = dist.Normal(real(5.0, -3.0, 2.0), 0.1).to_event(1)
    z = expected.sample((4,))
    close(q.log_prob(z).detach(), expected.log_prob(z), 0.5)  # a median of 15 draws with sd 0.01: 0.1 sd of the guide
    start = KINDS["realnvp"](
        model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"x": real(1.0, 2.0), "s": real(1.0)})
    )
    close(start.initialize().affine.loc, real(1.0, 2.0, 0.0), 1e-12)


@each_kind
@pytest.mark.parametrize("affine", ["tril", "diagonal"])
def test_start_at_sets_the_map_whatever_was_trained(affine, kind):
    guide = random_guide(flat(3), kind=kind, affine=affine)
    noise = normal(5, 3, seed=65)
    *before, last = guide.flow.bijection.layers
    assert last is guide.affine
    x, _ = pf.transforms.Compose(before).forward_and_ladj(noise)
    scale = real([[0.5, 0.0, 0.0], [0.3, 2.0, 0.0], [-0.4, 0.1, 1.5]])
    guide.start_at(real(1.0, 2.0, 3.0), scale)
    kept = scale if affine == "tril" else scale.diagonal().diag()
    close(guide.flow.bijection.forward_and_ladj(noise)[0], real(1.0, 2.0, 3.0) + x @ kept.T, 1e-12)


def test_flows_given_in_every_form():
    """A name, a flow, a bijection, and functions of the dimension."""
    forms = ["spline", pf.nice(3), pf.transforms.Planar(3), lambda dim: pf.realnvp(dim, layers=2), pf.transforms.Planar]
    for form in forms:
        guide = pf.AutoFlow(flat(3), form, base="student_t", df=7.0).initialize()
        assert guide.sample_posterior(4)["x"].shape == (4, 3)
        assert guide.flow.df == (15.0 if isinstance(form, pf.Flow) or form is forms[3] else 7.0)
        assert math.isfinite(guide.log_prob(guide.sample_posterior(1)).item())


@pytest.mark.slow
def test_a_spline_guide_finds_two_modes():
    """A quarter of the mass is on the left. One mode alone costs 0.29 nats, and so does an affine guide."""
    weights, middles = torch.tensor([0.25, 0.75]), torch.tensor([-2.0, 2.0])

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 3.0))
        parts = dist.Normal(middles, 0.7).log_prob(x[..., None]) + weights.log()
        pyro.factor("modes", parts.logsumexp(-1) - dist.Normal(0.0, 3.0).log_prob(x))

    guide = pf.AutoFlow(model, "spline", layers=1, init_scale=2.0)
    loss = Trace_ELBO(32, max_plate_nesting=0, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.995}), loss)  # a constant one wanders
    losses = [svi.step() for _ in range(600)]
    assert sum(losses[-50:]) / 50 < 0.08
    draws = guide.sample_posterior(4000)["x"]
    assert 0.15 < (draws < 0.0).float().mean() < 0.35


@pytest.mark.parametrize("name", ["glow", "multiscale_realnvp"])
def test_flows_of_images_are_no_guides(name):
    with pytest.raises(ValueError, match=f"flow: '{name}' makes flows of images"):
        pf.AutoFlow(flat(4), name)
    with pytest.raises(ValueError, match="flow: expected"):
        pf.AutoFlow(flat(4), pf.multiscale_realnvp((1, 2, 2), levels=1, layers=1, hidden=(4,))).initialize()
