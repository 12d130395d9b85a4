"""The benchmark of larger models: ports, long runs, what is right, resuming, stages, the table."""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from benchmarks import records
from benchmarks.larger import models, running
from benchmarks.larger.tables import larger_section
from benchmarks.nuts import running as nuts
from benchmarks.nuts import samplers, stages
from benchmarks.nuts.samplers import NUMPYRO
from benchmarks.posteriors.running import OURS, Task
from pyro_flows.support.process import stages as _stages
from pyro_flows.support.process.ledger import ledger, used_seconds

REFERENCE = json.loads(models.REFERENCE.read_text(encoding="utf-8"))


def problem(name):
    """The model and its density, unless its data are not here."""
    try:
        found = models.load(name)
    except LookupError as error:
        pytest.skip(str(error))
    return found, pf.LogDensity(found.model, found.args)


def row(**given):
    """A row of right draws, but for what is given."""
    figures = {"posterior": "seeds", "method": OURS, "seed": 0, "version": "1 a", "dim": 26, "draws": 4000}
    figures |= {"mean": 0.02, "sd": 0.02, "right": "yes", "seconds": 9.0, "cpu_seconds": 8.0, "scaled": "no"}
    return {name: str({**figures, "machine": "A CPU", **given}.get(name, "")) for name in nuts.FIELDS}


# ---- models and long runs --------------------------------------------------------------------------------------------


def test_there_are_nine_and_each_has_a_long_run():
    assert len(models.MODELS) == 9
    assert list(REFERENCE) == list(models.MODELS)


@pytest.mark.parametrize("name", models.MODELS)
def test_long_runs_are_good_and_have_the_models_coordinates(name):
    entry, (_, density) = REFERENCE[name], problem(name)
    assert len(entry["mean"]) == len(entry["sd"]) == density.dim
    assert min(entry["sd"]) > 0.0
    assert entry["r_hat"] < 1.01
    assert entry["ess"] > 1000.0
    middle = torch.tensor(entry["mean"], dtype=torch.float64)[None]
    assert bool(torch.isfinite(density(middle)).all())


def test_data_are_the_same_each_time():
    for name in ("horseshoe", "many_locals", "stochastic_volatility"):
        first, second = (models.MODELS[name].data() for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_lynxes_follow_the_hares():
    """With known rates, the states are those of a solver with a controlled error."""
    from scipy.integrate import solve_ivp

    _, times = models.lotka_volterra_data()
    rates, initial = [0.55, 0.028, 0.8, 0.024], [34.0, 6.0]
    solved = solve_ivp(
        lambda _, state: [(rates[0] - rates[1] * state[1]) * state[0], (rates[3] * state[0] - rates[2]) * state[1]],
        (0.0, 20.0),
        initial,
        t_eval=times[::10].numpy(),
        rtol=1e-10,
        atol=1e-10,
    ).y.T
    density = pf.LogDensity(models.lotka_volterra, (torch.from_numpy(solved), times))
    values = {"rates": rates, "initial": initial, "sigma": [1e-3, 1e-3]}
    tensors = {site: torch.tensor([value], dtype=torch.float64) for site, value in values.items()}
    at_truth = float(density(density.unconstrain(tensors)))
    bound = 42 * (np.log(1e3) - 0.5 * np.log(2 * np.pi)) - np.log(solved).sum()  # no error at all
    prior = sum(
        float(part)
        for part in (
            torch.distributions.Normal(torch.tensor([0.0, -3.5, 0.0, -3.5]), 0.5)
            .log_prob(torch.tensor(rates).log())
            .sum(),
            torch.distributions.Normal(np.log(10.0), 1.0).log_prob(torch.tensor(initial).log()).sum(),
            torch.distributions.Normal(-1.0, 1.0).log_prob(torch.tensor([1e-3, 1e-3]).log()).sum(),
        )
    )
    assert at_truth == pytest.approx(bound + prior, abs=0.02)


def test_folding_brings_draws_to_one_side_and_counts_them():
    (_, density), name = problem("item_response"), "item_response"
    z = 0.1 * torch.randn(40, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = density.constrain(z)
    values["loading"] += torch.where(torch.arange(40) < 10, -1.0, 1.0).reshape(-1, *[1] * (values["loading"].dim() - 1))
    z = density.unconstrain(values)
    folded, share = models.folded(name, density, z)
    assert share == pytest.approx(0.75)
    assert bool((density.constrain(folded)["loading"].reshape(40, -1).mean(1) > 0.0).all())
    assert torch.allclose(density(folded), density(z), rtol=0, atol=1e-8)


def test_draws_of_the_long_runs_moments_are_right_and_others_are_not():
    mean, sd = (torch.tensor(REFERENCE["seeds"][what], dtype=torch.float64) for what in ("mean", "sd"))
    noise = torch.randn(4000, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off, spread, whole = running.judged("seeds", mean + sd * noise)
    assert off < 0.1
    assert spread < 0.1
    assert whole
    assert running.judged("seeds", mean + 0.2 * sd + sd * noise)[0] > 0.15
    assert running.judged("seeds", mean + 1.2 * sd * noise)[1] > 0.15
    mirrored = torch.tensor(REFERENCE["item_response"]["mean"], dtype=torch.float64).repeat(4000, 1)
    assert not running.judged("item_response", mirrored)[2]  # all on one side


@pytest.mark.slow
@pytest.mark.skipif(samplers.numpyro_version() is None, reason="no NumPyro: set NUMPYRO_PYTHON to an interpreter of it")
@pytest.mark.parametrize("name", models.MODELS)
def test_the_ports_to_numpyro_have_the_density_of_the_models(name):
    given, density = problem(name)
    mean, sd = (torch.tensor(REFERENCE[name][what], dtype=torch.float64) for what in ("mean", "sd"))
    noise = torch.randn(4, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = mean + 0.3 * sd * noise
    points = {
        latent.name: z[:, latent.offset : latent.offset + latent.size].reshape(len(z), *latent.unconstrained_shape)
        for latent in density.structure.latents
    }
    difference = samplers.in_numpyro(given, points)["log_density"] - density(z).numpy()
    np.testing.assert_allclose(difference, difference[0], atol=1e-7)


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_each_task_is_done_once_and_again_for_another_model(tmp_path, monkeypatch):
    done = []

    def do(task, limit):
        done.append((task.posterior, task.method))
        return row(**task.named)

    monkeypatch.setattr(running, "limited", do)
    monkeypatch.setattr(nuts, "numpyro_version", lambda *also: "numpyro-1")
    monkeypatch.setattr(records, "code_version", lambda: "1")
    options = {"only": ["seeds", "surgical"], "methods": [OURS, NUMPYRO], "out": tmp_path / "rows.csv"}
    rows = running.bench(**options)
    assert done == [(name, method) for name in ("seeds", "surgical") for method in (OURS, NUMPYRO)]
    assert running.bench(**options) == rows
    assert len(done) == 4
    version = running.model_version
    monkeypatch.setattr(running, "model_version", lambda name: "new" if name == "seeds" else version(name))
    running.bench(**options)
    assert done[4:] == [("seeds", OURS), ("seeds", NUMPYRO)]


def test_the_version_of_a_model_follows_its_data(monkeypatch):
    before = running.model_version("many_locals")
    larger = models.MODELS["many_locals"]
    other = models.Larger(larger.model, running.partial(models.many_locals_data, 10))
    monkeypatch.setitem(models.MODELS, "many_locals", other)
    assert running.model_version("many_locals") != before


@pytest.mark.slow
def test_a_fit_is_ended_at_its_limit():
    found = running.limited(Task("many_locals", OURS, 0, "1", None), limit=8)
    assert found["error"].startswith("took more than 8 s of the processor")


@pytest.mark.slow
def test_a_row_of_ours_says_where_the_seconds_went():
    found = running.limited(Task("surgical", OURS, 0, "1", None))
    assert found["error"] == ""
    assert found["right"] == "yes" or found["status"] == "unreliable"
    parts = stages.read(found["parts"])
    assert sum(parts.values()) == pytest.approx(float(found["cpu_seconds"]), rel=0.05)
    assert parts["training"] > 0.0


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_each_second_of_a_fit_counts_once():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    began = used_seconds()
    with ledger() as kept:
        pf.fit(model, torch.tensor(0.5, dtype=torch.float64), progress=False, max_steps=200)
    spent = used_seconds() - began
    assert sum(kept.seconds.values()) == pytest.approx(spent, abs=0.05)
    of = {
        stage: sum(kept.seconds[parts] for parts in kept.seconds if stages.stage_of(parts) == stage)
        for stage in ("reading", "judging", "starts", stages.OTHER)
    }
    assert min(of["reading"], of["judging"], of["starts"]) > 0.0
    assert of[stages.OTHER] < 0.2 * spent


def test_the_outermost_part_decides_but_compiling_and_searches_of_chains_count_for_themselves():
    assert stages.stage_of((_stages.FIT, _stages.PARAMETERIZING, _stages.TRAINING)) == "coordinates"
    assert stages.stage_of((_stages.FIT, "run 1 of 1", _stages.TRAINING, "compiling")) == "compiling"
    assert stages.stage_of((_stages.FIT, "run 1 of 1")) == stages.OTHER
    chains = _stages.FIT, _stages.AT_ONCE
    assert stages.stage_of(chains) == "sampler"
    assert stages.stage_of((*chains, _stages.MISSED_BY_CHAINS)) == "modes"
    assert stages.stage_of((*chains, _stages.MISSED_BY_CHAINS, _stages.TRACING)) == "tracing"
    seconds = {(_stages.FIT, _stages.TRAINING): 1.0, (_stages.FIT, _stages.MISSED, _stages.TRAINING): 2.0, (): 0.001}
    assert stages.read(stages.written(seconds)) == {"modes": 2.0, "training": 1.0}


# ---- table -----------------------------------------------------------------------------------------------------------


def test_a_wrong_fit_that_says_so_is_honest():
    honest = [row(right="no", status="unreliable"), row(method=NUMPYRO)]
    assert "right or said to be unreliable on 1" in larger_section(honest)
    lie = [row(right="no", status="ok"), row(method=NUMPYRO)]
    assert "right or said to be unreliable on 0" in larger_section(lie)
