"""Markov chains as a judged posterior: figures, verdict, ArviZ, evidence, files."""

import copy
import math
import pickle
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_flows as pf
from pyro_flows.inference.chains.judging import TRIED
from pyro_flows.inference.verdict.deciding import judge_mcmc
from tests.conjugate import (
    COUNTS,
    COUNTS_LOO,
    counts,
    pine,
    pine_data,
    regression,
    regression_data,
    regression_evidence,
)
from tests.conjugate import _posterior as conjugate_posterior
from tests.posteriors import SCHOOLS, SPREAD, Y, schools

CHAINS, DRAWS = 4, 1000


def school_chains(*, rho=0.3, chains=CHAINS, draws=DRAWS, away=0.0):
    """Autoregressive chains of the posterior of :func:`schools`; the last one moved ``away`` sds."""
    x = torch.empty(chains, draws, SCHOOLS)
    x[:, 0] = torch.randn(chains, SCHOOLS)
    for step in range(1, draws):
        x[:, step] = rho * x[:, step - 1] + (1 - rho**2) ** 0.5 * torch.randn(chains, SCHOOLS)
    x[-1] += away
    return {"theta": 0.8 * Y + SPREAD * x}


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(1)
    return pf.from_mcmc(school_chains(), schools, Y)


def test_good_chains_are_ok(good):
    assert isinstance(good, pf.Posterior)
    assert good.verdict.status == "ok"
    assert good.verdict.chains.r_hat < 1.01
    assert CHAINS * DRAWS / 3 < good.verdict.chains.ess_bulk < CHAINS * DRAWS
    assert good.effective == good.verdict.chains.ess_bulk
    assert good.samples["theta"].shape == (CHAINS * DRAWS, SCHOOLS)
    torch.testing.assert_close(good._used_log_p, good.density(good._used))
    assert "4 chains of 1000 draws" in str(good)
    assert str(good.verdict).startswith("ok: MCMC (R-hat 1.0")
    assert good.flow is None
    assert good.guide is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"away": 0.5}, "R-hat"),
        ({"rho": 0.98}, "effective sample size"),
        ({"draws": 60}, "effective sample size"),
    ],
)
def test_bad_chains_are_unreliable(options, reason):
    found = pf.from_mcmc(school_chains(**options), schools, Y)
    assert found.verdict.status == "unreliable"
    assert any(reason in said for said in found.verdict.reasons)
    assert math.isnan(found.effective)
    with pytest.warns(pf.UnreliableWarning):
        found.summary()
    with pytest.raises(ValueError, match="unreliable"):
        found.loo()


def test_a_chain_that_stands_still_is_unreliable():
    draws = school_chains()
    draws["theta"][2] = draws["theta"][2, :1]
    assert pf.from_mcmc(draws, schools, Y).verdict.status == "unreliable"


def test_one_chain_is_compared_with_itself():
    found = pf.from_mcmc(school_chains(chains=1, draws=3000), schools, Y)
    assert found.verdict.status == "ok"
    assert any("one chain" in note for note in found.verdict.notes)
    assert 0.99 < found.verdict.chains.r_hat < 1.01
    assert 0.99 < found.summary()["r_hat"].max() < 1.01
    moved = school_chains(chains=1, draws=3000)
    moved["theta"][0, 1500:] += 0.5
    assert pf.from_mcmc(moved, schools, Y).verdict.status == "unreliable"


def test_the_share_of_divergences_decides():
    z = torch.randn(4, 1000, 1)
    for many, status in ((0, "ok"), (4, "ok"), (5, "unreliable")):
        diverging = torch.zeros(4, 1000, dtype=torch.bool)
        diverging[1, :many] = True
        verdict = judge_mcmc(z, torch.zeros(4, 1000), ["x"], diverging)
        assert verdict.status == status
        assert verdict.chains.divergences == many / 4000
        assert ("diverged" in str(verdict)) == (many > 0)
    assert judge_mcmc(z, torch.full((4, 1000), torch.nan), ["x"], None).status == "unreliable"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")  # a few hundred effective draws
def test_pyros_own_output():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mcmc = MCMC(NUTS(model), num_samples=600, warmup_steps=100, disable_progbar=True)
    with pytest.raises(ValueError, match="has no samples"):
        pf.from_mcmc(mcmc, model, torch.tensor(1.0))
    mcmc.run(torch.tensor(1.0))
    found = pf.diagnose(model, mcmc, torch.tensor(1.0))
    assert found.verdict.chains.chains == found.chains.count == 1
    assert type(found) is pf.Posterior
    assert isinstance(found.chains, pf.McmcDraws)
    assert found.guide_name == "NUTS"
    assert found.verdict.chains.divergences == 0
    assert found.chains.stats["diverging"].shape == (1, 600)
    torch.testing.assert_close(found.samples["mu"], mcmc.get_samples()["mu"])
    assert "diverging" in found.to_arviz(predictive=False)["sample_stats"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="'theta' missing"):
        pf.from_mcmc({"eta": torch.zeros(2, 20, 8)}, schools, Y)
    with pytest.raises(ValueError, match=r"site 'theta' has shape \(7,\), in the model \(8,\)"):
        pf.from_mcmc({"theta": torch.zeros(2, 20, 7)}, schools, Y)
    with pytest.raises(ValueError, match="draws of a chain"):
        pf.from_mcmc({"theta": torch.zeros(2, 5, 8)}, schools, Y)
    with pytest.raises(ValueError, match=r"expected a pyro\.infer\.MCMC"):
        pf.from_mcmc(3, schools, Y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("power", "lost"), [(0.05, True), (0.5, False)])
def test_draws_on_a_bound_are_never_ok(dtype, power, lost):
    """A tenth of the mass, or more, lies nearer to 1 than rounding has numbers; or next to none."""

    def model():
        pyro.sample("share", dist.Beta(torch.tensor(power, dtype=dtype), torch.tensor(power, dtype=dtype)))

    torch.manual_seed(0)
    share = torch.distributions.Beta(torch.tensor(power).double(), torch.tensor(power).double()).sample((4, 500))
    with pytest.warns(UserWarning, match="observe"):
        chains = pf.from_mcmc({"share": share.to(dtype)}, model)
    assert (chains.verdict.status == "unreliable") == lost
    assert any("share onto a bound" in reason for reason in chains.verdict.reasons) == lost


def test_summary_and_arviz_have_chains(good):
    table = good.assign_coords({"school": list("abcdefgh")}).summary(["theta"])
    assert list(table.columns)[-3:] == ["ess_bulk", "ess_tail", "r_hat"]
    assert table.index[0] == "theta[a]"
    assert table["r_hat"].max() < 1.01
    tree = good.to_arviz()
    sizes = dict(tree["posterior"].sizes)
    assert (sizes["chain"], sizes["draw"], sizes["school"]) == (CHAINS, DRAWS, SCHOOLS)
    for group in ("log_likelihood", "log_prior", "posterior_predictive", "unconstrained_posterior", "sample_stats"):
        assert dict(tree[group].sizes)["chain"] == CHAINS, group
    assert set(tree["sample_stats"].data_vars) == {"lp"}
    second = tree["posterior"]["theta"].to_numpy()[1]
    assert (second == good.samples["theta"][DRAWS : 2 * DRAWS].numpy()).all()
    assert tree.attrs["sampling"] == "mcmc"
    assert float(tree["fit"]["r_hat"]) == good.verdict.chains.r_hat


def test_files_pickles_and_copies(good, tmp_path):
    good.save(tmp_path / "chains")
    for found in (
        pf.load(tmp_path / "chains"),
        pf.load(tmp_path / "chains", schools, Y),
        pickle.loads(pickle.dumps(good)),
        copy.deepcopy(good),
        copy.copy(good),
    ):
        assert found._of_mcmc
        assert found.chain_count == found.chains.count == CHAINS
        torch.testing.assert_close(found.chains.z, good.chains.z)
        assert str(found.verdict) == str(good.verdict)
        torch.testing.assert_close(found.samples, good.samples)
        with nullcontext() if "groups" not in found.missing else pytest.warns(UserWarning, match="only the groups"):
            tree = found.to_arviz(predictive=False)
        assert dict(tree["posterior"].sizes)["chain"] == CHAINS
        assert found.summary().equals(good.summary())
    assert (
        pf.load(tmp_path / "chains", schools, Y).evidence().method == "importance"
    )  # from a Student t with their moments


def test_refinement_begins_at_chains_and_leaves_them_if_it_fails(good):
    cut_short = good.refine(max_steps=1)
    assert cut_short.verdict.status == "ok"
    assert any(note.startswith(TRIED) for note in cut_short.verdict.notes)
    assert cut_short.chain_count == CHAINS
    assert cut_short.verdict.chains == good.verdict.chains
    torch.testing.assert_close(cut_short.chains.z, good.chains.z)
    finished = good.refine()
    assert finished.verdict.status == "refined"
    assert not finished._of_mcmc
    assert finished.chain_count == 64
    assert str(finished.verdict).startswith("refined: ")
    assert finished.summary()["r_hat"].max() < 1.05


def test_evidence_of_chains_is_honest():
    """20 sets of chains: at most 4 of 20 outside of 95 % intervals but for 3 sets of seeds in 1000."""
    truth = float(dist.Normal(0.0, 5**0.5).log_prob(Y).sum())
    inside = 0
    for seed in range(20):
        torch.manual_seed(seed)
        found = pf.from_mcmc(school_chains(draws=1500), schools, Y).evidence(draws=2000)
        assert found.method == "importance"
        assert found.value == pytest.approx(truth, abs=0.1)
        inside += abs(found.value - truth) < 1.96 * found.standard_error
    assert inside >= 16


def test_evidence_of_chains_of_a_regression():
    x, y = regression_data(20, 120)
    precision, mean, shape, rate = conjugate_posterior(x, y)
    torch.manual_seed(0)
    tau = dist.Gamma(torch.tensor(shape).double(), torch.tensor(rate).double()).sample((4, 1000))
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    beta = mean + tau[..., None] ** -0.5 * (torch.randn(4, 1000, 20, dtype=torch.float64) @ root.T)
    found = pf.from_mcmc({"tau": tau, "beta": beta}, regression, x, y).evidence()
    assert found.value == pytest.approx(regression_evidence(x, y), abs=0.05)
    assert found.standard_error < 0.02


def test_leave_one_out_of_chains():
    torch.manual_seed(0)
    draws = {"rate": dist.Gamma(10.0, 7.0).sample((4, 16_000))}
    found = pf.from_mcmc(draws, counts, COUNTS).loo()
    assert found.method == "plain"
    assert found.elpd == pytest.approx(COUNTS_LOO, abs=0.02)


def test_other_methods_work_on_chains(good):
    assert good.predictive(draws=10)["y"].shape == (10, SCHOOLS)
    assert good.resample(20)["theta"].shape == (20, SCHOOLS)
    assert good.sensitivity().prior_sites == ("theta",)
    x, y = pine_data("density")
    with pytest.raises(ValueError, match="missing"):
        pf.from_mcmc(school_chains(), pine, x, y)
