"""Bad arguments of all public functions: a sentence that names the argument, before any work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import pyro_flows as pf
from pyro_flows.support.arguments import OTHERS, RANGES, Range, real, shown, whole

ODD: list[Any] = [
    "zzz", "", b"x", [], [None], {}, {1}, object(), math.nan, -math.inf, 1.5, -3.5, -1, 10**30, True, None, 1j, int,
    torch.zeros(0), torch.full((2,), math.nan), torch.zeros(2, dtype=torch.complex64), torch.zeros(3, 2).to_sparse(),
    np.zeros(2), np.array(["a", None], dtype=object), np.ma.masked_array([1.0, 2.0], [0, 1]), np.int64(-3),
    lambda: None,
]  # fmt: skip
TAKEN: dict[str, Callable[[Any], bool]] = {  # what a check of a type may let through
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "str | os.PathLike[str]": lambda value: isinstance(value, str),
    "Mapping[str, object]": lambda value: isinstance(value, dict),
    "Mapping[str, str | int]": lambda value: isinstance(value, dict),
    "Callable[..., object]": callable,
    "str | Sequence[str]": lambda value: isinstance(value, str) or _is_empty(value),
    "Callable[..., object] | MCMC": callable,
    "FlowLike": lambda value: isinstance(value, str) or callable(value),
    "Iterable[Bijection]": lambda value: hasattr(value, "__iter__"),
    "Comparison": lambda value: False,
    "Mapping[str, Sequence[str]]": lambda value: isinstance(value, dict),
    "Sequence[Sequence[float]] | Tensor": lambda value: _is_dense(value) or _is_number(value) or _is_empty(value),
    "Mapping[str, Tensor]": lambda value: isinstance(value, dict),
    "Transform": lambda value: isinstance(value, dict),
    "Names": lambda value: value is None or isinstance(value, str) or _is_empty(value),
    "Sequence[str]": lambda value: isinstance(value, str) or _is_empty(value),
    "Sequence[float] | Tensor": lambda value: _is_dense(value) or _is_number(value) or _is_empty(value),
    "Record": lambda value: False,
    "Bijection": lambda value: False,
    "Tensor": lambda value: isinstance(value, torch.Tensor) and _is_dense(value),
    "Sequence[int]": lambda value: (
        _is_empty(value) or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**16)
    ),
}


def _is_empty(value: Any) -> bool:
    return isinstance(value, list) and not value


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, (int, np.integer)) and abs(value) < 2**63)


def _is_dense(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype != object
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_complex()


def _is_taken(name: str, kind: str, bounds: Range, value: Any) -> bool:
    if kind == "int":
        number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return number and bounds.low <= value <= bounds.high
    if kind == "float":
        number = isinstance(value, (int, float, np.integer)) and not isinstance(value, bool)
        return bool(number and not math.isnan(value) and bounds.has(value))
    return TAKEN[kind](value)


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield all public functions, constructors and methods that check their arguments."""
    for owner in (pf, pf.plots, pf.transforms):
        for name in owner.__all__:
            found = getattr(owner, name)
            if inspect.isclass(found):
                methods = [part for part in dir(found) if not part.startswith("_")]
                for part in ("__init__", *methods):
                    yield f"{name}.{part}", inspect.getattr_static(found, part)
            else:
                yield name, found


CHECKED = {name: made for name, made in public() if inspect.isfunction(made) and hasattr(made, "checks")}


@pytest.mark.parametrize("name", CHECKED)
def test_what_is_no_value_of_an_argument_is_refused_by_its_name(name):
    function = CHECKED[name]
    parameters = inspect.signature(function).parameters
    for argument in function.checks:
        kind = str(parameters[argument].annotation).replace("Any", "object").removesuffix(" | None")
        own = f"{inspect.unwrap(function).__name__}.{argument}"
        bounds = RANGES.get(own, RANGES.get(argument, Range()))
        for value in ODD:
            default = value is None and str(parameters[argument].annotation).endswith(" | None")
            if default or value is parameters[argument].default or _is_taken(argument, kind, bounds, value):
                continue
            with pytest.raises(ValueError, match=rf"^{argument}: expected .+, got .+\.$"):
                function(**{argument: value})


def test_the_functions_that_are_asked_first_are_among_them():
    first = {"fit", "fit_many", "sbc", "diagnose", "fit_density", "from_mcmc", "compare", "prior_from", "realnvp"}
    assert first <= set(CHECKED)
    assert {"AutoRealNVP.__init__", "PathELBO.__init__", "ActNorm.__init__", "Posterior.refine"} <= set(CHECKED)
    assert len(CHECKED) > 60


def test_each_range_is_of_an_argument():
    names = {argument for function in CHECKED.values() for argument in function.checks}
    assert {name.rpartition(".")[2] for name in RANGES} <= names


def test_numbers_of_numpy_are_taken_as_those_of_python():
    assert type(whole("draws", np.int64(7), Range(1, 9))) is int
    assert type(real("width", np.float32(0.5), Range(0, 1))) is float
    assert OTHERS["bool"]("progress", np.True_) is True


def test_ranges_say_what_they_hold():
    assert str(Range(0, 1, open=True)) == " between 0 and 1"
    assert str(Range(1, 9)) == " from 1 to 9"
    assert str(Range(2)) == " >= 2"
    assert str(RANGES["max_seconds"]) == " > 0 (math.inf for no bound)"
    assert RANGES["max_seconds"].has(math.inf)
    assert not RANGES["width"].has(math.inf)


def test_long_values_are_cut_and_tensors_told_by_their_shape():
    assert shown(torch.zeros(2, 3)) == "a Tensor of shape (2, 3) and dtype torch.float32"
    assert len(shown("x" * 10_000)) < 100
