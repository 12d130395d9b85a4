"""The command ``pyro-flows``.

Exit codes: 0 for a posterior that is ``ok``, ``corrected`` or ``refined``, 3 for one that is ``unreliable`` (it is
written all the same), 2 for an error, 130 for a run that was interrupted by Ctrl-C, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import math
import platform
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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

from pyro_flows.fitting.diagnose import diagnose
from pyro_flows.fitting.fit import MAX_STEPS, fit
from pyro_flows.fitting.ranks import Followed, joined
from pyro_flows.flows.recipe import AUTO, VECTOR_BUILDERS
from pyro_flows.posterior import plots
from pyro_flows.posterior.export.files import FILES
from pyro_flows.posterior.posterior import Posterior, load
from pyro_flows.posterior.report.page import check_target as check_report
from pyro_flows.support.figures import png
from pyro_flows.support.files.files import check_folder, replace_file
from pyro_flows.support.files.inputs import match, read_data, read_model
from pyro_flows.support.process.fallbacks import Tried, first_line
from pyro_flows.support.process.interrupts import STATE, interruptible
from pyro_flows.support.process.warnings import UnreliableWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DONE, ERROR, UNRELIABLE, INTERRUPTED = 0, 2, 3, 130  # exit codes; 130 is what shells give to Ctrl-C
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


# how a command ends ---------------------------------------------------------------------------------------------------


@dataclass
class Ending:
    """What a command that is ended at once has come to."""

    left: str = "no complete results were written"  # what is there, in words
    integers: str = ""  # the fields of the data that are tensors of integers

    def say(self, text: str) -> None:
        """Print a line. After a signal the terminal may be gone, which is no reason not to go on."""
        try:
            typer.echo(text)
        except OSError:
            if not STATE.came():
                raise


def guarded(work: Callable[[Ending], int], debug: bool, file: Path | None = None) -> None:
    """Run, and exit with the code that comes back; turn any error into one line, unless a traceback is asked for by
    ``debug``.

    Ctrl-C, SIGTERM and SIGHUP end the work as :func:`~pyro_flows.fit` says. An error that was raised below the user's
    Python file is shown with its kind and line.
    """
    ending = Ending()
    code = ERROR
    try:
        with Tried(lambda error: not debug) as tried, interruptible():
            code = work(ending)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        with suppress(OSError):
            typer.echo(f"pyro-flows: interrupted; {ending.left}.", err=True)
        code = INTERRUPTED
    if tried.error is not None:
        error = _own(tried.error, file)
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else "no message"
        if text.endswith(":") and len(lines) > 1:  # torch writes the values that it means into the next line
            text = f"{text} {lines[1].strip()}"
        line = _line(error, file)
        plain = isinstance(error, ValueError) and not line
        kind = "" if plain else f"{type(error).__name__}: "
        hint = "" if plain else f"{line}{_of_integers(error, ending.integers)} (--debug shows the traceback)"
        typer.echo(f"pyro-flows: error: {kind}{text}{hint}", err=True)
    raise typer.Exit(code)


def _of_integers(error: Exception, fields: str) -> str:
    """What to write where torch takes no integers, if the data have some."""
    if not fields or not isinstance(error, RuntimeError) or "Long" not in str(error):
        return ""
    return f". The data have integers in {fields}. Write {fields.split(',')[0]}.float() in the model, or decimals there"


def _own(error: Exception, file: Path | None) -> Exception:
    """The error of the user's file that an error was raised from, if it quotes that one; otherwise the error itself."""
    cause = error.__cause__
    if not isinstance(cause, Exception) or first_line(cause) not in str(error) or _line(error, file):
        return error
    own = _own(cause, file)
    return own if _line(own, file) else error


def _line(error: Exception, file: Path | None) -> str:
    """The last line of the user's file that the error passed through, if any."""
    if file is None:
        return ""
    passed = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file.absolute()]
    return f" ({file.name}, line {passed[-1].lineno})" if passed else ""


# options --------------------------------------------------------------------------------------------------------------


def _seconds(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter(f"expected a number of seconds > 0, got {value}.")
    return value


Out = Annotated[Path, typer.Option(help="Directory for the results: new, empty, or with earlier results.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all randomness: the same seed gives the same result.")]
Steps = Annotated[
    int, typer.Option(min=1, help="Largest number of optimization steps; training often converges earlier.")
]
Seconds = Annotated[
    float | None,
    typer.Option(callback=_seconds, help="Time limit of the fit in seconds; the verdict says if it was reached."),
]
Progress = Annotated[bool | None, typer.Option(help="Show a progress bar; by default it is shown in a terminal.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
FlowName = Annotated[str, typer.Option(help=f"Kind of flow: {', '.join([AUTO, *sorted(VECTOR_BUILDERS)])}.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Number of layers; the default depends on the flow.")]
Draws = Annotated[int, typer.Option(min=100, help="Number of posterior draws.")]
Runs = Annotated[
    int, typer.Option(min=1, help="Number of independent runs, which are compared; from 2 on, each trains a flow.")
]
StepsOrNot = Annotated[
    int | None,
    typer.Option(min=1, help="Largest number of optimization steps; by default 6000, more in many dimensions."),
]
Escalate = Annotated[
    bool, typer.Option(help="If one flow does not suffice, go on with MCMC, mixtures and runs at missed modes.")
]
Refine = Annotated[bool, typer.Option(help="Run Markov chains from the flow's draws if weights cannot correct these.")]
TrainModel = Annotated[
    bool, typer.Option("--train-model", help="Also train the model's own parameters (pyro.param, modules).")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep what the work has come to in a file: the same command goes on from there."),
]
Data = Annotated[Path, typer.Option(help="JSON, CSV or npz file with a field for each parameter of the model.")]
ModelName = Annotated[str, typer.Argument(metavar="FILE.py:MODEL", help="A Python file and a Pyro model in it.")]
ReportFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write a report, one HTML file to read and to send.")
]
Saved = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a saved posterior, as `fit` writes it.")]
Page = Annotated[Path | None, typer.Option(help="The HTML file; report.html in DIR by default.")]
Title = Annotated[str | None, typer.Option(help="Heading of the report.")]
OfModel = Annotated[
    str | None, typer.Option(metavar="FILE.py:MODEL", help="The model that was fitted, for its graph and source.")
]
OfData = Annotated[Path | None, typer.Option(help="The data of the fit; needed with --model.")]


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
    out: Out = Path("demo-output"),
    seed: Seed = 0,
    max_steps: Steps = MAX_STEPS,
    progress: Progress = None,
    debug: Debug = False,
) -> None:
    """Fit the eight schools (Rubin 1981); write posterior.nc and two figures."""
    guarded(lambda ending: demo(_target(out), ending, seed=seed, max_steps=max_steps, progress=_shown(progress)), debug)


@app.command("fit", epilog=EXIT_CODES)
def fit_command(
    model: ModelName,
    data: Data,
    out: Out,
    flow: FlowName = AUTO,
    layers: Layers = None,
    draws: Draws = 4000,
    runs: Runs = 1,
    seed: Seed = 0,
    max_steps: StepsOrNot = None,
    max_seconds: Seconds = None,
    escalate: Escalate = True,
    refine: Refine = True,
    train_model: TrainModel = False,
    report: ReportFile = None,
    checkpoint: Checkpoint = None,
    progress: Progress = None,
    debug: Debug = False,
) -> None:
    """Fit the posterior of a Pyro model; write posterior.nc and figures.

    Under torchrun, processes train together a model that has a subsampled plate, and the first one judges and writes.
    """

    def work(ending: Ending) -> int:
        target = _target(out, report)
        chosen, arguments = _read(model, data)
        whole = (name for name, value in arguments.items() if isinstance(value, Tensor) and value.dtype == torch.int64)
        ending.integers = ", ".join(whole)
        STATE.hold(True)  # from here on, fit alone lets the first signal through
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
        return _code(posterior)

    guarded(work, debug, Path(model.rpartition(":")[0]))


@app.command("report", epilog=EXIT_CODES)
def report_command(
    saved: Saved,
    out: Page = None,
    title: Title = None,
    model: OfModel = None,
    data: OfData = None,
    debug: Debug = False,
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


def _code(posterior: Posterior) -> int:
    """The exit code for results that were written."""
    if STATE.came():
        with suppress(OSError):
            typer.echo("pyro-flows: interrupted; these are the best results so far.", err=True)
        return INTERRUPTED
    return UNRELIABLE if posterior.verdict.status == "unreliable" else DONE


def _target(out: Path, report: Path | None = None) -> Path:
    """Check before any work that results can be written to ``out``, and a report; leave nothing there."""
    if report is not None:
        check_report(report)
    try:
        target = FILES.check_target(out)
    except ValueError as error:
        raise ValueError(str(error).replace("path: ", "out: ", 1)) from None
    try:
        check_folder(target)
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
    STATE.hold(True)
    posterior = fit(eight_schools, y, sigma, seed=seed, max_steps=max_steps, progress=progress)
    _write(posterior, target, ending)
    guide = _gaussian(y, sigma, seed=seed, steps=min(1500, max_steps))
    if STATE.came():
        return _code(posterior)
    gaussian = diagnose(eight_schools, guide, y, sigma)
    labels = (posterior.method, "full-rank Gaussian guide")
    pairs = plots.plot_pairs(posterior, "mu", "tau", compare=gaussian, transform={"tau": torch.log}, labels=labels)
    _draw(pairs, target / "pairs.png")
    ending.say(f"For comparison, a full-rank Gaussian guide: {gaussian.verdict}")
    return _code(posterior)


def _gaussian(y: Tensor, sigma: Tensor, *, seed: int, steps: int) -> AutoMultivariateNormal:
    """Train Pyro's full-rank Gaussian guide by Pyro's SVI."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guide = AutoMultivariateNormal(eight_schools)
        svi = SVI(eight_schools, guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO())
        for _ in range(steps):
            if STATE.came():
                break
            svi.step(y, sigma)
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
    replace_file(path, png(figure)[0])
