"""The sentences of all shape and value errors: expected, got, remedy."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from pyro_flows.support.arguments import MOST_COORDINATES, POSITIVE, SECONDS, Range, checks_of, dense, real, whole

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def options(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of the user's that checks its arguments before any work.

    An unknown keyword lists the options and suggests one. A value of a wrong type or out of its range is refused by the
    table in ``support/arguments.py``.

    >>> @options
    ... def run(*, draws: int = 9):
    ...     pass
    >>> run(draw=1)
    Traceback (most recent call last):
    TypeError: run: no option 'draw'. Did you mean 'draws'? Options: draws.
    >>> run(draws=0)
    Traceback (most recent call last):
    ValueError: draws: expected an integer >= 1, got 0.
    """
    found = inspect.signature(function).parameters
    kinds = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [name for name, one in found.items() if one.kind in kinds and name not in ("self", "cls")]
    others = any(one.kind is one.VAR_KEYWORD for one in found.values())
    said = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    known = [
        name for name in named if found[name].kind is kinds[0] or found[name].default is not inspect.Parameter.empty
    ]
    data = " Data go by position, or in model_kwargs={...}." if "model_kwargs" in named else ""
    checks = checks_of(function)
    places = [name for name, one in found.items() if one.kind is kinds[1]]

    plain = cast("Callable[..., R]", function)

    def checked(name: str, value: object) -> object:
        return checks[name](name, value) if name in checks else value

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in named and not others:
                near = difflib.get_close_matches(name, sorted(named), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{said}: no option {name!r}.{hint} Options: {', '.join(known) or 'none'}.{data}")
        given = [checked(name, value) for name, value in zip(places, args, strict=False)]
        return plain(*given, *args[len(given) :], **{name: checked(name, value) for name, value in kwargs.items()})

    vars(call)["checks"] = checks
    return call


def constructor(owner: type[T]) -> type[T]:
    """Apply :func:`options` to how an object of a class is made."""
    owner.__init__ = options(owner.__init__)  # type: ignore[method-assign]
    return owner


def methods(owner: type[T]) -> type[T]:
    """Apply :func:`options` to the public methods of a class that take options, those of the class too."""
    for name, found in list(vars(owner).items()):
        of_class = isinstance(found, classmethod)
        method = found.__func__ if of_class else found
        if inspect.isfunction(method) and not name.startswith("_") and len(inspect.signature(method).parameters) > 1:
            setattr(owner, name, classmethod(options(method)) if of_class else options(method))
    return owner


def integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an int of at least ``minimum``, or say what is wrong with it."""
    return whole(name, value, Range(minimum, math.inf if maximum is None else maximum))


def seconds(name: str, value: object) -> float:
    """Return a bound on a time as a float above zero; infinity is none."""
    return real(name, value, SECONDS)


def positive(name: str, value: object) -> float:
    """Return ``value`` as a finite float above zero."""
    return real(name, value, POSITIVE)


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; suggest the nearest one otherwise."""
    options = sorted(choices)
    if isinstance(value, str) and value in options:
        return value
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}.{hint}")


def size(name: str, value: object) -> int | tuple[int, ...]:
    """Return a number of coordinates as it is, or the shape (C, T) of a signal or (C, H, W) of an image as a tuple."""
    return integer(name, value, 1, MOST_COORDINATES) if isinstance(value, int) else grid(name, value, "an integer or ")


def grid(name: str, value: object, other: str = "") -> tuple[int, ...]:
    """Return the shape (C, T) of a signal or (C, H, W) of an image as a tuple."""
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        shapes = f"{other}the shape (C, T) of a signal or (C, H, W) of an image"
        raise ValueError(f"{name}: expected {shapes}, got {value!r}.")
    shape = tuple(integer(name, side, 1, MOST_COORDINATES) for side in value)
    integer(f"{name}, coordinates in all", math.prod(shape), 1, MOST_COORDINATES)
    return shape


def image(name: str, value: object) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of an image as a tuple."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise ValueError(f"{name}: expected the shape (C, H, W) of an image, got {value!r}.")
    channels, height, width = grid(name, value)
    return channels, height, width


def divisor(name: str, value: object, *numbers: int) -> int:
    """Return ``value`` as an int that divides all of these numbers."""
    found = integer(name, value, 1)
    if any(number % found for number in numbers):
        raise ValueError(f"{name}: expected a divisor of {' and of '.join(map(str, numbers))}, got {value!r}.")
    return found


def event(owner: str, x: Tensor, dim: int | tuple[int, ...]) -> None:
    """Check that the last axis of ``x`` has ``dim`` entries, or its last axes the shape ``dim``."""
    shape = (dim,) if isinstance(dim, int) else dim
    if dense(owner, x).dtype == torch.bool:
        raise ValueError(f"{owner}: expected floating-point numbers, got booleans. Convert them first.")
    if x.shape[-len(shape) :] != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{owner}: expected a tensor of shape (..., {expected}), got {tuple(x.shape)}.")


def context(owner: str, value: Tensor | None, context_dim: int) -> None:
    """Check that a context is there exactly if one is expected, with the right width."""
    if value is not None:
        dense(f"{owner}, context", value)
    if context_dim == 0:
        if value is not None:
            raise ValueError(f"{owner}: takes no context (context_dim=0), got one of shape {tuple(value.shape)}.")
    elif value is None:
        raise ValueError(
            f"{owner}: expected a context of shape (..., {context_dim}), got none. "
            "Pass one, or bind it with condition(context)."
        )
    elif value.dim() < 1 or value.shape[-1] != context_dim:
        raise ValueError(f"{owner}: expected a context of shape (..., {context_dim}), got {tuple(value.shape)}.")


def floating(name: str, value: Tensor, like: Tensor | torch.dtype) -> Tensor:
    """Return floating-point numbers; whole ones, and those of less precision, in ``like``'s dtype, which holds them."""
    dtype = like if isinstance(like, torch.dtype) else like.dtype
    if not (isinstance(value, Tensor) and value.is_complex()) and dense(name, value).is_floating_point():
        narrow = value.dtype != dtype and torch.finfo(value.dtype).eps > torch.finfo(dtype).eps
        return value.to(dtype) if narrow else value
    limit = int(2 / torch.finfo(dtype).eps)  # up to which all whole numbers are there
    if value.is_complex() or (value.numel() and int(value.to(torch.int64).abs().max()) > limit):
        raise ValueError(
            f"{name}: expected real numbers of dtype {dtype} (or whole ones up to {limit}, which it holds exactly), "
            f"got {value.dtype}. Convert them first."
        )
    return value.to(dtype)


def vector(name: str, value: object, dim: int) -> Tensor:
    """Return ``value`` as a finite tensor of shape ``(dim,)``."""
    tensor = torch.as_tensor(value)
    if tensor.shape != (dim,) or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: expected {dim} finite numbers, got shape {tuple(tensor.shape)}: {value!r}.")
    return tensor
