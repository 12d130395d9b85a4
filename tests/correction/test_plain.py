"""Chains in plain coordinates, where the flow is no help; and places that they seem to lack."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.correction.joining import joins
from pyro_flows.correction.latent import Latent
from pyro_flows.correction.sampler import Sampler
from pyro_flows.correction.starts import plain_flow
from pyro_flows.fitting.combine import MAX_COPIES, _too_many
from pyro_flows.results.dims import coordinate_names


def model(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 10.0])).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def guide(y):
    pyro.sample("x", dist.Normal(torch.tensor([0.6, 3.5]), torch.tensor([0.2, 0.3])).to_event(1))


Y = torch.tensor([1.0, 3.0])


@pytest.fixture(scope="module")
def plain():
    narrow = pf.diagnose(model, guide, Y, draws=1000)
    assert narrow.verdict.status == "unreliable"
    return narrow.refine("plain")


def test_plain_chains_are_right(plain):
    assert plain.verdict.status == "refined"
    assert plain.chains.numbers["space"] == "plain"
    x = plain.samples["x"].double()
    mean, sd = torch.tensor([0.5, 300 / 101]).double(), torch.tensor([0.5**0.5, (100 / 101) ** 0.5]).double()
    assert ((x.mean(0) - mean) / sd).abs().max() < 0.1
    torch.testing.assert_close(x.std(0), sd, rtol=0.06, atol=0.0)


def test_plain_chains_go_on_where_they_were(plain, tmp_path):
    plain.save(tmp_path / "saved")
    again = pf.load(tmp_path / "saved", model, Y)
    assert again.chains.numbers["space"] == "plain"
    assert torch.equal(again.sample(200)["x"], plain.sample(200)["x"])
    more = plain.refine(max_steps=20)
    assert more.verdict.status == "refined"
    assert more.history[-1]["details"]["sweeps"] >= plain.history[-1]["details"]["sweeps"]


def test_chains_join_others_only_if_nothing_is_between():
    def two(apart):
        def one(y):
            x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
            near = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(x)
            far = dist.Normal(torch.tensor([apart, 0.0]), 1.0).to_event(1).log_prob(x)
            pyro.factor("two", torch.logaddexp(near, far))

        return pf.LogDensity(one, (Y,))

    for apart, together in ((1.0, True), (14.0, False)):
        density = two(apart)
        z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).to(density.dtype)
        names = coordinate_names(density.structure)
        with torch.no_grad():
            given = {"chains": 64, "kept": 64, "seed": 0, "independence": 0}
            sampler = Sampler.begin(Latent(plain_flow(z), density), names, z[:8], **given)
            sampler.run(300)
        assert joins(sampler, torch.tensor([[apart, 0.0], [apart, 0.5]]).to(z)) == together


def test_too_many_equal_modes():
    def swap(first, second, dim=8):
        order = list(range(dim))
        order[first], order[second] = second, first
        return tuple(order), (1.0,) * dim

    assert not _too_many([])
    assert not _too_many([swap(0, 1), swap(1, 2)])
    assert _too_many([swap(k, k + 1) for k in range(7)])  # 8! = 40,320
    assert MAX_COPIES < 40_320
