"""The benchmark of precision, scales and sizes: its closed forms, a row, the table."""

import pytest
import torch

import pyro_flows as pf
from benchmarks.scale import numbers, regressions


@pytest.mark.parametrize(("kind", "size"), [("scales side by side", 1e4), ("correlation", 1e-2), ("latents", 3)])
def test_the_closed_form_is_the_mode_of_the_density(kind, size):
    """Of normal posteriors: the gradient at the mean is zero, and each variance is one of the inverse Hessian."""
    known = numbers.problem(kind, size, torch.float64)
    density = pf.LogDensity(known.model, known.args)
    mean, sd = known.means["x"][None], known.sds["x"]
    _, gradient = density.value_and_grad(mean)
    assert float((gradient * sd).abs().max()) < 1e-8
    hessian = torch.autograd.functional.hessian(lambda z: density(z[None])[0], mean[0])
    torch.testing.assert_close(torch.linalg.inv(-hessian).diagonal().sqrt() / sd, torch.ones_like(sd))


def test_rows_and_their_closed_form():
    """Of a mean and a precision, by quadrature on a grid."""
    known = numbers.problem("rows", 50, torch.float64)
    density = pf.LogDensity(known.model, known.args)
    tau = torch.linspace(0.05, 0.8, 400, dtype=torch.float64)
    mu = torch.linspace(-3.0, 9.0, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(tau, mu)
    z = density.unconstrain({"tau": grid[:, 0], "mu": grid[:, 1]})
    with torch.no_grad():
        weights = (density(z) - density.log_jacobian(z)).softmax(0)
    for place, name in enumerate(("tau", "mu")):
        mean = (weights * grid[:, place]).sum()
        sd = (weights * (grid[:, place] - mean).square()).sum().sqrt()
        torch.testing.assert_close(mean, known.means[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(sd, known.sds[name], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", numbers.DTYPES)
def test_a_row_is_within_the_tolerance(dtype):
    row = numbers.measure("scale", 1e-8, dtype)
    assert not row["error"]
    assert row["status"] != "unreliable"
    assert max(float(row["mean_error"]), float(row["sd_error"])) < numbers.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", regressions.MODELS)
def test_a_row_of_a_regression(name, monkeypatch):
    """Without NumPyro, it has the figures of the fit alone."""
    monkeypatch.setattr(regressions.samplers, "numpyro_version", lambda: None)
    row = regressions.measure(name, 2000)
    assert not row["error"]
    assert row["status"] in {"ok", "corrected", "refined"}
    assert (row["dim"], row["numpyro_seconds"]) == ({"logistic_rows": 10, "poisson_groups": 88}[name], "")
    assert f"| {name} | 2,000 | {row['dim']} | {row['status']} |" in regressions.section([row])
