"""Points at which a model raises an error, or a matrix has no factor: there the log density is -inf, as a note says."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from pyro import poutine
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from pyro_flows.support.numbers.tensors import Args, Function, Kwargs
from pyro_flows.support.process.fallbacks import Tried, first_line
from pyro_flows.support.process.warnings import HERE

Result = TypeVar("Result")

OF_MACHINERY = (HERE, *(f"{folder}{os.sep}" for folder in (*torch.__path__, *poutine.__path__)))  # no model's lines
OF_POINTS = (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError)  # that values of latents cause


class Undefined(torch.linalg.LinAlgError):
    """The model raised an error at a point. It is handled as torch's own error of a matrix without a factor is."""


class Refused(ValueError):
    """A model that cannot be fitted, which is found out at a point."""


class Subsampled(Refused):
    """A model that reads a part of its data at each run, so that its log density is random."""


OF_CODE = (NotImplementedError, RecursionError, Refused, torch.OutOfMemoryError)  # that are among these, too


def is_about_dtypes(error: BaseException) -> bool:
    """Whether an operation took no numbers of two precisions."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.linalg.LinAlgError):
        return False
    return "dtype" in str(error) or "scalar type" in str(error)


def is_of_a_point(error: BaseException) -> bool:
    """Whether the values of latents may be what an error comes from; a misspelt name, say, is no such error.

    Inside of ``vmap`` a RuntimeError says as a rule that the model cannot be batched, unless it is about a matrix.
    """
    if isinstance(error, OF_CODE) or not isinstance(error, OF_POINTS) or is_about_dtypes(error):
        return False
    batched = _functorch.peek_interpreter_stack() is not None
    return isinstance(error, torch.linalg.LinAlgError) or not (batched and isinstance(error, RuntimeError))


@contextmanager
def defined(place: Callable[[], str]) -> Iterator[None]:
    """Raise :class:`Undefined` for errors of a point inside; ``place`` says where in the model it is."""
    with Tried(lambda error: is_of_a_point(error) and not isinstance(error, Undefined)) as tried:
        yield
    if tried.error is not None:
        raise Undefined(f"{place()}: {first_line(tried.error)}") from tried.error


at_a_point = partial(Tried, is_of_a_point)  # a context that keeps errors of a point
# one that leaves what is inside at an error of a point: the points are looked at one by one after it
passing_over = partial(Tried, lambda error: isinstance(error, RuntimeError) and is_of_a_point(error))


def place_of(last: str | None, order: Sequence[str]) -> str:
    """Say where a model was that had come to the site ``last``; ``order`` are the sites of a run without an error."""
    following = order[order.index(last) + 1 :] if last in order else order if last is None else ()
    if following:
        return f"in or before site {following[0]!r}"
    return "in the model" if last is None else f"after site {last!r}"


def line_of(error: BaseException) -> str:
    """Quote the last line that an error passed through outside of torch, Pyro's handlers and this package, if any.

    That is a line of the model, or of a library that it calls.
    """
    frames = traceback.extract_tb(error.__traceback__)
    passed = [frame for frame in frames if not frame.filename.startswith(OF_MACHINERY)]
    if not passed:
        return ""
    code = f": `{passed[-1].line}`" if passed[-1].line else ""  # of a model in a string there is none
    return f" ({Path(passed[-1].filename).name}, line {passed[-1].lineno}{code})"


LOOKS = 3  # at points where a recorded graph gives NaN
SIZES = 1.0, 0.3, 0.03, 0.001  # of the way from the first run to a draw of the prior, where a model is tried


def where_it_runs(
    run: Callable[[Tensor], Result],
    points: Callable[[float], Tensor],
    count: int = 1,
    *,
    good: Callable[[Result], bool] = lambda found: True,
    note: Callable[[Exception], object] = lambda error: None,
) -> list[Result]:
    """Return what ``run`` returns at so many points, or fewer, where it raises no error: ``good`` results, if any.

    ``points`` of a size are two, see :meth:`~pyro_flows.model.sites.Structure.points`; ``note`` is told of errors.
    """
    found, others = list[Result](), list[Result]()
    for point in (point for size in SIZES for point in points(size)):
        with at_a_point() as tried:
            result = run(point)
        if tried.error is not None:
            note(tried.error)
            continue
        (found if good(result) else others).append(result)
        if len(found) == count:
            break
    return [*found, *others][:count]


class Faults:
    """Counts the points at which a log density was not defined."""

    def __init__(self) -> None:
        self.points = self.undefined = 0  # that were looked at, and those among them
        self.looks = LOOKS  # still to be made, where a graph gives NaN, whether the model raises an error there
        self.said: str | None = None  # the first error of the model, and where it was raised

    def add(self, points: int, undefined: int, error: BaseException | None = None) -> None:
        """Add so many points, and the error that the model raised at one of them."""
        self.points += points
        self.undefined += undefined
        if self.said is None and error is not None:
            self.said, self.looks = str(error) if isinstance(error, Undefined) else first_line(error), 0

    def notes(self) -> tuple[str, ...]:
        """Return the sentence for a verdict, if the model raised an error."""
        if self.said is None:
            return ()
        return (
            f"the model raised an error at {self.undefined} of {self.points} points, {self.said}; "
            "these count as log density -inf",
        )


# factorizations -------------------------------------------------------------------------------------------------------

_CHOLESKY = (torch.linalg.cholesky, torch.cholesky, torch.Tensor.cholesky)


class Factorizations(TorchFunctionMode):
    """While it is entered, matrices that are not positive definite have factors of NaN; ``met`` tells whether there
    were any.

    torch raises an error for a whole batch if one matrix of it has no factor. Then whoever evaluates a model at many
    points has to look for that point, half by half.

    >>> import torch
    >>> with Factorizations():
    ...     torch.linalg.cholesky(torch.tensor([[[4.0]], [[-1.0]]])).flatten().tolist()
    [2.0, nan]
    """

    def __init__(self, *, strict: bool = False) -> None:
        """``strict`` leaves the error as it is, and only looks."""
        super().__init__()
        self.strict, self.met = strict, False

    def __torch_function__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        met = func in _CHOLESKY
        self.met = self.met or met
        run: Function = _factor if met and not self.strict else func
        return run(*args, **(kwargs or {}))


def _factor(matrix: Tensor, upper: bool = False) -> Tensor:
    factor, fault = torch.linalg.cholesky_ex(matrix, upper=upper)
    return factor * torch.where(fault > 0, torch.nan, 1.0).to(factor.dtype)[..., None, None]  # NaN gradients, too
