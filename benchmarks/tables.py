"""Write the tables of the pages in ``docs/evidence`` from the CSV files of the benchmarks.

    python -m benchmarks.tables

Only what stands between the markers is replaced; the text around them stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import ablation, alone, fingerprints, ledger, records, sensitivity
from benchmarks.amortized import running as amortized
from benchmarks.amortized.tables import section as amortized_section
from benchmarks.calibration import running as calibration
from benchmarks.calibration.tables import section as calibration_section
from benchmarks.cold import __main__ as cold
from benchmarks.crossed import running as crossed
from benchmarks.density import augmentation, conditional, recognition
from benchmarks.density import running as density
from benchmarks.density import tables as density_tables
from benchmarks.guides import running as guides
from benchmarks.guides.tables import guides_section
from benchmarks.larger import running as larger
from benchmarks.larger.tables import larger_section
from benchmarks.markdown import about, table
from benchmarks.modes import __main__ as modes
from benchmarks.named import running as named
from benchmarks.nuts import running as nuts
from benchmarks.nuts.tables import nuts_section
from benchmarks.posteriors import running as posteriordb
from benchmarks.posteriors import stopping
from benchmarks.posteriors.tables import posteriordb_section, stopping_section
from benchmarks.priors import autoencoders, chains
from benchmarks.records import Row
from benchmarks.scale import numbers, regressions
from benchmarks.search import running as search
from benchmarks.search import tables as search_tables
from benchmarks.speed import running as speed
from benchmarks.speed import tables as speed_tables
from benchmarks.toys import planar
from benchmarks.toys import running as toys
from benchmarks.toys.tables import toys_section
from benchmarks.zoo import reporting as zoo_reporting
from benchmarks.zoo import running as zoo_running

EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence"
CLAIMING = [EVIDENCE.parents[1] / name for name in ("README.md", "docs/index.md", "docs/understand/verdict.md")]
SKELETON = """# Performance

`make bench` runs the benchmarks and writes the tables of this page.

"""
TITLES = {
    "posteriordb": "Posteriors with reference draws",
    "zoo": "Is the verdict right?",
    "causes": "Three causes of wrong answers",
    "ledger": "What answers",
    "sensitivity": "If a threshold were another one",
    "ablation": "Without one of its parts",
    "numbers": "Scales, precision and sizes",
    "named": "Models that statisticians bring",
    "crossed": "Crossed effects",
    "modes": "Several modes",
    "search": "What the search for missed modes finds",
    "toys": "Toy targets",
    "nuts": "Against NUTS",
    "larger": "Larger models against NUTS",
    "regressions": "Regressions of many rows",
    "alone": "Flows on their own",
    "calibration": "Calibration",
    "amortized": "Amortized posteriors",
    "speed": "Speed",
    "cold": "In a new process",
    "stopping": "What the automatic stop costs",
    "density": "Densities of data",
    "conditional": "Conditional densities",
    "augmentation": "Synthetic data for classifiers",
    "recognition": "Samples that a classifier names",
    "chains": "Chains of batches",
    "autoencoders": "Autoencoders",
    "guides": "When is a flow worth its seconds?",
}
KINDS = {
    "speed": "step",
    "density": "density",
    "conditional": "density",
    "augmentation": "density",
    "recognition": "density",
    "autoencoders": "density",
    "guides": "step",
}  # what decides about tables that are not of fits


def write_tables(
    page: Path | None = None,
    *,
    zoo_csv: Path = zoo_running.OUT,
    causes_csv: Path = zoo_reporting.CAUSES,
    named_csv: Path = named.OUT,
    crossed_csv: Path = crossed.OUT,
    modes_csv: Path = modes.OUT,
    search_csv: Path = search.OUT,
    speed_csv: Path = speed.OUT,
    cold_csv: Path = cold.OUT,
    posteriordb_csv: Path = posteriordb.OUT,
    nuts_csv: Path = nuts.OUT,
    larger_csv: Path = larger.OUT,
    regressions_csv: Path = regressions.OUT,
    alone_csv: Path = alone.OUT,
    calibration_csv: Path = calibration.OUT,
    amortized_csv: Path = amortized.OUT,
    stopping_csv: Path = stopping.OUT,
    toys_csv: Path = toys.OUT,
    density_csv: Path = density.OUT,
    guides_csv: Path = guides.OUT,
    conditional_csv: Path = conditional.OUT,
    augmentation_csv: Path = augmentation.OUT,
    recognition_csv: Path = recognition.OUT,
    chains_csv: Path = chains.OUT,
    autoencoders_csv: Path = autoencoders.OUT,
    sensitivity_csv: Path = sensitivity.OUT,
    ablation_csv: Path = ablation.OUT,
    numbers_csv: Path = numbers.OUT,
) -> None:
    """Fill the sections whose CSV file is there, each in the page that has its markers.

    The pages are those of ``docs/evidence``, or one ``page``, which is made if there is none.

    Raises:
        ValueError: if no page has the markers of a section.
    """
    pages = sorted(EVIDENCE.glob("*.md")) if page is None else [page]
    if page is not None and not page.is_file():
        page.write_text(_skeleton(), encoding="utf-8")
    sections: list[tuple[str, Path, Callable[[Sequence[Row]], str]]] = [
        ("zoo", zoo_csv, lambda rows: zoo_reporting.section(rows, table, about)),
        ("causes", causes_csv, lambda rows: zoo_reporting.causes_section(rows, table, about)),
        ("ledger", zoo_csv, lambda rows: ledger.section(zoo_csv.parent)),
        ("sensitivity", sensitivity_csv, sensitivity.section),
        ("ablation", ablation_csv, ablation.section),
        ("numbers", numbers_csv, numbers.section),
        ("named", named_csv, lambda rows: named.section(rows, table, about)),
        ("crossed", crossed_csv, crossed.section),
        ("modes", modes_csv, lambda rows: modes.section(rows, table, about)),
        ("search", search_csv, search_tables.section),
        ("speed", speed_csv, lambda rows: speed_tables.section(rows, table)),
        ("cold", cold_csv, cold.section),
        ("posteriordb", posteriordb_csv, posteriordb_section),
        ("nuts", nuts_csv, nuts_section),
        ("larger", larger_csv, larger_section),
        ("regressions", regressions_csv, regressions.section),
        ("alone", alone_csv, alone.section),
        ("calibration", calibration_csv, calibration_section),
        ("amortized", amortized_csv, amortized_section),
        ("stopping", stopping_csv, stopping_section),
        ("toys", toys_csv, toys_section),
        ("density", density_csv, density_section),
        ("conditional", conditional_csv, lambda rows: conditional.section(rows, table, about)),
        ("augmentation", augmentation_csv, augmentation.section),
        ("recognition", recognition_csv, recognition.section),
        ("chains", chains_csv, chains.section),
        ("autoencoders", autoencoders_csv, autoencoders.section),
        ("guides", guides_csv, guides_section),
    ]
    if page is None and (rows := records.read(zoo_csv)):
        state(zoo_reporting.claim(rows))
        state(ledger.claim(zoo_csv.parent), name="ledger-claim")
    for name, file, section in sections:
        if rows := records.read(file):
            _fill(pages, name, fingerprints.stated(section(rows), KINDS.get(name, "fit")))


def _skeleton() -> str:
    """Return a page that has nothing but headings and markers."""
    parts = [f"## {title}\n\n<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name, title in TITLES.items()]
    return SKELETON + "\n".join(parts)


def _fill(pages: Sequence[Path], name: str, content: str) -> None:
    """Put a section into the page that has its markers."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    page = next((page for page, text in texts.items() if f"<!-- {name}: begin -->" in text), pages[0])
    page.write_text(replace(texts[page], name, content), encoding="utf-8")


def replace(text: str, name: str, content: str) -> str:
    """Put ``content`` between the markers ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: if a marker is missing.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"page: expected the markers {begin} and {end}, in this order; put them in.")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def state(claim: str, pages: Sequence[Path] = CLAIMING, name: str = "zoo-claim") -> None:
    """Write how often the verdict was wrong into the pages that say so, between the markers of that name."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        page.write_text(re.sub(f"(?<={begin}).*?(?={end})", claim, text, flags=re.DOTALL), encoding="utf-8")


def density_section(rows: Sequence[Row], planar_csv: Path = planar.OUT) -> str:
    """Return the section about densities of data."""
    return density_tables.section(rows, records.read(planar_csv), table, about)


if __name__ == "__main__":
    write_tables()
