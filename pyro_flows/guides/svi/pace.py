"""How far the steps of an optimizer move a flow: one factor, learned while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.transforms.networks import Paced

BEFORE = 0.1  # the factor of the first step: a learning rate of .1 is the largest that is usual
FIRST = 0.01  # how far the first step moves the parameter that it moves farthest: a usual learning rate
KAPPA = 0.05  # change of the log factor for a step as good as usual
MEMORY = 0.95  # of the mean square of gains
MOST = 2.0  # times the usual gain: what counts; times the step that set the unit: what sets it anew


class Pace:
    r"""A factor :math:`\gamma` between what an optimizer moves, u, and a flow's parameters :math:`\theta = \gamma u`.

    .. math:: \log \gamma_{t+1} = \log \gamma_t + \kappa \frac{h_t}{\sqrt{\overline{h^2}}}, \qquad
              h_t = - g_t^\top (\theta_t - \theta_{t-1})

    g is the gradient of the loss by :math:`\theta`. While the gradient after a step still points along the step, steps
    become longer; when it points back, they were too long and become shorter. Near the optimum the noise of gradients
    points back on average, so that steps become short at the end without a schedule. The first step sets the unit: the
    parameter that it moved farthest has moved by 0.01. So the optimizer's learning rate has next to no effect. What
    lowers it during training has. A step that is more than twice as long as the one that set the unit, as while a
    learning rate warms up, sets it anew: it becomes as long as that one would be by now.

    The factor is the gain of the flow's layers (:class:`Paced`), and goes with its parameters. When it changes, u does
    too, and the map stays as it is. The optimizer gets g, whose scale does not depend on the factor. Parameters of
    layers that have no gain, such as those of a user's own bijection, are the optimizer's alone.

    Cost of a step: a few passes over a vector as long as the parameters.

    Args:
        flow: a flow whose layers have gains (:meth:`Flow.slow`).
        parameters: its trained parameters, in their order.
        unit: how far an optimizer moved u in the step that set the unit, if the gains are those of an earlier training,
            and stay; else 0.

    References: Almeida, Langlois, Amaral and Plakhov 1998 (*Parameter adaptation in stochastic optimization*); Baydin
    et al. 2018 (hypergradient descent, arXiv 1703.04782).

    >>> import torch, pyro_flows as pf
    >>> from pyro_flows.guides.svi.pace import Pace
    >>> flow = pf.realnvp(2, layers=2).slow()
    >>> pace = Pace(flow, list(flow.parameters()))
    >>> pace.gain
    0.1...
    """

    @torch.no_grad()
    def __init__(self, flow: Flow, parameters: Sequence[Tensor], *, unit: float = 0.0) -> None:
        trained = {id(part) for part in parameters}
        paced = [module for module in flow.modules() if isinstance(module, Paced) and module.gain is not None]
        found = [module for module in paced if all(id(part) in trained for part in module._last_parameters())]
        self.modules, self.parameters, self.unit = found, list(parameters), unit
        owned = {id(own): None for module in found for own in module._last_parameters()}
        self._owned = [part for part in parameters if id(part) in owned]
        self._share = torch.cat([torch.full((part.numel(),), float(id(part) in owned)) for part in parameters])
        self._share = self._share.to(parameters[0])
        self._before: Tensor | None = None
        self._moved: Tensor | None = None
        self._square, self._steps = 0.0, 0
        if not self.begun:
            for module in found:
                even(module, BEFORE)

    @property
    def begun(self) -> bool:
        """Whether a step has set the unit."""
        return self.unit > 0.0

    @property
    def gain(self) -> float:
        """The factor, that of the first layer: all are the same unless others were loaded."""
        gain = self.modules[0].gain
        assert gain is not None
        return float(gain.reshape(-1)[0])

    @torch.no_grad()
    def follow(self) -> None:
        """Look how far the optimizer went since the last step; set the unit after the first, and after longer ones."""
        if self._before is None:
            return
        self._moved = self._flat() - self._before
        longest = float((self._moved * self._share).abs().max())
        if MOST * self.unit < longest < math.inf:
            factor = (self.unit if self.begun else FIRST / self.gain) / longest
            self._change(factor)  # which has divided the step itself too
            self._add(self._moved * self._share * (1.0 - 1.0 / factor))
            self.unit = longest

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> Tensor:
        """Learn from the gradient (W,) after a step; return what the optimizer gets."""
        given = gradient * (1.0 + self._share * (1.0 / self.gain - 1.0))
        if self._moved is not None and self.begun:
            better = -float(gradient.to(self._moved) @ self._moved)
            if math.isfinite(better) and better != 0.0:
                self._steps += 1
                self._square = MEMORY * self._square + (1.0 - MEMORY) * better**2
                usual = math.sqrt(self._square / (1.0 - MEMORY**self._steps))
                self._change(math.exp(KAPPA * max(-MOST, min(MOST, better / usual))))
        self._before = self._flat()
        return given

    def _flat(self) -> Tensor:
        return torch.cat([part.detach().reshape(-1) for part in self.parameters])

    def _add(self, step: Tensor) -> None:
        for part, own in zip(self.parameters, step.split([part.numel() for part in self.parameters]), strict=True):
            part.add_(own.view_as(part))

    def _change(self, factor: float) -> None:
        """Multiply the gains, and divide what they multiply: the map stays."""
        torch._foreach_mul_([module.gain for module in self.modules if module.gain is not None], factor)
        torch._foreach_mul_(self._owned, 1.0 / factor)


def even(module: Paced, gain: float) -> None:
    """Set a layer's gain in place, the same for all numbers that come out; the map stays."""
    assert module.gain is not None
    share = module.gain / gain
    for parameter in module._last_parameters():
        parameter.mul_(share.reshape(-1, *[1] * (parameter.dim() - 1)))
    module.gain.fill_(gain)
