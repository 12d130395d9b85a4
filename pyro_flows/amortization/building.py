"""The parts of an amortized posterior that are there before any training: form, simulations, scale and networks."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_flows.amortization.form import MEASURED, Form, Scale
from pyro_flows.amortization.networks import BASE, FLOW, Conditional, Pooled, Shaped, Sorted, Whitened, perceptron
from pyro_flows.calibration.simulating import check_model
from pyro_flows.calibration.wiring import Case, Names, check_wiring, filled, wire
from pyro_flows.densities.standardizing import preprocess
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import VECTOR_BUILDERS
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.precision import LostDigits
from pyro_flows.model.sites import Model
from pyro_flows.model.stack import NotStackable, Stack
from pyro_flows.support.process.fallbacks import fallback
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.transforms.fixed import Preprocess

LAYERS = {"spline": 4, "realnvp": 6}
SPLINES_UP_TO = 2  # dimensions: a spline bends a single one too, and takes three times as long
SIMULATIONS, SIMULATIONS_LEAST = 200_000, 10_000  # by default: as many as make so many numbers of data
NUMBERS = 10**8
STACKED = 8  # data sets that tell which arguments are inputs of the recorded graph
SET = 16  # rows, from which on exchangeable ones are pooled
COMPARED = 8  # points at which rows are exchanged
LOST_SHARE = 0.05  # of the simulations that may have parameters or data that are not finite
DIGITS = 64  # draws, each with the data simulated from it, at which precisions are compared


class Read(NamedTuple):
    """A model with data of one form: its density, their form, and draws of parameters z (N, D) and data from it."""

    density: LogDensity
    form: Form
    z: Tensor
    observed: dict[str, Tensor]


def simulate(model: Model, case: Case, data: Names, count: int | None, more: int, *, seed: int) -> Read:
    """Read a model, and draw ``count + more`` parameters and data from it, as far as all of them are finite."""
    case = filled(model, case, data)
    density = LogDensity(model, case.args, case.kwargs, noncentered=True)
    check_model(density, "prior")
    wiring = wire(density, case, data)
    form = Form.of(wiring, density.structure)
    if not any(form.sizes):
        raise ValueError("args: expected data with at least one value that is neither missing (NaN) nor masked out.")
    if count is None:
        count = max(SIMULATIONS_LEAST, min(SIMULATIONS, NUMBERS // sum(form.sizes)))
    drawn = density.prior(count + more, seed=derive(seed, "simulations"))
    if drawn is None:
        raise ValueError("model: expected proper priors that can be drawn from, so that data can be simulated.")
    check_wiring(density, wiring, {name: values[0] for name, values in drawn.items()})
    z = density.unconstrain(drawn)
    fine = torch.isfinite(z).all(1) & torch.isfinite(form.rows(drawn)).all(1)
    lost = 1.0 - float(fine.double().mean())
    if lost > LOST_SHARE:
        raise ValueError(
            f"model: {lost:.0%} of the simulations have parameters or data that are not finite. Its priors are too "
            "wide to learn from: give narrower ones."
        )
    z, observed = z[fine], {name: drawn[name][fine] for name in form.keep}
    try:  # parameters far from all that the data allow lose digits in any model
        for number in range(min(DIGITS, len(z))):
            own = form.wiring({name: values[number] for name, values in observed.items()})
            density.beside(own.args, own.kwargs).check_digits(z[number : number + 1])
    except LostDigits:
        density = density.in_double()
    return Read(density, form, z.to(density.dtype), observed)


def exchangeable_rows(read: Read) -> int:
    """Return how many rows the data have, if these are 16 or more, and may come in any order; else 1."""
    density, form = read.density, read.form
    sizes = {len(values[0]) if values.dim() > 1 else 0 for values in read.observed.values()}
    rows = max(sizes)
    if len(sizes) > 1 or rows < SET or not all(bool(keep.all()) for keep in form.keep.values()):
        return 1
    order, z = torch.randperm(rows, generator=torch.Generator().manual_seed(0)), read.z[:COMPARED]
    moved = {name: values[:, order] for name, values in read.observed.items()}
    changed = torch.stack([(moved[name] != values).flatten(1).any(1) for name, values in read.observed.items()]).any(0)
    if not bool(changed.any()):
        return 1
    told = int(changed.int().argmax())  # data whose rows are all alike tell nothing
    cases = [form.wiring({name: values[told] for name, values in of.items()}) for of in (read.observed, moved)]
    with torch.no_grad():
        one, other = (density.beside(case.args, case.kwargs)(z) for case in cases)
    return rows if torch.allclose(one, other, rtol=1e-5, atol=1e-4, equal_nan=True) else 1


def networks(
    read: Read, features: Tensor, encoder: nn.Module | None, rows: int, flow: str, layers: int | None, *, seed: int
) -> Conditional:
    """Return an encoder of data on a common scale (N, n), and a flow, both untrained."""
    with seeded(derive(seed, "networks"), read.density.device):
        made = default_encoder(read, features, rows) if encoder is None else Shaped(encoder, read.form.keep)
        made = made.to(features)
        width = made(torch.zeros_like(features[:2])).shape[-1]
        return Conditional(couplings(flow, read.density.dim, layers, width), made, features.shape[1])


def default_encoder(read: Read, features: Tensor, rows: int) -> nn.Module:
    """Return perceptrons of rows that are pooled, or one of all data, those of one number a row in order."""
    sizes, given = read.form.sizes, features[:MEASURED]
    if rows == 1:
        return nn.Sequential(Whitened(given), perceptron(2 * sum(sizes) + 1))
    if sizes == [rows]:
        return nn.Sequential(Sorted(), Whitened(Sorted()(given)), perceptron(2 * rows + 1))
    return Pooled(rows, [size // rows for size in sizes])


def couplings(flow: str, dim: int, layers: int | None, width: int) -> Flow:
    name = ("spline" if dim <= SPLINES_UP_TO else "realnvp") if flow == "auto" else flow
    return VECTOR_BUILDERS[name](dim, layers=layers or LAYERS[name], context_dim=width, **FLOW, **BASE)


def scale_of(read: Read, rows: int) -> Scale:
    return Scale(read.form.rows(read.observed), read.form.sizes, exchangeable=rows)


def measured(read: Read, features: Tensor, rows: int) -> Preprocess:
    """Return the linear regression of the latents on data (N, n), and the scale of what it leaves.

    Rows that may come in any order have the same slopes, or their order would matter.
    """
    z, given = read.z[:MEASURED].to(features), features[:MEASURED]
    found = preprocess("standardize", [(z, given)])
    assert found.slope is not None
    parts = [part.unflatten(0, (rows, -1)) for part in found.slope.split(read.form.sizes)]
    slope = torch.cat([part.mean(0, keepdim=True).expand_as(part).flatten(0, 1) for part in parts])
    slope = slope if rows > 1 else found.slope
    return Preprocess(found.loc + given.mean(0) @ (found.slope - slope), found.scale, slope)


def stacked(read: Read) -> Stack | None:
    """Return the densities of some simulated data sets side by side; None where the model cannot do that."""
    every = range(min(STACKED, len(read.z)))
    cases = [read.form.wiring({name: value[number] for name, value in read.observed.items()}) for number in every]
    with suppress(NotStackable):
        return Stack([read.density.beside(case.args, case.kwargs) for case in cases])
    fallback("each data set has a graph of its own")
    return None
