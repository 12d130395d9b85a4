"""The options of the command line, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_flows.flows.recipe import AUTO, VECTOR_BUILDERS


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
ANY_FLOW = AUTO
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
