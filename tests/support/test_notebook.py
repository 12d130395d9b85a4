"""What Jupyter shows of results: figures once each, verdicts as sentences. Run by a kernel where one is installed."""

from pathlib import Path

import pytest
import torch

import pyro_flows as pf
from tests.posteriors import schools_posterior

ROOT = Path(__file__).parent.parent.parent
SETUP = """
import sys, torch, pyro_flows as pf
from tests.posteriors import schools_posterior
posterior = schools_posterior("{status}", draws=300)
fitted = pf.fit_density("planar", torch.randn(100, 2), max_epochs=1, progress=False)
assert "matplotlib" not in sys.modules
"""
FIGURE = 'pf.plots.plot_posterior(posterior, "theta")'


# without a kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "color"), [("ok", "2e7d4f"), ("corrected", "b26a00"), ("unreliable", "b3261e")])
def test_verdicts_show_their_sentence(status, color):
    posterior = schools_posterior(status, draws=500)
    verdict, sentence = posterior.verdict, str(posterior.verdict)
    assert repr(verdict) == sentence
    assert sentence.startswith(f"{status}: ")
    page = verdict._repr_html_()
    assert page.startswith(f'<b style="color:#{color}">{status}</b>: ')
    assert page in posterior._repr_html_()
    assert repr(posterior) == str(posterior)


def test_html_of_a_verdict_is_escaped():
    verdict = pf.Verdict(
        "corrected", 0.1, 0.7, 0.9, 0.2, 0.1, "a<b", ("importance weighting changes the mean of a<b by 0.20 sd",)
    )
    page = verdict._repr_html_()
    assert "a<b" not in page
    assert page.count("a&lt;b") == 1


def test_a_fitted_density_shows_its_summary_and_not_its_losses():
    fitted = pf.fit_density("planar", torch.randn(100, 2), max_epochs=3, progress=False)
    assert repr(fitted) == f"DensityFit: {fitted.summary()}"
    assert "tensor" not in repr(fitted)
    assert len(repr(fitted).splitlines()) <= 4


# by a kernel ----------------------------------------------------------------------------------------------------------


def executed(cells):
    """Run cells of code in a Jupyter kernel; return the outputs of each."""
    formats = pytest.importorskip("nbformat", reason="needs Jupyter: pip install nbformat nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="needs Jupyter: pip install nbformat nbclient ipykernel")
    client = pytest.importorskip("nbclient", reason="needs Jupyter: pip install nbformat nbclient ipykernel")
    notebook = formats.v4.new_notebook(cells=[formats.v4.new_code_cell(cell) for cell in cells])
    kernel = {"resources": {"metadata": {"path": str(ROOT)}}, "kernel_name": "python3"}
    client.NotebookClient(notebook, timeout=600, **kernel).execute()
    return [cell.outputs for cell in notebook.cells]


def pictures(outputs):
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own making
def test_in_a_notebook():
    cells = [
        SETUP.format(status="unreliable"),
        FIGURE,
        f"figure = {FIGURE}",
        "fitted.plot_losses()",
        "assert 'matplotlib.pyplot' not in sys.modules",
        "posterior.verdict",
        "posterior",
        "fitted",
        "table = posterior.summary()",
        "import matplotlib.pyplot as plt",
        FIGURE,
        f"figure = {FIGURE}",
        "assert not plt.get_fignums()",
    ]
    shown = dict(zip(range(len(cells)), executed(cells), strict=True))
    assert [len(pictures(shown[number])) for number in (1, 2, 3, 10, 11)] == [1, 0, 1, 1, 0]
    (figure,) = pictures(shown[1])
    assert figure.metadata["image/png"] == {"width": round(96 * 7.0), "height": round(96 * 3.6)}
    (verdict,) = shown[5]
    assert verdict.data["text/plain"].startswith("unreliable: guide (k-hat")
    assert "Do not use the draws." in verdict.data["text/plain"]
    assert verdict.data["text/html"].startswith('<b style="color:#b3261e">unreliable</b>')
    (posterior,) = shown[6]  # no warning beside it: it says what it is
    assert "Do not use the draws." in posterior.data["text/html"]
    assert "<table" in posterior.data["text/html"]
    (density,) = shown[7]
    assert density.data["text/plain"].startswith("DensityFit: planar on 90 points")
    (warning,) = shown[8]
    assert "UnreliableWarning: unreliable: summary() hands on draws" in warning.text
    assert "table = posterior.summary()" in warning.text  # the line of the cell
    assert not shown[12]
