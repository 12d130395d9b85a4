"""Errors at the door: which argument is wrong, what was expected, what was got."""

from functools import partial

import pytest
import torch

import pyro_flows as pf
from tests.registry import BASES, FLOWS, TYPICAL, each, make_flow

CASES = TYPICAL


def passes(t):
    return (
        t.forward_and_ladj,
        t.inverse_and_ladj,
        lambda x, context=None: t.forward_and_score(x, torch.ones_like(x), context),
    )


@each(CASES)
def test_wrong_width(case):
    """Too wide, too narrow, and no axis at all."""
    t = case.make()
    _, context = case.inputs()
    for run in passes(t):
        for x in (torch.zeros(5, *case.shape[:-1], 8), torch.zeros(5, *case.shape[:-1], 2), torch.zeros(())):
            with pytest.raises(ValueError, match=r"expected a tensor of shape \(\.\.\., \d.*\), got"):
                run(x.double(), context)


@each(case for case in CASES if case.context_dim)
def test_wrong_or_missing_context(case):
    t = case.make()
    x, _ = case.inputs(5)
    for run in passes(t):
        with pytest.raises(ValueError, match=r"expected a context of shape \(\.\.\., 3\), got none"):
            run(x)
        with pytest.raises(ValueError, match=r"expected a context of shape \(\.\.\., 3\), got \(5, 2\)"):
            run(x, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="condition"):
        t(x)
    for bad in (None, torch.zeros(5, 2)):
        with pytest.raises(ValueError, match="expected a context"):
            t.condition(bad)


@each(case for case in CASES if not case.context_dim)
def test_unexpected_context(case):
    t = case.make()
    x, _ = case.inputs(5)
    for run in passes(t):
        with pytest.raises(ValueError, match="takes no context"):
            run(x, x)
    with pytest.raises(ValueError, match="takes no context"):
        t.condition(x)


class Image(pf.transforms.Bijection):
    event_dim = 3


BAD_ARGUMENTS = {
    "dim": [
        *(
            partial(kind, dim)
            for kind in (pf.transforms.AffineCoupling, pf.transforms.Planar, pf.transforms.Rescale)
            for dim in (0, 1.5)
        ),
        lambda: pf.transforms.AdditiveCoupling(True),
        lambda: pf.transforms.DiagonalAffine(-1),
        lambda: pf.transforms.LowerTriangularAffine("2"),
        lambda: pf.Flow(pf.transforms.Rescale(2), dim=0),
        lambda: pf.Flow(pf.transforms.Rescale(2), dim=3),
        lambda: pf.Flow(pf.transforms.Rescale(2), dim=(2, 1, 1)),
        lambda: pf.Flow(Image()),
        lambda: pf.Flow(Image(), dim=4),
    ],
    "mask": [
        lambda: pf.transforms.AffineCoupling(3, mask=[True, False]),
        lambda: pf.transforms.AffineCoupling(2, mask=[True, True]),
        lambda: pf.transforms.AdditiveCoupling(2, mask=[[True, False]]),
        lambda: pf.transforms.AdditiveCoupling(3, mask=[0, 2, 1]),
        lambda: pf.transforms.AffineCoupling(2, mask=[0.5, 0.0]),
    ],
    "hidden": [
        lambda: pf.transforms.AffineCoupling(2, hidden=(0,)),
        lambda: pf.transforms.Planar(2, hidden="32"),
        lambda: pf.nice(2, hidden=(8, 2.5)),
    ],
    "activation": [
        lambda: pf.transforms.AffineCoupling(2, activation="rely"),
        lambda: pf.planar(2, activation=torch.relu),
    ],
    "permutation": [
        lambda: pf.transforms.Permutation([0, 2]),
        lambda: pf.transforms.Permutation([0, 0]),
        lambda: pf.transforms.Permutation([]),
        lambda: pf.transforms.Permutation(0),
        lambda: pf.transforms.Permutation([[0, 1]]),
    ],
    "loc": [
        lambda: pf.transforms.DiagonalAffine(2, loc=[1.0]),
        lambda: pf.transforms.LowerTriangularAffine(2, loc=[0.0, float("nan")]),
    ],
    "scale": [
        lambda: pf.transforms.DiagonalAffine(2, scale=[1.0, 0.0]),
        lambda: pf.transforms.DiagonalAffine(2, scale=[1.0, float("inf")]),
        lambda: pf.transforms.DiagonalAffine(2, scale=torch.ones(2, 1)),
        lambda: pf.transforms.DiagonalAffine(2, scale=torch.ones(2, 2)),
        lambda: pf.transforms.DiagonalAffine(2, scale=-torch.eye(2)),
    ],
    "scale_tril": [
        lambda: pf.transforms.LowerTriangularAffine(2, scale_tril=torch.ones(2, 2)),
        lambda: pf.transforms.LowerTriangularAffine(2, scale_tril=-torch.eye(2)),
        lambda: pf.transforms.LowerTriangularAffine(2, scale_tril=torch.eye(3)),
        lambda: pf.transforms.LowerTriangularAffine(2, scale_tril=torch.eye(2) * float("nan")),
    ],
    "layers": [
        lambda: pf.transforms.Compose([]),
        lambda: pf.transforms.Compose([pf.transforms.Rescale(2), Image()]),
        lambda: pf.transforms.Compose([pf.transforms.Rescale(2), torch.nn.Linear(2, 2)]),
        lambda: pf.transforms.Compose([torch.distributions.ExpTransform()]),
        lambda: pf.transforms.Compose([pf.transforms.Planar(2, context_dim=1), pf.transforms.Planar(2, context_dim=2)]),
    ],
    "bijection": [lambda: pf.Flow(torch.nn.Linear(2, 2)), lambda: pf.Flow(torch.distributions.ExpTransform())],
    "base": [
        *(partial(build, 2, base="gauss") for build, _ in FLOWS.values()),
        lambda: pf.Flow(pf.transforms.Rescale(2), base=None),
    ],
}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param(name, call, id=f"{name}-{number}")
        for name, calls in BAD_ARGUMENTS.items()
        for number, call in enumerate(calls)
    ],
)
def test_a_bad_argument_is_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()


@pytest.mark.parametrize("build", [build for build, _ in FLOWS.values()])
@pytest.mark.parametrize(("word", "meant"), [("student", "student_t"), ("norml", "normal"), ("unifrom", "uniform")])
def test_an_unknown_base_is_met_with_a_suggestion(build, word, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'") as caught:
        build(2, base=word)
    assert all(repr(base) in str(caught.value) for base in BASES)


@pytest.mark.parametrize("name", FLOWS)
def test_errors_of_a_flow(name):
    plain, conditional = make_flow(name, 2), make_flow(name, 2, context_dim=3)
    with pytest.raises(ValueError, match="takes no context"):
        plain(torch.zeros(3))
    with pytest.raises(ValueError, match="expected a context"):
        conditional()
    with pytest.raises(ValueError, match="expected a context"):
        conditional(torch.zeros(4))
    for run in (conditional.rsample_and_log_prob, conditional.sample_with_score):
        with pytest.raises(ValueError, match="expected a context"):
            run()
    for run in (conditional.log_prob, plain.log_prob, plain().log_prob):
        with pytest.raises(ValueError, match=r"must match event_shape|expected a context|expected a tensor of shape"):
            run(torch.zeros(5, 3, dtype=torch.float64))
