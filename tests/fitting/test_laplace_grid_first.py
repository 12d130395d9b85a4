"""Slices before anything is trained or chosen, and who gets a flow of couplings instead."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.starts.coordinates import choose_coordinates, climbed
from pyro_flows.inference.verdict.methods import GRID as STAGE
from pyro_flows.support.process.stages import PARAMETERIZATION

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y, sigma):
    """Rubin's eight schools (1981), centered."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def stages(posterior):
    return [stage["stage"] for stage in posterior.history]


def test_slices_come_before_the_choice_of_coordinates():
    posterior = pf.fit(schools, Y, SIGMA, progress=False)
    assert stages(posterior) == [PARAMETERIZATION, STAGE]
    assert posterior.history[0]["details"]["noncentered"] == {"theta": None} == posterior.settings["noncentered"]
    assert posterior.verdict.status == "ok"
    assert len(posterior.losses) == 0
    assert posterior.samples["mu"].mean() == pytest.approx(4.41, abs=0.25)  # 10,000 reference draws of posteriordb
    assert posterior.samples["tau"].mean() == pytest.approx(3.60, abs=0.25)


SLOW = [pytest.param(options, marks=pytest.mark.slow) for options in ({"layers": 4}, {"escalate": False}, {"runs": 2})]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"flow": "realnvp"}, *SLOW])
def test_who_asks_for_a_flow_gets_it(options):
    posterior = pf.fit(
        schools, Y, SIGMA, **{"max_steps": 30, "refine": False, "draws": 200, "progress": False, **options}
    )
    assert "first round" in stages(posterior)
    assert len(posterior.losses) > 0


@pytest.mark.slow
def test_paths_that_were_made_before_change_no_choice():
    density, other = pf.LogDensity(schools, (Y, SIGMA)), pf.LogDensity(schools, (Y, SIGMA))
    _, start, said = choose_coordinates(density, seed=3)
    _, same, again = choose_coordinates(other, climbed(other, True, seed=3), seed=3)
    assert said == again
    torch.testing.assert_close(start.loc, same.loc, rtol=0.0, atol=0.0)
    assert said["elbo_noncentered"] > said["elbo_centered"]
