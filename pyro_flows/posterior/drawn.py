"""More draws of a posterior: resampled, refined, new ones, predictive ones."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._turns import alone
from pyro_flows.model.arguments import usable
from pyro_flows.posterior.shown import Shown
from pyro_flows.results import arviz_groups
from pyro_flows.verdict.deciding import resample


@_checks.methods
class Drawn(Shown):
    """A posterior that gives more draws; see :class:`~pyro_flows.Posterior`."""

    def resample(self, draws: int | None = None, *, seed: int = 0, force: bool = False) -> dict[str, Tensor]:
        """Resample the raw draws by their importance weights: ``{name: (draws, *shape)}``, constrained.

        With verdict refined, the chains' draws are resampled, all with the same weight.

        Args:
            draws: how many; as many as there are raw draws by default.
            seed: of the resampling.
            force: resample even if the verdict is unreliable.

        Raises:
            ValueError: if the verdict is unreliable, so that weighting cannot mend the draws; or if a loaded posterior
                needs its model for this.
        """
        if self.verdict.status == "unreliable" and not force:
            raise ValueError(
                f"resample: the importance weights cannot be relied on ({'; '.join(self.verdict.reasons)}). "
                "Pass force=True to resample all the same."
            )
        count = len(self.z) if draws is None else draws
        self._hand_on("resample()")
        weights = self._used_log_weights if self.verdict.status == "refined" else self.log_weights
        index = resample(weights, count, seed=seed)
        if not self.resampled:
            return {name: values[index] for name, values in self.samples.items()}
        return self._need_density().constrain(self.z[index])

    def refine(
        self,
        method: str = "auto",
        *,
        chains: int = 64,
        max_steps: int = 2000,
        max_seconds: float = math.inf,
        seed: int | None = None,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Self:
        r"""Let a sampler finish the work: many short chains in the flow's latent space, begun at its draws.

        Where the flow T is close to the posterior, the target in latent space,
        :math:`\log\tilde p(T(x)) + \log|\det J_T(x)|`, is close to the base distribution, and a few leaps of
        microcanonical dynamics (MAMS) make a new draw. Step size, trajectory length and units are adapted.
        Chains begin in superchains of eight, half of them at importance-resampled draws and half at places where the
        flow is thin, and go on until nested R-hat is at most 1.01, R-hat 1.05, and the effective sample size 1000 in
        the bulk and in the tails of each coordinate and of the log density. Then the search for missed modes is made
        once more, from the chains' draws. The verdict is ``refined`` if nothing speaks against that; if chains need
        more time, it is what it was, with a reason or a note.

        Called again, it goes on where it was, as if it had not been cut short. The guide's own draws stay: ``z``.

        Args:
            method: ``"hmc"``: Hamiltonian moves alone; ``"imh"``: with four independent proposals of the flow, or
                mixture, before each move;
                ``"smc"``: chains begin where particles come to that are annealed from the flow to the posterior, which
                also gives ``log_evidence`` (its standard error is in ``history``); ``"auto"``: with one independent
                proposal before each move, unless the flow's weights tell that it would be in vain. Chains of a mixture
                move in the latent space of one part at a time, and change parts.
            chains: how many, a multiple of 8.
            max_steps: bound on the moves of each chain, warm-up included; a move takes a few gradients.
            max_seconds: bound on the seconds.
            seed: of all moves; the posterior's own by default. One seed, one answer.
            progress: show what is being done, as :func:`fit` does.
            checkpoint: a file that keeps what chains have come to, as that of :func:`fit` does.

        Returns:
            A new posterior. Its draws to use are the chains', at least as many as before, if it is refined.

        Raises:
            ValueError: for a bad option, a checkpoint that is damaged or of another call, or if a
                loaded posterior needs its model for this.

        References: Hoffman et al. 2019 (arXiv 1903.03704); Hoffman, Radul and Sountsov 2021 (ChEES); Margossian et al.
        2024 (nested R-hat, arXiv 2110.13017); Li et al. 2024 (arXiv 2409.04332).

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("x", dist.Normal(y / 2, 0.3))
        >>> narrow = pf.diagnose(model, guide, torch.tensor(1.0), draws=1000)
        >>> narrow.verdict.status, narrow.refine().verdict.status
        ('unreliable', 'refined')
        """
        from pyro_flows.correction.refine import refine

        return refine(
            self, method=method, chains=chains, progress=progress, checkpoint=checkpoint, max_steps=max_steps,
            max_seconds=max_seconds, seed=seed,
        )  # fmt: skip

    def sample(self, draws: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw anew in the way of the verdict: ``{name: (draws, *shape)}``, constrained.

        From the flow if it is ok (or unreliable, with a warning); resampled by importance weights from four times as
        many new draws if it is corrected; by going on with the chains if it is refined.

        Args:
            draws: how many.
            seed: of the draws: the same seed gives the same values.

        Raises:
            ValueError: if a loaded posterior has no model, if the guide is no flow, or for chains of NUTS.
        """
        from pyro_flows.correction.refine import more_draws

        z = more_draws(self, draws, seed=seed)
        self._hand_on("sample()")
        return self._need_model().constrain(z)

    def local_samples(
        self,
        names: str | Sequence[str] | None = None,
        *,
        rows: Tensor | Sequence[int] | None = None,
        draws: int | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        r"""Draw latents of rows that a fit of minibatches has integrated out: ``{name: (draws, *shape)}``, constrained.

        .. math:: \theta_s \sim p(\theta \mid x), \qquad y_{is} \sim p(y_i \mid \theta_s, x_i)

        :math:`\theta_s` are the first draws to use, so that the two belong together. Each :math:`y_{is}` is resampled
        by importance weights from draws around the mode of the row given :math:`\theta_s`. Rows are independent of each
        other given :math:`\theta_s`, so that a few rows, or one chunk after the other, can be asked for.

        Args:
            names: sites in plates; all by default.
            rows: indices of rows in the plate that was integrated out row by row; all by default.
            draws: how many of the draws to use, from the first on; all by default.
            seed: of the drawing: the same seed gives the same values.

        Raises:
            ValueError: if no latents were integrated out, for a name that is no site in a plate, rows that are not
                there, more draws than there are, or if a loaded posterior has no model.

        Cost: one pass over the rows for each draw; memory: the values that are returned.

        Source: Rubin 1988 (sampling-importance resampling, in *Bayesian Statistics 3*).

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("row", len(x), subsample_size=20) as index:
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])
        >>> posterior = pf.fit(model, torch.linspace(-2.0, 4.0, 60), draws=200, progress=False)
        >>> posterior.local_samples("z", rows=[0, 59])["z"].shape
        torch.Size([200, 2])
        """
        density, z = self._need_density(), self._first(draws)
        self._hand_on("local_samples()")
        wanted = [names] if isinstance(names, str) else names
        with alone(), torch.no_grad():
            return density.local_samples(z, wanted, rows, seed=seed)

    def predictive(
        self,
        *args: object,
        draws: int | None = None,
        seed: int = 0,
        model_kwargs: Mapping[str, object] | None = None,
    ) -> dict[str, Tensor]:
        """Draw from the posterior predictive distribution: ``{name: (draws, *shape)}`` for each observed site.

        Without arguments, at the data of the fit. With arguments, the model is run on these: sites that are observed
        in that run are drawn anew, as are latent sites that the fit did not have (``y`` where ``y=None`` is passed);
        deterministic sites are there too.

        Args:
            args: the model's arguments, positional.
            draws: how many of the draws to use, from the first on; all by default.
            seed: of the drawing: the same seed gives the same values.
            model_kwargs: the model's keyword arguments.

        Raises:
            ValueError: if there are fewer draws, if a loaded posterior has no model, or if a latent site of the fit is
                missing from the new run or has another shape there.
        """
        density, z = self._need_density(), self._first(draws)
        self._hand_on("predictive()")
        if not args and model_kwargs is None:
            return density.predictive(z, seed=seed)
        return arviz_groups.predict(density, z, *usable(density.model, args, model_kwargs), seed=seed)

    def _first(self, draws: int | None) -> Tensor:
        """Return so many of the draws to use, unconstrained, from the first on."""
        count = len(self._used)
        if draws is not None and draws > count:
            raise ValueError(f"draws: expected at most {count}, the draws that there are, got {draws}.")
        return self._used[:draws]
