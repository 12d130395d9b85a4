"""The state of a training run and its single steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.training.flow_graphs import gradient_of
from pyro_flows.inference.training.objectives import BasePoints, elbo, pulled
from pyro_flows.inference.training.step_graph import Moments, Step, advance
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.fallbacks import Tried, fallback, first_line
from pyro_flows.support.thresholds import ESS_SHARE_PROMISING

BLEND = 0.5
DEFENSIVE = 0.3
LOOK_EVERY = 10  # steps between two looks at what they have come to, since a look makes a GPU wait
PLAIN = ("learning_rate", "evaluation", "_recordable", "_blend", "_careful", "_skips_seen")  # that steps change


class Trainer:
    """Adam on the flow's parameters (and the model's, with ``extra``), one state for all stages of a run.

    The parameters live in one vector here, and each step is arithmetic on it; :meth:`write` hands them to the flow.
    Nothing in a step waits for a result, so that a GPU is kept busy. Gradients are clipped at five times their running
    norm; steps whose gradient is not finite are skipped and counted. Recorded steps after them leave out draws at which
    the flow or the density is not finite, until there are none.
    """

    def __init__(
        self,
        flow: Flow,
        density: LogDensity,
        *,
        learning_rate: float,
        batch: int,
        extra: Sequence[Tensor] = (),
    ) -> None:
        self.flow, self.density, self.batch, self.learning_rate = flow, density, batch, learning_rate
        self.extra = list(extra)
        self.parameters = [*(part for part in flow.parameters() if part.requires_grad), *self.extra]
        self.weights = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        ends = self.weights.split([parameter.numel() for parameter in self.parameters])
        self._views = [part.view(parameter.shape) for part, parameter in zip(ends, self.parameters, strict=True)]
        self._points = BasePoints(flow)
        self._drawn: list[tuple[Tensor, Tensor]] = []
        self._step: Step | None = None
        self._to_record = False  # the step that there was where the training was broken off
        self._recordable = not self.extra
        self.evaluation = "eager"
        self.moments = Moments.fresh(self.weights)
        self._losses: list[float] = []
        self._pending: list[Tensor] = []
        self._blend, self._careful, self._skips_seen = 0.0, False, 0
        self._left_out = torch.zeros((), dtype=torch.long, device=self.weights.device)

    # state ----------------------------------------------------------------------------------------------------------

    @property
    def losses(self) -> list[float]:
        """The negative ELBO of each step so far."""
        if self._pending:
            self._losses += torch.stack(self._pending).tolist()
            self._pending = []
        return self._losses

    @property
    def skipped(self) -> int:
        """How many steps had a gradient that is not finite."""
        return int(self.moments.skipped)

    def write(self) -> None:
        """Hand the parameters to the flow (and the model)."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self._views)

    def keep(self) -> Tensor:
        """Return a copy of all parameters."""
        return self.weights.clone()

    def assign(self, kept: Tensor) -> None:
        """Take parameters from a copy."""
        self.weights.copy_(kept)
        self.write()

    def restore(self, kept: Tensor) -> None:
        """Go back to a copy, forget the optimizer's moments and halve the step size."""
        self.assign(kept)
        self.learning_rate *= 0.5
        self.moments = self.moments.forget()

    def state(self) -> dict[str, Any]:
        """Return all that steps change, so that they may go on elsewhere to the last digit."""
        return {
            "weights": self.weights,
            "moments": self.moments,
            "left_out": self._left_out,
            "drawn": self._drawn,
            "losses": self.losses,
            "recorded": self._step is not None,
            "plain": {name: getattr(self, name) for name in PLAIN},
        }

    def put_back(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned; the step is recorded again once there is another one."""
        self.moments = Moments(*state["moments"])
        self._losses, self._pending, self._left_out = list(state["losses"]), [], state["left_out"]
        self._drawn = [(x, ratio) for x, ratio in state["drawn"]]
        vars(self).update(state["plain"])
        self._to_record = state["recorded"]
        self.assign(state["weights"])

    # steps ----------------------------------------------------------------------------------------------------------

    def step(self, learning_rate: float) -> None:
        """Take one step, or find out that the time is over."""
        self.density.clock.look()
        if self.extra:
            self._advance(*self._elbo(), learning_rate)
            return
        if self._to_record:
            self._record_again()
        if not self._drawn:
            self._look()
        x, log_importance_ratio = self._drawn.pop()
        if self._step is None:
            self._advance(*self._path(x, log_importance_ratio), learning_rate)
            return
        if self._careful:
            possible = self._step.possible(x)
            self._left_out += torch.logical_not(possible).sum()
            x = torch.where(possible[:, None], x, 0.0)
            log_importance_ratio = torch.where(possible, log_importance_ratio, -torch.inf)
        options = (learning_rate, self._blend)
        loss, weights, self.moments = self._step(self.weights, self.moments, x, log_importance_ratio, *options)
        self.weights.copy_(weights)
        self._pending.append(loss)

    def _look(self) -> None:
        """See what the steps have come to, and draw the base points of the next ones."""
        done, skipped = len(self._losses) + len(self._pending), self.skipped
        self._blend = BLEND if float(self.moments.ess) > ESS_SHARE_PROMISING else 0.0
        self._careful = skipped > self._skips_seen or bool(self._left_out)
        self._skips_seen = skipped
        self._left_out.zero_()
        if self._recordable and done:  # a run up to the first look would not pay for it
            self._record()
        x, log_importance_ratio = self._points(LOOK_EVERY * self.batch, DEFENSIVE if self._blend else 0.0)
        self._drawn = list(zip(x.split(self.batch), log_importance_ratio.split(self.batch), strict=True))

    @torch.no_grad()
    def _advance(self, gradient: Tensor, terms: Tensor, log_weights: Tensor, learning_rate: float) -> None:
        state = (self.weights, self.moments, gradient, terms, log_weights, learning_rate)
        loss, weights, self.moments = advance(*state)
        self.weights.copy_(weights)
        self._pending.append(loss)

    def _path(self, x: Tensor, log_importance_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the path gradient by autograd, the ELBO's terms and the log weights."""
        self.write()
        z, log_q, score_q = self.flow.sample_with_score(at=x)
        log_p, score_p = self.density.value_and_grad(z)
        pull, terms, log_weights = pulled(log_p, score_p, log_q, score_q, log_importance_ratio, forward=self._blend)
        return gradient_of((pull * z).sum(), self.parameters), terms, log_weights

    def _elbo(self) -> tuple[Tensor, Tensor, Tensor]:
        self.write()
        estimate = elbo(self.flow, self.density, self.batch)
        return gradient_of(estimate.loss, self.parameters), estimate.terms, estimate.log_weights

    def _record_again(self) -> None:
        """Record the step where the training goes on elsewhere; what that changes besides was changed before."""
        self._to_record, faults = False, dict(vars(self.density.faults))
        with torch.random.fork_rng(devices=[]):
            self._record()
        vars(self.density.faults).update(faults)

    def _record(self) -> None:
        self._recordable = False
        like = self.weights.new_zeros(self.batch, self.flow.dim)
        self.write()
        with Tried() as tried, self.density.clock.watching():  # a layer's own code may raise anything
            self._step = Step(self.flow, self.density, like, self.weights, self._views)
        self.evaluation = "recorded" if tried.error is None else f"eager: {first_line(tried.error)}"
        if tried.error is not None:
            fallback("trained by autograd", tried.error)
