"""What the arguments of public functions may be: types are those of the annotations, ranges stand in one table.

:func:`checks_of` makes a check for each parameter of a function that :func:`pyro_flows.support.checks.options` runs
before any work. A check returns the value as the function is to get it (whole numbers of numpy become Python's), or
raises a sentence with the name, what was expected, and what was got. The default of a parameter is never refused.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Check = Callable[[str, object], object]
LONGEST = 60  # characters of a value that an error shows


class Range(NamedTuple):
    """The numbers from ``low`` to ``high``, without the ends if it is ``open``; infinity only where it is no bound."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    unbounded: bool = False

    def has(self, value: float) -> bool:
        """Whether the number is in it."""
        if value in (math.inf, -math.inf):
            return self.unbounded and value > 0
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        if self.high < math.inf:
            words = ("between", "and") if self.open else ("from", "to")
            return f" {words[0]} {int(self.low)} {words[1]} {int(self.high)}"
        more = " (math.inf for no bound)" if self.unbounded else ""
        return f" {'>' if self.open else '>='} {self.low:g}{more}" if self.low > -math.inf else more


POSITIVE, SHARE, SECONDS = Range(0, open=True), Range(0, 1, open=True), Range(0, open=True, unbounded=True)
MAX_DRAWS, MAX_LAYERS, MAX_RUNS, MOST_COORDINATES = 10**7, 1000, 100, 10**7
# By the name of a parameter; those of one function alone stand under both names. Ends of counts are beyond what fits
# into memory or ends within a day.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("alpha", "ci_prob", "level", "prob"), SHARE),
    **dict.fromkeys(
        ("bound", "df", "epsilon", "init_scale", "learning_rate", "log_bound", "log_scale_bound"), POSITIVE
    ),
    **dict.fromkeys(("log_scale_bound", "step_size", "width"), POSITIVE),
    **dict.fromkeys(("temperature", "weight_decay"), Range(0)),
    **dict.fromkeys(("batch", "max_epochs", "max_steps"), Range(1, 10**9)),
    **dict.fromkeys(("columns", "max_panels"), Range(1, 1000)),
    **dict.fromkeys(("count", "n"), Range(1, 10**8)),
    **dict.fromkeys(("num_particles", "steps"), Range(1, 10**6)),
    **dict.fromkeys(("chains", "max_rows"), Range(1, 10**5)),
    "bins": Range(2, 1000),
    "context_dim": Range(0, 10**6),
    "dim": Range(1, MOST_COORDINATES),
    "draws": Range(1, MAX_DRAWS),
    "jobs": Range(-1, 4096),  # -1: one a processor; 0 is refused where processes are made
    "layers": Range(1, MAX_LAYERS),
    "levels": Range(1, 2**16),
    "max_scalars": Range(2, 100),
    "max_seconds": SECONDS,
    "momentum": Range(0, 1),
    "runs": Range(1, MAX_RUNS),
    "seed": Range(0, 2**62),  # runs add their numbers to it, and torch takes 64 bits
    **dict.fromkeys(("fit.draws", "fit_many.draws", "diagnose.draws", "posterior.draws"), Range(100, MAX_DRAWS)),
    **dict.fromkeys(("loo.draws", "evidence.draws"), Range(100, MAX_DRAWS)),
    "sbc.draws": Range(9, MAX_DRAWS),
    "amortize.simulations": Range(1000, 10**7),
    "sbc.simulations": Range(10, 10**6),
    "plot_interpolation.steps": Range(2, 10**4),
    "interpolate.steps": Range(2, 10**6),
}
WIDEST = Range(1, 2**16)  # hidden units of a layer


def shown(value: object) -> str:
    """Return a value as an error shows it: tensors and arrays by shape and dtype, anything long cut short."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({type(value).__name__})"


def refused(name: str, expected: str, value: object, remedy: str = "") -> ValueError:
    """Return the error for a value that is not what was expected."""
    return ValueError(f"{name}: expected {expected}, got {shown(value)}.{remedy and ' '}{remedy}")


def whole(name: str, value: object, bounds: Range) -> int:
    """Return ``value`` as an int in a range; whole numbers of numpy are taken, floats and booleans are not."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < bounds.low:
        raise refused(name, f"an integer{Range(bounds.low)}", value)
    if value > bounds.high:
        raise refused(name, f"an integer{bounds}", value, "Take fewer.")
    return int(value)


def real(name: str, value: object, bounds: Range) -> float:
    """Return ``value`` as a float in a range; numbers of numpy are taken, booleans are not."""
    number = float(value) if isinstance(value, np.floating) else int(value) if isinstance(value, np.integer) else value
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not bounds.has(number):
        finite = "finite " if bounds.high == math.inf and not bounds.unbounded else ""
        raise refused(name, f"a {finite}number{bounds}", value)
    return float(number)


def _if(holds: Callable[[Any], bool], expected: str) -> Check:
    def check(name: str, value: object) -> object:
        if not holds(value):
            raise refused(name, expected, value)
        return value

    return check


def _of(kinds: type | tuple[type, ...], expected: str) -> Check:
    return _if(lambda value: isinstance(value, kinds), expected)


def _made_by(module: str, kind: str, expected: str) -> Check:
    return _if(lambda value: isinstance(value, getattr(import_module(module), kind)), expected)


def dense(name: str, value: object) -> Tensor:
    """Return ``value`` if it is a tensor of real numbers that has memory for each of them."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
        raise refused(name, "a dense tensor of real numbers", value)
    return value


def numbers(name: str, value: object) -> Tensor:
    """Return a list, an array or a tensor of real numbers as a dense tensor; what an array masks becomes NaN."""
    if isinstance(value, np.ma.MaskedArray) and value.dtype.kind in "biuf":
        value = np.ma.filled(value.astype(float), np.nan) if np.ma.is_masked(value) else np.asarray(value.data)
    if isinstance(value, np.ndarray) and (not value.flags.writeable or min(value.strides, default=0) < 0):
        value = value.copy()  # torch takes neither
    try:
        return dense(name, torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError, OverflowError, LookupError):  # the last one of a data frame in a list
        raise refused(name, "a list or a tensor of numbers", value) from None


def _numbers(name: str, value: object) -> object:
    numbers(name, value)
    return value


def _function(name: str, value: object) -> object:
    if not callable(value) or (isinstance(value, type) and not issubclass(value, torch.nn.Module)):
        raise refused(name, "a callable Pyro model" if name == "model" else "a function", value)
    return value


def widths(name: str, value: object) -> tuple[int, ...]:
    """Return hidden widths as a tuple of positive integers; an empty one is a linear map."""
    many: object = [value] if isinstance(value, (int, np.integer)) else value
    if not isinstance(many, (tuple, list)):
        raise refused(name, "a sequence of layer widths such as (32, 32)", value)
    return tuple(whole(name, width, WIDEST) for width in many)


def _names(name: str, value: object) -> object:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise refused(name, "a name, or a sequence of names", value)
    return value


OTHERS: dict[str, Check] = {
    "bool": lambda name, value: bool(_of((bool, np.bool_), "True or False")(name, value)),
    "str": _of(str, "a string"),
    "str | os.PathLike[str]": _of((str, os.PathLike), "a path"),
    "Callable[..., object]": _function,
    "Callable[..., object] | MCMC": _if(
        lambda value: callable(value) or hasattr(value, "get_samples"), "a guide, or an MCMC that has run"
    ),
    "FlowLike": _if(
        lambda value: isinstance(value, str) or callable(value), "a name, a Flow, a Bijection or a function"
    ),
    "Iterable[Bijection]": _of(Iterable, "bijections"),
    "Comparison": _made_by("pyro_flows.posterior.comparison.compare", "Comparison", "a Comparison of compare"),
    "Mapping[str, Sequence[str]]": _of(Mapping, "a mapping from names to names of axes"),
    "Sequence[Sequence[float]] | Tensor": _numbers,
    "Mapping[str, object]": _of(Mapping, "a mapping from names to values"),
    "Mapping[str, str | int]": _of(Mapping, "a mapping from names to values"),
    "Mapping[str, Tensor]": _of(Mapping, "a mapping from names to tensors"),
    "Transform": _of(Mapping, "a mapping from names to functions"),
    "str | Sequence[str]": _names,
    "Names": lambda name, value: value if value is None else _names(name, value),
    "Sequence[str]": _names,
    "Tensor": dense,
    "Sequence[float] | Tensor": _numbers,
    "Record": _made_by("pyro_flows.inference.record", "Record", "a Posterior"),
    "Bijection": _made_by("pyro_flows.transforms.base", "Bijection", "a transform of pyro_flows"),
}


def signature_of(model: Callable[..., object]) -> inspect.Signature:
    """Return the signature of a model: of a module it is that of ``forward``; that of its call has no names.

    Raises:
        TypeError, ValueError: if Python knows none.
    """
    own = inspect.unwrap(model, stop=lambda part: hasattr(part, "__signature__"))
    return inspect.signature(own.forward if isinstance(own, torch.nn.Module) else own)


def checks_of(function: Callable[..., object]) -> dict[str, Check]:
    """Return the checks of the parameters of a function, those that its annotations and the table tell."""
    found = dict[str, Check]()
    for name, one in inspect.signature(function).parameters.items():
        kind = str(one.annotation).replace("Any", "object")
        optional = kind.endswith(" | None")
        kind = kind.removesuffix(" | None")
        check = widths if (name, kind) == ("hidden", "Sequence[int]") else OTHERS.get(kind)
        if kind in ("int", "float"):
            bounds = RANGES.get(f"{function.__name__}.{name}", RANGES.get(name, Range()))
            check = partial(whole if kind == "int" else real, bounds=bounds)
        if check is not None and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            found[name] = partial(_or_default, check=check, default=None if optional else one.default)
    return found


def _or_default(name: str, value: object, *, check: Check, default: object) -> object:
    return value if value is default else check(name, value)
