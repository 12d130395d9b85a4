"""Models run on batches: without argument checks, past points where a factorization fails; gradients of batches."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from typing import TypeVar, cast

import pyro
import torch
from pyro.ops import special
from pyro.poutine import runtime
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor
from torch._C import _functorch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pyro_flows.model.faults import Faults, Undefined, is_of_a_point
from pyro_flows.support.numbers.tensors import filled, pull
from pyro_flows.support.process.fallbacks import Tried
from pyro_flows.support.process.seeding import BatchedDraws
from pyro_flows.support.process.threads import Disturbed, turn

Rows = TypeVar("Rows")  # a tensor, or a dict of tensors
Found = TypeVar("Found")  # likewise
Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., object])

BESIDE = (
    "Pyro: two threads use it at once, pyro_flows in one and other code in another. Its handlers belong to the whole "
    "process, so both may have got wrong numbers. Run one after the other, or in processes of their own."
)


class _SafeLog:
    """What stands for Pyro's function of this name, a logarithm whose slope is at most 1 / eps.

    Pyro's, in hidden Markov models and coalescents, is an ``autograd.Function`` that the transforms of ``torch.func``
    refuse.
    """

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        least = torch.finfo(x.dtype).eps
        straight = x.detach().log() + (x - x.detach()) / least
        return torch.where(x > least, x.clamp(min=least).log(), straight)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch validation off for a while: it branches on values, which neither vmap nor recording can do.

    Nor can they call Pyro's own logarithm: see :class:`_SafeLog`.
    """
    with turn(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because")  # vmap, in Pyro's samplers
        warnings.filterwarnings("ignore", message="Singular sample detected")  # torch's Wishart, which draws again
        before = special._SafeLog
        vars(special)["_SafeLog"] = _SafeLog
        try:
            yield
        finally:
            vars(special)["_SafeLog"] = before


def batch(function: Function) -> Function:
    """Return a function of one point as a function of many.

    Random numbers are the same at all of them: what is batched does not depend on any, though a model may draw some,
    as one does that makes a module with priors.
    """
    return cast(Function, torch.func.vmap(function, randomness="same"))


def over_rows(
    function: Callable[[Rows], Found],
    rows: Rows,
    *,
    batched: bool = True,
    randomness: str = "same",
    size: int | None = None,
    look: Callable[[], None] = lambda: None,
    otherwise: Callable[[Exception], object] | None = None,
) -> Found:
    """Apply a function of one row to all rows of a tensor or a dict of tensors, ``size`` at once, and stack what it
    returns.

    ``look`` is called before each piece. ``randomness`` is as in ``vmap``. Where that fails, ``otherwise`` is called
    with the error, and rows go one by one; without it, the error is raised.
    """
    count = len(tree_leaves(rows)[0])
    if batched:
        try:
            run = torch.func.vmap(function, randomness=randomness)
            with BatchedDraws() if randomness == "different" else nullcontext():
                return join((run(part) for part in pieces(rows, count if size is None else size, look)), count)
        except (torch.linalg.LinAlgError, NotImplementedError):
            raise  # of these points, and of a distribution without a sampler: no better one by one
        except RuntimeError as error:
            if otherwise is None:
                raise
            otherwise(error)
    return join((tree_map(lambda part: part[None], function(row)) for row in pieces(rows, None, look)), count)


def pieces(rows: Rows, size: int | None, look: Callable[[], None]) -> Iterator[Rows]:
    """Yield rows in pieces of ``size``, or one by one, without their axis, for None; ``look`` is called before each."""
    leaves, form = tree_flatten(rows)
    for parts in zip(*(leaf.unbind() if size is None else leaf.split(size) for leaf in leaves), strict=True):
        look()
        yield tree_unflatten(list(parts), form)


def advice(reason: str) -> str:
    """Say what it costs that a model cannot be batched for some reason, and what to change in it."""
    cost = "It is run draw by draw, which takes about as many times longer as there are draws (40 times, with 64)"
    for words, remedy in REMEDIES.items():
        if any(word in reason for word in words):
            return f"{cost}; {remedy}."
    return f"{cost}; write it with tensor operations that torch.func.vmap can batch."


REMEDIES = {
    ("data-dependent control flow",): "it takes a number out of a latent (.item(), float()) or branches on one: keep "
    "it a tensor, and write `if` as torch.where, or as a mixture",
    (".item()",): "it takes a number out of a latent (.item(), float()): keep it a tensor",
    ("in-place", "inplace"): "x[t] = ... writes into a tensor from outside of the model: make it in the model, or "
    "build a list and torch.stack it",
    ("numpy", "storage"): "it hands a latent to numpy: use the torch functions of the same name",
    ("dynamic shape",): "the shape of a value depends on a latent: use torch.where, or a mask, in place of an index",
    ("random operation",): "it draws random numbers: take them out of the model",
}


@contextmanager
def apart(*, inside: bool = False) -> Iterator[None]:
    """Run a model apart from a Pyro program that may be running around it: unseen by its handlers, and with all plate
    dimensions free. A plate around would move the model's own ones aside, and multiply its density.

    ``inside`` says that this is inside of a run of the same model. Then the handlers around are set aside, as it may be
    wrapped in one (``poutine.condition``), and Pyro lets no handler in twice.
    """
    with turn():
        dims, stack, inner = runtime._DIM_ALLOCATOR, runtime._PYRO_STACK, _Apart()
        taken, dims._stack = dims._stack, []
        around = [*stack]
        if inside:
            stack.clear()
        own = [*stack]
        try:
            with Tried(lambda error: inner.disturbed or own != stack) as tried, inner:
                yield
        finally:
            dims._stack = taken
            disturbed = inner.disturbed or own != stack
            if inside:
                stack[:] = around
        if disturbed:
            raise Disturbed(BESIDE) from tried.error


class _Apart(BlockMessenger):
    """Hides a model from the handlers around it, and tells whether another thread's sites come to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.disturbed, self._thread = False, threading.get_ident()

    def _process_message(self, msg: runtime.Message) -> None:
        if threading.get_ident() != self._thread:
            self.disturbed = True
            raise RuntimeError(BESIDE)
        super()._process_message(msg)


Note = Callable[[int, int, Exception | None], object]


def where_possible(
    function: Callable[[Tensor], tuple[Tensor, ...]],
    z: Tensor,
    *widths: tuple[int, ...],
    alone: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    halves: bool = True,
    note: Note = lambda points, undefined, error: None,
) -> tuple[Tensor, ...]:
    """Apply a function to the rows of ``z``, with NaN at rows where the model raises an error.

    ``widths`` are the shapes of its results at one row; the others are as in :func:`possible_pieces`.
    """
    found = list(possible_pieces(function, z, alone=alone, halves=halves, note=note))
    if len(found) == 1 and found[0][1] is not None:
        return found[0][1]
    nowhere = [z.new_full((1, *width), torch.nan) for width in widths]
    rows = [nowhere if part is None else part for _, part in found]
    return tuple(torch.cat([part.to(z) for part in parts]) for parts in zip(*rows, strict=True))


def possible_pieces(
    function: Callable[[Rows], Found],
    rows: Rows,
    *,
    alone: Callable[[Rows], Found] | None = None,
    halves: bool = True,
    instead: Callable[[Rows], Found | None] = lambda row: None,
    note: Note = lambda points, undefined, error: None,
) -> Iterator[tuple[int, Found | None]]:
    """Yield pieces of rows: how many, and the function of them; what is ``instead`` of it for one row where an error is
    raised.

    With ``halves`` the function is tried at all rows, and at halves of them where it fails; else at each row. ``alone``
    is the same function for one row without ``vmap``, which has errors of its own. ``note`` is told of each piece: its
    points, how many of them are undefined, and the error.
    """
    count, alone = len(tree_leaves(rows)[0]), function if alone is None else alone
    if halves:
        try:
            found = function(rows)
        except RuntimeError as error:
            if not is_of_a_point(error):
                raise
        else:
            note(count, 0, None)
            yield count, found
            return
    if count > 1:
        for part in pieces(rows, (count + 1) // 2 if halves else 1, lambda: None):
            yield from possible_pieces(function, part, alone=alone, halves=halves, instead=instead, note=note)
        return
    single: Found | None
    try:
        single = alone(rows)
        note(1, 0, None)
    except torch.linalg.LinAlgError as error:
        note(1, 1, error)
        single = instead(rows)
    yield 1, single


def filled_up(found: list[tuple[int, Found | None]], faults: Faults) -> Found:
    """Put pieces of rows together, with NaN (0 for whole numbers) where the model raised an error."""
    known = next((part for _, part in found if part is not None), None)
    if known is None:
        raise Undefined(faults.said or "no row")
    if len(found) == 1:
        return known
    leaves, form = tree_flatten(known)
    nowhere = [undefined(leaf[:1]) for leaf in leaves]
    rows = [nowhere if part is None else tree_flatten(part)[0] for _, part in found]
    return cast(Found, tree_unflatten([torch.cat(parts) for parts in zip(*rows, strict=True)], form))


def undefined(like: Tensor) -> Tensor:
    """Return NaN of the shape of a tensor, or 0 for whole numbers."""
    return torch.full_like(like, torch.nan if like.is_floating_point() else 0)


def redrawn(draw: Callable[[int], dict[str, Tensor]], draws: int) -> dict[str, Tensor]:
    """Return so many draws, each without NaN: those where the model raised an error are drawn again, a few times.

    Where all of them have NaN, it belongs to them.
    """
    found = draw(draws)
    for _ in range(10):
        floats = [value for value in found.values() if value.is_floating_point()]
        bad = torch.stack([value.reshape(draws, -1).isnan().any(1) for value in floats]).any(0) if floats else None
        if bad is None or not bool(bad.any()) or bool(bad.all()):
            break
        with suppress(torch.linalg.LinAlgError):
            more = draw(int(bad.sum()))
            found = {name: value.index_copy(0, bad.nonzero()[:, 0], more[name]) for name, value in found.items()}
    return found


def nearer(run: Callable[[float], Result]) -> Result:
    """Call ``run`` with 1, or with less where a factorization fails: sizes of a test point around zero."""
    for size in (1.0, 0.3):
        try:
            return run(size)
        except torch.linalg.LinAlgError:
            continue
    return run(0.1)


def join(parts: Iterable[Found], rows: int) -> Found:
    """Put pieces of ``rows`` rows in all, tensors or dicts of tensors, one after the other.

    Without autograd they are copied as they come, so that results never take twice their memory. Pieces that differ in
    more than their number of rows are an error.
    """
    left = iter(parts)
    first, form = tree_flatten(next(left))
    every = chain([first], map(tree_leaves, left))
    if any(part.requires_grad for part in first):
        return tree_unflatten([torch.cat(column) for column in zip(*every, strict=True)], form)
    whole = [part.new_empty(rows, *part.shape[1:]) for part in first]
    done = 0
    for piece in every:
        for part, to in zip(piece, whole, strict=True):
            if part.shape[1:] != to.shape[1:] or part.dtype != to.dtype:
                raise RuntimeError(f"{part.shape[1:]}, {part.dtype} after {to.shape[1:]}, {to.dtype} in one batch")
            to[done : done + len(part)] = part
        done += max(map(len, piece), default=0)
    return tree_unflatten(whole, form)


# gradients and Hessians of a function of one point, for many points at once, by autograd around `vmap` ----------------

# ``torch.func.grad`` gives the same numbers, but imports torch's compiler at its first call (0.6 s), and writes down
# what second derivatives would need, which takes as long as the gradient itself.


def values_and_grads(function: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (S,) of a function of one point, and its gradients (S, D), at ``points`` (S, D)."""
    if _functorch.peek_interpreter_stack() is not None:  # a transform around this one would not let autograd through
        grads, values = batch(torch.func.grad_and_value(function))(points)
        return values, grads
    return batch_and_grads(batch(function), points)


def batch_and_grads(whole: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for a function of all points (S, D) to their values (S,), each of which is of its point only."""
    values, leaf = _values(whole, points)
    (grads,) = pull(values, torch.ones_like(values), [leaf])
    return values.detach(), grads


def hessians(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the second derivatives (K, D, D) of a function of one point at ``points`` (K, D).

    A RuntimeError says that an operation cannot be differentiated twice, or not for many directions at once.
    """
    return batch_hessians(batch(function), points)


def batch_hessians(whole: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the same for a function of all points (K, D) to their values (K,)."""
    row, units = _rows(whole, points)
    with filled():
        return torch.func.vmap(row)(units).transpose(0, 1)


def hessian_diagonals(function: Callable[[Tensor], Tensor], points: Tensor, *, chunk: int) -> Tensor:
    """Return the diagonals (K, D) of the same, with ``chunk`` rows in memory at a time."""
    row, units = _rows(batch(function), points)
    with filled():
        return torch.func.vmap(lambda unit: torch.where(unit != 0.0, row(unit), 0.0).sum(1), chunk_size=chunk)(units).mT


def _rows(whole: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return what gives a row of each Hessian (K, D) for a unit vector (1, D), and these vectors (D, 1, D)."""
    values, leaf = _values(whole, points)
    with torch.enable_grad():
        (grads,) = pull(values, torch.ones_like(values), [leaf], further=True)
    units = torch.eye(leaf.shape[1], dtype=grads.dtype, device=grads.device)[:, None]
    return lambda unit: pull(grads, unit.expand(leaf.shape), [leaf], retain_graph=True)[0], units


def _values(whole: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (S,) with a graph that leads to the points, and the points as its leaf."""
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        values = whole(leaf)
    if values.shape != points.shape[:1]:
        raise RuntimeError(f"expected one number for each point, got shape {tuple(values.shape[1:])}")
    return values, leaf
