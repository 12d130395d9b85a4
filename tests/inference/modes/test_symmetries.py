"""Exact moves: found where the density has them, not where it has none; and mirrored modes at any dimension."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

import pyro_flows as pf
from pyro_flows.fitting import combine, methods
from pyro_flows.inference.modes import missed_modes as modes
from pyro_flows.inference.modes.missed_modes import Search, missed_modes
from pyro_flows.inference.modes.missed_regions import BY_WALKERS, MissedRegion
from pyro_flows.inference.modes.symmetries import (
    Image,
    Move,
    Unit,
    _joining,
    _moved,
    group,
    images,
    moves,
    signed_permutation,
)
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.support.process.clock import unbounded
from tests.models import real
from tests.registry import normal

pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")


def names(move):
    """A move as text: -site, -site[i], site[i <-> j] or site <-> other."""
    found = []
    for unit in move.units:
        if unit.other is not None:
            found.append(f"{unit.site} <-> {unit.other}")
            continue
        index = "" if unit.axis is None else f"[{' <-> '.join(map(str, unit.indices))}]"
        found.append(f"{'' if unit.swaps else '-'}{unit.site}{index}")
    return " ".join(sorted(found))


def exact(density, draws):
    """The moves found at any of the draws that leave the density of the values as it is at all of them.

    Others that do not lower it by much at one draw are found too; what they are worth is weighed later.
    """
    together = moves(density, draws)
    kept = set()
    before = density(draws) - density.log_jacobian(draws)
    for move, image in zip(together, images(density, together, draws), strict=True):
        assert bool(image.inside.all())
        heights = image.log_p - image.log_jacobian
        if torch.allclose(heights, before, rtol=1e-9, atol=1e-6):
            kept.add(names(move))
    return kept


# models with symmetries -----------------------------------------------------------------------------------------------


def factor_model(people, items, factors):
    """Factor analysis of data that its own factors made; the density, and draws next to those."""
    made = {"loadings": normal(items, factors, seed=1), "scores": normal(people, factors, seed=2)}
    y = made["scores"] @ made["loadings"].T + 0.3 * normal(people, items, seed=3)

    def model():
        loadings = pyro.sample("loadings", dist.Normal(torch.zeros(items, factors).double(), 1.0).to_event(2))
        scores = pyro.sample("scores", dist.Normal(torch.zeros(people, factors).double(), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(scores @ loadings.T, 0.3).to_event(2), obs=y)

    density = pf.LogDensity(model)
    z = density.unconstrain({name: value[None] for name, value in made.items()})
    return density, z + 0.05 * normal(2, density.dim, seed=4)


def test_the_sign_of_a_factor_and_its_loadings():
    density, draws = factor_model(4, 3, 1)
    assert "-loadings -scores" in exact(density, draws)


def test_two_factors_change_signs_and_places():
    density, draws = factor_model(5, 4, 2)
    got = exact(density, draws)
    assert "-loadings[0] -scores[0]" in got
    assert "-loadings[1] -scores[1]" in got
    assert "loadings[0 <-> 1] scores[0 <-> 1]" in got


def test_signs_of_scalar_sites():
    def product():
        a, b = (pyro.sample(name, dist.Normal(real(0.0), 2.0)) for name in "ab")
        c = pyro.sample("c", dist.Normal(real(0.0), 2.0))
        pyro.sample("y", dist.Normal(a * b + c, 0.1), obs=real(2.0))

    assert exact(pf.LogDensity(product), normal(3, 3, seed=4)) == {"-a -b", "a <-> b"}


@config_enumerate
def labels(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3).double()))
    loc = pyro.sample("loc", dist.Normal(real(0.0), 3.0).expand([3]).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(real(1.0)).expand([3]).to_event(1))
    with pyro.plate("n", len(y)):
        k = pyro.sample("k", dist.Categorical(p))
        pyro.sample("y", dist.Normal(Vindex(loc)[..., k], Vindex(sd)[..., k]), obs=y)


def test_components_of_a_mixture_change_places():
    """Components that differ in everything: what is not a move of all their sites together is no symmetry."""
    parts = [-8.0 + 0.2 * normal(12, seed=8), 1.0 + normal(30, seed=9), 9.0 + 3.0 * normal(60, seed=10)]
    density = pf.LogDensity(labels, (torch.cat(parts),))
    values = {"p": real([[0.12, 0.29, 0.59]]), "loc": real([[-8.0, 1.0, 9.0]]), "sd": real([[0.2, 1.0, 3.0]])}
    got = exact(density, density.unconstrain(values))
    assert got == {f"loc[{i} <-> {j}] p[{i} <-> {j}] sd[{i} <-> {j}]" for i, j in ((0, 1), (0, 2), (1, 2))}


@config_enumerate
def named_components(y, ends):
    """Two components, each parameter with a name of its own, and one share, between two ends."""
    low, high = ends
    share = pyro.sample("share", dist.Uniform(real(low), high))
    first, second = (pyro.sample(f"loc_{name}", dist.Normal(real(0.0), 5.0)) for name in ("first", "second"))
    sds = [pyro.sample(f"sd_{name}", dist.HalfNormal(real(2.0))) for name in ("first", "second")]
    w = (share - low) / (high - low)
    with pyro.plate("n", len(y)):
        logits = torch.stack([w, 1.0 - w], -1).log()
        k = pyro.sample("k", dist.Categorical(logits=logits))
        loc, sd = torch.where(k == 0, first, second), torch.where(k == 0, *sds)
        pyro.sample("y", dist.Normal(loc, sd), obs=y)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-2.0, 3.0)])
def test_components_with_names_change_places_and_their_share_is_reflected(ends):
    low, high = ends
    data = torch.cat([-4.0 + 0.5 * normal(30, seed=11), 3.0 + 2.0 * normal(60, seed=12)])
    density = pf.LogDensity(named_components, (data, ends))
    values = {"share": real([low + (high - low) / 3.0]), "loc_first": real([-4.0]), "loc_second": real([3.0])}
    values |= {"sd_first": real([0.5]), "sd_second": real([2.0])}
    got = exact(density, density.unconstrain(values))
    assert got == {"-share loc_first <-> loc_second sd_first <-> sd_second"}


def test_sites_change_places_along_with_an_index():
    """Components named one by one, whose shares are one vector."""
    data = torch.cat([-8.0 + 0.2 * normal(12, seed=8), 1.0 + normal(30, seed=9), 9.0 + 3.0 * normal(60, seed=10)])

    def model():
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3).double()))
        locs = [pyro.sample(f"loc{k}", dist.Normal(real(0.0), 5.0)) for k in range(3)]
        sds = [pyro.sample(f"sd{k}", dist.HalfNormal(real(2.0))) for k in range(3)]
        each = dist.Normal(torch.stack(locs, -1), torch.stack(sds, -1)).log_prob(data[:, None]) + shares.log()
        pyro.factor("y", each.logsumexp(-1).sum())

    density = pf.LogDensity(model)
    values = {"shares": real([[0.12, 0.29, 0.59]])}
    values |= {f"loc{k}": real([loc]) for k, loc in enumerate((-8.0, 1.0, 9.0))}
    values |= {f"sd{k}": real([sd]) for k, sd in enumerate((0.2, 1.0, 3.0))}
    got = exact(density, density.unconstrain(values))
    assert got >= {f"loc{i} <-> loc{j} sd{i} <-> sd{j} shares[{i} <-> {j}]" for i, j in ((0, 1), (0, 2), (1, 2))}


# models without -------------------------------------------------------------------------------------------------------


def test_a_model_without_symmetries():
    x = normal(20, 3, seed=5)

    def regression():
        slope = pyro.sample("slope", dist.Normal(torch.zeros(3).double(), 5.0).to_event(1))
        sd = pyro.sample("sd", dist.HalfNormal(real(1.0)))
        pyro.sample("y", dist.Normal(x @ slope, sd).to_event(1), obs=x @ real(1.0, -2.0, 3.0))

    density = pf.LogDensity(regression)
    at = density.unconstrain({"slope": real([[1.0, -2.0, 3.0]]), "sd": real([0.2])})
    assert moves(density, at) == []


SUPPORTS = [
    dist.LKJCholesky(3, real(1.0)),
    dist.ImproperUniform(constraints.ordered_vector, (), (3,)),
    dist.LogNormal(real(0.0), 1.0),
    dist.HalfNormal(real(1.0)).expand([3]).to_event(1),
]


@pytest.mark.parametrize("prior", SUPPORTS, ids=["LKJCholesky", "ordered", "positive", "positive vector"])
def test_no_move_leaves_the_support(prior):
    """A move that changes signs of what is positive, or an order that is fixed, has no images in the support."""

    def model():
        x = pyro.sample("x", prior)
        pyro.factor("flat", real(0.0) * x.sum())

    density = pf.LogDensity(model)
    z = 0.7 * normal(5, density.dim, seed=6)
    value = density.constrain(z)["x"]
    units = [Unit("x"), *(Unit("x", -1, (i,)) for i in range(value.shape[-1]) if value.dim() > 1)]
    if not isinstance(prior, dist.Independent):  # exchangeable entries may change places
        units += [Unit("x", -1, (0, 1))] if value.dim() > 1 else []
    for unit in units:
        ((there, inside, _, _),) = images(density, [Move((unit,))], z)
        assert not bool(inside.any()) or torch.allclose(
            density.constrain(there)["x"][inside], unit.apply({"x": value}, {})["x"][inside], atol=1e-3
        )
        if not isinstance(prior, dist.LKJCholesky) and not (isinstance(prior, dist.ImproperUniform) and unit.axis):
            assert not bool(inside.any()), unit  # signs of what is positive, or of all that is in order
        if unit.swaps:
            assert not bool(inside.any()), unit


# mirrored modes -------------------------------------------------------------------------------------------------------


def mirrored(dim):
    """Two equal modes, one the mirror image of the other in all coordinates, and a guide of the one where z > 0."""
    center = torch.full((dim,), 6.0 / math.sqrt(dim) + 2.0, dtype=torch.float64)

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        ends = torch.stack([(z - center).square().sum(-1), (z + center).square().sum(-1)])
        pyro.factor("both", torch.logsumexp(-0.5 * ends, 0))

    one = dist.Normal(center, 1.0).to_event(1)
    other = dist.Normal(-center, 1.0).to_event(1)
    return pf.LogDensity(model), one, other


def look(density, z, score):
    return missed_modes(density, [], z, score(z), score)


@pytest.fixture
def exact_moves_alone(monkeypatch):
    """Other searches find nothing: what is found, exact moves have found."""
    monkeypatch.setattr(modes, "climbed", lambda *_, **__: [])
    monkeypatch.setattr(modes, "under_covered_region", lambda *_, **__: [])


def check_half(dim):
    density, one, _ = mirrored(dim)
    found = look(density, one.sample((200,)), one.log_prob)
    assert len(found.failures) == 1
    assert "misses a mode near z[" in found.failures[0]
    assert bool((found.missed[0].place < 0).double().mean() > 0.9)
    assert not found.passed


@pytest.mark.parametrize("dim", [2, 20, 76, 226])
def test_a_guide_of_one_half(dim, exact_moves_alone):
    check_half(dim)


def check_whole(dim):
    density, one, other = mirrored(dim)
    z = torch.cat([one.sample((100,)), other.sample((100,))])[torch.randperm(200)]

    def score(points):
        return torch.logaddexp(one.log_prob(points), other.log_prob(points)) - math.log(2.0)

    assert look(density, z, score).failures == []


@pytest.mark.parametrize("dim", [2, 20, 76, 226])
def test_a_guide_of_both_halves(dim, exact_moves_alone):
    check_whole(dim)


@pytest.mark.parametrize("dim", [2, 20])
def test_a_guide_of_both_halves_by_all_searches(dim):
    check_whole(dim)


@pytest.mark.parametrize(("share", "named"), [(0.01, False), (0.1, True)])
def test_unequal_modes(share, named):
    """One per cent of the mass twelve sds away says nothing, ten per cent do."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (3,)))
        parts = [math.log(1.0 - share) - 0.5 * z.square().sum(-1), math.log(share) - 0.5 * (z - 7.0).square().sum(-1)]
        pyro.factor("both", torch.logsumexp(torch.stack(parts), 0))

    guide = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    assert bool(look(pf.LogDensity(model), guide.sample((400,)), guide.log_prob).failures) is named


# spikes ---------------------------------------------------------------------------------------------------------------


def test_a_spike_is_no_mode():
    """Where a scale goes to 0, a centered density has no bound; there is next to no mass, and it is no mode."""

    def effects(y):
        tau = pyro.sample("tau", dist.HalfCauchy(real(1.0)))
        with pyro.plate("groups", len(y)):
            u = pyro.sample("u", dist.Normal(real(0.0), tau))
            pyro.sample("y", dist.Normal(u, 0.3), obs=y)

    y = 0.5 * normal(12, seed=7)
    density = pf.LogDensity(effects, (y,))
    # u given tau is normal; tau by its marginal density on a grid
    t = torch.linspace(-4.0, 4.0, 4001, dtype=torch.float64)
    marginal = dist.HalfCauchy(real(1.0)).log_prob(t.exp()) + t
    marginal = marginal + dist.Normal(0.0, (t.exp()[:, None] ** 2 + 0.09).sqrt()).log_prob(y).sum(1)
    chances = torch.softmax(marginal, 0)
    at = torch.multinomial(chances, 1000, replacement=True)
    tau = (t[at] + (t[1] - t[0]) * (torch.rand(1000).double() - 0.5)).exp()
    shrunk = tau[:, None] ** 2 / (tau[:, None] ** 2 + 0.09)
    u = shrunk * y + (0.3 * shrunk.sqrt()) * torch.randn(1000, 12).double()

    def score(z):
        """The posterior itself, as a guide."""
        return density(z).detach() - float(torch.logsumexp(marginal, 0) + (t[1] - t[0]).log())

    z = density.unconstrain({"tau": tau, "u": u})
    spike = density.unconstrain({"tau": real([1e-9]), "u": torch.zeros(1, 12).double()})
    assert float(density(spike)) > float(density(z).max()) + 50.0
    # a guide that ends where the posterior does: it has nothing at the spike
    end = float(tau.log().min()) - 2.0
    place = next(latent.offset for latent in density.structure.latents if latent.name == "tau")

    def ending(points):
        return torch.where(points[:, place] > end, score(points), -1e4)

    assert look(density, z, ending).failures == []


# copies ---------------------------------------------------------------------------------------------------------------


def swap(dim, first, second):
    order = list(range(dim))
    order[first], order[second] = second, first
    return tuple(order), (1.0,) * dim


def flip(dim, *places):
    return tuple(range(dim)), tuple(-1.0 if place in places else 1.0 for place in range(dim))


def check_signed_permutation():
    order, signs = (2, 0, 1, 3), (1.0, -1.0, 1.0, -1.0)
    z = normal(20, 4, seed=3)
    moved = torch.tensor(signs, dtype=z.dtype) * z[:, list(order)]
    assert signed_permutation(z, moved) == (order, signs)
    assert signed_permutation(z, moved + 0.1) is None
    assert signed_permutation(z, moved[:, [0, 0, 2, 3]]) is None, "one coordinate stands twice"


def test_signed_permutations_are_told_from_draws():
    check_signed_permutation()


GROUPS = [
    ([flip(3, 0)], 2),
    ([flip(3, 0), flip(3, 1), flip(3, 2)], 8),
    ([swap(4, 0, 1), swap(4, 1, 2), swap(4, 2, 3)], 24),
    ([swap(2, 0, 1), flip(2, 0)], 8),
    ([((1, 2, 0), (1.0, 1.0, -1.0))], 6),  # three times round is a change of all signs
]


def check_group(generators, count):
    """All products, each once: what is in it stays in it, and takes draws where the moves one by one take them."""
    found = group(generators, 64)
    assert len(found) == len({*found}) == count
    x = normal(1, len(found[0][0]), seed=1)[0]
    images = torch.stack([torch.tensor(signs).to(x) * x[list(order)] for order, signs in found])
    for order, signs in generators:
        moved = torch.tensor(signs).to(x) * images[:, list(order)]
        assert float(torch.cdist(moved, images).amin(1).max()) < 1e-12


@pytest.mark.parametrize(("generators", "count"), GROUPS)
def test_a_group_is_closed(generators, count):
    check_group(generators, count)


def test_a_group_may_be_too_large():
    assert group([swap(5, place, place + 1) for place in range(4)], 64) is None


def test_a_mirrored_mode_costs_no_second_run(monkeypatch):
    """Both halves, one trained flow; saved and drawn from as any mixture. These coordinates would be tabulated."""
    monkeypatch.setattr(methods, "multimodal", lambda *_, **__: None)

    def model(y):
        a = pyro.sample("a", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a.abs(), 0.1).to_event(1), obs=y)

    posterior = pf.fit(model, torch.tensor([1.0, 0.7]).double(), draws=4000, progress=False)
    assert posterior.verdict.status == "corrected"
    reasons = posterior.verdict.reasons
    assert any("one of 4 symmetric modes was fitted" in reason for reason in reasons)
    assert {stage["run"] for stage in posterior.history if stage["steps"] is not None} == {0}
    assert len(posterior.flow.members) == 1
    quadrants = (posterior.samples["a"] > 0).double() @ torch.tensor([2.0, 1.0]).double()
    counts = torch.bincount(quadrants.long(), minlength=4) / 4000
    assert float((counts - 0.25).abs().max()) < 0.04  # standard error .007


def test_a_move_that_leaves_the_support_at_some_draws_is_no_symmetry(monkeypatch):
    monkeypatch.setattr(modes, "with_symmetric_modes", lambda guide, missed, *_: missed)
    density, one, _ = mirrored(2)
    for kept, known in ((200, True), (150, False)):

        def half(density, moves, z, kept=kept):
            inside = torch.arange(len(z)) < kept
            log_p = torch.where(inside, density(-z), -torch.inf)
            return [Image(-z, inside, log_p, density.log_jacobian(-z))]

        monkeypatch.setattr(modes, "images", half)
        found = look(density, one.sample((200,)), one.log_prob)
        assert (found.missed[0].move is not None) == known


def test_symmetries_that_are_too_many_leave_no_copies(monkeypatch):
    """All signs and orders of five numbers are 3840 images: some copies cost their time, and lack modes as one does."""
    far = torch.full((5,), 3.0)
    every = [flip(5, 1), *(swap(5, place, place + 1) for place in range(4))]
    searches = [[flip(5, 0)], every, []]

    def search(found):
        missed = tuple(MissedRegion(far, Start("mirrored", far, far), move) for move in searches.pop(0))
        found.search = Search(missed)

    def add(found, start):
        found.sampler, found.added = found.plain, found.added + 1

    monkeypatch.setattr(combine, "_look", search)
    monkeypatch.setattr(combine, "_add_run", add)
    monkeypatch.setattr(combine, "_surveyed", lambda *_: False)
    flow = pf.realnvp(5, layers=2)
    found = combine.FitState(SimpleNamespace(clock=SimpleNamespace(over=False)), None, plain=flow, sampler=flow)
    search(found)
    combine._complete(found)
    assert found.added == 0
    assert found.copies == 1
    assert found.sampler is flow


def test_no_run_is_added_where_a_flow_is_only_thin(monkeypatch):
    """It would begin where the flow is already; a missed mode next to it is another matter."""
    far = torch.full((2,), 3.0)
    thin, mode = (MissedRegion(far, Start(name, far, far)) for name in (BY_WALKERS, "mode"))
    added = []
    monkeypatch.setattr(combine, "_look", lambda found: setattr(found, "search", Search()))
    monkeypatch.setattr(combine, "_add_run", lambda found, start: added.append(start.name))
    monkeypatch.setattr(combine, "_surveyed", lambda *_: False)
    for missed in ([thin], [thin, mode]):
        flow = pf.realnvp(2, layers=2)
        plan = SimpleNamespace(clock=SimpleNamespace(over=False), refine="auto")
        found = combine.FitState(plan, None, plain=flow, sampler=flow, search=Search(tuple(missed)))
        combine._complete(found)
    assert len(added) == 1


def test_a_second_look_climbs_from_what_the_first_one_found(monkeypatch):
    """Whether another path came there with a normal that is good enough was chance, and the fit was a lie."""
    at, asked = Start("mode", torch.full((2,), 3.0), torch.ones(2)), []
    found = combine.FitState(SimpleNamespace(clock=unbounded(), seed=0), None, sampler=pf.realnvp(2, layers=2))

    def search(state, sampler, known):
        asked.append(known)
        return Search((MissedRegion(at.loc, at),)) if len(asked) == 1 else None

    monkeypatch.setattr(combine, "_search", search)
    monkeypatch.setattr(combine, "with_tails_checked", lambda search, *_, **__: search)
    combine._look(found)
    combine._look(found)
    assert asked == [[], [at]]


def test_units_join_a_set_if_they_go_with_each_member():
    """Two go together if they differ, and if neither changes the whole of a site that the other changes."""
    places = [(None,), (-1, 0), (-1, 0, 1), (-2, 1)]
    units = [Unit(site, axis, tuple(indices)) for site in "abc" for axis, *indices in places]
    units += [Unit("a", other="b"), Unit("b", other="c")]

    def goes_with(one: Unit, other: Unit) -> bool:
        return one != other and not (None in (one.axis, other.axis) and one.sites & other.sites)

    chance = random.Random(0)
    for _ in range(300):
        members = tuple(chance.sample(units, chance.randint(0, 5)))
        assert _joining(units, members) == [unit for unit in units if all(goes_with(unit, one) for one in members)]


def test_moves_that_share_all_but_the_last_unit_give_what_each_gives():
    values = {"x": normal(1, 4, seed=1), "y": normal(1, 4, seed=2)}
    parts = [Unit("x", -1, (0,)), Unit("x", other="y"), Unit("y", -1, (1, 3)), Unit("y", -1, (2,))]
    sets = [(), (parts[0],), (parts[0], parts[1]), (parts[0], parts[2]), (parts[1], parts[2], parts[3]), (parts[3],)]
    asked = [(values, Move(members)) for members in sets]
    for found, (_, move) in zip(_moved(asked), asked, strict=True):
        expected = move(values)
        assert all(torch.equal(found[name], expected[name]) for name in values)
