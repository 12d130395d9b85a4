"""The benchmarks: comparison, resuming, tables, ports against their reference draws, toy targets against quadrature."""

import math
from dataclasses import asdict

import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks import records, tables
from benchmarks.posteriors import judging, rivals
from benchmarks.posteriors import running as posteriordb
from benchmarks.posteriors.models import NAMES, eight_schools_centered, eight_schools_noncentered, load
from benchmarks.posteriors.reference import find_posteriordb
from benchmarks.speed import running as speed
from benchmarks.toys import running as toys
from benchmarks.toys import targets
from benchmarks.toys.targets import TARGETS
from pyro_flows import LogDensity
from tests.benchmarks.pages import write_only

STEIN_DRAWS = 2000
STEIN_CHUNK = 250
STEIN_ERRORS = 6.0  # largest admissible deviation, in standard errors, over all entries of the identity
# Where the score is heavy-tailed under the posterior, so that its averages have no standard error: tau of the centered
# model, whose funnel makes the score of theta as large as 1 / tau. Its density is compared with the non-centered one.
INFINITE_VARIANCE = "eight_schools-eight_schools_centered"


def row(**given: object) -> records.Row:
    """A row of a right fit, but for what is given."""
    figures = {"status": "ok", "k_hat": 0.2, "ess_ratio": 0.9, "elbo": -1.0, "elbo_gap": 0.01}
    figures |= {"raw_mean": 0.02, "raw_sd": 0.02, "used_mean": 0.02, "used_sd": 0.02, "dim": 3}
    figures |= {"gradient_evaluations": 80000, "steps": 1000, "seconds": 9.0, "rounds": "first round"}
    figures |= {"posterior": NAMES[0], "method": posteriordb.OURS, "seed": 0, "version": "1", "machine": "A CPU"}
    return {name: str({**figures, **given}.get(name, "")) for name in posteriordb.FIELDS}


def made(task: posteriordb.Task) -> records.Row:
    """A row for a task, without a fit."""
    named = {"posterior": task.posterior, "method": task.method, "seed": task.seed, "version": task.version}
    return row(**named, gradient_evaluations=task.gradients or 128)


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_compare_finds_the_shift_and_the_scale_that_were_put_in():
    reference = torch.randn(4000, 3, dtype=torch.float64)
    shift = torch.tensor([0.0, 0.3, -0.1]) * reference.std(0)
    scale = torch.tensor([1.0, 1.0, 0.8])
    draws = reference.mean(0) + (reference - reference.mean(0)) * scale + shift
    mean, sd = posteriordb.compare(draws, reference)
    assert mean == pytest.approx(0.3, rel=1e-6)
    assert sd == pytest.approx(-math.log(0.8), rel=1e-6)
    assert posteriordb.compare(reference, reference) == (0.0, 0.0)


def test_compare_calls_draws_that_are_not_finite_infinitely_wrong():
    draws = torch.randn(100, 2)
    draws[3, 1] = math.nan
    assert posteriordb.compare(draws, torch.randn(100, 2)) == (math.inf, math.inf)


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_bench_does_each_fit_once(tmp_path):
    out, done = tmp_path / "rows.csv", []

    def do(task):
        done.append((task.method, task.seed))
        return made(task)

    options = {"only": ["kilpisjarvi"], "out": out, "do": do}
    posteriordb.bench(None, seeds=1, **options)
    assert done == [(posteriordb.OURS, 0)]
    rows = posteriordb.bench(None, seeds=2, **options)
    assert done == [(posteriordb.OURS, 0), (posteriordb.OURS, 1)]
    assert [found["seed"] for found in rows] == ["0", "1"]
    assert records.read(out) == rows


def test_bench_does_fits_of_another_version_again(tmp_path, monkeypatch):
    options = {"seeds": 1, "only": ["kilpisjarvi"], "out": tmp_path / "rows.csv", "do": made}
    posteriordb.bench(None, **options)
    monkeypatch.setattr(records, "code_version", lambda: "another")
    rows = posteriordb.bench(None, **options)
    assert [found["version"] for found in rows] == ["another"]
    assert len(records.read(options["out"])) == 2


def test_a_row_that_was_cut_short_is_done_again(tmp_path):
    options = {"seeds": 2, "only": ["kilpisjarvi"], "out": tmp_path / "rows.csv", "do": made}
    whole = posteriordb.bench(None, **options)
    text = options["out"].read_text()
    options["out"].write_text(text[: text.rindex("ok")])
    assert len(records.read(options["out"])) == 1
    assert posteriordb.bench(None, **options) == whole
    assert records.read(options["out"]) == whole


def test_a_file_with_other_columns_is_refused(tmp_path):
    out = tmp_path / "rows.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="out: expected the columns"):
        posteriordb.bench(None, seeds=1, only=["kilpisjarvi"], out=out, do=made)
    assert out.read_text() == "a,b\n1,2\n"


def test_an_exception_in_a_fit_becomes_its_row(monkeypatch):
    def broken(name, root):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(posteriordb, "load", broken)
    found = posteriordb.work(posteriordb.Task(NAMES[0], posteriordb.OURS, 0, "1", None))
    assert found["error"] == "RuntimeError: no luck"
    assert set(found) == set(posteriordb.FIELDS)


def test_an_unknown_posterior_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="got 'nine_schools'; choose from"):
        posteriordb.bench(None, seeds=1, only=["nine_schools"], out=tmp_path / "rows.csv", do=made)


# ---- summary and tables ----------------------------------------------------------------------------------------------


def test_count_goes_by_the_worst_seed():
    rows = [
        row(),
        row(seed=1, raw_mean=0.3),
        row(posterior=NAMES[1], k_hat=0.9, status="unreliable", elbo_gap=0.07),
        row(posterior=NAMES[2], used_mean=0.3, raw_mean=0.3, elbo_gap=""),
        row(
            posterior=NAMES[3],
            error="ValueError: none",
            status="",
            **dict.fromkeys(("used_mean", "k_hat", "ess_ratio"), ""),
        ),
    ]
    found = judging.count(rows)
    assert (found.posteriors, found.fits, found.failed_fits) == (4, 5, 1)
    assert (found.right_used, found.right_raw) == (2, 1)
    assert (found.small_k, found.large_ess) == (2, 3)
    assert (found.evidence_known, found.small_gap) == (3, (1, 2))
    assert found.wrong_and_ok_fits == 1
    assert (found.right_fits, found.right_and_unreliable_fits) == (2, 1)
    assert "right in the worst seed: 2 of 4 with the draws to use, 1 with raw draws" in judging.summary(rows)


def test_newest_keeps_the_version_that_was_written_last_and_no_fit_twice():
    found = judging.newest([row(version="1"), row(version="2"), row(version="2", seed=1), row(version="2")])
    assert [kept["version"] for kept in found[posteriordb.OURS]] == ["2", "2"]


def timed(method: str, milliseconds: float, case: speed.Case = speed.SCHOOLS, **figures: object) -> dict[str, str]:
    about = {"version": "1", "machine": "A CPU", "software": "Torch", "setup_seconds": "1", "megabytes": "300"}
    row = {**asdict(case), "method": method, "round": 0, "milliseconds": milliseconds, **about, **figures}
    return {name: str(value) for name, value in row.items()}


def test_tables_are_put_between_the_markers_and_nowhere_else(tmp_path):
    page, posteriors, times = tmp_path / "performance.md", tmp_path / "posteriordb.csv", tmp_path / "speed.csv"
    rows = [row(), row(seed=1, used_mean=0.055), row(posterior=NAMES[1], error="ValueError: none", status="")]
    records.write(posteriors, posteriordb.FIELDS, rows)
    records.write(times, speed.FIELDS, [timed("eager", 2.0), timed("Pyro", 8.0), timed("recorded", 1.0)])
    write_only(page, speed_csv=times, posteriordb_csv=posteriors)
    text = page.read_text()
    assert "| eight schools | 10 | 256 | 2.00 (4.0) | 1.00 (8.0) | 8.00 |" in text
    line = next(line for line in text.splitlines() if line.startswith(f"| {NAMES[0]} |"))
    assert line.split(" | ")[2] == "0.055"
    assert line.endswith("| ok |")
    assert "| inf |" in next(line for line in text.splitlines() if line.startswith(f"| {NAMES[1]} |"))
    assert "A CPU" in text

    page.write_text(text.replace("# Performance", "# Performance\n\nBy hand."))
    write_only(page, posteriordb_csv=posteriors)
    again = page.read_text()
    assert "By hand." in again
    assert again.replace("\n\nBy hand.", "") == text


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected the markers <!-- speed: begin -->"):
        tables.replace("# Performance", "speed", "table")


def test_the_version_goes_by_definitions():
    """Docstrings, comments, imports and the order of definitions are no part of it."""
    plain = "def f():\n    return g()\n\ndef g():\n    return 1\n"
    other = 'import g\n\ndef g():\n    import f\n    return 1  # one\n\ndef f():\n    """One."""\n    return g()\n'
    assert records.definitions(other) == records.definitions(plain)
    assert records.definitions(plain.replace("1", "2")) != records.definitions(plain)


def test_the_version_does_not_go_by_paths(tmp_path):
    """Definitions that move to another file, or to another folder, leave the version as it is; others do not."""
    first, second = "X = 1\n\n\ndef one():\n    return X\n", "class Two:\n    number = 2\n"
    trees = {
        "before": {"a.py": first, "b/c.py": second},
        "moved": {"d/e.py": first, "f.py": second},
        "in one file": {"g/h/i.py": f"{second}\n\n{first}"},
        "changed": {"a.py": first, "b/c.py": second.replace("2", "3")},
        "renamed": {"a.py": first, "b/c.py": second.replace("Two", "Three")},
        "shown": {"a.py": first, "b/c.py": second, "plots.py": "def plot():\n    pass\n"},
    }
    for tree, files in trees.items():
        for name, text in files.items():
            path = tmp_path / tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    found = {tree: records.code_version(tmp_path / tree) for tree in trees}
    assert found["before"] == found["moved"] == found["in one file"] == found["shown"]
    assert len(set(found.values())) == 3


# ---- the ports -------------------------------------------------------------------------------------------------------


def stein_errors(density: LogDensity, z: torch.Tensor) -> torch.Tensor:
    """Deviations from Stein's identity in standard errors: E[s_j] = 0 and E[w_i s_j] = -1 if i is j, else 0.

    w are the whitened draws, s the score in their coordinates.
    """
    center = z.mean(0)
    factor = torch.linalg.cholesky((z - center).T.cov())
    z = z[:: max(len(z) // STEIN_DRAWS, 1)]
    w = torch.linalg.solve_triangular(factor, (z - center).T, upper=False).T
    score = torch.cat([density.value_and_grad(part)[1] for part in z.split(STEIN_CHUNK)]) @ factor
    terms = torch.cat([w[:, :, None] * score[:, None, :] + torch.eye(density.dim), score[:, None, :]], 1).flatten(1)
    return terms.mean(0) / (terms.std(0) / math.sqrt(len(terms)))


@pytest.mark.skipif(find_posteriordb() is None, reason="posteriordb is not here: set POSTERIORDB to a checkout of it")
@pytest.mark.parametrize("name", [name for name in NAMES if name != INFINITE_VARIANCE])
def test_the_score_of_each_port_fits_its_reference_draws(name):
    problem = load(name)
    density = LogDensity(problem.model, problem.args)
    errors = stein_errors(density, density.unconstrain(problem.reference))
    assert float(errors.abs().max()) < STEIN_ERRORS


def test_the_score_check_tells_a_wrong_density():
    def model(scale):
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), scale).to_event(1))

    z = torch.randn(4000, 2, dtype=torch.float64)
    right, wrong = (LogDensity(model, (torch.tensor(scale, dtype=torch.float64),)) for scale in (1.0, 1.15))
    assert float(stein_errors(right, z).abs().max()) < STEIN_ERRORS
    assert float(stein_errors(wrong, z).abs().max()) > STEIN_ERRORS


def test_the_centered_schools_have_the_density_of_the_non_centered_ones():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
    noncentered = LogDensity(eight_schools_noncentered, (y, sigma))
    centered = LogDensity(eight_schools_centered, (y, sigma))
    z = torch.randn(200, noncentered.dim, dtype=torch.float64)
    values = noncentered.constrain(z)
    tau = values["tau"]
    theta = values["mu"][:, None] + tau[:, None] * values["theta_trans"]
    z_centered = centered.unconstrain({"mu": values["mu"], "tau": tau, "theta": theta})
    torch.testing.assert_close(centered(z_centered), noncentered(z) - 8.0 * tau.log())


# ---- toy targets -----------------------------------------------------------------------------------------------------


def toy_row(**given: object) -> records.Row:
    """A row of a right fit of U1, but for what is given."""
    figures = {"target": "u1", "flow": "planar", "layers": 32, "runs": 1, "seed": 0, "version": "1", "status": "ok"}
    figures |= {"k_hat": 0.2, "ess_ratio": 0.9, "elbo": 1.8, "elbo_gap": 0.02, "modes": 2, "of_modes": 2}
    figures |= {"used_mean": 0.01, "used_sd": 0.01, "gradient_evaluations": 90000, "seconds": 9.0, "machine": "A CPU"}
    return {name: str({**figures, **given}.get(name, "")) for name in toys.FIELDS}


def moments(points: torch.Tensor, log_density: torch.Tensor, cell: float) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Log normalizer, mean and sd by the midpoint rule over points (..., D)."""
    density = log_density.exp()
    mass = density.sum() * cell
    weights = (density * cell / mass)[..., None]
    axes = tuple(range(log_density.dim()))
    mean = (weights * points).sum(axes)
    return float(mass.log()), mean, (weights * (points - mean).square()).sum(axes).sqrt()


@pytest.mark.parametrize("name", ["u1", "u2", "u3", "u4"])
def test_the_potentials_have_the_normalizer_and_moments_that_a_grid_finds(name):
    """The energies are written down once more, as in the paper, and integrated over a square."""
    axis = torch.linspace(-8.0, 8.0, 1001, dtype=torch.float64)
    z1, z2 = torch.meshgrid(axis, axis, indexing="ij")
    w1 = torch.sin(2 * math.pi * z1 / 4)
    w2 = 3 * torch.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + torch.exp(-(z1 - 1) / 0.3))
    wall = 0.5 * ((z1.abs() - 4).clamp(min=0) / 0.4) ** 2
    energies = {
        "u1": 0.5 * (((z1**2 + z2**2).sqrt() - 2) / 0.4) ** 2
        - torch.log(torch.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + torch.exp(-0.5 * ((z1 + 2) / 0.6) ** 2)),
        "u2": wall + 0.5 * ((z2 - w1) / 0.4) ** 2,
        "u3": wall
        - torch.log(torch.exp(-0.5 * ((z2 - w1) / 0.35) ** 2) + torch.exp(-0.5 * ((z2 - w1 + w2) / 0.35) ** 2)),
        "u4": wall
        - torch.log(torch.exp(-0.5 * ((z2 - w1) / 0.4) ** 2) + torch.exp(-0.5 * ((z2 - w1 + w3) / 0.35) ** 2)),
    }
    target, points = TARGETS[name], torch.stack([z1, z2], dim=-1)
    log_normalizer, mean, sd = moments(points, -energies[name], float(axis[1] - axis[0]) ** 2)
    assert target.log_evidence == pytest.approx(log_normalizer, abs=1e-5)
    assert mean.tolist() == pytest.approx(target.mean, abs=1e-5)
    assert sd.tolist() == pytest.approx(target.sd, abs=1e-5)

    density = LogDensity(target.model, ())
    inside = points[200:800:75, 200:800:75].reshape(-1, 2)
    expected = -energies[name][200:800:75, 200:800:75].flatten()
    torch.testing.assert_close(density(inside.float()).double(), expected, atol=1e-3, rtol=1e-5)


def test_the_many_well_has_the_normalizer_and_moments_of_its_double_well():
    x = torch.linspace(-5.0, 5.0, 10001, dtype=torch.float64)
    log_well = 0.5 * x + 6.0 * x**2 - x**4
    log_normalizer, mean, sd = moments(x[:, None], log_well, float(x[1] - x[0]))
    target = TARGETS["many_well"]
    expected = 16 * (log_normalizer + 0.5 * math.log(2 * math.pi))
    assert target.log_evidence == pytest.approx(expected, abs=1e-3)
    assert (float(mean), float(sd)) == pytest.approx((target.mean[0], target.sd[0]), abs=1e-5)
    left = float(log_well[x < 0].exp().sum() / log_well.exp().sum())
    assert target.shares == pytest.approx((left,) * 16 + (1 - left,) * 16, abs=1e-5)

    z = torch.randn(5, 32)
    terms = 0.5 * z[:, ::2] + 6.0 * z[:, ::2] ** 2 - z[:, ::2] ** 4 - 0.5 * z[:, 1::2] ** 2
    torch.testing.assert_close(LogDensity(target.model, ())(z), terms.sum(-1))


def test_the_funnel_and_the_mixture_have_mass_one_and_their_moments():
    funnel = LogDensity(TARGETS["funnel"].model, ())
    z = torch.randn(6, 10)
    x0, leaves = z[:, :1], z[:, 1:]
    log_p = dist.Normal(0.0, 3.0).log_prob(x0).sum(-1) + dist.Normal(0.0, (x0 / 2).exp()).log_prob(leaves).sum(-1)
    torch.testing.assert_close(funnel(z), log_p)
    torch.testing.assert_close(LogDensity(TARGETS["funnel_energy"].model, ())(z), log_p)
    torch.testing.assert_close(funnel.constrain(z)["x0"], z[:, 0])

    target = TARGETS["mixture"]
    centers = targets.CENTERS
    assert len(centers) == 40
    assert bool((centers.abs() <= 40.0).all())
    draws = centers[torch.arange(40).repeat(2000)] + targets.COMPONENT_SD * torch.randn(80_000, 2)
    components = dist.Normal(centers, targets.COMPONENT_SD).to_event(1)
    reference = dist.MixtureSameFamily(dist.Categorical(torch.ones(40)), components).log_prob(draws[:100])
    torch.testing.assert_close(LogDensity(target.model, ())(draws[:100]), reference, atol=1e-4, rtol=1e-4)
    mean, sd = toys.errors(target, draws)
    assert mean < 0.001
    assert sd < 0.001
    assert toys.modes_found(target, draws) == 40


def test_modes_that_draws_lack_are_not_found():
    ring = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]).repeat(500, 1)
    assert toys.modes_found(TARGETS["u1"], ring) == 2
    assert toys.modes_found(TARGETS["u1"], ring.abs()) == 1
    mostly = ring.abs()
    mostly[:100] = -mostly[:100]  # a tenth, where a half is due
    assert toys.modes_found(TARGETS["u1"], mostly) == 1
    wells = torch.full((1000, 32), 1.75)
    assert toys.modes_found(TARGETS["many_well"], wells) == 16
    wells[:100, :6] = -1.7
    assert toys.modes_found(TARGETS["many_well"], wells) == 19
    some = targets.CENTERS[:7].repeat(100, 1)
    assert toys.modes_found(TARGETS["mixture"], some) == 7


def test_one_toy_is_fitted_for_real(monkeypatch):
    given = {}

    def short(model, **options):
        given.update(options)
        return fit(model, **options, max_steps=30, escalate=False, refine=False)

    fit = toys.pyro_flows.fit
    monkeypatch.setattr(toys.pyro_flows, "fit", short)
    found = toys.work(toys.Task(toys.Case("u1", "planar", 2), seed=3, version="1"))
    assert given == {"flow": "planar", "layers": 2, "runs": 1, "seed": 3, "draws": toys.DRAWS, "progress": False}
    assert found["error"] == ""
    assert set(found) == set(toys.FIELDS)
    assert float(found["elbo_gap"]) == pytest.approx(TARGETS["u1"].log_evidence - float(found["elbo"]), abs=1e-4)
    assert found["layers_at_end"] == "2"
    assert int(found["modes"]) <= int(found["of_modes"]) == 2
    assert "u1, planar 2, seed 3: " in toys.line(found)


def test_a_toy_fit_without_a_mode_is_wrong_whatever_its_moments():
    assert not toys.wrong(toy_row())
    assert toys.wrong(toy_row(modes=1))
    assert toys.wrong(toy_row(used_mean=0.3))
    assert toys.wrong(toy_row(used_sd=0.3))
    assert "2 fits, 0 of them failed; wrong and ok: 1" in toys.summary([toy_row(), toy_row(modes=1)])


SLOW_RIVALS = ("AutoIAFNormal", "AutoNormalizingFlow")  # run in the same way as the others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_RIVALS else ()) for name in rivals.RIVALS]
)
def test_rivals_are_trained_and_judged(name):
    def model():
        pyro.sample("x", dist.Normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1))

    found = rivals.run(rivals.RIVALS[name], model, (), gradients=5 * rivals.PARTICLES, seed=0, draws=200)
    assert found.settings["gradient_evaluations"] == 5 * rivals.PARTICLES
    assert found.settings["rate"] in rivals.RATES
    assert found.settings["seconds"] > 0.0
    assert math.isfinite(found.elbo)
