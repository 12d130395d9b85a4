"""Which graphs go block by block, and what they may and may not rely on from one run to the next."""

from __future__ import annotations

import threading
from importlib.machinery import ModuleSpec

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows.model.graphs import fused as blocks
from pyro_flows.model.graphs import programs
from pyro_flows.model.graphs.fused import fused
from pyro_flows.model.graphs.recording import record
from pyro_flows.model.graphs.rounding import rounds_alike, within_rounding
from pyro_flows.model.graphs.runner import Runner
from pyro_flows.support.process.fallbacks import strict
from tests.invariants import close
from tests.model.graphs.test_blocks import in_blocks
from tests.registry import needs_interpreter, normal

aten = torch.ops.aten
pytestmark = needs_interpreter


def some(x: Tensor) -> tuple[Tensor, ...]:
    return x.exp().sum(1), (x.sin() + x[:, :1]).cos()


def equal(made, function, *inputs: Tensor) -> None:
    for got, expected in zip(made(*inputs), function(*inputs), strict=True):
        close(got, expected, 1e-12)


# graphs that are taken, and others -----------------------------------------------------------------------------------


def test_a_graph_of_tasks_is_taken():
    made = fused(record(some, normal(20, 3, seed=0)), (normal(20, 3, seed=0),))
    assert made.calls == 1
    assert made.tasks >= 5
    equal(made, some, normal(20, 3, seed=1))


REFUSED = {
    "strides": lambda x: (torch.as_strided(x.exp().sin(), (3, 2), (1, 3)).cos(), x.exp()),
    "random numbers": lambda x: ((x + torch.randn_like(x)).exp().sin(), x.cos()),
    "parts of complex numbers": lambda x: (torch.fft.fft(x).imag.exp().sin(), x.exp()),
    "nothing that is a task": lambda x: (torch.lgamma(x), torch.special.i0e(x)),
    "foreign operations between all tasks": lambda x: (torch.lgamma(torch.lgamma(x.exp()).exp()).exp(),),
    "half precision": lambda x: (x.half().exp().sin(),),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_graphs_that_are_not_taken(reason):
    x = normal(20, 3, seed=0)
    x = x.half() if reason == "half precision" else x
    assert fused(record(REFUSED[reason], x), (x,)) is None


def test_more_dimensions_than_a_nest_has_are_not_taken():
    x = normal(*[2] * 7, seed=0)
    assert fused(record(lambda x: (x.permute(6, 5, 4, 3, 2, 1, 0).exp() + x, x.sin().cos()), x), (x,)) is None


def test_changes_in_place_are_not_taken():
    module = record(lambda x: (x.exp().sin().cos(), x.exp()), normal(20, 3, seed=0))
    assert fused(module, (normal(20, 3, seed=0),)) is not None
    node = next(node for node in module.graph.nodes if node.target is aten.cos.default)
    node.target = aten.cos_.default
    assert fused(module, (normal(20, 3, seed=0),)) is None


def test_chosen_rows_are_taken():
    rows = torch.tensor([3, 1, 1])
    made = in_blocks(lambda x: (x.exp()[rows].sin(), x.cos()), normal(20, 3, seed=0))
    equal(made, lambda x: (x.exp()[rows].sin(), x.cos()), normal(20, 3, seed=1))
    assert fused(
        record(lambda x: (x.exp()[rows].sin().exp(), x.cos()), normal(20, 3, seed=0)), (normal(20, 3, seed=0),)
    )


def test_graphs_that_round_to_single_precision_on_their_way_are_taken():
    data, unchecked = normal(8, seed=1), {"validate_args": False}

    def density(x: Tensor) -> tuple[Tensor, ...]:
        tau, rate = x[:, 0].exp(), dist.Gamma(2.0, 1.0, **unchecked).log_prob(x[:, 1].exp())
        prior = dist.HalfCauchy(1.0, **unchecked).log_prob(tau)  # of the precision of its scale
        likelihood = dist.StudentT(4.0, x[:, 1:], tau[:, None], **unchecked).log_prob(data).sum(1)
        return (prior + rate + likelihood, x.sin())

    made = in_blocks(density, normal(20, 2, seed=0))
    x = normal(20, 2, seed=2)
    found, expected = made(x), density(x)
    assert found[0].dtype == torch.float64
    close(found[0], expected[0], 1e-5)
    close(found[1], expected[1], 1e-12)
    other = record(lambda x: tuple(1.01 * part for part in density(x)), x)
    assert not rounds_alike(other, (x,), found, other(x))


@pytest.mark.parametrize(("rows", "threads", "taken"), [(100, 8, True), (2**17, 8, False), (2**17, 2, True)])
def test_large_operations_are_left_to_many_threads(monkeypatch, rows, threads, taken):
    x = normal(rows, seed=0)
    module = record(lambda x: ((x.exp() + 1.0).log() * x.sin(),), x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert (fused(module, (x,)) is not None) == taken


# the interpreter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"no library at all"])
def test_without_it_nothing_is_taken(monkeypatch, tmp_path, content):
    file = tmp_path / "_interpreter.so"
    if content is not None:
        file.write_bytes(content)
    spec = None if content is None else ModuleSpec("_interpreter", None, origin=str(file))
    monkeypatch.setattr(programs, "find_spec", lambda _: spec)
    monkeypatch.setattr(blocks, "library", programs.library.__wrapped__)
    x = normal(20, 3, seed=0)
    runner = Runner(record(some, x))
    with strict(False):
        for _ in range(3):
            equal(runner, some, x)
    assert not runner.in_blocks


@pytest.mark.falls_back
def test_an_interpreter_that_gives_other_numbers_is_not_used(monkeypatch):
    monkeypatch.setattr(blocks, "library", lambda: lambda *_: None)
    x = normal(20, 3, seed=0)
    assert fused(record(some, x), (x,)) is None


# values ---------------------------------------------------------------------------------------------------------------


def near_singular(x: Tensor) -> tuple[Tensor]:
    """The last entry of a factor is the difference of nearly equal numbers."""
    return (aten.linalg_cholesky_ex(x)[0].diagonal(0, -2, -1).reciprocal(),)


def test_what_rounding_makes_of_a_near_singular_matrix_is_no_other_value():
    rows = normal(40, 5, 1, seed=0)
    rows = torch.cat([rows, rows + 1e-6 * normal(40, 5, 1, seed=1)], -1)
    gram = rows.mT @ rows
    module = record(near_singular, gram)
    (expected,), (rounded,) = module(gram), module(gram.mul(1.0 + 1e-15))
    assert not torch.allclose(rounded, expected, rtol=1e-7)
    assert rounds_alike(module, (gram,), [rounded], [expected])
    assert within_rounding(module, (gram,), [rounded], [expected])
    assert not within_rounding(module, (gram,), [1.5 * expected], [expected])
    equal(fused(module, (gram,)), near_singular, gram + torch.eye(2))


# one run and the next -------------------------------------------------------------------------------------------------


def test_results_are_not_overwritten():
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x.exp()
        return y, y, y.mT[1:], torch.lgamma(y), torch.zeros_like(x), torch.ones(3), (x > 0.0), y.sum(1)

    made = in_blocks(function, normal(20, 3, seed=0))
    first = made(normal(20, 3, seed=1))
    kept = [part.clone() for part in first]
    with torch.inference_mode():
        for part in made(normal(20, 3, seed=2)):
            part.fill_(True)
    for part, before in zip(first, kept, strict=True):
        assert torch.equal(part, before)
    equal(made, function, normal(20, 3, seed=3))


def test_inputs_may_lie_otherwise_than_at_first():
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x.mT * 2.0).exp(), y[3:].exp() + y[:-3], x.reshape(-1).sin() + y.sum()

    whole = normal(40, seed=0)
    part = whole[:20].view(4, 5)
    for first in ((part, whole[20:]), (part, whole[:20]), (whole[:1].expand(4, 5), whole[::2])):
        made = in_blocks(function, *first)
        equal(made, function, *first)
        equal(made, function, normal(4, 5, seed=1), normal(20, seed=2))
        equal(made, function, normal(5, 8, seed=3)[:, ::2].mT, normal(20, 2, seed=4)[:, 1])


def test_other_shapes_are_errors():
    made = in_blocks(some, normal(20, 3, seed=0))
    with pytest.raises(RuntimeError, match="expected inputs of shape"):
        made(normal(20, 4, seed=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parameters_may_change_between_runs(dtype):
    weights = torch.nn.Parameter(normal(3, seed=1, dtype=dtype))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x * weights.exp(), weights[1:].double().exp() * x[:, 1:], torch.lgamma(weights) + x

    made = in_blocks(function, normal(20, 3, seed=0))
    with torch.no_grad():
        weights.mul_(-2.0)
        equal(made, function, normal(20, 3, seed=2))


def test_threads_do_not_meet():
    made, wrong = in_blocks(some, normal(2000, 3, seed=0)), []

    def run(seed: int) -> None:
        x = normal(2000, 3, seed=seed)
        expected = some(x)
        wrong.extend(1 for _ in range(100) if not all(map(torch.allclose, made(x), expected)))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def waits(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """What is read by two foreign operations is there for the first of them."""
    z, total = x.exp(), y.sum(0).exp().sum()
    return torch.igamma(z, (total / 100.0).exp()), torch.lgamma(z), (x * total).sin()


def truths(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Each is one or zero, whatever it was made of."""
    mask = x > 0.0
    made = aten.copy(mask, x * 3.0), mask.masked_fill(x < -1.0, 2.0), torch.lgamma(mask.double()), mask.double()
    return (*made, *(part.double() * x for part in made), torch.isnan(y / y).double().sum(0))


def narrow(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Numbers of less precision are compared in that precision."""
    tenths = torch.tensor([0.1, 0.2, 0.3])
    same = tenths.eq(0.1 + 0.0 * x[0, 0]), (tenths + 0.0 * x.float()[:1]).eq(0.1)
    return *(part.double().exp() for part in same), tenths * x, (x.argmax(1) * y[0, 0]).exp(), x.max(1)[0].exp()


def test_single_precision_is_worked_on_in_double():
    made = in_blocks(some, normal(20, 3, seed=0, dtype=torch.float32))
    x = normal(20, 3, seed=1, dtype=torch.float32)
    for got, expected in zip(made(x), some(x.double()), strict=True):
        close(got, expected.float(), 2e-7)


@pytest.mark.parametrize("function", [waits, truths, narrow])
def test_what_went_wrong_once(function):
    x, y = normal(20, 3, seed=0), normal(7, 3, seed=1)
    made = in_blocks(function, x, y)
    equal(made, function, x, y)
    equal(made, function, y.sum() * x, x[:7] + 1.0)
