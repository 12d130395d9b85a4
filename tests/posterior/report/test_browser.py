"""The report in a headless Chromium: no complaint, no overflow, sorting by keyboard, light and dark."""

from __future__ import annotations

import pytest

from tests.browser import chromium, find
from tests.posteriors import schools_posterior

pytestmark = pytest.mark.skipif(find() is None, reason="needs Chromium (Debian's package chromium)")
WIDTHS = (390, 1280)
NAMES = ["Choate", "Deerfield", "Phillips Andover", "Phillips Exeter", "Hotchkiss", "Lawrenceville", "St. Paul's", "8"]
COLUMN = "[...document.querySelectorAll('#table-summary tbody tr')].map(row => row.cells[{0}].{1})"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    posterior = schools_posterior("ok", draws=300).assign_coords({"school": NAMES})
    return posterior.report(tmp_path_factory.mktemp("browser") / "report.html")


@pytest.fixture(scope="module")
def page():
    with chromium() as found:
        yield found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_complaint_or_overflow(page, report, width, scheme):
    page.open(report, width, scheme=scheme)
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("innerWidth") == width
    assert not page.errors
    assert [request for request in page.requests if not request.startswith("data:")] == [report.resolve().as_uri()]
    dark = page.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")
    text = page.run("getComputedStyle(document.querySelector('#figure-marginals text')).fill")
    assert text == ("rgb(230, 230, 230)" if scheme == "dark" else "rgb(36, 41, 47)")


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_as_wide_as_the_page_lets_them(page, report, width):
    page.open(report, width)
    wide = page.run("[...document.querySelectorAll('figure svg')].map(one => one.getBoundingClientRect().width)")
    assert len(wide) >= 6
    assert min(wide) > 300
    smallest = page.run(
        "Math.min(...[...document.querySelectorAll('figure svg text')].filter(one => one.textContent.trim())"
        ".map(one => parseFloat(getComputedStyle(one).fontSize)"
        " * Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b)))"
    )
    assert smallest >= 8.0  # pixels


@pytest.mark.parametrize("key", ["Enter", " "])
def test_the_table_sorts_by_keyboard(page, report, key):
    page.open(report, 390)
    page.run("document.querySelector('#table-summary').closest('.scroll').focus()")
    headings = page.run("[...document.querySelectorAll('#table-summary th button')].map(one => one.textContent)")
    place = headings.index("mean")
    for _ in range(place + 1):
        page.press("Tab")
    assert page.run("document.activeElement.textContent") == "mean"
    before = page.run(COLUMN.format(place, "dataset.value"))
    page.press(key)
    up = [float(value) for value in page.run(COLUMN.format(place, "dataset.value"))]
    assert up == sorted(map(float, before))
    assert up != [float(value) for value in before]
    assert page.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    assert "sorted by mean, ascending" in page.run("document.getElementById('said').textContent")
    page.press(key)
    assert [float(value) for value in page.run(COLUMN.format(place, "dataset.value"))] == up[::-1]
    assert page.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"
    assert page.run("document.querySelectorAll('#table-summary [aria-sort]').length") == 1
    page.run("document.querySelector('#table-summary th button').click()")
    names = page.run(COLUMN.format(0, "textContent"))
    assert names[0] == "double[8]"
    assert names.index("theta[Choate]") < names.index("theta[Deerfield]")
    assert not page.errors


def test_a_complaint_would_be_seen(page, tmp_path):
    (tmp_path / "bad.html").write_text("<div style='width: 900px'>x</div><script>undefinedFunction()</script>")
    page.open(tmp_path / "bad.html", 390)
    assert any("undefinedFunction" in error for error in page.errors)
    assert page.run("document.documentElement.scrollWidth") > 390
