"""The report: what stands on it for each kind of posterior, that it is escaped, and where it is written."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.posterior.report import figures as graphs
from pyro_flows.posterior.report.page import Options, content, recipe, render
from pyro_flows.support.process.fallbacks import strict
from tests.posteriors import exact, location, location_guide, schools_chains, schools_posterior

NAMES = [
    "Choate",
    "Deerfield",
    "Andover",
    "Exeter",
    "Hotchkiss",
    "Lawrenceville",
    "St. Paul's",
    "Mt. <b>Hermon</b> $1 $2",
]
SMALL = 3_000_000  # bytes
EMPTY = {
    "br",
    "col",
    "hr",
    "img",
    "input",
    "link",
    "meta",
    "path",
    "use",
    "circle",
    "ellipse",
    "polygon",
    "image",
    "rect",
}


class Reader(HTMLParser):
    """Headings, cells and identifiers; complains of tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"])
        self.links += [found[name] for name in ("href", "src", "xlink:href") if found.get(name)]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open[-2:]:
            self.text.setdefault(tag, []).append(data.strip())


def read(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < SMALL
    return Reader(text), text


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    posterior = schools_posterior("ok", draws=500).assign_coords({"school": NAMES})
    path = posterior.report(tmp_path_factory.mktemp("report") / "deep" / "report.html", title="Eight <i>schools</i>")
    return read(path)


def test_headings_table_and_figures(page):
    found, text = page
    assert found.text["h1"] == ["Eight <i>schools</i>"]
    wanted = ["Verdict", "Summary", "Figures", "Predictive checks", "Model", "Settings, and how to make it again"]
    assert found.text["h2"] == wanted
    assert {"Marginals", "Intervals", "Prior and posterior", "Pairs", "Importance weights"} <= set(found.text["h3"])
    assert {"theta[Choate]", "double[St. Paul's]", "mean of y"} <= set(found.text["th"])
    assert "The draws can be used." in text
    assert text.count("<svg") >= 6
    assert "def schools(y" in text  # its source


def test_everything_is_in_the_file_and_closed(page):
    found, text = page
    assert not [link for link in found.links if not link.startswith(("#", "data:"))]
    assert not re.findall(r"url\((?!#)", text)
    assert not re.findall(r"@import|<script src|<iframe|fetch\(|XMLHttp", text)
    assert len(found.ids) == len(set(found.ids))
    inner = {link[1:] for link in found.links if link.startswith("#")}
    assert inner <= set(found.ids)
    assert '<meta name="generator" content="pyro_flows report">' in text[:400]


def test_labels_are_text_and_no_markup(page):
    _, text = page
    assert "<b>Hermon" not in text
    assert "<i>schools" not in text
    assert "theta[Mt. &lt;b&gt;Hermon&lt;/b&gt; $1 $2]" in text  # in the figures as well as in the table
    svg = text[text.index("<svg") :]
    assert "$1 $2]" in svg


def test_figures_take_the_colors_of_the_page(page):
    _, text = page
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in drawn
    assert "#333333" not in drawn
    assert "#ffffff" not in drawn.lower()
    assert "<style" not in drawn
    for name in set(re.findall(r"var\((--[a-z]+)\)", text)):
        assert text.count(f"{name}:") == 2, name  # light and dark


@pytest.mark.slow
def test_the_same_but_for_the_time(tmp_path):
    posterior = exact(location, location_guide, torch.zeros(4))
    pages = [read(posterior.report(tmp_path / name, predictive=False, source=False))[1] for name in ("a", "b")]
    assert len({re.sub(r"Written by.*", "", text) for text in pages}) == 1
    assert 'id="checks"' not in pages[0]
    assert "def location" not in pages[0]


@pytest.mark.parametrize("status", ["corrected", "unreliable"])
def test_a_verdict_that_is_not_ok_says_why_and_what_to_do(status, tmp_path, recwarn):
    posterior = schools_posterior(status, draws=500)
    found, text = read(posterior.report(tmp_path / "report.html"))
    assert not recwarn
    for reason in posterior.verdict.reasons:
        assert reason in found.text["li"]
    assert ("Do not use these draws." in text) == (status == "unreliable")
    assert ("Train the guide longer, or call refine()." in text) == (status == "unreliable")
    if status == "corrected":
        assert "The approximation (guide) is close to the posterior" in text


@pytest.mark.slow
def test_refined_draws_show_their_chains(tmp_path):
    posterior = schools_chains()
    assert posterior.verdict.status == "refined"
    _, text = read(posterior.report(tmp_path / "report.html", predictive=False))
    for word in ("Nested R-hat", "Method: MCMC", "the guide's own draws were replaced, because", "ess_bulk"):
        assert word in text.replace("&#39;", "'")


def test_chains_from_elsewhere(tmp_path):
    generator = torch.Generator().manual_seed(0)
    draws = {"mu": 0.3 + 0.1 * torch.randn(4, 500, generator=generator)}
    chains = pf.from_mcmc(draws, location, torch.full((100,), 0.3))
    found, text = read(chains.report(tmp_path / "report.html"))
    assert "The chains agree" in text
    assert "pf.from_mcmc(mcmc, location, y)" in text
    assert "Importance weights" not in found.text["h3"]
    assert "Pairs" not in found.text["h3"]  # there is one scalar


@pytest.mark.slow
def test_a_loaded_posterior_and_its_versions(tmp_path):
    posterior = schools_posterior("ok", draws=300).assign_coords({"school": NAMES})
    posterior.save(tmp_path / "saved")
    _, text = read(pf.load(tmp_path / "saved").report(tmp_path / "saved" / "report.html"))
    assert "The graph of the model is left out: the posterior was loaded without its model." in text
    assert "mean of y" in text  # replicates were saved
    assert "pyro-ppl" in text
    posterior.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "report.html").exists()


def test_improper_priors_and_models_without_data_say_so(tmp_path):
    def model():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("f", -0.5 * x**2)

    posterior = pf.diagnose(model, lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), draws=300)
    found, _ = read(posterior.report(tmp_path / "report.html"))
    said = " ".join(found.text["p"])
    assert "its prior cannot be drawn from" in said
    assert "the model observes nothing" in said


def test_a_comparison(tmp_path):
    y = torch.tensor([0.3, 1.1, -0.4, 0.8])

    def wide(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 50.0))
        with pyro.plate("observation", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        precision = len(y) + 50.0**-2
        pyro.sample("mu", dist.Normal(y.sum() / precision, precision**-0.5))

    both = {"narrow": exact(location, location_guide, y), "wide": exact(wide, guide, y)}
    comparison = pf.compare(both)
    found, text = read(both["wide"].report(tmp_path / "report.html", comparison=comparison))
    assert "Comparison" in found.text["h2"]
    assert {"narrow", "wide"} <= set(found.text["th"])
    assert f"elpd of {comparison.names[0]} above that of {comparison.names[1]} by" in text
    with pytest.raises(ValueError, match="comparison: expected a Comparison of compare, got"):
        both["wide"].report(tmp_path / "other.html", comparison=both)
    assert not (tmp_path / "other.html").exists()


# what is chosen, and where it goes ------------------------------------------------------------------------------------


def test_variables_are_chosen_as_in_arviz(tmp_path):
    posterior = schools_posterior("ok", draws=200).assign_coords({"school": NAMES})
    chosen = {"var_names": "~double", "coords": {"school": ["Exeter"]}}
    found, _ = read(posterior.report(tmp_path / "report.html", predictive=False, **chosen))
    assert [name for name in found.text["th"] if "[" in name] == ["theta[Exeter]"]
    with pytest.raises(ValueError, match="var_names: expected one of 'double', 'theta', got 'tehta'"):
        posterior.report(tmp_path / "other.html", var_names="tehta")


@pytest.mark.slow
def test_only_an_earlier_report_is_replaced(tmp_path):
    posterior = exact(location, location_guide, torch.zeros(4))
    path = posterior.report(tmp_path / "report.html", predictive=False, title="one")
    assert posterior.report(path, predictive=False, title="two") == path
    assert "two" in path.read_text()
    (tmp_path / "notes.html").write_text("<p>mine")
    with pytest.raises(ValueError, match="is there and is no earlier report"):
        posterior.report(tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "<p>mine"
    with pytest.raises(ValueError, match=r"expected a file, .* is a directory"):
        posterior.report(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["notes.html", "report.html"]


# parts ----------------------------------------------------------------------------------------------------------------


def test_how_it_is_made_again():
    posterior = pf.fit(location, torch.zeros(3), max_steps=30, draws=100, seed=4, refine=False, progress=False)
    text = recipe(posterior)
    assert "pf.fit(location, y, draws=100, seed=4, max_steps=30, refine=False)" in text


def again(posterior, **given):
    """The posterior that a recipe makes."""
    scope = dict(given)
    exec(recipe(posterior), scope)
    return scope["posterior"]


def bent():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2 + x, 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flow": "planar", "layers": 2, "max_steps": 40, "escalate": False, "refine": False},
        {"flow": pf.planar(1, layers=2), "max_steps": 40, "max_seconds": 60.0, "escalate": False, "refine": False},
    ],
    ids=["as usual", "by name", "own flow"],
)
def test_a_recipe_makes_the_posterior_again(options):
    posterior = pf.fit(bent, draws=200, seed=3, progress=False, **options)
    found = again(posterior, bent=bent, flow=options.get("flow"))
    assert torch.equal(found.samples["x"], posterior.samples["x"])
    assert found.settings["asked"] == posterior.settings["asked"]
    assert found.method == posterior.method


@pytest.mark.slow
def test_recipes_of_guides_chains_refinements_and_keywords():
    given = {"location": location, "guide": location_guide, "y": torch.zeros(4)}
    posterior = exact(location, location_guide, torch.zeros(4)).refine("hmc", max_steps=300, seed=2)
    assert torch.equal(again(posterior, **given).samples["mu"], posterior.samples["mu"])
    draws = {"mu": 0.4 * torch.randn(4, 100, generator=torch.Generator().manual_seed(1))}
    chains = pf.from_mcmc(draws, location, torch.zeros(4))
    assert torch.equal(again(chains, mcmc=draws, **given).z, chains.z)
    named = pf.diagnose(location, location_guide, model_kwargs={"y": torch.zeros(4)}, draws=200)
    made = again(named, location=location, guide=location_guide, model_kwargs={"y": torch.zeros(4)})
    assert torch.equal(made.z, named.z)


@pytest.mark.slow
def test_a_model_that_fails_its_check_is_not_called_ok():
    """The word is about the computation, and the check speaks for the model."""
    y = torch.tensor([-20.0, 20.0, -15.0, 18.0])  # of sd 1, says the model
    values = content(exact(location, location_guide, y), exact(location, location_guide, y).summary(), Options())
    assert values["verdict"].status == "ok"
    assert "does not reproduce the sd of y" in values["checks"][2]
    page = render(values)
    assert page.index("is about the computation. The model does not reproduce") < page.index('id="verdict"')
    assert "Data and replicates · " not in page
    good = torch.tensor([0.4, -0.9, 1.1, -0.2, 0.8])
    posterior = exact(location, location_guide, good)
    assert "reproduces all 4 statistics" in content(posterior, posterior.summary(), Options())["checks"][2]


def test_the_graph_of_the_model_or_why_there_is_none(monkeypatch):
    graphviz = pytest.importorskip("graphviz", reason="needs the Python package graphviz")
    found = graphs.graph(schools_posterior("ok", draws=200))
    if found.missing:
        assert "install graphviz" in found.missing
        pytest.skip("needs the program graphviz")
    assert "theta" in found.svg
    assert 'stroke="black"' in found.svg

    def fails(*args, **kwargs):
        raise RuntimeError("odd")

    monkeypatch.setattr(pyro, "render_model", fails)
    with strict(False):
        assert "Pyro could not draw it: RuntimeError: odd" in graphs.graph(schools_posterior("ok", draws=200)).missing

    def lacks(*args, **kwargs):
        raise graphviz.ExecutableNotFound(["dot"])

    monkeypatch.setattr(pyro, "render_model", lacks)
    assert "install graphviz" in graphs.graph(schools_posterior("ok", draws=200)).missing
