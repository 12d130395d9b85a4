"""The site as `make docs` builds it, in a headless Chromium: no overflow, complaint, broken link or hard-to-reach part.

It needs what `make docs` installs, Chromium, and npm for axe-core, which checks contrast, names and keyboard access.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from tests.browser import chromium, find

ROOT = Path(__file__).parent.parent.parent
WIDTHS = (390, 1100, 1280)
AXE = "axe-core@4.14.1"
RESULTS = "document.querySelectorAll('#search-results li')"
VIOLATIONS = """axe.run(document, {preload: false, resultTypes: ['violations']}).then(found =>
    found.violations.map(one => [one.id, one.impact, one.nodes.length, one.nodes[0].html.slice(0, 150)]))"""
SERIOUS = {"serious", "critical"}
NEEDED = ("sphinx", "myst_nb", "furo", "mathjax", "sphinx_copybutton", "sphinx_design")
LACKING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"needs the extra docs: {', '.join(LACKING)}"),
]
needs_browser = pytest.mark.skipif(find() is None, reason="needs Chromium (Debian's package chromium)")


class Links(HTMLParser):
    """The addresses and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with warnings as errors."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(target / "trees"), "docs"]
    done = subprocess.run([*command, str(target / "html")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / "html"


def pages(site: Path) -> list[Path]:
    """All pages that somebody reads."""
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


def broken(site: Path) -> list[str]:
    """The links inside of the site that lead nowhere, with the pages that they stand on."""
    found = {path: Links(path.read_text(encoding="utf-8")) for path in pages(site)}
    faults = []
    for path, page in found.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            target = (path.parent / unquote(urlsplit(address).path)).resolve() if address else path
            if not target.exists() or (anchor and target in found and unquote(anchor) not in found[target].anchors):
                faults.append(f"{path.relative_to(site)}: {link}")
    return faults


def test_no_link_is_broken(site):
    assert len(pages(site)) > 50
    assert not broken(site)


def test_nothing_is_loaded_from_elsewhere(site):
    for path in pages(site):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="([^"]*)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]*)"', text
        )
        assert not [one for pair in loaded for one in pair if re.match(r"(?:https?:)?//", one)], path.name


def test_the_check_of_links_bites(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there">x</a><a href="b.html#not">y</a><a href="c.html">z</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="https://example.org/none">far</a>')
    assert broken(tmp_path) == ["a.html: b.html#not", "a.html: c.html"]


# in the browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The text of axe-core, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm, which brings axe-core")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", AXE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot bring axe-core: {done.stderr.strip().splitlines()[-1:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def ready(page, path, width, **more):
    """Open a page, and wait for its formulae."""
    page.open(path, width, **more)
    page.run("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 1) : 1")


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_open_without_complaint_or_overflow(page, site, width):
    faults = []
    for path in pages(site):
        ready(page, path, width)
        if (wide := page.run("document.documentElement.scrollWidth")) > width:
            faults.append(f"{path.relative_to(site)}: {wide} pixels wide")
        if page.errors:
            faults.append(f"{path.relative_to(site)}: {page.errors}")
        if far := [request for request in page.requests if not request.startswith(("data:", "file:", "blob:"))]:
            faults.append(f"{path.relative_to(site)}: asks for {far}")
    assert not faults


@needs_browser
def test_formulae_are_set_without_network(page, site):
    ready(page, site / "understand" / "flows.html", 1280)
    assert page.run("document.querySelectorAll('mjx-container svg').length") > 20
    assert page.run("document.querySelectorAll('mjx-merror').length") == 0


@needs_browser
def test_the_search_finds_pages_without_network(page, site):
    page.open(site / "search.html", 1280)
    page.run("location.search = '?q=funnel'")
    found = 0
    for _ in range(50):
        with contextlib.suppress(RuntimeError):  # while the page is left for the one with results
            found = page.run(f"new Promise(done => setTimeout(() => done({RESULTS}.length), 100))")
        if found:
            break
    assert found >= 2
    assert not page.errors


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing_serious(page, site, axe, width, scheme):
    faults: dict[str, list[str]] = {}
    for path in pages(site):
        ready(page, path, width, scheme=scheme)
        page.run(f"{axe}; 1")
        found = page.run(VIOLATIONS)
        for rule, impact, count, html in found:
            if impact in SERIOUS:
                faults.setdefault(f"{rule} ({impact})", []).append(f"{path.relative_to(site)}: {count} x {html}")
    assert not faults, {rule: (len(where), where[:3]) for rule, where in faults.items()}
