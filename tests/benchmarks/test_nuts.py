"""The benchmark against NUTS: resuming, the rule of the limit, what is counted, its table, NumPyro's ports."""

import numpy as np
import pytest
import torch

from benchmarks import records
from benchmarks.clock import Stopwatch
from benchmarks.nuts import running as nuts
from benchmarks.nuts import samplers
from benchmarks.nuts.samplers import CHAINS, LENGTH, LIMIT, MOST, NUMPYRO, PYRO, SCALE, SHORT
from benchmarks.posteriors.models import NAMES, eight_schools_noncentered, load
from benchmarks.posteriors.reference import find_posteriordb
from benchmarks.posteriors.running import OURS, Task
from pyro_flows import LogDensity


def row(**given: object) -> records.Row:
    """A row of right draws, but for what is given."""
    figures = {"posterior": NAMES[0], "method": OURS, "seed": 0, "version": "1", "dim": 10, "draws": 4000}
    figures |= {"mean": 0.02, "sd": 0.02, "right": "yes", "seconds": 9.0, "cpu_seconds": 8.0, "scaled": "no"}
    return {name: str({**figures, "machine": "A CPU", **given}.get(name, "")) for name in nuts.FIELDS}


def made(task: Task) -> records.Row:
    """A row for a task, without a run."""
    return row(posterior=task.posterior, method=task.method, seed=task.seed, version=task.version)


def pair(name: str, ours: float, theirs: float, rival: str = PYRO, **given: object) -> list[records.Row]:
    """Our row and one of a rival."""
    return [
        row(posterior=name, cpu_seconds=ours),
        row(posterior=name, cpu_seconds=theirs, method=rival, version="2", **given),
    ]


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def numpyro(monkeypatch):
    """The versions that an interpreter with NumPyro would name."""
    monkeypatch.setattr(
        nuts, "numpyro_version", lambda *also: " ".join(f"{name}-1" for name in (*also, "numpyro", "jax"))
    )


def test_a_change_of_our_code_repeats_our_fits_only(tmp_path, numpyro, monkeypatch):
    options = {"only": ["kilpisjarvi"], "out": tmp_path / "rows.csv", "do": made}
    nuts.bench(None, **options)
    monkeypatch.setattr(records, "code_version", lambda: "another")
    rows = nuts.bench(None, **options)
    assert [found["version"] for found in rows if found["method"] == OURS] == ["another"]
    assert len(records.read(options["out"])) == 5


def test_numpyro_and_nutpie_are_left_out_with_a_word_where_they_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(samplers.INTERPRETER, raising=False)
    rows = nuts.bench(None, only=["kilpisjarvi"], out=tmp_path / "rows.csv", do=made)
    assert [found["method"] for found in rows] == [OURS, PYRO]
    said = capsys.readouterr().out
    assert "NumPyro NUTS: left out, since no interpreter with NumPyro was found" in said
    assert "nutpie: left out, since no interpreter with NumPyro and nutpie was found" in said


# ---- the limit -------------------------------------------------------------------------------------------------------


class Chains:
    """A chain that takes ``seconds`` a transition on a clock of its own, and keeps what it was asked for."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.asked = seconds, 0.0, []

    def __call__(self, index, length, check):
        self.asked.append((index, length))
        for _ in range(2 * length):
            self.now += self.seconds
            check()
        return torch.full((length, 2), float(index))

    def clock(self):
        chains = self

        class Fake(Stopwatch):
            @staticmethod
            def _read():
                return 2.0 * chains.now, chains.now

        return Fake()


ALLOWED = LIMIT / (2 * CHAINS * LENGTH)  # seconds a transition that just stay within the limit


def test_all_chains_are_run_where_they_stay_within_the_limit():
    chains = Chains(0.99 * ALLOWED)
    found = samplers.run_chains(chains, chains.clock)
    assert chains.asked == [(index, LENGTH) for index in range(CHAINS)]
    assert found.draws.shape == (CHAINS * LENGTH, 2)
    assert found.cpu_seconds == pytest.approx(0.99 * LIMIT)
    assert found.seconds == pytest.approx(2 * 0.99 * LIMIT)
    assert not found.scaled


def test_a_short_chain_stands_in_for_chains_that_would_take_longer():
    chains = Chains(1.01 * ALLOWED)
    found = samplers.run_chains(chains, chains.clock)
    assert chains.asked == [(0, LENGTH), (0, SHORT)]
    assert len(found.draws) == SHORT
    assert found.cpu_seconds == pytest.approx(1.01 * LIMIT)
    assert found.scaled
    assert SCALE * SHORT == CHAINS * LENGTH


def test_the_first_chain_is_given_up_once_it_has_taken_its_share():
    chains = Chains(7 * ALLOWED)
    found = samplers.run_chains(chains, chains.clock)
    short = 2 * SHORT * chains.seconds
    assert found.cpu_seconds == pytest.approx(SCALE * short)
    assert 0.0 < chains.now - short - LIMIT / CHAINS <= chains.seconds


def test_a_short_chain_is_broken_off_in_its_turn():
    chains = Chains(MOST / (2 * SHORT) * 1.01)
    found = samplers.run_chains(chains, chains.clock)
    assert found.draws is None
    assert found.scaled
    assert SCALE * MOST < found.cpu_seconds <= SCALE * (MOST + chains.seconds)


@pytest.mark.slow
def test_pyro_samples_the_recorded_density(monkeypatch):
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
    problem = samplers.Problem("schools", eight_schools_noncentered, (y, sigma), {}, None)
    monkeypatch.setattr(samplers, "LENGTH", 40)
    monkeypatch.setattr(samplers, "CHAINS", 2)
    found = samplers.pyro_nuts(problem, 0)
    assert found.draws.shape == (80, 10)
    assert found.draws.dtype == torch.float64
    assert found.cpu_seconds > 0
    assert float(found.draws[:, 0].mean()) == pytest.approx(4.4, abs=4.0)  # sd 3.3, mean 4.4, few draws
    monkeypatch.setattr(samplers, "LIMIT", 0.0)
    monkeypatch.setattr(samplers, "SHORT", 5)
    assert samplers.pyro_nuts(problem, 0).scaled


# ---- summary and table -----------------------------------------------------------------------------------------------


def test_ratios_are_counted_by_their_limits():
    rows = [*pair(NAMES[0], 2.0, 20.0), *pair(NAMES[1], 2.0, 19.9), *pair(NAMES[2], 2.0, 1.9)]
    rows += pair(NAMES[3], 2.0, 900.0, scaled="yes", right="no")
    (line,) = nuts.summary(rows).splitlines()
    assert "against Pyro NUTS: 2 of 4 10 x faster, 3 faster, 1 slower or not right" in line
    assert "right on 3, its time is scaled on 1" in line


def test_our_wrong_or_failed_fits_are_not_faster():
    rows = [*pair(NAMES[0], 2.0, 90.0, NUMPYRO), *pair(NAMES[1], 2.0, 90.0, NUMPYRO)]
    rows[0]["right"] = "no"
    rows[2]["error"] = "ValueError: none"
    assert "against NumPyro NUTS: 0 of 2 10 x faster, 0 faster, 2 slower or not right" in nuts.summary(rows)


def test_a_rival_that_failed_is_not_compared():
    rows = [*pair(NAMES[0], 2.0, 3.0), *pair(NAMES[1], 2.0, 3.0)]
    rows[3].update(error="ValueError: none", cpu_seconds="")
    assert "0 of 1 10 x faster, 1 faster, 0 slower" in nuts.summary(rows)


def test_a_posterior_that_we_have_not_fitted_is_not_compared():
    rows = [*pair(NAMES[0], 2.0, 3.0), row(posterior=NAMES[1], method=PYRO, version="2")]
    assert "0 of 1 10 x faster, 1 faster, 0 slower" in nuts.summary(rows)
    assert nuts.summary(rows[1:2]).startswith("seconds to a right posterior against Pyro NUTS: 0 of 0")


# ---- NumPyro's ports -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_posteriordb() is None, reason="posteriordb is not here: set POSTERIORDB to a checkout of it")
@pytest.mark.skipif(samplers.numpyro_version() is None, reason="no NumPyro: set NUMPYRO_PYTHON to an interpreter of it")
@pytest.mark.parametrize("name", NAMES)
def test_the_ports_to_numpyro_have_the_density_of_those_to_pyro(name):
    problem = load(name)
    density = LogDensity(problem.model, problem.args)
    z = density.unconstrain({site: draws[::2500] for site, draws in problem.reference.items()})
    points = {
        latent.name: z[:, latent.offset : latent.offset + latent.size].reshape(len(z), *latent.unconstrained_shape)
        for latent in density.structure.latents
    }
    difference = samplers.in_numpyro(problem, points)["log_density"] - density(z).numpy()
    assert len(difference) >= 4
    np.testing.assert_allclose(difference, difference[0], atol=1e-8)
