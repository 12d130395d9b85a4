"""The command ``pyro-flows``.

Exit codes: 0 for a posterior that is ``ok``, ``corrected`` or ``refined``, 3 for one that is ``unreliable`` (it is
written all the same), 2 for an error, 130 for a run that was interrupted by Ctrl-C,
SIGTERM or SIGHUP.
"""

from __future__ import annotations

import io
import math
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pyro
import pyro.distributions as dist
import torch
import typer
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_flows import _options as ask
from pyro_flows import plots
from pyro_flows._exits import DONE, INTERRUPTED, UNRELIABLE, Ending, guarded
from pyro_flows._files import replace_file
from pyro_flows._inputs import match, read_data, read_model
from pyro_flows._warnings import UnreliableWarning
from pyro_flows.fitting.diagnose import diagnose
from pyro_flows.fitting.fit import MAX_STEPS, fit
from pyro_flows.fitting.ranks import Followed, joined
from pyro_flows.posterior.posterior import Posterior, load
from pyro_flows.report.page import check_target as check_report
from pyro_flows.results.files import check_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAUSSIAN_STEPS = 1500
EXIT_CODES = (
    "Exit codes: 0 if the posterior is ok, corrected or refined, 3 if it is unreliable (its results are written too), "
    "2 for an error, 130 after Ctrl-C, SIGTERM or SIGHUP."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Normalizing flows for Pyro models: fit a posterior, check it, and go on in ArviZ.",
    epilog=EXIT_CODES,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            own = version("pyro-flows")
        except PackageNotFoundError:  # run from a source tree that was not installed
            own = "0+unknown"
        beside = f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}"
        typer.echo(f"pyro-flows {own} ({beside})")
        raise typer.Exit


# the commands ---------------------------------------------------------------------------------------------------------


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


@app.command("demo", epilog=EXIT_CODES)
def demo_command(
    out: ask.Out = Path("demo-output"),
    seed: ask.Seed = 0,
    max_steps: ask.Steps = MAX_STEPS,
    progress: ask.Progress = None,
    debug: ask.Debug = False,
) -> None:
    """Fit the eight schools (Rubin 1981); write posterior.nc and two figures."""
    guarded(lambda ending: demo(_target(out), ending, seed=seed, max_steps=max_steps, progress=_shown(progress)), debug)


@app.command("fit", epilog=EXIT_CODES)
def fit_command(
    model: ask.ModelName,
    data: ask.Data,
    out: ask.Out,
    flow: ask.FlowName = ask.ANY_FLOW,
    layers: ask.Layers = None,
    draws: ask.Draws = 4000,
    runs: ask.Runs = 1,
    seed: ask.Seed = 0,
    max_steps: ask.StepsOrNot = None,
    max_seconds: ask.Seconds = None,
    escalate: ask.Escalate = True,
    refine: ask.Refine = True,
    train_model: ask.TrainModel = False,
    report: ask.ReportFile = None,
    checkpoint: ask.Checkpoint = None,
    progress: ask.Progress = None,
    debug: ask.Debug = False,
) -> None:
    """Fit the posterior of a Pyro model; write posterior.nc and figures.

    Under torchrun, processes train together a model that has a subsampled plate, and the first one judges and writes.
    """

    def work(ending: Ending) -> int:
        target = _target(out, report)
        chosen, arguments = _read(model, data)
        ending.interrupts.hold(True)  # from here on, fit alone lets the first signal through
        with joined() as ranks:
            try:
                shown = _shown(progress) and ranks.first
                posterior = fit(
                    chosen, model_kwargs=arguments, progress=shown, flow=flow, layers=layers, draws=draws, runs=runs,
                    seed=seed, max_steps=max_steps, max_seconds=math.inf if max_seconds is None else max_seconds,
                    escalate=escalate, refine="auto" if refine else False, train_model=train_model,
                    checkpoint=checkpoint,
                )  # fmt: skip
            except Followed:
                return DONE
        _write(posterior, target, ending, report=report)
        return _code(posterior, ending)

    guarded(work, debug, Path(model.rpartition(":")[0]))


@app.command("report", epilog=EXIT_CODES)
def report_command(
    saved: ask.Saved,
    out: ask.Page = None,
    title: ask.Title = None,
    model: ask.OfModel = None,
    data: ask.OfData = None,
    debug: ask.Debug = False,
) -> None:
    """Write a report of a saved posterior: one HTML file to read and to send."""

    def work(ending: Ending) -> int:
        if (model is None) != (data is None):
            raise ValueError("model: expected --model and --data together, got one of them. Give both or neither.")
        target = check_report(saved / "report.html" if out is None else out)
        with warnings.catch_warnings():  # the report says it
            warnings.simplefilter("ignore", UnreliableWarning)
            if model is None or data is None:
                posterior = load(saved)
            else:
                chosen, arguments = _read(model, data)
                posterior = load(saved, chosen, model_kwargs=arguments)
        typer.echo(str(posterior.verdict))
        typer.echo(f"Wrote the report to {posterior.report(target, title=title)}.")
        return UNRELIABLE if posterior.verdict.status == "unreliable" else DONE

    guarded(work, debug, None if model is None else Path(model.rpartition(":")[0]))


def main() -> None:
    """Run the command line; errors are one line on stderr and exit code 2."""
    app(prog_name="pyro-flows")


# before and after a fit -----------------------------------------------------------------------------------------------


def _read(model: str, data: Path) -> tuple[Callable[..., object], dict[str, object]]:
    """Return a model and its arguments, from their files."""
    chosen = read_model(model)
    return chosen, match(chosen, read_data(data))


def _code(posterior: Posterior, ending: Ending) -> int:
    """The exit code for results that were written."""
    if ending.interrupts.came():
        with suppress(OSError):
            typer.echo("pyro-flows: interrupted; these are the best results so far.", err=True)
        return INTERRUPTED
    return UNRELIABLE if posterior.verdict.status == "unreliable" else DONE


def _target(out: Path, report: Path | None = None) -> Path:
    """Check before any work that results can be written to ``out``, and a report; leave nothing there."""
    if report is not None:
        check_report(report)
    try:
        target = check_target(out)
    except ValueError as error:
        raise ValueError(str(error).replace("path: ", "out: ", 1)) from None
    place = target.absolute()
    try:
        while not place.is_dir():
            if place.exists() or place.is_symlink():
                raise NotADirectoryError(0, f"{str(place)!r} is no directory")
            place = place.parent
        tempfile.TemporaryDirectory(prefix=".pyro-flows-", dir=place).cleanup()
    except OSError as error:
        raise ValueError(
            f"out: expected a directory that can be written, got {str(out)!r}: {error.strerror or error}. Name another."
        ) from None
    return target


def _shown(progress: bool | None) -> bool:
    """Whether there is a progress bar: as asked for, or if somebody sees it."""
    return sys.stderr.isatty() if progress is None else progress


# what they do ---------------------------------------------------------------------------------------------------------


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Effects of coaching in eight schools, non-centered (Rubin 1981)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def demo(target: Path, ending: Ending, *, seed: int, max_steps: int, progress: bool) -> int:
    """Fit the eight schools by `fit` and by a full-rank Gaussian; write results and figures to ``target``."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    ending.interrupts.hold(True)
    posterior = fit(eight_schools, y, sigma, seed=seed, max_steps=max_steps, progress=progress)
    _write(posterior, target, ending)
    if ending.interrupts.came():
        return _code(posterior, ending)
    guide = _gaussian(y, sigma, ending, seed=seed, steps=min(GAUSSIAN_STEPS, max_steps))
    if ending.interrupts.came():
        return _code(posterior, ending)
    gaussian = diagnose(eight_schools, guide, y, sigma)
    labels = (posterior.method, "full-rank Gaussian guide")
    pairs = plots.plot_pairs(posterior, "mu", "tau", compare=gaussian, transform={"tau": torch.log}, labels=labels)
    _draw(pairs, target / "pairs.png")
    ending.say(f"For comparison, a full-rank Gaussian guide: {gaussian.verdict}")
    return _code(posterior, ending)


def _gaussian(y: Tensor, sigma: Tensor, ending: Ending, *, seed: int, steps: int) -> AutoMultivariateNormal:
    """Train Pyro's full-rank Gaussian guide by Pyro's SVI."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guide = AutoMultivariateNormal(eight_schools)
        svi = SVI(eight_schools, guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO())
        for _ in range(steps):
            svi.step(y, sigma)
            if ending.interrupts.came():
                break
    return guide


def _write(posterior: Posterior, out: Path, ending: Ending, *, report: Path | None = None) -> None:
    """Save the posterior; then print verdict and table, and write figures, and a report if one is wanted."""
    ending.left = f"in {out} is what was there before, or the whole posterior"
    with warnings.catch_warnings():  # the verdict says it
        warnings.simplefilter("ignore", UnreliableWarning)
        posterior.save(out)
        ending.left = f"the posterior is in {out}, what goes with it may be missing"
        ending.say(str(posterior.verdict))
        ending.say(posterior.summary().to_string())
    _draw(plots.plot_posterior(posterior), out / "posterior.png")
    if len(posterior.losses):
        _draw(plots.plot_elbo(posterior), out / "elbo.png")
    else:
        (out / "elbo.png").unlink(missing_ok=True)  # of an earlier fit
        ending.say(f"No flow was trained ({posterior.method}), so there is no elbo.png.")
    ending.say(f"Wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}.")
    if report is not None:
        ending.say(f"Wrote the report to {posterior.report(report, progress=False)}.")


def _draw(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    stored = io.BytesIO()
    figure.savefig(stored, format="png")
    replace_file(path, stored.getvalue())
