"""The command ``pyro-flows``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
import typer
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from pyro_flows import plots
from pyro_flows.alarms import UnreliableWarning
from pyro_flows.data import match, read_data, read_model
from pyro_flows.diagnostics import diagnose
from pyro_flows.fit import MAX_STEPS, fit
from pyro_flows.posterior import Posterior
from pyro_flows.storage import check_target

GAUSSIAN_STEPS = 1500

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Normalizing flows for Pyro models: fit, judge, hand over to ArviZ.",
)

Out = Annotated[Path, typer.Option(help="Directory for the results: new, empty, or of an earlier run.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all randomness: the same seed gives the same result.")]
Steps = Annotated[int, typer.Option(min=1, help="Bound on optimisation steps; the fit stops by itself before.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


# the commands ---------------------------------------------------------------------------------------------------------


@app.command("demo")
def demo_command(
    out: Out = Path("demo-output"), seed: Seed = 0, max_steps: Steps = MAX_STEPS, debug: Debug = False
) -> None:
    """Fit the eight schools (Rubin 1981); write posterior.nc and three figures."""
    _guarded(lambda: demo(out, seed=seed, max_steps=max_steps), debug)


@app.command("fit")
def fit_command(
    model: Annotated[str, typer.Argument(metavar="FILE.py:MODEL", help="A Python file and a Pyro model in it.")],
    data: Annotated[Path, typer.Option(help="JSON, CSV or npz file with a field for each parameter of the model.")],
    out: Out,
    flow: Annotated[str, typer.Option(help="Kind of flow: realnvp, nice, planar.")] = "realnvp",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Number of layers; the flow's own default otherwise.")
    ] = None,
    draws: Annotated[int, typer.Option(min=100, help="Number of posterior draws.")] = 4000,
    seed: Seed = 0,
    max_steps: Steps = MAX_STEPS,
    debug: Debug = False,
) -> None:
    """Fit a flow to the posterior of a Pyro model; write posterior.nc and two figures."""

    def work() -> None:
        target = check_target(out)
        chosen = read_model(model)
        arguments = match(chosen, read_data(data))
        options: dict[str, Any] = {"flow": flow, "layers": layers, "draws": draws, "seed": seed, "max_steps": max_steps}
        posterior = fit(chosen, model_kwargs=arguments, progress=_interactive(), **options)
        _write(posterior, target)

    _guarded(work, debug)


def main() -> None:
    """Run the command line; errors are one line on stderr and exit code 2."""
    app(prog_name="pyro-flows")


def _guarded(work: Callable[[], None], debug: bool) -> None:
    """Run; turn any error into one line, unless a traceback is asked for."""
    try:
        work()
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else "no message"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        hint = "" if isinstance(error, ValueError) else " (--debug shows the traceback)"
        typer.echo(f"pyro-flows: error: {kind}{text}{hint}", err=True)
        raise typer.Exit(2) from None


def _interactive() -> bool:
    return sys.stderr.isatty()


# what they do ---------------------------------------------------------------------------------------------------------


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Effects of coaching in eight schools, non-centred (Rubin 1981)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def demo(out: Path, *, seed: int, max_steps: int) -> None:
    """Fit the eight schools by a flow and by a full-rank Gaussian; write results and figures to ``out``."""
    target = check_target(out)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    posterior = fit(eight_schools, y, sigma, seed=seed, max_steps=max_steps, progress=_interactive())
    gaussian = diagnose(eight_schools, _gaussian(y, sigma, seed=seed, steps=min(GAUSSIAN_STEPS, max_steps)), y, sigma)
    labels = ("flow", "full-rank Gaussian guide")
    pairs = plots.plot_pairs(posterior, "mu", "tau", compare=gaussian, transform={"tau": torch.log}, labels=labels)
    _write(posterior, target, {"pairs.png": pairs})
    typer.echo(f"For comparison, a full-rank Gaussian guide: {gaussian.verdict}")


def _gaussian(y: Tensor, sigma: Tensor, *, seed: int, steps: int) -> AutoMultivariateNormal:
    """Train Pyro's full-rank Gaussian guide by Pyro's SVI."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guide = AutoMultivariateNormal(eight_schools)
        svi = SVI(eight_schools, guide, Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(steps):
            svi.step(y, sigma)
    return guide


def _write(posterior: Posterior, out: Path, figures: dict[str, Any] | None = None) -> None:
    """Print verdict and table; save posterior and figures."""
    typer.echo(str(posterior.verdict))
    with warnings.catch_warnings():  # the line above says it
        warnings.simplefilter("ignore", UnreliableWarning)
        typer.echo(posterior.summary().to_string())
        posterior.save(out)
    drawn = {
        "elbo.png": plots.plot_elbo(posterior),
        "posterior.png": plots.plot_posterior(posterior),
        **(figures or {}),
    }
    for name, figure in drawn.items():
        figure.savefig(out / name)
    typer.echo(f"Wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}.")
