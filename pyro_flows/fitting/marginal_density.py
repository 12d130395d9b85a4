"""The log density of a model's global latents as a posterior needs it: latents in plates are integrated out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows.guides.conditional import Rows
from pyro_flows.guides.marginal import Marginal
from pyro_flows.model.bijections import bijection
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import messages


class MarginalDensity(LogDensity):
    """The log density of the globals; ``structure``, names and constrained values are those of the globals alone.

    Args:
        marginal: the log density at points.
    """

    def __init__(self, marginal: Marginal) -> None:
        self.marginal = marginal
        nodes, first = messages(marginal.first.at.trace), marginal.first
        values = {name: bijection(nodes[name]["fn"])(value) for name, value in first.base.items()}
        rows = marginal.rows
        super().__init__(_globals_alone(rows, first.at.chosen, values), rows.args, rows.kwargs)

    def affordable(self, draws: int) -> int:
        """Return how many of so many draws a check may evaluate, each by a pass over all rows."""
        return min(draws, 1000)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density (S,) at ``z`` (S, D), without gradients."""
        return self.marginal(self._check(z).detach()).to(z.dtype)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density (S,) and its gradient (S, D); cost: S passes over all rows."""
        self.spend(len(z))
        value, gradient = self.marginal.value_and_grad(self._check(z).detach())
        return value.to(z.dtype), gradient.to(z.dtype)

    def predictive(self, z: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
        """Raise an error: the latents of rows are not there.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "predictive: latents of rows were integrated out. Draw them with posterior.guide.sample_posterior, or use "
            "pyro.infer.Predictive with the guide."
        )

    def graph(self, z: Tensor) -> None:
        """Return None: a pass over parts of the data is no graph."""


class _Fixed(Messenger):
    """Run a model with these rows and latents in plates."""

    def __init__(self, chosen: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.fixed = {**chosen, **values}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and msg["name"] in self.fixed:
            msg["value"] = self.fixed[msg["name"]].detach()


def _globals_alone(rows: Rows, chosen: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return the model without data and latents in plates."""
    names = [latent.name for latent in rows.latents]

    def model(*args: Any, **kwargs: Any) -> None:
        with poutine.block(expose=names), _Fixed(chosen, values):
            rows.model(*args, **kwargs)

    return model
