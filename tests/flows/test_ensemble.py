"""The mean of the densities of flows: its density, draws and quantiles; files; training that goes on."""

import copy
import math
import subprocess
import sys

import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.ensemble import Ensemble, averaged
from pyro_flows.flows.recipe_json import not_rebuilt, restored, to_json
from pyro_flows.support.files.untrusted import Damaged
from tests.slow import rest_slow

CONTEXT = torch.tensor([[-1.0, 0.5], [2.0, 0.0]])


def members(dim=1):
    """Two fits of other rows, each with its own line and scale."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for slope in (1.0, -2.0):
        x = torch.randn(60, 2, generator=generator)
        y = slope * x[:, :1] + (0.3 + x[:, 1:].abs()) * torch.randn(60, dim, generator=generator)
        fit = pf.fit_density(y, context=x, validation=(y[:20], x[:20]), max_epochs=4, progress=False)
        found.append(fit.flow)
    return found


@pytest.fixture(scope="module")
def pair():
    return members()


def test_the_density_is_the_mean_and_integrates_to_one(pair):
    whole = averaged(copy.deepcopy(pair))
    grid = torch.linspace(-60.0, 60.0, 12_001)[:, None]
    for row in CONTEXT:
        about = row.expand(len(grid), -1)
        density = whole.log_prob(grid, about).exp().detach()
        torch.testing.assert_close(density, sum(flow.log_prob(grid, about).exp() for flow in pair) / 2.0)
        assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=2e-3)


def test_draws_and_quantiles_are_those_of_the_density(pair):
    levels = torch.tensor([0.02, 0.3, 0.5, 0.9])
    whole = averaged(copy.deepcopy(pair))
    base = whole.base_distribution(CONTEXT[:, None])
    quantiles = base.icdf(levels.expand(2, -1))[..., 0]
    torch.testing.assert_close(base.cdf(quantiles[..., None]), levels.expand(2, -1), atol=1e-5, rtol=0.0)
    torch.manual_seed(1)
    drawn = whole(CONTEXT).sample((20_000,))
    assert drawn.shape == (20_000, 2, 1)
    share = (drawn <= quantiles).double().mean(0)
    assert float((share - levels).abs().max()) < 4.0 * 0.5 / math.sqrt(20_000)


def test_shapes_in_two_dimensions():
    whole = averaged(members(dim=2))
    assert whole(CONTEXT).sample((3,)).shape == (3, 2, 2)
    assert whole(CONTEXT).log_prob(torch.zeros(3, 2, 2)).shape == (3, 2)
    assert whole(CONTEXT[0]).sample((3,)).shape == (3, 2)
    with pytest.raises(NotImplementedError, match="no gradient"):
        whole(CONTEXT).rsample()


def test_without_a_context(tmp_path):
    """Flows of other rows were averaged only where they had a context: of few rows, one was behind a plain mixture."""
    x = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)).exp()
    options = {"max_epochs": 1, "learning_rate": 0.003, "progress": False, "checkpoint": tmp_path / "run"}
    fit = pf.fit_density(x, **options)
    assert fit.settings["flows"] == 5
    members = fit.flow.mixture.members
    assert len({float(flow.log_prob(x).sum().detach()) for flow in members}) == 5
    grid = torch.linspace(-60.0, 60.0, 12_001)[:, None]
    density = fit.log_prob(grid).exp()
    torch.testing.assert_close(density, (sum(flow.log_prob(grid).exp() for flow in members) / 5.0).detach())
    assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=5e-3)
    levels = torch.tensor([0.05, 0.5, 0.9])
    quantiles = fit.quantiles(levels)
    torch.testing.assert_close(fit.pit(quantiles)[:, 0], levels, atol=1e-5, rtol=0.0)
    assert ((fit.sample(20_000, seed=1) <= quantiles[:, 0]).double().mean(0) - levels).abs().max() < 0.015
    fit.save(tmp_path / "density")
    assert torch.equal(pf.DensityFit.load(tmp_path / "density").log_prob(x), fit.log_prob(x))
    (tmp_path / "run.3").unlink()
    assert torch.equal(pf.fit_density(x, **options).log_prob(x), fit.log_prob(x))
    made = fit.flow().expand((3, 2))
    assert made.sample((4,)).shape == (4, 3, 2, 1)
    assert made.log_prob(x[:4, None, None]).shape == (4, 3, 2)
    draws, log_prob = fit.flow.draw(7)
    torch.testing.assert_close(fit.log_prob(draws), log_prob)


def test_draws_differ_where_the_base_does_not_depend_on_the_context():
    """Above 200 outputs, flows have no mixture as base: all draws of one flow were the same."""
    whole = averaged([pf.realnvp(2, layers=2, context_dim=2), pf.realnvp(2, layers=2, context_dim=2)])
    drawn = whole(CONTEXT[:1].expand(100, -1)).sample((2,))
    assert len(drawn.reshape(-1, 2).unique(dim=0)) == 200


def test_it_is_rebuilt_from_what_is_written_of_it(pair):
    whole = averaged(copy.deepcopy(pair))
    assert not_rebuilt(whole) is None
    text, state = to_json(whole), whole.state_dict()
    again = restored(text, state)
    y = torch.randn(5, 1)
    about = CONTEXT[:1].expand(5, -1)
    assert torch.equal(again.log_prob(y, about), whole.log_prob(y, about))
    for wrong in ((), ({"builder": "realnvp", "dim": 1, "base": "normal", "df": 15.0},)):
        with pytest.raises(Damaged, match=r"as this release makes it"):
            restored({**text, "members": wrong}, state)


def test_another_process_loads_it(tmp_path):
    """Only a process that had called `fit_density` did: the builder was not known in others."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    fit = pf.fit_density(x[:, :1], context=x[:, 1:], max_epochs=1, progress=False)
    assert isinstance(fit.flow.mixture, Ensemble)
    fit.save(tmp_path / "density")
    program = "import sys, pyro_flows as pf; print(type(pf.DensityFit.load(sys.argv[1]).flow.mixture).__name__)"
    words = [sys.executable, "-c", program, tmp_path / "density"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["Ensemble"], done.stderr


SCALES = ["standardize", "whiten", "auto", "without a context"]


@pytest.mark.parametrize("kind", rest_slow(SCALES, "auto".__eq__))
def test_training_goes_on_at_another_scale(tmp_path, kind):
    """The map to the scale of the data came after those of the flows, so that 8 nats were lost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 2, generator=generator)
    y = 20.0 + 3.0 * x[:, :1] + torch.randn(90, 1, generator=generator)
    if kind == "without a context":
        x, kind = None, "auto"
    first = pf.fit_density(y, context=x, max_epochs=4, progress=False)
    for scale in (1.0, 1000.0):
        options = {"preprocess": kind, "max_epochs": 1, "learning_rate": 1e-4, "progress": False}
        more = pf.fit_density(first.flow, scale * y, context=x, **options)
        assert more.nats(scale * y, x) + math.log(scale) > first.nats(y, x) - 0.1
        more.save(tmp_path / f"{scale}")
        assert torch.equal(pf.DensityFit.load(tmp_path / f"{scale}").log_prob(y, x), more.log_prob(y, x))
