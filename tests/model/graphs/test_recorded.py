"""Recorded graphs: the same numbers as ordinary code, for each layer, each flow and each training step."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import LogDensity
from pyro_flows.inference.training import loop
from pyro_flows.inference.training import trainer as training
from pyro_flows.inference.training.flow_graphs import Passes, body_of
from pyro_flows.inference.training.step_graph import CLIP, Moments, Step, update
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.model.graphs.bindings import bound
from pyro_flows.model.graphs.recording import DependsOnValues, record
from tests.invariants import close
from tests.registry import FLOWS, LARGE, SMALL, each, make_flow, normal, randomize

NUMERIC = ("Inverse-Planar", "Inverse-Compose")  # the root is searched until it is found, so there is no flat graph
VECTORS = [case for case in SMALL + LARGE if not (case.context_dim or case.unit) and len(case.shape) == 1]
PLAIN = [case for case in VECTORS if not case.name.startswith(NUMERIC)]


def run(function, *inputs: Tensor):
    """Record, then run both forms of the graph at other inputs than those it was recorded at."""
    module = record(function, *inputs)
    others = [part + 0.3 * torch.cos(part) for part in inputs]
    with torch.no_grad():
        return module(*others), bound(module)(*others), function(*others), module


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_constants_are_folded_and_repeats_shared():
    scale = torch.arange(1.0, 4.0)

    def function(x: Tensor) -> Tensor:
        return torch.exp(x) / scale.log1p() + torch.exp(x).detach() * torch.ones_like(x)

    plain, quick, expected, module = run(function, normal(3, seed=0).float())
    assert torch.equal(plain, expected)
    assert torch.equal(quick, expected)
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert sorted(called) == ["aten.add.Tensor", "aten.div.Tensor", "aten.exp.default", "aten.mul.Tensor"]


SIZED = {
    "mask": lambda x: x[x > 0.0].exp().sum(),
    "places": lambda x: (x > 0.0).nonzero().sum() * x.sum(),
    "selected": lambda x: torch.masked_select(x, x > 0.0).sum(),
    "different values": lambda x: x.round().unique().sum(),
}


@pytest.mark.parametrize("name", SIZED)
def test_shapes_that_depend_on_values_are_not_recorded(name):
    """What follows would have the shapes of the first values."""
    with pytest.raises(DependsOnValues, match="a shape depends on values"):
        record(SIZED[name], normal(20, 3, seed=0))


def test_orders_and_constant_masks_are_recorded():
    even = torch.arange(5) % 2 == 0
    plain, quick, expected, _ = run(lambda x: x[x[:, 0].argsort()][even].exp(), normal(5, 3, seed=0))
    assert torch.equal(plain, expected)
    assert torch.equal(quick, expected)


def test_no_operation_on_constants_is_left_where_memory_is_used_again():
    """A fit's digits hung on the process: a constant came to memory that something else had been written into."""
    base = torch.arange(1.0, 4.0, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        for _ in range(8):
            written = torch.exp(x)
            written += x
            x = torch.sin(written)
            del written
            scale = base.log1p()  # torch gives memory out again that has just become free
            x = x * (scale * 2.0)
        return x

    plain, quick, expected, module = run(function, normal(3, seed=0))
    assert torch.equal(plain, expected)
    assert torch.equal(quick, expected)
    called = [node for node in module.graph.nodes if node.op == "call_function"]
    assert all(any(part.op != "get_attr" for part in node.all_input_nodes) for node in called)
    assert len(called) == 4 * 8


def test_a_large_constant_that_has_changed_is_another_one():
    """A wrong graph: a constant of more than 4096 numbers stayed the one that it was before it was changed in place."""
    x = torch.ones(5000, dtype=torch.float64)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        c = torch.arange(5000.0, dtype=torch.float64)
        before = (x * c).sum()
        c.add_(1.0)
        return before, (x * c).sum()

    for got, expected in zip(record(function, x)(x), function(x), strict=True):
        assert torch.equal(got, expected)


def test_changes_in_place_are_kept():
    """A value that is changed in place, one that is used before and after, and one that a view shares."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        doubled = 2.0 * x
        before = doubled + 1.0
        doubled.masked_fill_(x > 0.0, -1.0)
        again = 2.0 * x
        part = again[1:]
        part.mul_(3.0)
        return before, doubled, doubled + 1.0, again, 2.0 * x

    plain, quick, expected, _ = run(function, normal(5, seed=1))
    for one, other, value in zip(plain, quick, expected, strict=True):
        assert torch.equal(one, value)
        assert torch.equal(other, value)


def test_parameters_are_no_constants():
    weight = torch.nn.Parameter(torch.tensor(2.0))
    module = record(lambda x: (weight.exp() * x).detach(), torch.ones(2))
    with torch.no_grad():
        weight.fill_(0.0)
        assert torch.equal(bound(module)(torch.ones(2)), torch.ones(2))


def test_draws_are_not_shared():
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randn_like(x), torch.randn_like(x)

    module = record(function, torch.zeros(4))
    first, second = bound(module)(torch.zeros(4))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, [2, 0]] + x[[1], :2],
        lambda x: torch.where(x > 0, x, torch.full_like(x, 2.0)).to(torch.float32).sum(-1, keepdim=True),
        lambda x: torch.cat([part.t() for part in x.split(2, dim=-1)], 0).reshape(-1).cumsum(0),
        lambda x: torch.nn.functional.silu(x[..., 1:]) - x.new_zeros(1) * x.flatten()[0],
    ],
)
def test_bindings_take_the_same_arguments(function):
    plain, quick, expected, _ = run(function, normal(4, 4, seed=2))
    assert torch.equal(plain, expected)
    assert torch.equal(quick, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.long])
def test_numbers_change_no_type(dtype):
    def function(x: Tensor) -> tuple[Tensor, ...]:
        total = x.sum()
        return (
            0.1 * x,
            x + 1,
            x - 0.1,
            x / 3,
            torch.rsub(x, 0.1, alpha=2),
            1 - x,
            torch.add(x, 3, alpha=2),
            0.1 * total,
            -x * 3,
        )

    module = record(function, torch.arange(1, 7).to(dtype))
    x = torch.arange(2, 8).to(dtype)
    for one, value in zip(bound(module)(x), function(x), strict=True):
        assert one.dtype == value.dtype
        assert torch.equal(one, value)


# ---- layers and flows ------------------------------------------------------------------------------------------------


def eager(flow: pf.Flow, x: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, log_q, score = flow.sample_with_score(at=x)
    parameters = list(flow.parameters())
    gradients = torch.autograd.grad((pull * z).sum(), parameters, materialize_grads=True)
    return z.detach(), log_q, score, torch.cat([gradient.reshape(-1) for gradient in gradients])


def recorded(flow: pf.Flow, x: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    passes = Passes(flow, x, [parameter.detach() for parameter in flow.parameters()])
    z, log_q, score, tape = passes.sample(x)
    return z, log_q, score, passes.pull(tape, pull)


@each(PLAIN, slow=lambda case: case.shape in ((2,), (7,)))
def test_passes_of_every_layer(case):
    flow = pf.Flow(pf.transforms.Compose([pf.transforms.DiagonalAffine(case.shape[0]).double(), case.make()]))
    x, pull = normal(6, *case.shape, seed=3), normal(6, *case.shape, seed=4)
    for got, expected in zip(recorded(flow, x, pull), eager(flow, x, pull), strict=True):
        close(got, expected, 1e-12)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("base", ["normal", "student_t", "logistic"])
def test_passes_of_every_flow(name, base):
    flow = make_flow(name, 5, base=base)
    x, pull = normal(7, 5, seed=5), normal(7, 5, seed=6)
    for got, expected in zip(recorded(flow, x, pull), eager(flow, x, pull), strict=True):
        close(got, expected, 1e-12)


def test_flows_that_arrange_coordinates_otherwise_share_no_graph():
    x, pull = normal(7, 5, seed=5), normal(7, 5, seed=6)
    masks = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]])
    kinds = set()
    for mask in masks:
        couplings = [pf.transforms.AffineCoupling(5, mask=part) for part in (mask, mask.flip(0))]
        flow = pf.Flow(
            randomize(
                pf.transforms.Compose([*couplings, pf.transforms.Permutation(5, seed=int(mask[0]))]).double(), sd=0.3
            )
        )
        for got, expected in zip(recorded(flow, x, pull), eager(flow, x, pull), strict=True):
            close(got, expected, 1e-12)
        kinds.add(id(Passes(flow, x, [parameter.detach() for parameter in flow.parameters()]).kind))
    assert len(kinds) == 2


def test_what_passes_return_may_meet_autograd():
    flow, x = make_flow("realnvp", 4), normal(5, 4, seed=8)
    z, log_q, score, gradient = recorded(flow, x, x)
    leaf = torch.ones((), dtype=z.dtype, requires_grad=True)
    (leaf * (z.sum() + log_q.sum() + score.sum() + gradient.sum())).backward()
    for tensor in (z, log_q, score, gradient, *LogDensity(model).value_and_grad(z)):
        assert not tensor.is_inference()


class Listed(pf.transforms.AffineCoupling):
    """A layer with an attribute that is no plain value."""

    def __init__(self, dim: int, size: float) -> None:
        super().__init__(dim)
        self.sizes = [size]

    def forward_and_score(self, x, score, context=None):
        y, ladj, score = super().forward_and_score(x, score, context)
        return y * self.sizes[0], ladj + self.dim * math.log(self.sizes[0]), score / self.sizes[0]


def test_layers_that_differ_in_more_than_plain_values_share_nothing():
    x = normal(8, 6, seed=7)
    for size in (1.0, 2.0, 3.0):  # short-lived, so that one may get the identity of the one before
        layer = Listed(6, size).double()
        z = Passes(pf.Flow(layer), x, list(layer.parameters())).sample(x)[0]
        close(z[:, 3:], size * x[:, 3:], 1e-12)
    hooked = pf.transforms.AffineCoupling(6).double()
    hooked.conditioner.register_forward_hook(lambda module, inputs, out: out + 1.0)
    body_of(pf.transforms.AffineCoupling(6).double(), x)
    assert Passes(pf.Flow(hooked), x, list(hooked.parameters())).sample(x)[1].std() > 0.0
    close(
        Passes(pf.Flow(hooked), x, list(hooked.parameters())).sample(x)[0],
        hooked.forward_and_ladj(x)[0].detach(),
        1e-12,
    )


@pytest.mark.falls_back
def test_passes_are_compared_with_the_flow(monkeypatch):
    """A body that a changed class left behind is found out."""
    flow = make_flow("realnvp", 4)
    x = normal(5, 4, seed=8)
    passes = Passes(flow, x, [parameter.detach() for parameter in flow.parameters()])
    passes.check(x)
    monkeypatch.setattr(pf.transforms.AffineCoupling, "_move", pf.transforms.AdditiveCoupling._move)
    with pytest.raises(RuntimeError, match="other values"):
        passes.check(x)
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in flow.parameters()])
    views = weights.split([parameter.numel() for parameter in flow.parameters()])
    views = [part.view_as(parameter) for part, parameter in zip(views, flow.parameters(), strict=True)]
    with pytest.raises(RuntimeError, match="other values"):
        Step(flow, LogDensity(model), x, weights, views)


def test_frozen_parameters_get_no_gradient():
    flow = make_flow("realnvp", 4)
    next(flow.parameters()).requires_grad_(False)
    x = normal(5, 4, seed=8)
    trained = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    passes = Passes(flow, x, [parameter.detach() for parameter in trained])
    gradient = passes.pull(passes.sample(x)[-1], x)
    assert len(gradient) == sum(parameter.numel() for parameter in trained)


def test_a_layer_used_twice_is_refused():
    layer = pf.transforms.AffineCoupling(4).double()
    flow = pf.Flow(pf.transforms.Compose([layer, layer]))
    with pytest.raises(ValueError, match="belong to one layer"):
        Passes(flow, normal(3, 4, seed=9), list(flow.parameters()))


# ---- steps -----------------------------------------------------------------------------------------------------------


class Branching(pf.transforms.AffineCoupling):
    """A layer whose code depends on values, so that it cannot be recorded."""

    def forward_and_score(self, x, score, context=None):
        assert math.isfinite(x.sum().item())
        return super().forward_and_score(x, score, context)


def model() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))
    pyro.sample("x", dist.StudentT(4.0, torch.zeros(3, dtype=torch.float64), scale).to_event(1))


def item_model() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))
    pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), scale.item()).to_event(1))


def trained(flow: pf.Flow, *, steps: int = 40) -> Trainer:
    pyro.set_rng_seed(0)
    trainer = Trainer(flow, LogDensity(model), learning_rate=1e-2, batch=32)
    for _ in range(steps):
        trainer.step(1e-2)
    trainer.write()
    return trainer


def test_recorded_steps_are_eager_steps(monkeypatch):
    flow = make_flow("realnvp", 4, base="student_t")
    other = copy.deepcopy(flow)
    fast = trained(flow)
    monkeypatch.setattr(training.Trainer, "_record", lambda self: None)
    slow = trained(other)
    assert fast.evaluation == "recorded"
    assert slow.evaluation == "eager"
    close(fast.weights, slow.weights, 1e-9)
    close(torch.tensor(fast.losses), torch.tensor(slow.losses), 1e-9)
    held = torch.cat([parameter.reshape(-1) for parameter in flow.parameters()])
    assert torch.equal(held, fast.weights)


@pytest.mark.falls_back
def test_a_layer_that_cannot_be_recorded_is_trained_all_the_same():
    flow = pf.Flow(
        pf.transforms.Compose(
            [Branching(4).double(), pf.transforms.AffineCoupling(4, mask=~pf.transforms.masks.half(4)).double()]
        )
    )
    trainer = trained(flow)
    assert trainer.evaluation.startswith("eager: ")
    assert trainer.losses[-1] < trainer.losses[0]


def test_a_gradient_that_is_not_finite_changes_nothing():
    before = normal(20, seed=1)
    weights, moments = update(before, Moments.fresh(before), normal(20, seed=2), 1e-2)
    same, after = update(weights, moments, torch.full_like(before, torch.nan), 1e-2)
    assert int(after.skipped) == 1
    assert torch.equal(same, weights)
    assert torch.equal(after.square, moments.square)
    moved, after = update(same, after, torch.ones_like(before), 1e-2)
    assert int(after.skipped) == 1
    assert not torch.equal(moved, weights)


def test_a_bad_gradient_may_come_first():
    before = normal(20, seed=1)
    weights, moments = before, Moments.fresh(before)
    for _ in range(2):
        weights, moments = update(weights, moments, torch.full_like(before, torch.nan), 1e-2)
        assert torch.equal(weights, before)
        moments = moments.forget()
    assert int(moments.skipped) == 2


def test_a_batch_without_a_finite_term_counts_as_infinite_loss():
    trainer = trained(make_flow("realnvp", 4), steps=0)
    trainer.density.value_and_grad = lambda z: (torch.full_like(z[:, 0], -torch.inf), torch.zeros_like(z))
    trainer.step(1e-2)
    assert trainer.losses == [math.inf]
    assert float(trainer.moments.ess) == 0.0


def test_updates_are_those_of_adam():
    """As long as nothing is clipped."""
    weights = normal(20, seed=1)
    moments = Moments.fresh(weights)
    reference = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([reference], lr=1e-2)
    for seed in range(5):
        reference.grad = normal(len(reference), seed=seed)
        weights, moments = update(weights, moments, reference.grad, 1e-2)
        optimizer.step()
    close(weights, reference.detach(), 1e-12)


def test_large_gradients_are_clipped():
    weights, gradient = normal(20, seed=1), normal(20, seed=0)
    weights, moments = update(weights, Moments.fresh(weights), gradient, 1e-2)
    _, after = update(weights, moments, 1e6 * gradient, 1e-2)
    running = (0.95 + 0.05 * CLIP) * torch.linalg.vector_norm(gradient)
    clipped = gradient / torch.linalg.vector_norm(gradient) * CLIP * running
    close(after.mean, moments.mean.lerp(clipped, 0.1), 1e-9)


class Overflowing(pf.transforms.DiagonalAffine):
    """A layer that overflows at its farthest points, there alone."""

    def forward_and_score(self, x, score, context=None):
        y, ladj, score = super().forward_and_score(x, score, context)
        return torch.exp(torch.exp(y)).log().log(), ladj, score


def test_draws_that_overflow_do_not_stop_training():
    """One draw in ten, so that nearly no batch is without one: a batch that was skipped is followed by careful ones."""
    flow = pf.Flow(
        pf.transforms.Compose([Overflowing(4).double(), make_flow("realnvp", 4).bijection]), base="student_t", df=1.0
    )
    trainer = trained(flow, steps=120)
    assert trainer.evaluation == "recorded"
    assert 0 < trainer.skipped <= 10  # those before the first look after recording
    assert torch.isfinite(trainer.weights).all()


@pytest.mark.falls_back
def test_a_step_is_one_graph_where_the_density_has_one():
    assert trained(make_flow("realnvp", 4), steps=12)._step._whole is not None
    trainer = Trainer(make_flow("realnvp", 4), LogDensity(item_model), learning_rate=1e-2, batch=8)
    for _ in range(12):
        trainer.step(1e-2)
    assert trainer.evaluation == "recorded"
    assert trainer._step._whole is None


def test_a_fall_while_cooling_leads_back(monkeypatch):
    """Half of the cool-down is good; then something breaks."""
    trainer = trained(make_flow("realnvp", 4), steps=12)
    check = loop.Check(trainer.flow, trainer.density, seed=0)
    run = loop._Run(trainer, loop.Budget(100), check, lambda *_: None, None)
    run.best = check.elbo()
    step, taken = trainer.step, []

    def breaks(learning_rate):
        taken.append(None)
        step(learning_rate)
        if len(taken) > 60:
            trainer.weights.add_(100.0)

    monkeypatch.setattr(trainer, "step", breaks)
    run._cool("", 100)
    while run.ended is None:
        run._cool_on(run.cooling)
    assert run.falls >= 1
    assert run.elbo == run.best
    assert check.elbo() == pytest.approx(run.elbo, abs=1e-12)  # block by block from its second run on
