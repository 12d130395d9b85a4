"""Flow guides as Pyro's users lead them: on a part of the latents, one draw a step, minibatches, a saved store."""

import copy
import functools
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)

import pyro_flows as pf
from tests import lockstep
from tests.invariants import close
from tests.models import real

CELLS, BATCH = 40, 10
PRIORS = {
    "half-Cauchy": lambda: dist.HalfCauchy(torch.tensor(5.0)),
    "log-normal": lambda: dist.LogNormal(torch.tensor(0.0), 1.0),
    "half-normal": lambda: dist.HalfNormal(torch.tensor(5.0)),
}
MAKERS = {
    "realnvp": pf.AutoRealNVP,
    "nice": pf.AutoNICE,
    "planar": pf.AutoPlanar,
    "spline": functools.partial(pf.AutoFlow, flow="spline"),
    "a flow of one's own": lambda model, **options: pf.AutoFlow(model, lambda dim: pf.realnvp(dim), **options),
}


def cells():
    generator = torch.Generator().manual_seed(0)
    return 3.0 + 2.0 * torch.randn(CELLS, generator=generator) + torch.randn(CELLS, generator=generator)


def model_of(prior, batch=BATCH):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", PRIORS[prior]())
        with pyro.plate("cells", len(y), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    return model


def train(make, prior, *, seed, steps):
    """Train (mu, tau) by one guide and z by Pyro's own; return the list and the largest loss."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, y = model_of(prior), cells()
    guide = AutoGuideList(model)
    guide.append(make(poutine.block(model, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(steps)]
    assert all(map(math.isfinite, losses))
    return guide, max(map(abs, losses))


@pytest.mark.slow
def test_the_first_steps_of_a_part_by_single_draws():
    """Steps of .01 in each weight: without small ones, far points come to 1e6 by step 51, and all to NaN by step 55."""
    guide, _ = train(MAKERS["realnvp"], "half-Cauchy", seed=1, steps=120)
    x = torch.cartesian_prod(*2 * [torch.linspace(-6.0, 6.0, 7)])  # where few draws go, the map stays tame
    assert guide[0].get_transform()(x).abs().max() < 50.0


def run_all(start, *, steps=3000, seeds=10):
    """ELBOs (prior, seed) of runs in lockstep; ``start`` makes a map and the df of its base from a prior and a seed."""
    made = [
        (*start(prior, seed), one) for one, prior in zip(torch.eye(3), PRIORS, strict=True) for seed in range(seeds)
    ]
    cores, (df, *_), picked = zip(*made, strict=True)
    pyro.set_rng_seed(0)
    how = {"y": cells(), "priors": tuple(PRIORS.values())}
    runs = lockstep.lockstep(cores, torch.stack(picked), df, **how, batch=BATCH, steps=steps)
    found = [lockstep.elbo(*run, one, df, **how) for run, one in zip(runs, picked, strict=True)]
    return torch.tensor(found).reshape(3, seeds)


def gaussian_start(prior, seed):
    theirs = AutoMultivariateNormal(poutine.block(model_of(prior), expose=["mu", "tau"]))
    theirs(cells())
    return lockstep.Gaussian(theirs.loc.detach()), None


def flow_start(make):
    def start(prior, seed):
        pyro.set_rng_seed(seed)
        model = model_of(prior)
        guide = AutoGuideList(model)
        guide.append(make(poutine.block(model, expose=["mu", "tau"])))
        guide.append(AutoNormal(poutine.block(model, expose=["z"])))
        guide(cells())
        return lockstep.Map(guide[0].flow), guide[0].flow.df

    return start


@functools.cache
def gaussians():
    return run_all(gaussian_start)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("kind", ["Gaussian", "realnvp", "nice", "planar", "spline"])
def test_runs_in_lockstep_have_the_gradients_of_pyros_svi(kind, prior):
    """At the parameters, rows and draws of one step of Pyro's."""
    pyro.set_rng_seed(5)
    model, y, ours = model_of(prior), cells(), kind != "Gaussian"
    guide = AutoGuideList(model)
    guide.append((MAKERS[kind] if ours else AutoMultivariateNormal)(poutine.block(model, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(y)
    trace = poutine.trace(guide).get_trace(y)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(y)
    top, locs = guide[0], guide[1].locs.z
    raw = guide[1].scales.z_unconstrained
    if ours:
        core = lockstep.Map(top.flow)
        own = dict(core.named_parameters())
        values = {name: parameter.detach().clone() for name, parameter in own.items()}
    else:
        core, own = lockstep.Gaussian(top.loc.detach()), {"loc": top.loc, "raw": top.scale_unconstrained}
        values = {**{name: value.detach() for name, value in own.items()}, "below": top.scale_tril.detach()[1, 0]}
    (posterior,) = (trace.nodes[name]["value"].detach() for name in trace.nodes if name.endswith("_latent"))
    if ours:
        x = top.flow.bijection.inverse_and_ladj(posterior)[0].detach()
    else:
        factor = (top.scale[:, None] * top.scale_tril).detach()
        x = torch.linalg.solve_triangular(factor, (posterior - top.loc.detach())[:, None], upper=False)[:, 0]
    index = trace.nodes["cells"]["value"]
    noise = ((trace.nodes["z"]["value"] - guide[1].locs.z[index]) / guide[1].scales.z[index]).detach()
    picked = torch.eye(3)[list(PRIORS).index(prior)]
    found, local = torch.func.grad(
        lambda own, local: lockstep.loss(
            core, own, dict(core.named_buffers()), local, x, noise, index, picked, y, tuple(PRIORS.values())
        ),
        argnums=(0, 1),
    )(values, (locs.detach(), raw.detach()))
    (trace.log_prob_sum() - replayed.log_prob_sum()).backward()
    for name, parameter in own.items():
        close(found[name], parameter.grad, 1e-3)
    close(local[0], locs.grad, 1e-3)
    close(local[1], raw.grad, 1e-3)


# Known to miss: planar maps alone have to pull a unit Gaussian together to a tenth; they end .47 nats below. Splines
# with an affine map end .04 to .08 nats below on average: one seed in thirty is at -.65 when it is cut off.
MISSES = pytest.mark.xfail(reason="planar maps without an affine map are slow to shrink", strict=True)
JUMPS = pytest.mark.xfail(reason="one seed in thirty is far off at the last step", strict=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "affine"),
    [
        *((kind, "none") for kind in ("realnvp", "nice", "spline")),
        *((kind, "auto") for kind in ("nice", "planar")),
        *(pytest.param(kind, "auto", marks=JUMPS) for kind in ("realnvp", "spline")),
        pytest.param("planar", "none", marks=MISSES),
    ],
)
def test_parts_by_single_draws_are_as_good_as_a_gaussian(kind, affine):
    """Three priors, ten seeds, 3000 steps of one draw and ten cells: all finite, and no worse than a Gaussian's."""
    found, gaussian = run_all(flow_start(functools.partial(MAKERS[kind], affine=affine))), gaussians()
    assert found.isfinite().all()
    error = ((found.var(1) + gaussian.var(1)) / 10.0).sqrt()
    assert (found.mean(1) > gaussian.mean(1) - 2.0 * error).all()
    assert (found.amin(1) > gaussian.amin(1) - 0.5).all()


def test_a_part_starts_at_the_prior_median_with_unit_scale():
    """It sees no data: from the prior's scale, 10, a step of its location is a third of the posterior's sd."""
    start, _ = flow_start(MAKERS["realnvp"])("half-normal", 0)
    affine = next(layer for layer in start.modules() if isinstance(layer, pf.transforms.LowerTriangularAffine))
    assert torch.equal(affine.scale_tril, torch.eye(2))


# a trained guide that is moved ----------------------------------------------------------------------------------------


def means(y):
    x = pyro.sample("x", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("whole", [True, False], ids=["guide", "flow"])
@pytest.mark.parametrize("loss", [Trace_ELBO, pf.PathELBO])
def test_a_trained_guide_may_be_moved_and_trained_further(whole, loss):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    y, guide = torch.tensor([1.0, -2.0]), pf.AutoRealNVP(means, layers=2)
    svi = SVI(means, guide, pyro.optim.Adam({"lr": 1e-2}), loss(num_particles=4))
    for _ in range(5):
        svi.step(y)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    (guide if whole else guide.flow).double()
    y = y.double()
    assert guide(y)["x"].dtype == torch.float64
    for old, parameter in zip(before, guide.parameters(), strict=True):
        assert torch.equal(parameter, old.double())
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(y).sum()
    svi = SVI(means, guide, pyro.optim.Adam({"lr": 1e-3}), loss(num_particles=4))
    assert sum(svi.step(y) for _ in range(20)) / 20 == pytest.approx(-float(evidence), abs=0.2)


# what small steps change and what they do not ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["realnvp", "nice", "planar", "spline"])
def test_slowing_a_flow_leaves_its_distribution(name):
    """At random parameters, both passes and the score."""
    torch.manual_seed(3)
    flow = getattr(pf, name)(3).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    slowed = copy.deepcopy(flow).slow()
    x = torch.randn(20, 3, dtype=torch.float64)
    for found, expected in zip(slowed.bijection.forward_and_ladj(x), flow.bijection.forward_and_ladj(x), strict=True):
        close(found, expected, 1e-12)
    close(slowed.log_prob(x), flow.log_prob(x), 1e-10)
    scored = [part.bijection.forward_and_score(x, torch.ones_like(x))[2] for part in (slowed, flow)]
    close(scored[0], scored[1], 1e-12)
    close(slowed.slow().log_prob(x), flow.log_prob(x), 1e-10)  # twice is once


def random_triangular():
    torch.manual_seed(3)
    tril = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-1.0, 3.0, 0.1]], dtype=torch.float64)
    map_ = pf.transforms.LowerTriangularAffine(3, loc=torch.ones(3, dtype=torch.float64), scale_tril=tril)
    torch.nn.init.normal_(map_.conditioner.values)
    return pf.Flow(map_)


def test_slowing_a_triangular_map_leaves_it_and_makes_its_rows_relative():
    """A step of what is below the diagonal is one in units of the row's own scale, not of its start."""
    flow = random_triangular()
    slowed, x = copy.deepcopy(flow).slow(), torch.randn(20, 3, dtype=torch.float64)
    close(slowed.bijection(x), flow.bijection(x), 1e-12)
    close(copy.deepcopy(slowed).slow().bijection(x), flow.bijection(x), 1e-12)  # twice is once
    close(slowed.bijection.inv(slowed.bijection(x)), x, 1e-10)
    before = slowed.bijection(x).detach()
    with torch.no_grad():
        slowed.bijection.conditioner.values[6] += 0.01  # A_21
    row = 0.01 * flow.bijection.conditioner.values.detach()[4].exp() * x[:, :1]
    close(slowed.bijection(x).detach() - before, row * flow.bijection.scale_tril[:, 1], 1e-12)


def test_a_triangular_state_brings_its_units():
    flow = random_triangular()
    slowed, x = copy.deepcopy(flow).slow(), torch.randn(5, 3, dtype=torch.float64)
    for source in (flow, slowed):
        for other in (
            pf.Flow(pf.transforms.LowerTriangularAffine(3)).double(),
            pf.Flow(pf.transforms.LowerTriangularAffine(3)).double().slow(),
        ):
            other.load_state_dict(copy.deepcopy(source.state_dict()))
            close(other.bijection(x), flow.bijection(x), 1e-12)
            assert other.state_dict().keys() == source.state_dict().keys()
    assert not any("relative" in key for key in flow.state_dict())


@pytest.mark.parametrize("name", ["realnvp", "nice", "planar", "spline"])
def test_a_step_moves_a_slowed_flow_no_further_than_an_affine_map(name):
    """Adam's first step moves each weight by the step size; a point at sqrt(2) or so by no more than three."""
    torch.manual_seed(3)
    x = torch.randn(200, 3)
    moved = {}
    for slow in (False, True):
        flow = getattr(pf, name)(3)
        flow = flow.slow() if slow else flow
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
        flow.bijection.forward_and_ladj(x)[0].sum().backward()
        optimizer.step()
        moved[slow] = (flow.bijection.forward_and_ladj(x)[0] - x).abs().mean().item()
    assert 0.001 < moved[True] < 0.03 < moved[False]


@pytest.mark.parametrize("network", ["mlp", "robust", "residual"])
@pytest.mark.parametrize("name", ["realnvp", "nice", "spline"])
def test_a_trained_network_is_no_faster_than_an_untrained_one(name, network):
    """The last layers' weights have grown; then it is the layers before that move a point furthest in one step."""
    torch.manual_seed(3)
    x, moved = torch.randn(200, 3), {}
    flow = getattr(pf, name)(3, network=network)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    for slow in (False, True):
        part = copy.deepcopy(flow).slow() if slow else copy.deepcopy(flow)
        inner = [
            parameter
            for coupling in part.modules()
            if hasattr(coupling, "conditioner") and hasattr(coupling.conditioner, "layers")
            for layer in coupling.conditioner.layers[:-1]
            for parameter in layer.parameters()
        ]
        before, optimizer = part.bijection.forward_and_ladj(x)[0], torch.optim.Adam(inner, lr=0.01)
        before.sum().backward()
        optimizer.step()
        moved[slow] = (part.bijection.forward_and_ladj(x)[0] - before).abs().mean().item()
    assert moved[True] < 0.03
    assert moved[True] < 0.2 * moved[False]


def test_a_slowed_residual_network_is_the_same():
    torch.manual_seed(3)
    flow = pf.realnvp(3, layers=2, network="residual").double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(20, 3, dtype=torch.float64)
    slowed = copy.deepcopy(flow).slow()
    close(slowed.log_prob(x), flow.log_prob(x), 1e-10)
    close(slowed.slow().log_prob(x), flow.log_prob(x), 1e-10)


def test_a_state_brings_its_gain_or_the_lack_of_it():
    flow, slowed = pf.realnvp(3, layers=4), pf.realnvp(3, layers=4).slow()
    for parameter in (*flow.parameters(), *slowed.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 3)
    for source in (flow, slowed):
        for other in (pf.realnvp(3, layers=4), pf.realnvp(3, layers=4).slow()):
            other.load_state_dict(copy.deepcopy(source.state_dict()))
            close(other.log_prob(x).detach(), source.log_prob(x).detach(), 1e-6)
            assert other.state_dict().keys() == source.state_dict().keys()
    assert not any("gain" in key for key in flow.state_dict())


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_cautious_is_for_guides_and_not_for_fit():
    model = lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # noqa: E731
    gains = {
        cautious: [name for name in pf.AutoNICE(model, cautious=cautious).initialize().state_dict() if "gain" in name]
        for cautious in (True, False)
    }
    assert len(gains[True]) == 13  # three layers of each of four couplings, and tails
    assert not gains[False]
    posterior = pf.fit(model, max_steps=20, draws=100, escalate=False, progress=False)
    assert not any("gain" in key for key in posterior.guide.state_dict())


# the arguments of Pyro's guides --------------------------------------------------------------------------------------


def test_a_start_for_which_single_precision_has_no_digits_is_found_in_double():
    """Counts of a million: a guide of 500 counts began at the prior, and ended 10 nats below its best."""

    def large(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        pyro.sample("y", dist.Poisson(z.exp()).to_event(1), obs=y)

    y = torch.tensor([1e6, 2e6])
    guide = pf.AutoRealNVP(large)
    guide(y)
    found = guide.median(y)["z"]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(y.log().tolist(), abs=0.01)


@pytest.mark.parametrize(
    "start",
    [
        init_to_feasible,
        init_to_mean,
        init_to_median,
        init_to_median(num_samples=5),
        init_to_sample,
        init_to_uniform,
        init_to_uniform(radius=0.5),
        init_to_value(values={"mu": torch.tensor(1.5), "tau": torch.tensor(2.0)}),
        init_to_generated(generate=lambda: init_to_value(values={"mu": torch.tensor(1.5), "tau": torch.tensor(2.0)})),
    ],
)
def test_every_start_of_pyros(start):
    """The flow's center is where Pyro's own guide with that function has its own."""
    model = poutine.block(model_of("half-normal"), expose=["mu", "tau"])
    pyro.set_rng_seed(4)
    theirs = AutoMultivariateNormal(model, init_loc_fn=start)
    theirs(cells())
    pyro.set_rng_seed(4)
    ours = pf.AutoRealNVP(model, layers=2, init_loc_fn=start)
    ours(cells())
    close(ours.affine.loc, theirs.loc.detach(), 1e-6)


def batches(y, index):
    return pyro.plate("cells", CELLS, dim=-1, subsample=index)


def given(y, index):
    """The model of the cells, of rows that the caller picks."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with batches(y, index):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def pooled(y, index):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with batches(y, index):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


@pytest.mark.parametrize("several", [False, True])
def test_plates_of_ones_own_are_those_that_pyros_guide_makes(several):
    """A subsampled plate around the data: its rows are drawn in the guide, and the model works on them."""
    calls = []

    def create_plates(y):
        plate = pyro.plate("cells", CELLS, subsample_size=BATCH)
        calls.append(plate)
        return [plate] if several else plate

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("cells", CELLS, subsample_size=BATCH) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    def rows(guide):
        pyro.set_rng_seed(0)
        guide(cells())
        trace = poutine.trace(guide).get_trace(cells())
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(cells())
        assert replayed.nodes["cells"]["value"] is trace.nodes["cells"]["value"]
        return trace.nodes["cells"]["value"].shape

    assert rows(pf.AutoRealNVP(model, layers=2, create_plates=create_plates)) == (BATCH,)
    assert rows(AutoNormal(model, create_plates=create_plates)) == (BATCH,)
    assert len(calls) == 4
    svi = SVI(model, pf.AutoPlanar(model, create_plates=create_plates), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(cells()))


def test_plates_of_ones_own_around_latents():
    """A whole plate that the caller makes is the one that the latents sit in."""

    def create_plates(y):
        return pyro.plate("rows", len(y), dim=-2)

    def model(y):
        with pyro.plate("rows", len(y), dim=-2):
            x = pyro.sample("x", dist.Normal(torch.zeros(3, 1), 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide = pf.AutoNICE(model, create_plates=create_plates)
    assert guide(torch.ones(3, 1))["x"].shape == (3, 1)
    again = copy.deepcopy(guide)
    assert again(torch.ones(3, 1))["x"].shape == (3, 1)
    loaded = pickle.loads(pickle.dumps(guide))  # a local function cannot be pickled, and need not be
    assert loaded.sample_posterior(2)["x"].shape == (2, 3, 1)


def test_arguments_that_are_no_functions():
    with pytest.raises(ValueError, match=r"create_plates: expected a function .* got a plate"):
        pf.AutoRealNVP(pooled, create_plates=pyro.plate("cells", 3))
    with pytest.raises(ValueError, match=r"init_loc_fn: expected a function, got 1.0"):
        pf.AutoRealNVP(pooled, init_loc_fn=1.0)


# a whole life ---------------------------------------------------------------------------------------------------------


def lazy(make, **options):
    """A guide of both parts as a framework makes it: nothing is known of the data yet."""
    guide = AutoGuideList(given, create_plates=batches)
    guide.append(make(poutine.block(given, expose=["mu", "tau"]), **options))
    guide.append(AutoNormal(poutine.block(given, expose=["z"])))
    return guide


def said(guide, y):
    """What a guide predicts: medians, quantiles by minibatch, draws and new data."""
    found = []
    for index in torch.arange(CELLS).split(BATCH):
        with torch.no_grad():
            middle, ends = guide.median(y, index), guide.quantiles([0.05, 0.5, 0.95], y, index)
        assert middle["z"].shape == (CELLS,)
        assert ends["tau"].shape == (3,)
        found += [middle[name] for name in ("mu", "tau", "z")] + [ends[name] for name in ("mu", "tau", "z")]
    pyro.set_rng_seed(9)
    found += [guide[0].sample_posterior(5)["tau"], guide[0].get_posterior().log_prob(torch.tensor([3.0, 0.5]))]
    drawn = pyro.infer.Predictive(given, guide=guide, num_samples=3)(y, torch.arange(BATCH))
    return [*found, drawn["mu"], drawn["z"]]


def lives():
    """Each kind of flow once, and each other choice with one kind: all the rest is slow."""
    usual = [(kind, "auto", "file") for kind in MAKERS] + [("nice", "none", "file"), ("realnvp", "auto", "state")]
    rest = [life for life in itertools.product(MAKERS, ("auto", "none"), ("file", "state")) if life not in usual]
    return usual + [pytest.param(*life, marks=pytest.mark.slow) for life in rest]


@pytest.mark.parametrize(("kind", "affine", "way"), lives())
def test_a_guide_is_built_lazily_trained_by_minibatches_saved_and_loaded(kind, affine, way, tmp_path):
    """As scvi-tools leads it: a new guide runs once on a batch of two, and then the store gets the saved state."""
    y = cells()
    guide = lazy(MAKERS[kind], affine=affine)
    guide(y, torch.arange(2))
    svi = SVI(given, guide, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO())
    for step in range(8):
        svi.step(y, torch.arange(CELLS).split(BATCH)[step % 4])
    expected = said(guide, y)
    state = pyro.get_param_store().get_state()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.set_rng_seed(77)
    fresh = lazy(MAKERS[kind], affine=affine)
    fresh(y, torch.tensor([5, 7]))
    SVI(given, fresh, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO()).step(y, torch.tensor([5, 7]))
    assert not torch.equal(said(fresh, y)[0], expected[0])
    if way == "file":
        pyro.get_param_store().load(tmp_path / "store")
    else:
        pyro.get_param_store().set_state(state)
    assert torch.equal(fresh[0].median(y, torch.arange(2))["tau"], expected[1])  # before it ran
    fresh(y, torch.arange(2))  # Pyro's own guide takes its values over when it runs
    for found, kept in zip(said(fresh, y), expected, strict=True):
        close(found.detach(), kept.detach(), 1e-6)
    before = [parameter.detach().clone() for parameter in fresh[0].parameters()]
    svi = SVI(given, fresh, pyro.optim.ClippedAdam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        assert math.isfinite(svi.step(y, torch.arange(BATCH)))
    assert any((old != new).any() for old, new in zip(before, fresh[0].parameters(), strict=True))
    held = {id(tensor) for tensor in pyro.get_param_store()._params.values()}
    assert held.issuperset(map(id, fresh[0].parameters()))


def test_medians_of_a_guide_that_never_ran_are_those_of_the_loaded_store():
    index = torch.arange(CELLS)
    guide = pf.AutoRealNVP(pooled, layers=2)
    svi = SVI(pooled, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step(cells(), index)
    expected, state = guide.median(cells(), index)["mu"], pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    pyro.set_rng_seed(5)
    close(pf.AutoRealNVP(pooled, layers=2).median(cells(), index)["mu"], expected, 1e-6)


def test_a_store_without_gains_is_one_of_gain_one():
    """Parameters that were saved before there were small steps mean what they meant."""

    def pair():
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]])))

    old = pf.AutoRealNVP(pair, layers=2, cautious=False)
    svi = SVI(pair, old, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step()
    expected, state = old.quantiles([0.1, 0.5])["x"], pyro.get_param_store().get_state()
    assert old.affine.conditioner.values[-1].abs() > 0.1  # below the diagonal
    pyro.clear_param_store()
    new = pf.AutoRealNVP(pair, layers=2)
    new()
    pyro.get_param_store().set_state(state)
    for name in [name for name in pyro.get_param_store() if name.endswith((".gain", ".relative"))]:
        del pyro.get_param_store()[name]
    close(new.quantiles([0.1, 0.5])["x"], expected, 1e-5)


def test_another_guide_of_the_same_name_does_not_pass_its_values_on():
    """Only what was loaded is taken over; and a guide that fit has made looks at no store."""
    index = torch.arange(CELLS)
    first = pf.AutoRealNVP(pooled, layers=2)
    SVI(pooled, first, pyro.optim.Adam({"lr": 0.5}), Trace_ELBO()).step(cells(), index)
    second = pf.AutoRealNVP(pooled, layers=2, init_loc_fn=init_to_value(values={"mu": torch.tensor(50.0)}))
    second(cells(), index)
    close(second.affine.loc, torch.tensor([50.0]), 1e-6)
    assert first.median()["mu"] < 40.0
    unseen = pf.AutoRealNVP(pooled, layers=2, init_loc_fn=init_to_value(values={"mu": torch.tensor(-50.0)}))
    unseen.initialize(cells(), index)
    pyro.get_param_store().set_state(copy.deepcopy(pyro.get_param_store().get_state()))
    close(unseen.sample_posterior(50)["mu"].mean(), torch.tensor(-50.0), 2.0)


def test_real_is_double():
    """A guide in double precision has gains in double precision."""
    guide = pf.AutoRealNVP(lambda: pyro.sample("x", dist.Normal(real(0.0, 1.0), 1.0).to_event(1))).initialize()
    assert all(tensor.dtype in (torch.float64, torch.bool) for tensor in guide.flow.state_dict().values())
