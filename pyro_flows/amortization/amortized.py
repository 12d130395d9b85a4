"""The answer to any data set of a form: draws of one flow, weighed and judged by the model's density at these data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from pyro_flows.amortization import files
from pyro_flows.amortization.building import simulate, stacked
from pyro_flows.amortization.form import Form, Scale, bound, ess_share
from pyro_flows.amortization.networks import Conditional, matched
from pyro_flows.calibration.wiring import Case
from pyro_flows.flows.flow import Flow
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.inference.verdict.deciding import POOL, UNSEARCHED, Draw
from pyro_flows.inference.verdict.weighing import log_mean
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Keywords
from pyro_flows.model.stack import NotStackable, Stack
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support import checks
from pyro_flows.support.files.bundles import Entries
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone, few_threads
from pyro_flows.support.thresholds import (
    DENSITY_GAP_OF_WALKERS,
    ESS_SHARE_PROMISING,
    MISSED_MASS_SHARE,
    PREDICTIVE_TAIL,
    SHIFT_SEEN,
)

TOGETHER = 2**19  # numbers of data and draws that are handled at once
FEW = 64  # simulations that a loaded model is read with
TRIED = 32  # draws of the flow that estimate the density of a simulated data set,
PILOT = 512  # and of one in hand: the first draws, which also tell how many are needed
MOVES = 2  # of the base to the weighted moments of draws, where those of the flow are poor
CHECKED = 1  # draws of each data set that are run with Pyro's checks: these are a matter of the model
# ESS/S from which on draws are used as they are: a mean is off by sqrt(S/ESS - 1) sds at most (Cauchy-Schwarz)
EVEN = 1.0 / (1.0 + SHIFT_SEEN**2)
LEARNED = f"{UNSEARCHED}, since the flow learned from draws of parameters and data together"
OUTSIDE = "the data are outside of what the prior predicts"


@dataclass(frozen=True)
class Predicted:
    """What simulated data sets come to: log densities on the common scale, if there are any, and farthest entries."""

    log_density: Tensor
    farthest: Tensor

    @cached_property
    def limits(self) -> tuple[float, float, float]:
        """Return the log densities between which, and the distance within which, data are as the prior predicts."""
        far = float(self.farthest.quantile(1.0 - PREDICTIVE_TAIL))
        if not len(self.log_density):
            return -math.inf, math.inf, far
        low, high = (float(self.log_density.quantile(level)) for level in (PREDICTIVE_TAIL, 1.0 - PREDICTIVE_TAIL))
        return low, high, far


class Parts(NamedTuple):
    """What an answer is made of."""

    form: Form  # the arguments of the model, and which of them are data
    scale: Scale  # of the data, as networks take them
    conditional: Conditional  # the trained flow
    lead: LogDensity  # the model's log density of the first data set
    stack: Stack | None  # graphs that all data sets share; None if each has its own

    def features(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return K data sets ``{site: (K, *shape)}`` as networks take them, (K, n)."""
        return self.scale(self.form.rows(values))

    @torch.no_grad()
    def weighed(self, data: Mapping[str, Tensor], features: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Return draws z (K, draws, D) for K data sets, and their log importance weights (K, draws)."""
        assert self.stack is not None
        wiring, flow = self.form.wiring, self.conditional.flow
        cases = [wiring({name: values[number] for name, values in data.items()}) for number in range(len(features))]
        z, log_q = flow.rsample_and_log_prob((draws,), features.to(next(flow.parameters())))
        z = z.transpose(0, 1).to(self.stack.dtype).contiguous()
        return z, self.stack.at(z, [(case.args, case.kwargs) for case in cases]) - log_q.T

    def predict(self, data: Mapping[str, Tensor]) -> Predicted:
        """Return what simulated data sets ``{site: (K, *shape)}`` come to, as far as their densities can be had."""
        features = self.features(data)
        farthest = features.abs().amax(1)
        if self.stack is None:
            return Predicted(farthest[:0], farthest)
        found = []
        for part in torch.arange(len(features)).split(max(1, TOGETHER // (TRIED * self.stack.numbers))):
            own = {name: values[part] for name, values in data.items()}
            found.append(log_mean(self.weighed(own, features[part], TRIED)[1]))
        log_density = torch.cat(found).double() - self.scale.log_slope(features)
        return Predicted(log_density[torch.isfinite(log_density)], farthest)


class Pilot(NamedTuple):
    """The first draws of a flow (n, D), their log densities (n,) under it, and their log importance weights (n,)."""

    z: Tensor
    log_q: Tensor
    log_weights: Tensor

    @classmethod
    def of(cls, flow: Flow, density: LogDensity, draws: int) -> Pilot:
        """Draw and weigh."""
        z, log_q = flow.draw(draws)
        return cls(z, log_q, (density(z) - log_q).double())


def left_out(flow: Flow, pilot: Pilot, seen: Sequence[Pilot]) -> bool:
    """Say whether draws of other flows have mass where the density of a flow, with its own first draws, is too small.

    Its own weights do not tell: no draw of it is there.
    """
    level = log_mean(pilot.log_weights)
    for z, log_q, log_weights in seen:
        weights = torch.softmax(torch.where(torch.isfinite(log_weights), log_weights, -torch.inf), 0)
        thin = log_weights + log_q - flow.log_prob(z) - level > DENSITY_GAP_OF_WALKERS
        if float(weights[thin].sum()) > MISSED_MASS_SHARE:
            return True
    return False


def _going_on(pilot: Pilot, draw: Draw) -> Draw:
    """Return a function that draws, whose first draws are those that there are already."""
    left = [pilot]

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        if not left:
            return draw(count)
        z, log_q, _ = left.pop()
        if count <= len(z):
            return z[:count], log_q[:count]
        more, more_log_q = draw(count - len(z))
        return torch.cat([z, more]), torch.cat([log_q, more_log_q])

    return drawn


@checks.methods
@dataclass(frozen=True, eq=False, repr=False)
class Amortized:
    r"""A conditional flow :math:`q(\theta \mid y)` for all data sets of one form; :func:`amortize` trains it.

    Called with the arguments of a data set, it returns a :class:`Posterior`, as :meth:`posterior` does.

    Attributes:
        model: the Pyro model.
        losses: of the training, negative mean log density of each minibatch, nats.
        validation: mean log density of held-out parameters given their data, nats.
        settings: what :func:`amortize` was told, and how the training ended.

    Cost of an answer: one pass of the encoder, and ``draws`` evaluations of flow and model; twice as many where draws
    are resampled, 2560 more for each move, and four times as many of both where weights are uneven.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> options = {"simulations": 2000, "max_epochs": 5, "progress": False}
    >>> amortized = pf.amortize(model, torch.zeros(4), **options)
    >>> amortized(torch.tensor([0.3, 1.4, -0.2, 0.9])).samples["mu"].shape
    torch.Size([4000])
    """

    model: Callable[..., object]
    losses: Tensor
    validation: float
    settings: dict[str, object]
    _parts: Parts
    _predicted: Predicted
    _probe: Entries

    def __getstate__(self) -> dict[str, object]:
        raise TypeError(
            "Amortized: it holds graphs of its model, so that it is not pickled or copied. Use save(path), and "
            "Amortized.load(path, model, ...) in the other process."
        )

    def __call__(self, *args: object, **kwargs: object) -> Posterior:
        """Return the posterior of a data set, given as the model takes it."""
        return self.posterior(*args, model_kwargs=kwargs)

    def posterior(
        self,
        *args: object,
        model_kwargs: Mapping[str, object] | None = None,
        draws: int = 4000,
        seed: int = 0,
        escalate: bool = False,
    ) -> Posterior:
        r"""Return the judged posterior of a data set.

        Draws of :math:`q(\theta \mid y)` are weighted by :math:`p(\theta, y) / q(\theta \mid y)`. The base of q has
        heavier tails than in the training, so that tails of the posterior are drawn. Draws are used as they are,
        resampled by these weights, or called unreliable, by the rules of :func:`diagnose`. They are resampled wherever
        ESS/S is below 0.998, too: above it, a mean of the draws as they are is off by 0.04 sd at most. Where ESS/S of
        the first 512 is below 0.5, a Student t distribution with the weighted mean and covariance of 2048 draws
        replaces q, if its own ESS/S reaches 0.5 in two such moves. Four times as many draws are weighed then, whether
        it does or not. Missed modes are not searched for, and the verdict notes this. Data that are outside of what the
        prior predicts are named in the verdict, which is then never ``ok``.

        Args:
            args: the arguments of the model, as :func:`amortize` was given them, with other data.
            model_kwargs: its keyword arguments.
            draws: how many, 100 at least.
            seed: of the draws.
            escalate: let Markov chains go on from the draws (:meth:`Posterior.refine`) where the verdict is unreliable.

        Raises:
            ValueError: for data of another shape, an argument that differs and is no data, values outside of the
                support of the likelihood.

        Source: Li et al. 2024, *Amortized Bayesian Workflow* (arXiv 2409.04332).
        """
        case, features = self._read(args, model_kwargs)
        with alone(), few_threads(self._parts.lead.numbers), seeded(derive(seed, "amortized"), self._parts.lead.device):
            density = self._density(case)
            flow, pilot, moved = self._flow(features, density)
            found = from_draws(
                density,
                _going_on(pilot, flow.draw),
                draws=draws,
                seed=seed,
                guide=AutoFlow.of(flow, density.structure, self.model, density.args, density.kwargs),
                losses=self.losses,
                settings={"amortized": self.settings},
                doubts=self._outside(features, pilot),
                notes=(LEARNED,),
                checked=CHECKED,
                times=POOL if moved else 1,
                least=EVEN,
            )
        if escalate and found.verdict.status == "unreliable":
            found = found.refine(progress=False)
        return found

    def samples(
        self, data: Mapping[str, Tensor], draws: int = 1000, *, seed: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        r"""Return draws of the flow for many data sets at once, and their importance weights. Nothing is judged.

        The log weights are :math:`\log p(\theta, y) - \log q(\theta \mid y)`, in unconstrained coordinates.

        Args:
            data: values of the observed sites of K data sets, ``{site: (K, *shape)}``.
            draws: of each data set.
            seed: of the draws.

        Returns:
            Draws of each latent site (K, draws, ...), and log weights (K, draws) in nats, as they are.

        Raises:
            ValueError: for data of another shape, or a model that takes numbers out of its data: call
                :meth:`posterior` for each data set then.
        """
        parts = self._parts
        if parts.stack is None:
            raise ValueError("samples: this model does not take many data sets at once. Call posterior() for each.")
        for name, keep in parts.form.keep.items():
            got = tuple(data[name].shape[1:]) if name in data else "nothing"
            if got != tuple(keep.shape):
                raise ValueError(f"data[{name!r}]: expected shape (K, *{tuple(keep.shape)}), got {got}.")
        parts.form.checked({name: data[name] for name in parts.form.keep})
        with alone(), seeded(derive(seed, "many data sets"), parts.lead.device):
            z, log_weights = parts.weighed(data, parts.features(data), draws)
            found = parts.lead.constrain(z.flatten(0, 1))
        return {name: found[name].unflatten(0, z.shape[:2]) for name in parts.lead.names}, log_weights

    def outside(
        self, *args: object, model_kwargs: Mapping[str, object] | None = None, seed: int = 0
    ) -> tuple[str, ...]:
        r"""Say in which way a data set is outside of what the prior predicts; nothing if it is not.

        Two figures are compared with those of 4096 simulated data sets: the distance of the farthest entry from its
        median, and :math:`\log p(u)`, the density of the data on a common scale u, by importance sampling. A data set
        is outside if one in a thousand simulated ones is as extreme.

        Args:
            args: as for :meth:`posterior`.
            model_kwargs: likewise.
            seed: of the draws.

        Source: Box 1980, *Sampling and Bayes' Inference in Scientific Modelling and Robustness* (doi:10.2307/2982063).
        """
        case, features = self._read(args, model_kwargs)
        with alone(), seeded(derive(seed, "outside"), self._parts.lead.device):
            return self._outside(features, self._flow(features, self._density(case))[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a directory of tensors and JSON; neither the model nor its data, nor an encoder of your own.

        Raises:
            ValueError: if ``path`` holds other files.
            OSError: if it cannot be written.
        """
        parts = self._parts
        states = {"flow": parts.conditional.flow.state_dict(), "scale": parts.scale.state_dict()}
        curves = {name: getattr(self._predicted, name) for name in ("log_density", "farthest")}
        curves["losses"] = self.losses
        text = {"settings": self.settings, "validation": self.validation}
        files.write(path, {**states, **curves, "probe": self._probe}, text)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Callable[..., object],
        *args: object,
        model_kwargs: Mapping[str, object] | None = None,
        data: Mapping[str, str | int] | None = None,
        encoder: nn.Module | None = None,
    ) -> Self:
        """Read what :meth:`save` wrote, given the model and all that :func:`amortize` was given.

        Raises:
            ValueError: if it is no saved amortized posterior, or a damaged one; if the model, its arguments or the
                encoder are not those of the training.
        """
        tensors, text = files.read(path)
        with alone():
            case = bound(model, args, dict(model_kwargs or {}))
            read = simulate(model, case, data, FEW, 0, seed=0)
            files.check_probe(read, tensors["probe"])
            scale, conditional = files.rebuilt(read, tensors, text["settings"], encoder)
            parts = Parts(read.form, scale, conditional, read.density, stacked(read))
        predicted = Predicted(tensors["log_density"], tensors["farthest"])
        about = tensors["losses"], float(text["validation"]), text["settings"]
        return cls(model, *about, parts, predicted, tensors["probe"])

    def _read(self, args: tuple[object, ...], kwargs: Keywords | None) -> tuple[Case, Tensor]:
        """Return a data set in the form that all have, and its features (1, n)."""
        case = bound(self.model, args, dict(kwargs or {}))
        return case, self._parts.features({name: value[None] for name, value in self._parts.form.read(case).items()})

    def _density(self, case: Case) -> LogDensity:
        """Return the model's log density of a data set, which takes the graphs of all others where it can."""
        if self._parts.stack is not None:
            with suppress(NotStackable):  # it is read by itself then, and its own graph is recorded
                density = self._parts.lead.beside(case.args, case.kwargs, moves_alike=True)
                self._parts.stack.join(density)
                return density
        return self._parts.lead.beside(case.args, case.kwargs)

    @torch.no_grad()
    def _flow(self, features: Tensor, density: LogDensity) -> tuple[Flow, Pilot, bool]:
        """Return the flow of a data set with features (1, n), its first draws, and whether those were poor.

        Where their weights are uneven, the flow begins adaptive importance sampling: its base at weighted moments
        replaces it, if the weights of that are not uneven, and if it leaves out nothing that was drawn before. Other
        posteriors are not near to normal.
        """
        flow = moved = self._parts.conditional.given(features[0], density.dtype)
        pilot = first = Pilot.of(flow, density, PILOT)
        seen = [first]
        while ess_share(pilot.log_weights) < ESS_SHARE_PROMISING and len(seen) <= MOVES:
            seen.append(Pilot.of(moved, density, POOL * PILOT))
            moved = matched(moved, seen[-1].z, seen[-1].log_weights)
            pilot = Pilot.of(moved, density, PILOT)
        if ess_share(pilot.log_weights) >= ESS_SHARE_PROMISING and not left_out(moved, pilot, seen):
            return moved, pilot, moved is not flow
        return flow, first, True

    def _outside(self, features: Tensor, pilot: Pilot) -> tuple[str, ...]:
        """Say in which way features (1, n) of a data set are outside of what the prior predicts."""
        low, high, far = self._predicted.limits
        away, number = features.abs().max(1)
        value = float(log_mean(pilot.log_weights)) - float(self._parts.scale.log_slope(features))
        if not float(away) <= far:
            how = f"{self._parts.form.entry(int(number))} is farther out"
        elif not low <= value <= high:
            how = f"their density is {'higher' if value >= low else 'lower'}"
        else:
            return ()
        return (f"{OUTSIDE}: {how} than in {1.0 - PREDICTIVE_TAIL:.1%} of simulated data sets",)

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        return f"Amortized({name}, {', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"
