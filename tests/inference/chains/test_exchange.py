"""Exact symmetries as moves of chains: copies of a flow that chains change between freely."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.parts import location_scale
from pyro_flows.flows.recipe import start_at
from pyro_flows.flows.stacked import Images
from pyro_flows.inference.chains.hmc import exchange_of
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.sampler import Sampler

DIM, PERSONS, ITEMS = 3, 50, 5
IMAGES = [((0, 1, 2), (1.0, 1.0, 1.0)), ((1, 0, 2), (-1.0, -1.0, 1.0))]


def mirrored(tilt=0.0, constant=0.0):
    """Two modes: (2, -1, .) and (1, -2, .), as heavy as each other without a tilt."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(DIM).double(), 1.0).to_event(1))
        tops = torch.tensor([[2.0, -1.0, 0.0], [1.0, -2.0, 0.0]]).double()
        parts = -0.5 * ((z - tops) / 0.1).square().sum(1) + torch.tensor([0.0, tilt]).double()
        pyro.factor("modes", 0.5 * z.square().sum() + torch.logsumexp(parts, 0) + constant)

    return model


def copies():
    flow = location_scale(DIM, base="normal").double()
    with torch.no_grad():
        start_at(flow, torch.tensor([2.0, -1.0, 0.0]), 0.1 * torch.eye(DIM))
    return FlowMixture.copied(flow, IMAGES)


def begun(model):
    density = pf.LogDensity(model)
    latent = Latent(copies(), density)
    z = latent.mixture.draw(8)[0]
    names = [f"z[{i}]" for i in range(DIM)]
    return Sampler.begin(latent, names, z, chains=64, kept=64, seed=0, independence=0)


def test_an_image_leads_back_home():
    orders, signs = torch.tensor([order for order, _ in IMAGES]), torch.tensor([s for _, s in IMAGES]).double()
    images = Images.of(orders, signs)
    y, k = torch.arange(12.0).double().reshape(2, 2, 3), torch.tensor([[0, 1], [1, 0]])
    z = images.image(y, k)
    torch.testing.assert_close(z[0, 1], torch.tensor([-4.0, -3.0, 5.0]).double())
    torch.testing.assert_close(images.home(z, k), y)


def test_chains_have_all_images_equally_often_though_they_began_in_one():
    """No trajectory crosses from mode to mode, which are 14 sds apart."""
    sampler = begun(mirrored())
    assert sampler.exchange is not None
    found = sampler.run(400)
    assert found.nested_r_hat < 1.05
    z = sampler.chains().z
    assert float((z[..., 0] > 1.5).double().mean()) == pytest.approx(0.5, abs=0.05)
    home = sampler.at_home(z, sampler.chains().stats["part"].long())
    assert bool((home[..., 0] > 1.5).all()), "at home, all draws are of one image"
    torch.testing.assert_close(sampler.latent.density(z[0]), sampler.chains().stats["lp"][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tilt", "constant"), [(0.1, 0.0), (0.1, -3000.0), (0.25, 1e5)])
def test_modes_of_unequal_mass_are_not_exchanged(tilt, constant):
    """However large log densities are: in double precision they have digits enough."""
    assert begun(mirrored(tilt, constant)).exchange is None
    assert begun(mirrored(0.0, constant)).exchange is not None


def test_a_flow_alone_has_no_images():
    latent = Latent(copies().members[0], pf.LogDensity(mirrored()))
    points = latent.look(torch.zeros(8, DIM).double(), torch.zeros(8, dtype=torch.long))
    assert exchange_of(latent, points, True) is None
    assert exchange_of(latent, points, None) is None


def items(right):
    """Item response with free signs of discriminations and abilities: two mirrored modes."""
    discrimination = pyro.sample("discrimination", dist.Normal(torch.zeros(ITEMS), 1.0).to_event(1))
    ability = pyro.sample("ability", dist.Normal(torch.zeros(PERSONS, 1), 1.0).to_event(2))
    pyro.sample("right", dist.Bernoulli(logits=1.7 * ability * discrimination).to_event(2), obs=right)


@pytest.mark.slow
def test_item_response_with_free_signs_is_sampled_in_both_modes_and_not_trained(tmp_path):
    generator = torch.Generator().manual_seed(4)
    ability = torch.randn(PERSONS, 1, generator=generator)
    chance = torch.sigmoid(1.7 * ability * torch.tensor([1.5, 1.0, -1.2, 0.8, 1.8]))
    right = torch.bernoulli(chance, generator=generator)
    posterior = pf.fit(items, right, progress=False)
    assert posterior.verdict.status == "refined", posterior.verdict
    assert len(posterior.losses) == 0
    assert isinstance(posterior.flow, FlowMixture)
    assert posterior.verdict.reasons[-1].startswith("one of 2 symmetric modes was fitted")
    signs = posterior.samples["discrimination"][:, 4] > 0.0
    assert float(signs.double().mean()) == pytest.approx(0.5, abs=0.05)
    product = posterior.samples["discrimination"][:, 0] * posterior.samples["discrimination"][:, 4]
    assert float((product > 0.0).double().mean()) > 0.95, "signs change together"
    more = posterior.sample(200)["discrimination"][:, 4] > 0.0
    assert 0.3 < float(more.double().mean()) < 0.7
    posterior.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved")
    torch.testing.assert_close(again.samples["discrimination"], posterior.samples["discrimination"])
