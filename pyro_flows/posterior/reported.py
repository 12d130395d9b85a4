"""A posterior as a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_flows import _checks
from pyro_flows._progress import Bar
from pyro_flows.posterior.assessed import Assessed

if TYPE_CHECKING:
    from pyro_flows.comparison.compare import Comparison


@_checks.methods
class Reported(Assessed):
    """A posterior that writes a report; see :class:`~pyro_flows.Posterior`."""

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

        chosen: dict[str, Any] = {"var_names": var_names, "filter_vars": filter_vars, "coords": coords}
        with Bar("report", progress, quick=True) as bar:
            bar.watch("the table")
            self._check_unchanged()
            options = Options(title, comparison, predictive, source, chosen, bar.watch)
            target = write(self, path, self._table(**chosen), options)
            bar.close(str(target))
        return target
