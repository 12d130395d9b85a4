"""Properties of log densities over models that hypothesis writes, and verdicts on fits of random models of the zoo."""

import os
from dataclasses import replace

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyro_flows as pf
from benchmarks import zoo
from benchmarks.zoo.running import Task, blank, fill
from pyro_flows.model.stack import NotStackable, Stack
from tests.invariants import close
from tests.registry import RECORDED_FROM, normal
from tests.whole.programs import Program, by_trace, programs

pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")

USUAL = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
Y = 2.0 * normal(2, 5, seed=8)


def built(program: Program, y: torch.Tensor = Y) -> pf.LogDensity:
    pyro.clear_param_store()
    return pf.LogDensity(program, (y,))


def parts_of(density: pf.LogDensity, row: torch.Tensor) -> dict[str, torch.Tensor]:
    return {latent.name: latent.unconstrained(row) for latent in density.structure.latents}


def check_density(program: Program, seed: int) -> None:
    """Value and gradient are those of the trace, at the first calls and once they are recorded, for each batch size."""
    density = built(program)
    z = 0.8 * normal(3, density.dim, seed=seed)
    leaf = z.clone().requires_grad_()
    expected = torch.stack([by_trace(program, (Y,), parts_of(density, row)) for row in leaf])
    (slope,) = torch.autograd.grad(expected.sum() + 0.0 * leaf.sum(), leaf)  # of a flat density too
    expected = expected.detach()
    if any(one.kind == "latent" and one.masked != "no" for one in program.statements):
        # elements without a prior that nothing depends on are no coordinates: a constant log Jacobian less
        expected = expected - expected[0] + density(z[:1]).detach()
    for _ in range(RECORDED_FROM + 1):
        value, gradient = density.value_and_grad(z)
        close(value, expected, 1e-9)
        close(gradient, slope, 1e-8)
        with torch.no_grad():
            close(density(z), expected, 1e-9)
    assert density.batched
    assert density.reason is None, density.reason
    close(density.value_and_grad(z[1:])[1], slope[1:], 1e-8)


def check_stack(program: Program, seed: int) -> None:
    """Each group of points of a stack is scored as by the density of its data set."""
    sets = [Y, Y + 0.1 * normal(2, 5, seed=seed)]
    densities = [built(program, y) for y in sets]
    z = 0.8 * normal(4, densities[0].dim, seed=seed)
    single = torch.cat([density(part).detach() for density, part in zip(densities, z.split(2), strict=True)])
    try:
        stack = Stack(densities)
    except NotStackable as error:
        pytest.fail(f"not stacked: {error}")
    for _ in range(RECORDED_FROM + 1):
        with torch.no_grad():
            close(stack(z), single, 1e-9)


SEEDS = st.integers(0, 2**20)


@settings(USUAL, max_examples=30)
@given(programs(), SEEDS)
def test_a_density_is_that_of_pyros_trace(program, seed):
    check_density(program, seed)


@settings(USUAL, max_examples=8)
@given(programs(), SEEDS)
def test_a_stack_is_its_densities(program, seed):
    check_stack(program, seed)


@settings(USUAL, max_examples=10)
@given(programs(), st.integers(1, 4))
def test_a_subsampled_plate_is_refused_by_its_name(program, rows):
    with pytest.raises(ValueError, match=r"^plate 'data': subsampled,|: a latent in the subsampled plate 'data';"):
        built(replace(program, rows=rows))


@pytest.mark.slow
@settings(USUAL, max_examples=int(os.environ.get("PROPERTIES", "1500")))
@given(programs(), SEEDS)
def test_many_densities_are_those_of_pyros_trace(program, seed):
    check_density(program, seed)


@pytest.mark.slow
@settings(USUAL, max_examples=int(os.environ.get("PROPERTIES", "500")))
@given(programs(), SEEDS)
def test_many_stacks_are_their_densities(program, seed):
    check_stack(program, seed)


@pytest.mark.slow
@pytest.mark.falls_back  # the zoo has models that no batch goes through
@settings(USUAL, max_examples=int(os.environ.get("PROPERTIES", "40")))
@given(st.integers(0, 2**20), st.integers(0, zoo.MODELS - 1))
def test_no_verdict_is_a_lie(seed, number):
    task = Task(seed, number, "", "")
    row = blank(task)
    fill(row, task)
    assert row["outcome"] != "lie", row
