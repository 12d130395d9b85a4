"""What a posterior says of its model, and as a text or a page: evidence, cross-validation, sensitivity, reports."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_flows import _arviz, _checks
from pyro_flows._arrays import Chosen
from pyro_flows._progress import Bar
from pyro_flows.posterior.drawn import Drawn
from pyro_flows.results import labeled

if TYPE_CHECKING:
    from pyro_flows.comparison.compare import Comparison
    from pyro_flows.comparison.evidence import Evidence
    from pyro_flows.comparison.loo import Loo
    from pyro_flows.comparison.sensitivity import Sensitivity


@_checks.methods
class Assessed(Drawn):
    """A posterior that assesses its model and writes reports; see :class:`~pyro_flows.Posterior`."""

    def evidence(
        self, method: str = "auto", *, draws: int | None = None, error: float | None = None, seed: int = 0
    ) -> Evidence:
        r"""Estimate the log evidence :math:`\log Z = \log \int \tilde p(z)\,dz`, nats, with an honest standard error.

        ``importance``: the mean of :math:`\tilde p / q` over fresh draws of the flow. ``bridge``: Meng and Wong's
        bridge between q and the draws to use, where these are of the posterior, that is, Markov chains; q is the flow,
        or, without one, a Student t fitted to the first half of each chain. ``smc``: what a run of sequential Monte
        Carlo left in ``history``. ``auto``: all that can be used; the one with the smallest standard error is chosen,
        and all are listed.

        Args:
            method: ``"auto"``, ``"importance"``, ``"bridge"`` or ``"smc"``.
            draws: of the flow or guide, 16 000 by default, each scored once. Without a model, the raw ones are taken.
            error: standard error that is asked of importance sampling, nats, in the place of ``draws``. Draws are added
                to those of the posterior until it is reached, 16 000 at most. Where latents in plates were integrated
                out, each is a pass over all rows: then 0.05 is the default, and there are 1000 draws at most.
            seed: of these draws.

        Returns:
            An :class:`Evidence`, which unpacks as ``value, standard_error, method``. The error is infinite where the
            verdict is unreliable, or k-hat too high for one.

        Raises:
            ValueError: for an unknown method, or one that these draws do not allow; for both ``draws`` and ``error``.

        References: Meng and Wong 1996; Frühwirth-Schnatter 2004; Vehtari et al. 2024.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
        >>> guide = lambda: pyro.sample("x", dist.Normal(0.5, 0.75))
        >>> value, error, method = pf.diagnose(model, guide).evidence()
        >>> round(value, 1), error < 0.01, method
        (-1.5, True, 'importance')
        """
        from pyro_flows.comparison.evidence import evidence

        found = evidence(self, method=method, draws=draws, error=error, seed=seed)
        self._hand_on("evidence()")
        return found

    def loo(
        self,
        sites: str | Sequence[str] | None = None,
        *,
        draws: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Loo:
        r"""Estimate the expected log predictive density by Pareto-smoothed leave-one-out cross-validation.

        .. math:: \text{elpd} = \sum_i \log p(y_i \mid y_{-i})

        Draws of q are weighted by :math:`\tilde p(z) / (q(z)\, p(y_i \mid z))` (approximate-posterior LOO), resampled
        draws and chains by :math:`1 / p(y_i \mid z)`. Each entry of an observed site is one observation; those of event
        dimensions go together. The target is a Monte Carlo error of a fiftieth of the standard error over observations,
        or of .02 nats if that is more. The total error is then .02 % larger than by observations alone. Where k-hat is
        not below its limit, and where it is the cheaper way to that target, draws are moved to where the posterior
        without the observation lies, and weighted there.

        After a fit of minibatches, an observation is a row of the plate whose latents are integrated out, with all its
        data: :math:`p(y_i \mid z)` is its likelihood given the other latents. The draws in hand are used.

        Args:
            sites: observed sites, or plates after a fit of minibatches, to leave observations out of; all by default.
            draws: new draws of the flow or guide, resampled if the verdict is corrected. By default those in hand, or
                as many new ones as bring the Monte Carlo error down, 64 000 at most, and fewer where they are moved:
                two million for all observations together. Our own chains are gone on with, for two million gradients
                at most; those of another sampler have no more draws.
            seed: of new draws.
            progress: show what is being done, as :func:`fit` does, if it takes more than two seconds.

        Returns:
            A :class:`Loo` with elpd, its errors, k-hat and elpd of each observation, and leverage.

        Raises:
            ValueError: if the verdict is unreliable, for models with enumerated latents or without data, and for a
                name that is no observed site.

        Cost: the likelihood of all draws, and a sort of them for each observation; where draws are moved, the same for
        each observation: .03 to .2 seconds of one thread.

        References: Vehtari, Gelman and Gabry 2017; Magnusson et al. 2019; Paananen et al. 2021 (arXiv 1906.08850).

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.mean(), len(y) ** -0.5))
        >>> found = pf.diagnose(model, guide, torch.tensor([0.1, 1.2, -0.4, 0.7])).loo()
        >>> found.method, found.high
        ('approximate', ())
        """
        from pyro_flows.comparison.loo import loo

        return loo(self, sites=sites, draws=draws, seed=seed, progress=progress)

    def log_likelihood(self) -> dict[str, Tensor]:
        """Return the pointwise log likelihood of the draws to use, nats: ``{site: (draws, *batch)}``.

        Entries that a mask leaves out are 0. Models with enumerated latents have none: the dict is empty.

        Raises:
            ValueError: if a loaded posterior has no model.
        """
        found = self._need_density().log_likelihood(self._used)
        self._hand_on("log_likelihood()")
        return found

    def sensitivity(
        self,
        var_names: str | Sequence[str] | None = None,
        *,
        filter_vars: str | None = None,
        coords: Mapping[str, object] | None = None,
        prior_sites: str | Sequence[str] | None = None,
    ) -> Sensitivity:
        r"""Tell how much the posterior hangs on the prior and on the likelihood, by power scaling, without a refit.

        .. math:: p_\alpha(z) \propto p(z \mid y)\, p(\theta)^{\alpha - 1}, \qquad
                  p_\alpha(z) \propto p(z \mid y)\, p(y \mid z)^{\alpha - 1}, \qquad \alpha = .99, 1.01

        The figure is how fast the cumulative distribution of a scalar changes with :math:`\log_2 \alpha` (cumulative
        Jensen-Shannon distance). Only priors at the top are scaled. A group effect's prior is a part of the model:
        scaled too, it hides the sensitivity to the others.

        Args:
            var_names: variables to show, as in ArviZ; all by default.
            filter_vars: ``"like"`` or ``"regex"``, as in ArviZ.
            coords: labels of the entries to show, ``{"school": ["Choate"]}``.
            prior_sites: sites whose priors are scaled, instead of those found to be at the top.

        Returns:
            A :class:`Sensitivity`, with a table, the sites that were scaled, and why the others were not.

        Raises:
            ValueError: for an unknown name, if no prior stands at the top, or if a loaded posterior has no model.

        Reference: Kallioinen et al. 2024, "Detecting and diagnosing prior and likelihood sensitivity with
        power-scaling".

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(5.0, 0.5))
        ...     pyro.sample("y", dist.Normal(mu, 0.5), obs=y)
        >>> guide = lambda y: pyro.sample("mu", dist.Normal((y + 5) / 2, 0.5 / 2**0.5))
        >>> found = pf.diagnose(model, guide, torch.tensor(7.0)).sensitivity()
        >>> found.prior_sites, found.table.loc["mu", "diagnosis"]
        (('mu',), 'prior and likelihood conflict')
        """
        from pyro_flows.comparison.sensitivity import sensitivity

        draws = _arviz.select(labeled.posterior_group(self), var_names, filter_vars, coords)
        found = sensitivity(self, draws, prior_sites=prior_sites)
        self._hand_on("sensitivity()")
        return found

    def methods_text(self) -> str:
        """Return a paragraph for the methods section of a paper: software, method, figures, seed; nothing of the model.

        It names the works that the method rests on; :meth:`references` has them as BibTeX.

        Cost: none, beside a few evaluations of the flow.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> posterior = pf.fit(model, torch.tensor(1.0), progress=False)
        >>> posterior.method, "an affine map of a Student-t base with 60 degrees of freedom" in posterior.methods_text()
        ('Gaussian', True)
        """
        from pyro_flows.results.methods_text import methods_text

        return methods_text(self)

    def references(self) -> str:
        """Return the works that :meth:`methods_text` cites, and this package, as BibTeX.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))
        >>> found = pf.diagnose(model, guide, torch.tensor(1.0), draws=500).references()
        >>> "@article{Vehtari2024," in found, "1507.02646" in found, "Rue2009" in found
        (True, True, False)
        """
        from pyro_flows.results.methods_text import references

        return references(self)

    def report(
        self,
        path: str | os.PathLike[str] = "report.html",
        *,
        title: str | None = None,
        var_names: str | Sequence[str] | None = None,
        filter_vars: str | None = None,
        coords: Mapping[str, object] | None = None,
        comparison: Comparison | None = None,
        predictive: bool = True,
        source: bool = True,
        progress: bool = True,
    ) -> Path:
        """Write one HTML file to read and to send: what was found, whether to believe it, and how to make it again.

        On it: the verdict in plain words and what to do next; a table that sorts; figures; replicates against the data;
        the graph of the model, where graphviz and its Python package are installed; a comparison; settings and
        versions. The file takes no network and no other file, is light or dark as the reader's system is, and is read
        with a keyboard and on a phone. It is below 3 MB. An unreliable verdict is its first line, so no warning comes.

        Args:
            path: the file. An earlier report there is replaced in one step; any other file is refused.
            title: its heading; by default the sites.
            var_names: variables in table and figures, as in ArviZ; all by default.
            filter_vars: ``"like"`` or ``"regex"``: how names are matched, as in ArviZ.
            coords: labels to show, ``{"school": ["Choate"]}``, as in ArviZ.
            comparison: of :func:`~pyro_flows.compare`, to show.
            predictive: whether to draw replicates of the data.
            source: whether the source of the model stands on the page.
            progress: show what is being done, as :func:`~pyro_flows.fit` does, if it takes more than two seconds.

        Returns:
            The path of the file.

        Raises:
            ValueError: for a directory or a file that is no report, an unknown name or label, or a ``comparison`` that
                is none.
            OSError: if the file cannot be written.

        Cost: a few seconds for the figures, and 2500 runs of the model for prior draws and replicates.

        >>> import tempfile, torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))
        >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=500)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = posterior.report(f"{folder}/report.html").read_text()
        >>> "The draws can be used." in text, len(text) < 3_000_000
        (True, True)
        """
        from pyro_flows.report.content import Options
        from pyro_flows.report.page import write

        chosen: Chosen = {"var_names": var_names, "filter_vars": filter_vars, "coords": coords}
        with Bar("report", progress, quick=True) as bar:
            bar.watch("the table")
            self._check_unchanged()
            options = Options(title, comparison, predictive, source, chosen, bar.watch)
            target = write(self, path, self._table(chosen), options)
            bar.close(str(target))
        return target
