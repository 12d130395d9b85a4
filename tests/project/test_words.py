"""No sentence of README and Start here is longer than 30 words; of other pages, CONTRIBUTING and verdicts, than 35."""

import math
import re
from pathlib import Path

import pytest

from pyro_flows import Verdict
from pyro_flows.inference.verdict.chains import McmcDiagnostics, objections
from pyro_flows.inference.verdict.verdict import OF_FITS, OF_MCMC, OF_MIXING, OF_WEIGHTS, next_step

ROOT = Path(__file__).parent.parent.parent
LONGEST, LONGEST_AT_FIRST = 35, 30  # words
FIRST = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "start").glob("*.md"))]
MORE = [path for room in ("howto", "understand", "reference") for path in sorted((ROOT / "docs" / room).glob("*.md"))]
FILES = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "gallery.md", ROOT / "docs" / "notebooks.md", *MORE]
DESIGN = [ROOT / "docs" / "design.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
BLOCK = re.compile(r"^(?:[-*] |\d+\. |#+ |\|)")  # an item, a heading, a row of a table: a sentence does not go on there
DISPLAYED = re.compile(r"^\s*```.*?^\s*```$|<!--.*?-->|^\$\$.*?^\$\$$", flags=re.MULTILINE | re.DOTALL)
ONE_WORD = re.compile(r"`[^`]*`|\$[^$]*\$|!?\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<=[.?!])[*)\"]*\s+|\s*\|\s*")


def prose(text):
    """The paragraphs, items, headings and rows of a Markdown file, without its code."""
    found = [""]
    for line in DISPLAYED.sub("\n\n", text).splitlines():
        if not line.strip():
            found.append("")
        elif BLOCK.match(line.lstrip()):
            found.append(line.strip())
        else:
            found[-1] += " " + line.strip()
    return [part for part in found if part]


def sentences(text):
    """The sentences of a text; code and formulas in a line count as one word each."""
    plain = ONE_WORD.sub(lambda match: match[1] or "CODE", text)
    return [part for part in END.split(plain) if part]


def words(sentence):
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def long_ones(parts, longest=LONGEST):
    return [sentence for part in parts for sentence in sentences(part) if words(sentence) > longest]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    ("paths", "longest"),
    [(FIRST, LONGEST_AT_FIRST), ([*FILES, *DESIGN], LONGEST)],
    ids=["the first pages", "other documents"],
)
def test_no_sentence_is_long(paths, longest):
    found = {name_of(path): long_ones(prose(path.read_text(encoding="utf-8")), longest) for path in paths}
    assert paths
    assert not {name: sentences for name, sentences in found.items() if sentences}


PAGES = [*FIRST[1:], *FILES[1:], *sorted((ROOT / "docs" / "evidence").glob("*.md"))]


SENTENCE = re.compile(r"(?!```)[A-Z`\[*]")


def opening(text):
    """The first line of a page below its heading."""
    return next(line for line in text.partition("\n# ")[2].splitlines()[1:] if line.strip())


def test_pages_begin_with_a_sentence():
    """Not with code, a table, a picture or another heading: it says what the page is for."""
    first = {name_of(path): opening("\n" + path.read_text(encoding="utf-8")) for path in PAGES}
    assert not {name: line for name, line in first.items() if not SENTENCE.match(line)}


# verdicts -------------------------------------------------------------------------------------------------------------

GOOD = McmcDiagnostics(64, 64, 128, 1.01, 1.005, 4000.0, 3500.0, "the log density", 0.0, 0.1, 0.85, 0.6, 1.001, 3.0)
BAD = McmcDiagnostics(64, 64, 128, 1.2, 1.1, 90.0, 80.0, "theta[0] (non-centered)", 0.1, 0.1, 0.2, 0.1, 1.5, 3.0)
REASONS = (
    "the guide misses a mode near z[0] = 10, z[1] = 2.5, z[2] = -1.25 and 3 more",
    "k-hat 0.91 is not below its threshold 0.70",
    "ESS/S 0.031 is below 0.1",
    "k-hat 0.55 is not below 0.5 and weighting changes the results, so the weights have infinite variance",
    *objections(BAD),
)
NOTES = ("no search for missed modes was made", "tau: heavy tails, so quantiles were compared")


def verdict(status, **more):
    reasons = () if status == "ok" else REASONS
    return Verdict(status, 0.26, 0.7, 0.95, 0.03, 0.02, "theta[0]", reasons, NOTES, **more)


def mcmc(status):
    reasons = (
        () if status == "ok" else ("12 of 4000 transitions diverged", "effective sample size (bulk) 90 is below 400")
    )
    known = {"chains": 4, "draws": 1000, "r_hat": 1.02, "ess_bulk": 500.0, "ess_tail": 450.0, "where": "theta[0]"}
    figures = McmcDiagnostics.of_mcmc(**known, divergences=0.003)
    return Verdict(status, *[math.nan] * 5, "", reasons, NOTES, figures)


VERDICTS = [
    verdict("ok"),
    verdict("corrected"),
    verdict("refined", chains=GOOD),
    verdict("unreliable"),
    mcmc("ok"),
    mcmc("unreliable"),
]


@pytest.mark.parametrize("found", VERDICTS, ids=lambda found: f"{found.status}, k-hat {found.k_hat}")
def test_verdicts_begin_with_the_status_and_have_no_long_sentence(found):
    """Reasons, notes and the figures of chains are lists, with semicolons between the items."""
    text = str(found)
    assert text.startswith(f"{found.status}: ")
    assert not long_ones(text.split("; "))
    assert ("Next step: " in text) == (found.status == "unreliable")


@pytest.mark.parametrize("step", [*OF_FITS, *OF_MCMC], ids=lambda step: step[0][0])
def test_each_cause_has_its_next_step(step):
    causes, said = step
    of = None if step in OF_FITS else "MCMC"
    for cause in causes:
        assert next_step(["k-hat 0.91 is not below its threshold 0.70", f"one thing: {cause} and more"], of) == said


def test_where_no_cause_is_known_weights_or_chains_are_poor():
    assert next_step(REASONS[1:4]) == OF_WEIGHTS
    assert next_step(["R-hat 1.100 of x is not below 1.01: the chains do not agree"], "MCMC") == OF_MIXING


def test_what_the_package_says_is_known_as_a_cause():
    """The words by which causes are known stand in the package's own messages."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pyro_flows").rglob("*.py"))
    verdict = (ROOT / "pyro_flows" / "inference" / "verdict" / "verdict.py").read_text(encoding="utf-8")
    elsewhere = source.replace(verdict.partition("# what to do next")[2], "")
    built = {
        "a mode near": "misses a mode",
        "too little mass near": "has too little mass",
    }  # put together with " near "
    for causes, _ in (*OF_FITS, *OF_MCMC):
        for cause in causes:
            assert built.get(cause, cause) in elsewhere, cause


# the test itself ------------------------------------------------------------------------------------------------------


def test_the_test_bites():
    long = " ".join(["word"] * 36)
    assert long_ones([f"{long[5 * 5 :]}."], LONGEST_AT_FIRST)
    assert not long_ones([f"{long[6 * 5 :]}."], LONGEST_AT_FIRST)
    for start in ("```python", "<!-- setup -->", "| a | b |", "## More", "![picture](a.png)"):
        assert not SENTENCE.match(opening(f"\n# Page\n\n{start}\nThis is late.\n"))
    assert SENTENCE.match(opening("\n# Page\n\n`fit` does it.\n"))
    for text in (f"One. {long}. Two.", f"- short\n- {long}\n", f"| a | {long} |", f"(see `a b`) {long}"):
        assert len(long_ones(prose(text))) == 1, text
    assert not long_ones(prose(f"{long[5:]}. {long[5:]}.\n\n{long[5:]}\n- {long[5:]}\n"))
    assert not long_ones(prose(f"```text\n{long}\n```\n<!-- {long} -->\nOne `{long}`, ${long}$.\n"))
