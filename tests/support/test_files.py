"""Directories that are whole or not there: saves that are killed, disturbed, or run out of disk, and damaged files."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyro_flows.support.files import bundles, files
from pyro_flows.support.files.bundles import Bundle, digest
from pyro_flows.support.files.files import replace_file

PACKAGE = Path(files.__file__).parents[2]
BUNDLE = Bundle("thing", "a thing", "thing.json", ("one.bin", "two.bin"))
OLD, NEW = ({"one.bin": bytes([byte]) * 3000, "two.bin": bytes([byte + 1]) * 50} for byte in (1, 7))

# both files need the standard library alone: without the rest of the package, processes of their own start quickly
PREAMBLE = f"""
import os, sys, types
from pathlib import Path
sys.modules["pyro_flows"] = types.ModuleType("pyro_flows")
sys.modules["pyro_flows"].__path__ = [{str(PACKAGE)!r}]
from pyro_flows.support.files import bundles
from pyro_flows.support.files import files as files
bundle = bundles.Bundle({BUNDLE.what!r}, {BUNDLE.format!r}, {BUNDLE.text!r}, {BUNDLE.others!r})
path = Path(sys.argv[1])
old, new = {OLD!r}, {NEW!r}
"""

# kills a save at each line that it runs, and where each function returns, in forks of one process
KILLS = """
import shutil, signal
os.fsync = lambda descriptor: None  # kills of processes lose nothing that was written
first, exchanging, extra = (word == "True" for word in sys.argv[2:5])
if not exchanging:
    files._exchange = lambda one, other: False

def save_until(count):
    left = count
    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in (files.__file__, bundles.__file__, shutil.__file__):
            return None
        if event in ("line", "return"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    write = files._write
    def halves(file, data):
        nonlocal left
        left -= 1
        if left == 0:
            file.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, data)
    files._write = halves
    sys.settrace(trace)
    bundle.write(path, {"name": "new"}, new)
    sys.settrace(None)
    os._exit(0)

found, count = {"old": 0, "new": 0, "none": 0}, 0
while True:
    count += 1
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    if not first:
        bundle.write(path, {"name": "old"}, old)
    if extra:
        (path / "notes").mkdir()
        (path / "notes" / "a.txt").write_text("kept")
    child = os.fork()
    if child == 0:
        save_until(count)
    done = os.waitpid(child, 0)[1] == 0
    try:
        name, contents = bundle.read(path)
        assert contents == {"old": old, "new": new}[name["name"]], count
        found[name["name"]] += 1
        if extra and path.exists():
            assert (path / "notes" / "a.txt").read_text() == "kept", count
        assert not done or name["name"] == "new"
    except ValueError as error:
        assert first and not path.exists(), (count, error)
        found["none"] += 1
    # what was left is in nobody's way, and goes with the next save
    bundle.write(bundle.check_target(path), {"name": "old"}, old)
    assert bundle.read(path)[1] == old, count
    assert not extra or (path / "notes" / "a.txt").read_text() == "kept", count
    assert [item.name for item in path.parent.iterdir()] == [path.name], (count, os.listdir(path.parent))
    if done:
        break
print(count, found["old"], found["new"], found["none"])
"""


def run(program, *words):
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("first", "exchanging", "extra"),
    [
        (True, True, False),
        (False, True, False),
        (False, False, False),
        pytest.param(False, True, True, marks=pytest.mark.slow),
        pytest.param(False, False, True, marks=pytest.mark.slow),
    ],
)
def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new(tmp_path, first, exchanging, extra):
    count, old, new, none = map(int, run(KILLS, tmp_path / "folder" / "saved", first, exchanging, extra))
    assert count > 100
    assert new > 3
    assert (none > 50) if first else (old > 50 and none == 0)


def test_who_reads_a_file_that_is_replaced_reads_the_old_one(tmp_path):
    replace_file(tmp_path / "run.pt", b"old")
    with (tmp_path / "run.pt").open("rb") as reader:
        replace_file(tmp_path / "run.pt", b"new")
        assert reader.read() == b"old"
    assert (tmp_path / "run.pt").read_bytes() == b"new"


def test_a_file_that_is_killed_or_fails_leaves_the_old(tmp_path, monkeypatch):
    replace_file(tmp_path / "run.pt", b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"run.pt' could not be written \(No space left on device\)"):
            replace_file(tmp_path / "run.pt", b"new")
    assert (tmp_path / "run.pt").read_bytes() == b"old"
    (tmp_path / f".run.pt.{'0' * 12}.new").write_bytes(b"half")  # of a process that was killed
    replace_file(tmp_path / "run.pt", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("run.pt", b"new")]


def test_saves_at_once_are_one_after_the_other_and_readers_see_whole_ones(tmp_path):
    program = """
for count in range(60):
    contents = {"one.bin": os.urandom(4) * 5000, "two.bin": os.urandom(4)}
    bundle.write(path, {"sum": bundles.digest(contents["one.bin"] + contents["two.bin"])}, contents)
"""
    path = tmp_path / "saved"
    BUNDLE.write(path, {"sum": digest(OLD["one.bin"] + OLD["two.bin"])}, OLD)
    writers = [subprocess.Popen([sys.executable, "-c", PREAMBLE + program, str(path)]) for _ in range(3)]
    reads = 0
    try:
        while any(writer.poll() is None for writer in writers):
            description, contents = BUNDLE.read(path)
            assert description["sum"] == digest(contents["one.bin"] + contents["two.bin"])
            reads += 1
    except BaseException:
        for writer in writers:
            writer.kill()
        raise
    finally:
        for writer in writers:
            writer.wait()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert reads > 10
    assert [item.name for item in tmp_path.iterdir()] == ["saved"]


def test_a_read_that_a_save_came_between_is_done_again_while_no_save_can_go_on(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    BUNDLE.write(tmp_path / "saved", {}, OLD)
    read, locked = bundles.Bundle._read, []

    def interrupted(*arguments):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(False)
        except BlockingIOError:
            locked.append(True)
        finally:
            os.close(descriptor)
        if not locked[-1]:
            BUNDLE.write(tmp_path / "saved", {}, NEW)
            raise ValueError("files of two saves")
        return read(*arguments)

    monkeypatch.setattr(bundles.Bundle, "_read", interrupted)
    assert BUNDLE.read(tmp_path / "saved")[1] == NEW
    assert locked == [False, True]


def test_what_others_are_writing_is_left_alone_where_there_are_no_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    other, dead = (tmp_path / f".saved.{digit * 12}.new" for digit in "ab")
    other.mkdir()
    dead.mkdir()
    long_ago = time.time() - 2 * files.DEAD_SECONDS
    os.utime(dead, (long_ago, long_ago))
    BUNDLE.write(tmp_path / "saved", {}, OLD)
    assert BUNDLE.read(tmp_path / "saved")[1] == OLD
    assert sorted(item.name for item in tmp_path.iterdir()) == [other.name, "saved"]


def test_a_lock_that_is_never_given_does_not_hang(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    BUNDLE.write(tmp_path / "saved", {}, OLD)
    os.close(descriptor)
    assert BUNDLE.read(tmp_path / "saved")[1] == OLD


# full and read-only disks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchanging", [True, False])
def test_what_cannot_be_written_leaves_the_old(tmp_path, monkeypatch, exchanging):
    path = tmp_path / "saved"
    BUNDLE.write(path, {"name": "old"}, OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"saved' could not be written \(File too large\); what was there is as it was"
        ):
            BUNDLE.write(path, {}, {**NEW, "two.bin": bytes(30_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert BUNDLE.read(path)[1] == OLD

    rename = os.rename

    def fail(source, target):
        if Path(target) == path and Path(source).suffix == ".new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    if not exchanging:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="Input/output error"):
            BUNDLE.write(path, {}, NEW)
    assert BUNDLE.read(path)[1] == OLD
    assert [item.name for item in tmp_path.iterdir()] == ["saved"]


def test_reading_writes_nothing(tmp_path):
    BUNDLE.write(tmp_path / "saved", {}, OLD)
    aside = tmp_path / f".saved.{'0' * 12}.old"
    (tmp_path / "saved").rename(aside)  # as a save leaves it that is killed between two renames
    for folder in (aside, tmp_path):
        folder.chmod(0o555)
    before = [(item.name, item.stat().st_mtime_ns) for item in (tmp_path, *tmp_path.rglob("*"))]
    assert BUNDLE.read(tmp_path / "saved")[1] == OLD
    assert [(item.name, item.stat().st_mtime_ns) for item in (tmp_path, *tmp_path.rglob("*"))] == before
    for folder in (tmp_path, aside):
        folder.chmod(0o755)


# where to -------------------------------------------------------------------------------------------------------------


def test_other_files_in_the_directory_stay(tmp_path):
    path = tmp_path / "saved"
    BUNDLE.write(path, {}, OLD)
    path.chmod(0o750)
    (path / "figure.png").write_bytes(b"picture")
    (path / "notes").mkdir()
    (path / "notes" / "a.txt").write_text("words")
    (path / "link").symlink_to("nowhere")
    BUNDLE.write(BUNDLE.check_target(path), {}, NEW)
    assert BUNDLE.read(path)[1] == NEW
    names = {"figure.png", "notes", "link", "one.bin", "two.bin", "thing.json"}
    assert {item.name for item in path.iterdir()} == names
    assert (path / "figure.png").read_bytes() == b"picture"
    assert (path / "notes" / "a.txt").read_text() == "words"
    assert (path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o750


def test_directories_that_cannot_be_replaced_are_refused_at_the_door(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", tmp_path / "here"):
        with pytest.raises(ValueError, match=r"is the working directory\. Name a directory inside of it, such as"):
            BUNDLE.check_target(name)
    assert BUNDLE.check_target("thing") == Path("thing")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(ValueError, match=r"is a mount point\. Name a directory inside of it, such as '.*disk/thing'"):
        BUNDLE.check_target(tmp_path / "disk")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="path: no permission to write into"):
        BUNDLE.check_target(tmp_path / "new" / "thing")


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    BUNDLE.write(tmp_path / "one", {}, OLD)
    (tmp_path / "two").symlink_to("one")
    BUNDLE.write(BUNDLE.check_target(tmp_path / "two"), {}, NEW)
    assert (tmp_path / "two").is_symlink()
    assert BUNDLE.read(tmp_path / "one")[1] == NEW


# damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    for name, contents in (("old", OLD), ("new", NEW)):
        BUNDLE.write(tmp_path / name, {"numbers": [1.5, 2]}, contents)
    return tmp_path / "old", tmp_path / "new"


def refused(path, *parts):
    with pytest.raises(ValueError, match="path: ") as caught:
        BUNDLE.read(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for part in (repr(str(path)), *parts):
        assert part in text


def test_each_flipped_bit_of_the_text_is_found(pair):
    file = pair[0] / "thing.json"
    data = file.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        file.write_bytes(bytes(changed))
        refused(pair[0])
    file.write_bytes(data)
    assert BUNDLE.read(pair[0])[1] == OLD


@pytest.mark.parametrize("name", ["one.bin", "two.bin"])
@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "longer", "swapped", "lost"])
def test_damaged_files_are_refused_by_name(pair, name, kind):
    file = pair[0] / name
    data = file.read_bytes()
    if kind == "lost":
        file.unlink()
        refused(pair[0], f"{name} missing")
        return
    other = (pair[1] / name).read_bytes()
    changed = {"cut": data[:-1], "empty": b"", "longer": data + b"\0", "swapped": other, "flipped": b"\xff" + data[1:]}
    file.write_bytes(changed[kind])
    refused(pair[0], "is damaged", f"({name} is not what was saved: its SHA-256 digest differs)")


def test_foreign_texts_are_refused(pair):
    for text in ("", "{", "[1]", '{"format": "b thing"}', "null", '{"format": "a thing"}'):
        (pair[0] / "thing.json").write_text(text)
        refused(pair[0])
    (pair[0] / "thing.json").write_bytes(b"\xff\xfe\x00")
    refused(pair[0], "thing.json was not written by pyro_flows")
    refused(pair[0].parent / "nowhere", "one.bin, two.bin, thing.json missing")


def test_files_need_their_digests_and_the_present_format(pair):
    text = json.loads((pair[0] / "thing.json").read_text())
    assert text["version"] == 3
    assert text["digests"]["one.bin"] == digest(OLD["one.bin"])
    del text["digests"]
    (pair[0] / "thing.json").write_text(json.dumps(text))
    refused(pair[0], "is damaged")
    for version in (2, 4, "3", True, None):
        (pair[0] / "thing.json").write_text(json.dumps({**text, "version": version}))
        refused(pair[0], f"has format version {version!r}, this release of pyro_flows reads version 3.")
