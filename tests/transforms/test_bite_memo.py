"""The checks of the memo: each deliberate bug in it is caught by the function that the tests use."""

import pytest

import pyro_flows as pf
from pyro_flows.flows import flow as flows
from tests.registry import SMALL, make_flow
from tests.state_invariants import (
    EDITS,
    check_evaluations,
    check_memo_has_gradients,
    check_memo_is_fresh,
    check_memo_is_spent,
    check_memo_saves_a_pass,
)


class NoMemo(pf.transforms.Bound):
    def _keep(self, *_, **__):
        self._memo = None


class NotSpent(pf.transforms.Bound):
    def log_abs_det_jacobian(self, x, y):
        memo = self._recall(x, y)
        return super().log_abs_det_jacobian(x, y) if memo is None else memo.ladj


class PointNotSpent(pf.transforms.Bound):
    def _inverse(self, y):
        memo = self._recall(None, y)
        if memo is not None:
            return memo.x
        return super()._inverse(y)


class VersionsIgnored(pf.transforms.Bound):
    def _state(self, *tensors):
        return tuple((id(tensor), 0, tensor.requires_grad) for tensor in tensors)


class GradientsIgnored(pf.transforms.Bound):
    def _state(self, *tensors):
        return tuple((first, version, False) for first, version, _ in super()._state(*tensors))


class ModeIgnored(pf.transforms.Bound):
    def _keep(self, x, y, ladj, *, point):
        super()._keep(x, y, ladj, point=point)
        self._memo = self._memo._replace(grad=True)

    def _state(self, *tensors):
        return tuple((first, version, False) for first, version, _ in super()._state(*tensors))


def mixed(kind):
    case = next(case for case in SMALL if case.name == "Compose-3-context")
    x, context = case.inputs(4)
    return kind(case.make(), context), x


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (NoMemo, check_memo_saves_a_pass),
        (NotSpent, check_memo_is_spent),
        (PointNotSpent, check_memo_is_spent),
        (GradientsIgnored, check_memo_has_gradients),
        (ModeIgnored, check_memo_has_gradients),
        *((VersionsIgnored, lambda bound, x, edit=edit: check_memo_is_fresh(bound, x, edit)) for edit in EDITS),
    ],
)
def test_a_bug_in_the_memo_is_caught(wrong, check):
    check(*mixed(pf.transforms.Bound))
    with pytest.raises((AssertionError, RuntimeError)):  # RuntimeError: a graph that was freed
        check(*mixed(wrong))


def test_a_flow_without_the_memo_is_caught(monkeypatch):
    flow = make_flow("realnvp", 2)

    def work():
        distribution = flow()
        distribution.log_prob(distribution.rsample((3,)))

    check_evaluations(flow, work)
    monkeypatch.setattr(flows, "Bound", NoMemo)
    with pytest.raises(AssertionError, match="expected 1 evaluation"):
        check_evaluations(flow, work)
