"""Tables are of the code that landed: fingerprints of code, what pages say of versions, and what runs anew."""

import math
import re
import shutil

import pytest

from benchmarks import evidence, fingerprints, records, standing, tables, zoo
from benchmarks.zoo import reporting as zoo_reporting
from benchmarks.zoo import running as zoo_running

SECTION = re.compile(r"<!-- (\w+): begin -->(.*?)<!-- \1: end -->", re.DOTALL)
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(tables.EVIDENCE.glob("*.md"))}
SECTIONS = {name: text for page in PAGES.values() for name, text in SECTION.findall(page)}


# ---- this repository -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in standing.TABLES if name not in standing.BEHIND])
def test_tables_are_of_the_code_that_landed(name):
    assert not (found := standing.stale(only=[name])), found[name]


@pytest.mark.parametrize("name", standing.BEHIND)
def test_tables_that_are_not_complete_are_known(name):
    assert len(standing.TABLES[name].standing()) >= standing.BEHIND[name]
    assert standing.stale(only=[name]), f"{name} is complete: take it out of BEHIND"


@pytest.mark.parametrize("name", SECTIONS)
def test_pages_say_how_much_of_the_code_has_changed_since(name):
    kind = tables.KINDS.get(name, "fit")
    for version, said in fingerprints.statements(SECTIONS[name]).items():
        if math.isnan(said):
            assert not fingerprints.load(version), f"{version}: its fingerprint is there"
        else:
            share = fingerprints.changed(version, kind)
            assert abs(share - said) <= fingerprints.LIMIT, (
                f"{name}: the page says that {said:.0%} of the deciding lines have changed since {version}; "
                f"it is {share:.0%}. Run `python -m benchmarks.tables`."
            )


def test_pages_have_what_the_rows_say(tmp_path):
    """Apart from the shares of changed lines, which go up with each change of the code."""
    page = tmp_path / "page.md"
    tables.write_tables(page)
    written = dict(SECTION.findall(page.read_text(encoding="utf-8")))
    share = re.compile(r" \(\d+ % of its deciding lines have changed since\)")
    assert {name: share.sub("", text) for name, text in written.items()} == {
        name: share.sub("", text) for name, text in SECTIONS.items() if name in written
    }


def test_each_fingerprint_is_that_of_a_row():
    rows = "".join(file.read_text(encoding="utf-8") for file in records.RESULTS.glob("*.csv"))
    assert not [file.stem for file in fingerprints.KEPT.glob("*.txt") if file.stem not in rows]


# ---- fingerprints ----------------------------------------------------------------------------------------------------

SOURCE = '''
"""A module."""
import os


class Walk:
    """A walk."""

    def step(self, x, *, size=0.1):  # one step
        """Return the next place."""
        if x > 0.0:
            return f"{x + size:.2f} {{of}} it"
        return self.step(
            x + size,
            size=size,
        )
'''


def test_lines_are_statements_without_layout_comments_docstrings_and_imports():
    lines = fingerprints.logical_lines(SOURCE)
    assert len(lines) == 5
    compact = SOURCE.replace("(\n            x + size,\n            size=size,\n        )", "(x + size, size=size)")
    compact = compact.replace("  # one step", "").replace('"""A walk."""', '"""A long\n    walk."""\n    import re')
    assert fingerprints.logical_lines(compact) == lines
    assert len(set(lines) ^ set(fingerprints.logical_lines(SOURCE.replace("x > 0.0", "x > 1.0")))) == 2


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two rooms of 40 lines, whose fingerprint is kept, and the share that has changed since."""
    monkeypatch.setattr(fingerprints, "PARTS", {"one": ("room",), "two": ("_cellar",)})
    monkeypatch.setattr(fingerprints, "DECIDING", {"fit": ("one", "two"), "density": ("two",)})
    root, kept = tmp_path / "package", tmp_path / "code"
    (root / "room").mkdir(parents=True)
    (root / "room" / "a.py").write_text("".join(f"a{i} = {i}\n" for i in range(30)), encoding="utf-8")
    (root / "_cellar.py").write_text("".join(f"b{i} = {i}\n" for i in range(10)), encoding="utf-8")
    fingerprints.save("1.2.3-0123abcd", kept, root)

    def changed(kind="fit"):
        monkeypatch.setattr(fingerprints, "today", lambda: fingerprints.of_code(root))
        fingerprints.changed.cache_clear()
        return fingerprints.changed("1.2.3-0123abcd", kind, kept)

    yield root, changed
    fingerprints.changed.cache_clear()
    fingerprints.load.cache_clear()


def test_moved_lines_do_not_count(package):
    root, changed = package
    assert changed() == 0.0
    shutil.move(root / "room" / "a.py", root / "room" / "b.py")
    lines = (root / "_cellar.py").read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "_cellar.py").write_text("".join(lines[5:]), encoding="utf-8")
    (root / "room" / "c.py").write_text("# from below\n\n" + "".join(lines[:5]), encoding="utf-8")
    assert changed() == 0.0
    assert changed("density") == 0.5


@pytest.mark.parametrize(
    ("change", "share"),
    [
        (lambda text: text.replace("a1 = 1\n", "a1 = -1\n"), 1 / 40),
        (lambda text: text.replace("a1 = 1\na2 = 2\n", ""), 2 / 40),
        (lambda text: text + "a1 = 1\n" * 3, 3 / 40),
        (lambda text: text.replace("a1 = 1\na2 = 2\n", "c = 1\n"), 2 / 40),
    ],
)
def test_changed_lines_count_once(package, change, share):
    root, changed = package
    file = root / "room" / "a.py"
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    assert changed() == share
    assert changed("density") == 0.0


def test_a_room_that_is_not_there_is_an_error(package):
    root, _ = package
    (root / "_cellar.py").unlink()
    with pytest.raises(FileNotFoundError, match="_cellar"):
        fingerprints.of_code(root)


def test_a_version_without_a_fingerprint_has_changed_altogether(tmp_path):
    assert fingerprints.changed("9.9.9-00000000", "fit", tmp_path) == 1.0
    assert fingerprints.changed("9.9.9-00000000", "fit", tmp_path, since="9.9.9-00000000") == 0.0


def test_shares_are_stated_once_and_read_back(monkeypatch):
    shares = {"1.0.0-aaaaaaaa": 0.121, "1.0.0-bbbbbbbb": 0.001}
    monkeypatch.setattr(fingerprints, "load", lambda version: shares.get(version))
    monkeypatch.setattr(fingerprints, "changed", lambda version, kind: shares[version])
    text = "Made by 1.0.0-aaaaaaaa, 1.0.0-bbbbbbbb and 1.0.0-cccccccc.\n| 1.0.0-aaaaaaaa |\nAgain 1.0.0-aaaaaaaa."
    said = fingerprints.stated(text, "fit")
    assert said.count("12 % of its deciding lines") == 1
    assert fingerprints.stated(said, "fit") == said
    found = fingerprints.statements(said)
    assert found["1.0.0-aaaaaaaa"] == 0.12
    assert found["1.0.0-bbbbbbbb"] == 0.0
    assert math.isnan(found["1.0.0-cccccccc"])


# ---- what is made anew -----------------------------------------------------------------------------------------------


@pytest.fixture
def zoo_table(tmp_path, monkeypatch):
    """The zoo's table with three models of one seed, made by a version of which a given share has changed."""
    shares = {"0.1.0-cccccccc": 0.0, "0.1.0-aaaaaaaa": 0.04, "0.1.0-bbbbbbbb": 0.2}
    monkeypatch.setattr(records, "code_version", lambda: "0.1.0-cccccccc")
    monkeypatch.setattr(fingerprints, "load", shares.get)
    monkeypatch.setattr(fingerprints, "changed", lambda version, kind, folder=None, since=None: shares[version])
    out, done = tmp_path / "zoo.csv", []

    def run(arguments):
        def do(task):
            done.append(task.number)
            return {
                **dict.fromkeys(running.FIELDS, ""),
                **dict(zip(running.KEY, task.key, strict=True)),
                "seconds": "60",
            }

        running.bench(seed=1, models=3, out=out, do=do)

    running = zoo_running
    table = standing.Table(out, zoo_reporting.newest, 3, run, ((),), side_by_side=False)
    monkeypatch.setattr(standing, "TABLES", {"zoo": table})

    def put(version, count):
        blank = dict.fromkeys(running.FIELDS, "")
        keys = [
            {"seed": 1, "number": i, "version": version, "zoo": running.zoo_version(zoo.family_of(i))}
            for i in range(count)
        ]
        records.write(out, running.FIELDS, [{**blank, **key, "seconds": 60} for key in keys])

    return put, done


@pytest.mark.parametrize(
    ("version", "count", "again"), [("aaaaaaaa", 3, []), ("aaaaaaaa", 1, [1, 2]), ("bbbbbbbb", 3, [0, 1, 2])]
)
def test_only_stale_and_missing_rows_are_made(zoo_table, version, count, again):
    put, done = zoo_table
    put(f"0.1.0-{version}", count)
    reasons = standing.stale()
    assert set(reasons) == ({"zoo"} if again else set())
    if again:
        said = "20.0% of the deciding lines" if version == "bbbbbbbb" else "1 of 3 rows are there"
        assert said in reasons["zoo"]
        assert "`make evidence`" in reasons["zoo"]
        assert standing.TABLES["zoo"].minutes() == len(again)
    evidence.run("zoo", 1, fingerprints.LIMIT)
    assert done == again
    assert not standing.stale()


def test_the_list_says_what_is_stale_and_runs_nothing(zoo_table, capsys):
    put, done = zoo_table
    put("0.1.0-bbbbbbbb", 3)
    evidence.main(["--list", "--only", "zoo"])
    assert "About 3 minutes of one process." in capsys.readouterr().out
    assert not done
