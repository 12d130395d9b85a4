"""Non-centered coordinates: which sites can have them, that the density is the same one, and that fit takes them."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import LogDensity
from pyro_flows.posterior.export.arviz_groups import predict
from pyro_flows.support.process.stages import PARAMETERIZATION
from tests.models import real
from tests.registry import normal

Y = normal(4, seed=3)


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(real(0.0), 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(real(1.5)))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def by_hand(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(real(0.0), 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(real(1.5)))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, 1.0), obs=y)


def families() -> None:
    a = pyro.sample("a", dist.Normal(real(0.3), 1.0))
    b = pyro.sample("b", dist.LogNormal(a, real(0.5)))
    pyro.sample("c", dist.StudentT(5.0, a, b).expand([3]).to_event(1))
    pyro.sample("d", dist.MultivariateNormal(a * torch.ones(2).double(), scale_tril=b * torch.eye(2).double()))
    pyro.sample("e", dist.Laplace(real(0.0), 1.0))  # depends on nothing
    pyro.sample("f", dist.HalfNormal(b))  # a scale, but no location
    with pyro.poutine.mask(mask=torch.tensor([True, False])):
        pyro.sample("g", dist.Normal(a, torch.ones(2).double()))


def steps(count: int) -> None:
    x = pyro.sample("x0", dist.Normal(real(0.0), 1.0))
    sd = pyro.sample("sd", dist.HalfNormal(real(1.0)))
    for i in range(1, count):
        x = pyro.sample(f"x{i}", dist.Normal(x, sd))


def funnel() -> None:
    x = pyro.sample("x", dist.Normal(real(0.0), 3.0))
    with pyro.plate("nine", 9):
        pyro.sample("rest", dist.Normal(0.0, torch.exp(x / 2)))


def test_sites_whose_location_or_scale_moves_are_found() -> None:
    assert LogDensity(hierarchy, (Y,)).structure.hierarchical == ("theta",)
    assert LogDensity(by_hand, (Y,)).structure.hierarchical == ()
    assert LogDensity(families).structure.hierarchical == ("b", "c", "d")
    assert LogDensity(steps, (4,)).structure.hierarchical == ("x1", "x2", "x3")


@pytest.mark.parametrize("name", ["mu", "tau", "nobody"])
def test_a_site_that_cannot_be_noncentered_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"noncentered: expected sites .*'theta'.*got '{name}'"):
        LogDensity(hierarchy, (Y,), noncentered=["theta", name])


def test_the_density_is_that_of_the_model_written_noncentered() -> None:
    ours, theirs = LogDensity(hierarchy, (Y,), noncentered=True), LogDensity(by_hand, (Y,))
    z = normal(20, ours.dim, seed=1)
    assert torch.allclose(ours(z), theirs(z), rtol=0.0, atol=1e-10)
    for mine, other in zip(ours.value_and_grad(z), theirs.value_and_grad(z), strict=True):
        assert torch.allclose(mine, other, rtol=0.0, atol=1e-9)


KINDS = {
    "normal": dist.Normal,
    "student": lambda loc, scale: dist.StudentT(4.0, loc, scale),
    "laplace": dist.Laplace,
    "cauchy": dist.Cauchy,
    "logistic": dist.Logistic,
    "gumbel": dist.Gumbel,
    "lognormal": dist.LogNormal,
    "multivariate": lambda loc, scale: dist.MultivariateNormal(
        loc.expand(3), scale_tril=scale * torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.9, 0.0], [0.2, 0.1, 0.7]]).to(loc)
    ),
}
TOLD = {"precision": real([0.3, 0.0, 2.0]), "center": real([1.0, 0.0, -0.5])}


@pytest.mark.parametrize("data", [None, TOLD], ids=["prior", "data"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_neck_narrower_than_rounding_the_prior_of_standardized_values_is_kept(kind, dtype, data) -> None:
    """(y - m) / s was computed from y: with s below its last digit, any standardized value had the mode's density."""

    def model(written: str) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=dtype), 3.0))
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones((), dtype=dtype)))
        fn = KINDS[written](loc, scale)
        pyro.sample("y", fn if written == "multivariate" else fn.expand([3]).to_event(1))

    options = None if data is None else {name: values.to(dtype) for name, values in data.items()}
    ours = LogDensity(model, (kind,), noncentered={"y": options})
    z = torch.tensor([2.8, 0.0, 1.5, -30.0, 0.0]).to(dtype).expand(4, 5).clone()
    z[:, 1] = torch.tensor([-1.0, -18.0, -40.0, -80.0])
    at_scale_1 = LogDensity(model, (kind,), noncentered={"y": None})
    wide = z.clone()
    wide[:, 1] = -1.0
    scale_alone = LogDensity(scales, (dtype,))
    expected = at_scale_1(wide) + scale_alone(z[:, 1:2]) - scale_alone(wide[:, 1:2])  # one prior, whatever the scale
    neck = 1 if data is None else 2  # so narrow that data say nothing
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    for found in (ours(z), ours.value_and_grad(z)[0], ours.unrecorded(z)[0]):
        assert torch.allclose(found[neck:], expected[neck:], rtol=tolerance, atol=tolerance)


def scales(dtype: torch.dtype) -> None:
    pyro.sample("scale", dist.HalfCauchy(torch.ones((), dtype=dtype)))


def graded(y: Tensor, group: Tensor) -> None:
    """Pyro writes the probabilities of ordered categories in place."""
    spread = pyro.sample("spread", dist.HalfNormal(real(1.0)))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(real(0.0), spread))
    with pyro.plate("rows", len(group)):
        pyro.sample("y", dist.OrderedLogistic(effect[group], real([-1.0, 1.0])), obs=y)


def test_a_model_that_writes_in_place_is_run_for_the_values_of_its_latents() -> None:
    """The search for modes asks for the Jacobian, and the whole fit failed in it."""
    group = torch.arange(9) % 3
    density = LogDensity(graded, (group.flip(0), group), noncentered=True)
    assert density.batched
    z = normal(5, density.dim, seed=1)
    expected = z[:, 0] + 3.0 * z[:, 0]  # of exp, and of three effects that are multiplied by it
    torch.testing.assert_close(density.log_jacobian(z), expected)
    drawn = predict(density, z, (None, group[:4]), {}, seed=0)
    assert drawn["y"].shape == (5, 4)


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_fit_chooses_noncentered_coordinates_for_a_funnel_and_fits_it_exactly() -> None:
    posterior = pf.fit(funnel, flow="realnvp", progress=False, seed=0, max_steps=1500)
    choice = next(stage for stage in posterior.history if stage["stage"] == PARAMETERIZATION)
    choice = choice["details"]
    assert choice["noncentered"] == {"rest": None} == posterior.settings["noncentered"]
    assert choice["elbo_noncentered"] > choice["elbo_centered"]
    assert posterior.verdict.status == "ok"
    assert -0.01 <= posterior.elbo <= 0.005  # log Z = 0
    assert 2.85 < float(posterior.samples["x"].std()) < 3.15


@pytest.mark.slow
def test_saved_and_loaded(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = pf.fit(funnel, progress=False, seed=1, max_steps=400, escalate=False, draws=500)
    assert posterior.settings["noncentered"] == {"rest": None}
    posterior.save(tmp_path / "fit")
    loaded = pf.load(tmp_path / "fit", funnel)
    assert torch.equal(loaded.z, posterior.z)
    z, log_q = loaded.flow.rsample_and_log_prob((50,))
    assert torch.allclose(loaded.guide.get_posterior().log_prob(z), log_q)
    assert torch.allclose(loaded.density(posterior.z[:20]), posterior.log_p[:20])
    values = loaded.density.constrain(posterior.z[:3])["rest"]
    assert torch.allclose(values, posterior.density.constrain(posterior.z[:3])["rest"])
    assert math.isfinite(loaded.elbo)


def test_a_location_that_depends_on_a_discrete_latent_stays_centered():
    """Summed out, the discrete latent gives the site one location for each of its values: no coordinate of its own."""
    middles = torch.linspace(-6.0, 6.0, 7, dtype=torch.float64)

    def mixture(y: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(7).double()), infer={"enumerate": "parallel"})
        theta = pyro.sample("theta", dist.Normal(middles[z], 1.5))
        pyro.sample("y", dist.Normal(theta, 2.0), obs=y)

    assert LogDensity(mixture, (real(1.0),)).structure.hierarchical == ()
    with pytest.raises(ValueError, match="noncentered"):
        LogDensity(mixture, (real(1.0),), noncentered=["theta"])


@pytest.mark.parametrize("noncentered", [False, True])
def test_values_are_carried_over_to_other_data_whatever_the_coordinates(noncentered):
    def regression(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(real(0.0), 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(real(1.0)))
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(slope * x, tau))
            pyro.sample("y", dist.Normal(theta, 1e-6), obs=y)

    x = real(0.0, 1.0, 2.0)
    density = LogDensity(regression, (x, x), noncentered=noncentered)
    assert density.structure.hierarchical == ("theta",)
    values = {"slope": normal(5, seed=1), "tau": 1.0 + normal(5, seed=2).abs(), "theta": normal(5, 3, seed=3)}
    drawn = predict(density, density.unconstrain(values), (x + 100.0,), {}, seed=0)
    assert torch.allclose(drawn["y"], values["theta"], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("prior", [torch.float32, torch.float64])
@pytest.mark.parametrize("site", ["one by one", "as vectors"])
def test_priors_in_single_precision_go_with_data_in_double(prior: torch.dtype, site: str) -> None:
    """Products of matrices do not mix precisions: correlated effects with default priors had ended in an error."""

    def effects(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(2, dtype=prior)).to_event(1))
        with pyro.plate("groups", 5):
            if site == "as vectors":
                root = torch.diag_embed(scale) @ torch.linalg.cholesky(0.5 * (1.0 + torch.eye(2, dtype=scale.dtype)))
                effect = pyro.sample("effect", dist.MultivariateNormal(torch.zeros(2, dtype=prior), scale_tril=root))
            else:
                effect = pyro.sample("effect", dist.Normal(torch.zeros(2, dtype=prior), scale).to_event(1))
            pyro.sample("y", dist.Normal(effect.sum(-1), 0.1), obs=y)

    plain = LogDensity(effects, (normal(5, seed=0),))
    values = plain.constrain(normal(4, plain.dim, seed=1))
    data = {name: torch.linspace(0.5, 5.0, 10, dtype=torch.float64).reshape(5, 2) for name in ("precision", "center")}
    density = LogDensity(effects, (normal(5, seed=0),), noncentered={"effect": data})
    assert density.dtype == torch.float64
    z = density.unconstrain({name: value.to(prior) for name, value in values.items()})
    for name, value in density.constrain(z).items():
        torch.testing.assert_close(value, values[name], rtol=1e-5, atol=1e-5, check_dtype=False)
    assert density.value_and_grad(z)[1].isfinite().all()
