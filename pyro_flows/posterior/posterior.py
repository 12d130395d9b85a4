"""The frozen result of a fit, its copies and its files; what it does else is in the classes that it extends."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from pyro_flows import _checks
from pyro_flows.flows.flow import Flow
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.posterior.assessed import Assessed
from pyro_flows.results import arviz_groups, files
from pyro_flows.results.record import attributes

UNPICKLED = "unpickled without a model"


@_checks.methods
@dataclass(frozen=True, eq=False, repr=False)
class Posterior(Assessed):
    r"""What a fit (or :func:`diagnose`) found. Nothing in it changes; methods give new values.

    If the verdict is unreliable, all methods that hand draws on (``summary``, ``to_arviz``, ``predictive``,
    ``resample``, ``save``), and :func:`load`, warn with an :class:`UnreliableWarning`, once for each line that calls
    them. Attributes, figures and reports do not; figures and reports show the status.

    Attributes:
        samples: the draws to use, constrained, deterministic sites too: ``{name: (draws, *shape)}``. Raw draws of the
            guide if the verdict is ok or unreliable, importance-resampled ones if it is corrected, draws of chains,
            one chain after the other, if it is refined.
        z: raw draws in unconstrained coordinates (S, D).
        log_p: unnormalized log posterior density of ``z`` (S,).
        log_q: log guide density of ``z`` (S,).
        log_weights: Pareto-smoothed, normalized log importance weights of ``z`` (S,).
        k_hat: Pareto shape of the weights.
        ess: effective sample size of the weights (S is the best).
        elbo: evidence lower bound, nats, mean of ``log_p - log_q``.
        log_evidence: importance-sampling estimate of the log normalizer, nats.
        method: what made the draws to use, such as ``"trained flow"``; see :attr:`Verdict.guide_method`.
        verdict: whether to believe the draws.
        losses: negative ELBO of each optimization step (empty for :func:`diagnose`); with several runs, of the best.
        history: what happened during the fit, one dict a stage. Each has ``stage``, its name, and ``elbo``, what it
            reached in nats, None where a stage has none; the other entries go by the stage.
        settings: everything that :func:`fit` was told (``asked``, ``flow``) or chose (``sampler``), JSON values only.
        coordinates: names of the unconstrained coordinates.
        guide: the guide that drew ``z``; None after :func:`load` without a model. It knows of no weights: what it draws
            is like ``z``, and like ``samples`` unless these are importance-resampled.
        guide_name: its class.
        flow: the guide's :class:`Flow` over the unconstrained coordinates, a ``FlowMixture`` after runs that disagree;
            None if it has none. ``flow.log_prob(z)`` is ``log_q``.
        density: the model as a log density; None after :func:`load` without a model.
        missing: for each of ``guide``, ``flow`` and ``density`` that is None, why; and why ``groups`` of the ArviZ
            object are missing, if any are.
        chains: :class:`McmcDraws`, what a sampler came to, if :meth:`refine` was called, by ``fit`` or since: draws of
            each chain, and all that it takes to go on. Or the chains that :func:`from_mcmc` was given.

    Methods that run the model again do so on the data of the fit. Arguments of at most 16 MB in all are copied for
    that. Larger ones are not: if they have changed since, these methods raise a ``ValueError`` that names the argument.
    They do so, too, if the log density at a draw is not what it was: the model reads something else that has changed.
    Not noticed are changes from outside of the arguments, or inside of modules and other objects among them, that leave
    this density as it is. ``summary`` needs no data.

    It can be pickled (joblib, Dask): draws, verdict and flow go along, model, data and guide stay behind.

    The weights are :math:`w_i \propto \tilde p(z_i) / q(z_i)`, smoothed as in Vehtari et al. 2024 (arXiv 1507.02646).
    Cost: draws and figures are computed once, by the call that makes it.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.sum() / 4.01, 4.01**-0.5))
    >>> y = torch.tensor([0.4, 1.3, -0.2, 0.9])
    >>> posterior = pf.diagnose(model, guide, y, draws=400)
    >>> posterior.verdict.status, posterior.samples["mu"].shape
    ('ok', torch.Size([400]))
    """

    # copies ---------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, object]:
        """Return what is pickled: draws, verdict, flow and the groups that take no model; neither model nor data."""
        state = {name: _compact(value) for name, value in vars(self).items()}
        state.update(guide=None, density=None, _drawer=None)
        missing = {**self.missing, "guide": UNPICKLED, "density": UNPICKLED}
        state["missing"] = missing
        if self._stored is None:
            density = self._need_model()
            self._check_unchanged(runs=False)
            groups = self._labeling.applied(arviz_groups.all_groups(self, density, predictive=False, runs=False))
            state["_stored"] = groups, attributes(self)
            missing["groups"] = f"it was {UNPICKLED}; call to_arviz() or save() where the model is"
        if isinstance(self.flow, Flow) and self.flow.recipe is None:  # the user's own, of a class that may be local
            try:
                pickle.dumps(self.flow)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                state["flow"], missing["flow"] = None, f"it could not be pickled ({error})"
        return state

    def __copy__(self) -> Posterior:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, object]) -> Posterior:
        """Copy everything but the model, its data and guides of other packages, which copies may share."""
        kept = {"density", "_drawer", *(() if isinstance(self.guide, AutoFlow) else ("guide",))}
        found = {name: value if name in kept else copy.deepcopy(value, memo) for name, value in vars(self).items()}
        make: Callable[..., Posterior] = type(self)
        return make(**found)

    # files ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a directory with ``posterior.nc`` (netCDF, for ArviZ), ``guide.pt`` (tensors), ``posterior.json``.

        A posterior that was saved there before is replaced in one step: a save that is killed leaves the old one or the
        new one, whole. Other files in the directory stay. The JSON holds digests of all three files.

        Raises:
            ValueError: if ``path`` is a file, a directory with content that is not a saved posterior, or one that
                cannot be replaced as a whole (the working directory, a mount point).
            OSError: if the disk is full or cannot be written to; what was saved there before is as it was.
        """
        target = files.check_target(path)
        groups, attrs = self._groups(True)
        files.write(self, groups, attrs, target)
        self._hand_on("save()")


def _compact(value: object) -> object:
    """Copy tensors: a pickled view takes along all that it is cut from."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {name: _compact(item) for name, item in value.items()} if isinstance(value, dict) else value


@_checks.options
def load(
    path: str | os.PathLike[str],
    model: Callable[..., object] | None = None,
    *args: object,
    model_kwargs: Mapping[str, object] | None = None,
) -> Posterior:
    """Read a posterior that :meth:`Posterior.save` wrote. Tensors and JSON only: nothing in the files is run.

    Without a model, draws, summary, ArviZ object, verdict and flow are there. With the model and the arguments of the
    fit, guide and log density are too, and so are predictive draws.

    Args:
        path: the directory.
        model: the model that was fitted.
        args: its positional arguments.
        model_kwargs: its keyword arguments.

    Raises:
        ValueError: if the directory is not a saved posterior, is damaged, was written in another format version, or if
            model and arguments give another log density than the saved one.

    Cost: reading the files; with a model, one pass of all draws through it.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.sum() / 4.01, 4.01**-0.5))
    >>> y = torch.tensor([0.4, 1.3, -0.2, 0.9])
    >>> posterior = pf.diagnose(model, guide, y, draws=400)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     posterior.save(f"{folder}/saved")
    ...     again = pf.load(f"{folder}/saved")
    >>> torch.equal(again.samples["mu"], posterior.samples["mu"])
    True
    """
    found = Posterior(**files.read(path, model, args, dict(model_kwargs or {})))
    found._hand_on("load()")
    return found
