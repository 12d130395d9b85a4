"""A prior that was fitted to draws: a flow on the supports of sites."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flows import _checks
from pyro_flows._bundles import Bundle, plain
from pyro_flows._shapes import broadcast
from pyro_flows._untrusted import check_numbers, reading, require, unpacked
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe_json import not_rebuilt, restored, to_json
from pyro_flows.priors.parts import Joint, Part

TENSORS, TEXT = "prior.pt", "prior.json"
FILES = Bundle("prior", "pyro_flows prior", TEXT, (TENSORS,))


@_checks.methods
class FittedPrior(nn.Module):
    r"""A flow on the supports of one or several sites; ``prior()`` is a Pyro distribution with one event.

    .. math:: \theta = c(z), \qquad z \sim q, \qquad \log p(\theta) = \log q(z) - \log |d\theta / dz|

    with c the bijections onto the supports. Of one site, the event is its value, the axes of its plates included:
    ``theta = pyro.sample("theta", prior())`` stands outside of the plates. Of several sites, the event is a vector of
    all; :meth:`sample` draws it and names its parts. Parameters do not train, and no gradient goes to them.

    Attributes:
        flow: over the unconstrained coordinates.
        parts: the sites, each with ``name``, ``shape``, ``support`` and ``dims``.
        verdict: of the posterior that it was fitted to, one sentence.
        status: of that verdict.
        mean_shift: largest difference of the means of draws and flow, in sds of the draws, unconstrained coordinates.
        sd_shift: largest absolute log ratio of their sds.

    Cost: a pass of the flow for each draw or density.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.sum() / 4.01, 4.01**-0.5))
    >>> y = torch.tensor([0.4, 1.3, -0.2, 0.9])
    >>> posterior = pf.diagnose(model, guide, y, draws=400)
    >>> prior = pf.prior_from(posterior, "mu", max_epochs=1)
    >>> prior.sites, prior().sample((5,)).shape
    (('mu',), torch.Size([5]))
    """

    def __init__(
        self,
        flow: Flow,
        parts: Sequence[Part],
        *,
        status: str,
        verdict: str,
        mean_shift: float,
        sd_shift: float,
    ) -> None:
        super().__init__()
        self.flow = flow.eval().requires_grad_(False)
        self.parts = tuple(parts)
        self.status, self.verdict = status, verdict
        self.mean_shift, self.sd_shift = mean_shift, sd_shift

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(part.name for part in self.parts)

    def forward(self) -> PriorDistribution:
        """Return the distribution, without batch axes."""
        return PriorDistribution(self)

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Return the values ``{site: (..., *shape)}`` of one draw or several of the distribution."""
        if len(self.parts) == 1:
            return {self.parts[0].name: value}
        return dict(zip(self.sites, Joint(self.parts).split(value), strict=True))

    def sample(self, name: str = "prior") -> dict[str, Tensor]:
        """Draw all sites inside of a model, as the site ``name`` and a deterministic site for each of several.

        Of one site, its own name is taken instead of ``name``.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = pf.diagnose(model, lambda y: pyro.sample("mu", dist.Normal(0.5, 0.5**0.5)), torch.tensor(1.0))
        >>> prior = pf.prior_from(posterior, max_epochs=3)
        >>> list(prior.sample())
        ['mu']
        """
        if len(self.parts) == 1:
            return {self.sites[0]: pyro.sample(self.sites[0], self())}
        values = self.split(pyro.sample(name, self()))
        return {
            part.name: pyro.deterministic(part.name, values[part.name], event_dim=len(part.shape))
            for part in self.parts
        }

    def __str__(self) -> str:
        return (
            f"Prior of {', '.join(self.sites)}: {self.flow.dim} unconstrained coordinates, means of the flow off by "
            f"{self.mean_shift:.2f} sd and sds by {100 * self.sd_shift:.0f} % at most, from a posterior that is "
            f"{self.verdict}"
        )

    __repr__ = __str__

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a directory of tensors and JSON; :meth:`load` reads it.

        Raises:
            ValueError: if ``path`` holds other files, or the flow was changed so that it could not be rebuilt.
            OSError: if it cannot be written.
        """
        target = FILES.check_target(path)
        reason = not_rebuilt(self.flow)
        if reason is not None:
            raise ValueError(f"flow: {reason}.")
        text = {
            "flow": to_json(self.flow),
            "parts": [part.describe() for part in self.parts],
            **{name: getattr(self, name) for name in ("status", "verdict", "mean_shift", "sd_shift")},
        }
        file = io.BytesIO()
        torch.save({name: value.detach().cpu() for name, value in self.flow.state_dict().items()}, file)
        FILES.write(target, plain(text), {TENSORS: file.getvalue()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedPrior:
        """Read what :meth:`save` wrote. No code is run: only tensors and JSON are read.

        Raises:
            ValueError: if the directory is no saved prior, is damaged, or of another format version.
        """
        text, contents = FILES.read(path)
        with reading(path, TENSORS, TEXT):
            flow = restored(text["flow"], unpacked(contents[TENSORS]))
            check_numbers(text["parts"], flow.state_dict())
            parts = [Part.read(part, flow._like.dtype) for part in text["parts"]]
            require(sum(part.size for part in parts) == flow.dim, "its sites have another number of coordinates")
            figures = {name: float(text[name]) for name in ("mean_shift", "sd_shift")}
            return cls(flow, parts, status=str(text["status"]), verdict=str(text["verdict"]), **figures)


class PriorDistribution(TorchDistribution):
    """The distribution of a :class:`FittedPrior`; its one event holds all of the sites."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, prior: FittedPrior, batch_shape: torch.Size | Sequence[int] = ()) -> None:
        self.prior = prior
        single = len(prior.parts) == 1
        self._support = prior.parts[0].support if single else Joint(prior.parts)
        event = prior.parts[0].shape if single else [sum(part.shape.numel() for part in prior.parts)]
        super().__init__(torch.Size(batch_shape), torch.Size(event), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The site's own support, or all sites' one after the other."""
        return self._support

    @property
    def event_dims(self) -> tuple[str | None, ...]:
        """Names of the event's axes, None where there is none."""
        return self.prior.parts[0].dims if len(self.prior.parts) == 1 else (None,)

    @property
    def site_dims(self) -> dict[str, tuple[str | None, ...]]:
        """Names of the axes of each site."""
        return {part.name: part.dims for part in self.prior.parts}

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> PriorDistribution:
        """Return independent copies."""
        return PriorDistribution(self.prior, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, *event_shape)``."""
        shape = (*sample_shape, *self.batch_shape)
        z, _ = self.prior.flow.rsample_and_log_prob(shape)
        pieces = z.split([part.size for part in self.prior.parts], -1)
        values = [part.forward(piece)[0] for part, piece in zip(self.prior.parts, pieces, strict=True)]
        return values[0] if len(values) == 1 else torch.cat([value.reshape(*shape, -1) for value in values], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, of shape ``(*sample_shape, *batch_shape)``."""
        values = self.prior.split(value)
        pairs = [part.inverse(values[part.name]) for part in self.prior.parts]
        found = self.prior.flow.log_prob(torch.cat([z for z, _ in pairs], -1))
        found = found - sum(ladj for _, ladj in pairs)
        return found.expand(broadcast(found.shape, self.batch_shape))
