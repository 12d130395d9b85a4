"""What a map keeps, forgets and answers twice, as functions that raise AssertionError; see ``invariants``."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.transforms.networks import Free, Network
from tests.invariants import close


def snapshot(module: nn.Module) -> tuple[dict, dict]:
    """All attributes of all submodules, by identity, and the values and versions of the tensors."""
    held = {
        (name, key): dict(value) if isinstance(value, dict) else value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
    }
    tensors = {key: (value.clone(), value._version) for key, value in module.state_dict(keep_vars=True).items()}
    return held, tensors


def check_unchanged(module: nn.Module, before: tuple[dict, dict]) -> None:
    """Nothing was added, removed, replaced or edited since the snapshot."""
    held, tensors = snapshot(module)
    assert held.keys() == before[0].keys(), "attributes came or went"
    for key, value in held.items():
        old = before[0][key]
        if isinstance(value, dict):
            assert value.keys() == old.keys(), f"{key}: entries came or went"
            assert all(value[entry] is old[entry] for entry in value), f"{key}: an entry was replaced"
        else:
            assert value is old, f"{key}: replaced"
    for key, (value, version) in tensors.items():
        assert version == before[1][key][1], f"{key}: edited"
        close(value, before[1][key][0], 0.0, key)


def check_pure(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None) -> None:
    """No pass in any direction leaves anything on the module."""
    before = snapshot(t)
    y, _ = t.forward_and_ladj(x, context)
    t.inverse_and_ladj(x, context)
    t.forward_and_score(x, torch.ones_like(x), context)
    bound = t.condition(context)
    bound.log_abs_det_jacobian(x, bound(x))
    bound.inv(y.detach())
    bound.inv(bound(x))
    assert t.inv.inv == t
    check_unchanged(t, before)


def check_follows_parameters(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None) -> None:
    """After an edit of every parameter, and after a step of an optimizer, the map is the new one; through Bound too."""
    parameters = list(t.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05 if t.event_dim == 1 else 0.001)  # images have far larger gradients
    bound = t.condition(context)

    def edit() -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.1).add_(0.01)

    def step() -> None:
        optimizer.zero_grad()
        y, ladj = t.forward_and_ladj(x, context)
        (y.square().sum() - ladj.sum()).backward()
        optimizer.step()

    for change in (edit, step):
        y = bound(x)
        point = y.detach()
        bound.inv(point)
        change()
        ladj, again, back = bound.log_abs_det_jacobian(x, y), bound(x), bound.inv(point)
        fresh = copy.deepcopy(t)
        close(again, fresh.forward_and_ladj(x, context)[0], 0.0, f"value after {change.__name__}")
        close(ladj, fresh.forward_and_ladj(x, context)[1], 0.0, f"ladj after {change.__name__}")
        close(back, fresh.inverse_and_ladj(point, context)[0], 0.0, f"inverse after {change.__name__}")
        assert not torch.equal(again, y), f"the map did not change after {change.__name__}"


def copies(module: nn.Module, fresh: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module by deepcopy, pickle, torch.save, and by its ``state_dict`` through a file into a fresh one."""
    yield "deepcopy", copy.deepcopy(module)
    yield "pickle", pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield "torch.save", torch.load(buffer, weights_only=False)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    yield "state_dict", fresh


@contextmanager
def evaluations(module: nn.Module) -> Iterator[Counter]:
    """Count how often each layer's source of parameters (network or free numbers) is evaluated."""
    counts: Counter = Counter()
    sources = [(name, part) for name, part in module.named_modules() if isinstance(part, (Free, Network))]
    counts.update({name: 0 for name, _ in sources})
    hooks = [part.register_forward_hook(lambda *_, name=name: counts.update([name])) for name, part in sources]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def check_evaluations(module: nn.Module, work: Callable[[], object], expected: int = 1) -> None:
    """``work`` evaluates each layer's source of parameters exactly ``expected`` times."""
    with evaluations(module) as counts:
        work()
    assert counts, "nothing to count"
    assert set(counts.values()) == {expected}, f"expected {expected} evaluation(s) of each layer, got {dict(counts)}"


def check_memo_saves_a_pass(bound: pf.transforms.Bound, x: Tensor) -> None:
    """Map, way back and log-determinant of one point cost one evaluation, and so do inverse and log-determinant."""
    y, ladj = bound.bijection.forward_and_ladj(x, bound.context)

    def sample_and_score() -> None:
        there = bound(x)
        assert bound.inv(there) is x
        close(bound.log_abs_det_jacobian(x, there), ladj, 0.0)

    def score() -> None:
        back = bound.inv(y)
        close(bound.log_abs_det_jacobian(back, y), ladj, 1e-7)

    check_evaluations(bound.bijection, sample_and_score)
    check_evaluations(bound.bijection, score)


def check_memo_is_spent(bound: pf.transforms.Bound, x: Tensor) -> None:
    """Each answer is given once: to read it again, or to invert again, is a pass of its own, with its own graph."""
    y = bound(x)
    first = bound.log_abs_det_jacobian(x, y)
    check_evaluations(bound.bijection, lambda: bound.log_abs_det_jacobian(x, y))
    assert bound.log_abs_det_jacobian(x, y) is not first
    data = y.detach()
    for _ in range(2):
        back = bound.inv(data)
        back.sum().backward()  # a graph handed out twice would raise here
    there = bound(x)
    assert bound.inv(there) is x
    check_evaluations(bound.bijection, lambda: bound.inv(there))


EDITS: dict[str, Callable[[pf.transforms.Bound, Tensor, Tensor], object]] = {
    "x": lambda bound, x, y: x.add_(0.5),
    "y": lambda bound, x, y: y.detach().add_(0.5),
    "one parameter": lambda bound, x, y: next(bound.bijection.parameters()).add_(0.5),
    "last parameter": lambda bound, x, y: list(bound.bijection.parameters())[-1].mul_(1.5),
    "context": lambda bound, x, y: bound.context.add_(0.5),
    "a buffer": lambda bound, x, y: dict(bound.bijection.named_buffers())["layers.6.scale_tril"].mul_(2.0),
}


def check_memo_is_fresh(bound: pf.transforms.Bound, x: Tensor, edit: str) -> None:
    """After an edit in place, log-determinant and inverse are those of the edited tensors."""
    for forward, inverse_first in itertools.product((True, False), repeat=2):
        point = x.clone()
        y = bound(point)
        if not forward:
            y = y.detach()
            point = bound.inv(y)
        with torch.no_grad():
            EDITS[edit](bound, point, y)
        back = bound.inv(y) if inverse_first else None  # who asks first gets what the memo holds
        ladj = bound.log_abs_det_jacobian(point, y)
        back = bound.inv(y) if back is None else back
        close(ladj, bound.bijection.forward_and_ladj(point, bound.context)[1], 0.0, f"ladj after an edit of {edit}")
        close(back, bound.bijection.inverse_and_ladj(y, bound.context)[0], 0.0, f"inverse after an edit of {edit}")


def check_memo_has_gradients(bound: pf.transforms.Bound, x: Tensor) -> None:
    """A pass without gradients never answers where they are wanted: under no_grad, of frozen or of detached tensors."""
    parameters = list(bound.bijection.parameters())
    with torch.no_grad():
        y = bound(x)
    assert bound.log_abs_det_jacobian(x, y).requires_grad, "answered from a pass under no_grad"
    with torch.no_grad():
        y = bound(x)
    assert bound.inv(y).requires_grad, "inverted from a pass under no_grad"
    for parameter in parameters:
        parameter.requires_grad_(False)
    y = bound(x)
    for parameter in parameters:
        parameter.requires_grad_(True)
    assert bound.log_abs_det_jacobian(x, y).requires_grad, "answered from a pass with frozen parameters"
    for parameter in parameters:
        parameter.requires_grad_(False)
    y = bound(x).requires_grad_()
    back = bound.inv(y)
    assert back.requires_grad, "inverted from a pass in which y needed no gradient"
    for parameter in parameters:
        parameter.requires_grad_(True)
