"""What the verdict and the history say of several runs, and of each stage of a fit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.fitting.combine import balanced, disagreements
from pyro_flows.flows.flow import Flow
from pyro_flows.support.thresholds import R_HAT_CONVERGED
from pyro_flows.transforms.linear import Rescale


def test_runs_that_disagree_in_many_coordinates_name_the_worst_three():
    r_hats = {f"x[{number}]": 1.05 + 0.001 * number for number in range(200)}
    r_hats |= {"x[7]": 2.5, "fine": R_HAT_CONVERGED, "x[3]": math.nan}
    found = disagreements(r_hats)
    assert [reason.split(" ")[3] for reason in found] == ["x[3]", "x[7]", "x[199]"]
    assert found[1] == "runs disagree on x[7] (R-hat 2.50)"
    assert found[2] == "runs disagree on x[199] (R-hat 1.25) and on 197 more coordinates"


@pytest.mark.parametrize(
    ("count", "end"), [(0, ""), (1, "(R-hat 1.50)"), (3, "(R-hat 1.50)"), (4, "1 more coordinate")]
)
def test_runs_that_disagree_in_few(count, end):
    found = disagreements({f"x[{number}]": 1.5 for number in range(count)})
    assert len(found) == min(count, 3)
    assert not found or found[-1].endswith(end)
    assert all("more" not in reason for reason in found[:3]) or count > 3


def test_draws_of_a_run_that_are_no_numbers_count_for_nothing():
    """Where Pyro's validation is on, they raised an error in the middle of a fit."""

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    torch.manual_seed(0)
    good, wild = pf.realnvp(2), Flow(Rescale(2))
    with torch.no_grad():
        next(wild.parameters()).fill_(math.nan)
    assert not torch.isfinite(wild().sample((500,))).any()
    with pyro.validation_enabled(True):
        assert balanced([good, wild], pf.LogDensity(model), [0.5, 0.5])[0] > 0.9


@pytest.mark.slow
def test_each_stage_of_the_history_has_a_name_and_an_elbo():
    """Of a model whose coordinates are chosen, in two runs: some stages have no ELBO of their own."""

    def centered(y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("unit", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    quick = {"layers": 2, "max_steps": 12, "draws": 200, "refine": False, "escalate": False, "progress": False}
    posterior = pf.fit(centered, torch.tensor([0.3, -1.0, 2.0]), runs=2, **quick)
    stages = [stage["stage"] for stage in posterior.history]
    assert {"parameterization", "first round", "comparison of runs"} <= set(stages)
    for stage in posterior.history:
        assert stage["elbo"] is None or math.isfinite(stage["elbo"])
    assert any(stage["elbo"] is not None for stage in posterior.history if stage["stage"] == "first round")
