"""The figures that README and the landing page state are those of the benchmarks' tables."""

import re
from pathlib import Path

import pytest
from scipy.stats import beta

import pyro_flows as pf
from benchmarks import records, tables
from benchmarks.zoo import reporting as zoo_reporting
from benchmarks.zoo import running as zoo_running

ROOT = Path(__file__).parent.parent.parent
EVIDENCE = ROOT / "docs" / "evidence"


def section(page, name):
    """The text between the markers of a section."""
    text = (EVIDENCE / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]


def row(text, label):
    """The cells of the row with this label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def measured():
    """What the tables say: posteriors, those that are right, fits, those wrong and called usable, and so on."""
    posteriors, zoo, nuts = (
        section("accuracy.md", "posteriordb"),
        section("accuracy.md", "zoo"),
        section("nuts.md", "nuts"),
    )
    ours = row(posteriors, "pyro_flows.fit")
    right, count = (int(number) for number in ours[1].split(" of "))
    tenfold, faster = re.search(r"Pyro NUTS: (\d+) of \d+ 10 x faster, (\d+) faster", nuts).groups()
    return {
        "right": right,
        "count": count,
        "alarms": int(row(zoo, "all")[3]),
        "tenfold": int(tenfold),
        "faster": int(faster),
    }


def words(path):
    return " ".join(path.read_text(encoding="utf-8").split())


def test_readme_says_what_was_measured():
    found, text = measured(), words(ROOT / "README.md")
    assert found["count"] == found["faster"]
    assert (
        f"On {found['right']} of {found['count']} posteriors with reference draws, every mean is within 0.1 sd" in text
    )
    assert f"than Pyro's NUTS on all {found['faster']}, and at least ten times less on {found['tenfold']}" in text
    numpyro = re.search(r"NumPyro NUTS: .*?(\d+) faster", section("nuts.md", "nuts")).group(1)
    assert f"less than NumPyro's NUTS on {numpyro} of {found['count']}, too" in text


def test_the_landing_page_says_what_was_measured():
    found, text = measured(), words(ROOT / "docs" / "index.md")
    assert f"{found['right']} of {found['count']} posteriors: every mean within 0.1 sd, every sd within 10 %" in text
    assert f"NUTS on {found['faster']} of {found['count']}, ten times less on {found['tenfold']}" in text


def test_the_page_of_the_verdict_says_what_was_measured():
    found, text = measured(), words(ROOT / "docs" / "understand" / "verdict.md")
    alarms = f"{found['alarms']} right result{' was' if found['alarms'] == 1 else 's were'} called `unreliable`"
    assert f"<!-- zoo-claim: end -->, and {alarms}." in text


@pytest.mark.parametrize("page", tables.CLAIMING, ids=lambda page: page.name)
def test_pages_say_how_often_the_verdict_was_wrong_over_all_seeds(page):
    rows = zoo_reporting.newest(records.read(zoo_running.OUT))
    lies, fits = sum(row["outcome"] == "lie" for row in rows), len(rows)
    limit = beta.ppf(0.95, lies + 1, fits - lies)  # Clopper and Pearson
    (said,) = re.findall("<!-- zoo-claim: begin -->(.*?)<!-- zoo-claim: end -->", words(page))
    number = int(re.search(r"(\w+) wrong results? w", said)[1].replace("no", "0"))
    assert (int(said.split()[0]), number) == (fits, lies)
    assert f"95 % upper bound {100 * limit:.2f} %" in said
    assert f"of {len({row['seed'] for row in rows})} seed" in said
    assert f"{fits} random models" in said


def test_the_page_of_many_latents_says_what_was_measured():
    named, larger = section("accuracy.md", "named"), section("nuts.md", "larger")
    text = words(ROOT / "docs" / "howto" / "many-latents.md")
    radon, rates = row(named, "radon_slopes"), row(larger, "many_locals")
    four = next(line.strip("|").split("|") for line in named.splitlines() if line.startswith("| items_76 | 4 |"))
    items = row(named, "items_501")
    assert f"`{four[7].split()[-1]}`, both mirrored modes, {four[9].strip()} seconds" in text
    assert radon[7] == "3 refined"
    assert f"`refined` with all three seeds, means within {radon[3]} sd, {radon[9]} seconds" in text
    assert f"`{items[7].split()[-1]}`, means within {items[3]} sd, {items[9]} seconds" in text
    assert rates[3] == "yes"
    assert f"| {rates[1]} (counts with a rate each) | `{rates[4]}`, right, {float(rates[2]):.0f} seconds" in text
    assert f"with {items[2]} and {rates[1]} latents, and both were right" in words(ROOT / "README.md")


def test_how_to_pages_say_what_was_measured():
    found, pages = measured(), ROOT / "docs" / "howto"
    right = f"right on {found['right']} of {found['count']} reference posteriors"
    assert right in words(pages / "choose-a-flow.md")
    faster, slower = re.search(r"NumPyro NUTS: .*?(\d+) faster, (\d+) slower", section("nuts.md", "nuts")).groups()
    numpyro = f"less processor time on {faster} of {found['count']} posteriors, and more on {slower}"
    assert numpyro in words(pages / "from-numpyro.md")
    step = next(line for line in section("speed.md", "speed").splitlines() if line.startswith("| 100000 |"))
    assert f"a step takes {round(float(step.split('|')[2]), -1):.0f} milliseconds on one" in words(pages / "gpu.md")


def test_pages_of_understand_say_what_was_measured():
    pages, named = ROOT / "docs" / "understand", section("accuracy.md", "named")
    radon = row(named, "radon_slopes")
    assert radon[7].endswith(" refined")
    within = f"`refined`, with means and sds within {100 * max(map(float, radon[3:5])):.0f} %"
    assert within in words(pages / "centering.md")
    path = row(section("speed.md", "speed"), "realnvp")
    assert f"{float(path[3]):.1f} times as long" in words(pages / "gradients.md")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if link and not (ROOT / link).exists()]


def test_the_entry_to_cite_is_that_of_the_package():
    entry, known = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/cite.md", "CITATION.cff"))
    title, version = (
        re.search(rf'^{name}: "?([^"\n]+)', known, flags=re.MULTILINE)[1] for name in ("title", "version")
    )
    assert version == pf.__version__
    plain = re.sub(r"[{}\\]", "", entry)
    assert f"title   = {title}," in plain
    assert f"version = {version}," in plain
