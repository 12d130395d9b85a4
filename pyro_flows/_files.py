"""Files that are whole or not there: directories replaced in one step, with digests of what they hold."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION, FIRST_SEALED = 2, 2  # of the format; from the second on, the JSON holds digests of all files
UNFINISHED = ".unfinished"  # what the writer of format 1 appended to the names of its files
NEW, OLD = ".new", ".old"  # endings of what a save makes beside its target
TOKEN = 6  # random bytes in these names
ZEROS = "0" * 64  # stands for the digest of the JSON file while that is computed
LOCK_SECONDS = 20.0  # to wait for another save into the same folder
DEAD_SECONDS = 3600.0  # after which a left-over is nobody's, where locks cannot tell
READS = 5  # attempts, where locks cannot keep saves of other processes out
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of file systems that have no such thing
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@dataclass(frozen=True)
class Bundle:
    """A directory that holds one object: files of tensors and arrays, and a JSON file with their SHA-256 digests.

    Attributes:
        what: what it holds, in a word.
        format: the entry ``format`` of the JSON.
        text: the name of the JSON file.
        others: the names of the other files.
    """

    what: str
    format: str
    text: str
    others: tuple[str, ...]

    def check_target(self, path: str | os.PathLike[str]) -> Path:
        """Return the directory to write to, or say why it cannot be written.

        Raises:
            ValueError: if it is a file, a directory with content that is no such object, or one that cannot be replaced
                as a whole: the working directory, a mount point, one in a folder without permission to write.
        """
        target = Path(path)
        if target.exists() and not target.is_dir():
            raise ValueError(f"path: expected a directory, {str(target)!r} is a file.")
        if target.is_dir() and any(target.iterdir()) and not self._is_ours(target):
            raise ValueError(
                f"path: {str(target)!r} holds other files and no saved {self.what}. Name a new or empty directory."
            )
        real = Path(os.path.realpath(target))
        inside = f"Name a directory inside of it, such as {str(target / self.what)!r}."
        if real in _working():
            raise ValueError(
                f"path: a save replaces a directory as a whole, and {str(target)!r} is the working directory. {inside}"
            )
        if os.path.ismount(real):
            raise ValueError(
                f"path: a save replaces a directory as a whole, and {str(target)!r} is a mount point. {inside}"
            )
        folder = next(parent for parent in real.parents if parent.exists())
        if not folder.is_dir():
            raise ValueError(f"path: expected a directory, {str(folder)!r} in {str(target)!r} is a file.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"path: no permission to write into {str(folder)!r}, where {str(target)!r} would be made.")
        return target

    def _is_ours(self, folder: Path) -> bool:
        try:
            if _parsed((folder / self.text).read_bytes()).get("format") == self.format:
                return True
        except (OSError, ValueError):
            pass
        # the writer of format 1, killed in its first save
        names, known = {file.name for file in folder.iterdir()}, {self.text, *self.others}
        return names <= known | {name + UNFINISHED for name in known} and any(n.endswith(UNFINISHED) for n in names)

    def write(self, path: Path, description: Mapping[str, Any], contents: Mapping[str, bytes]) -> None:
        """Write the object: all of it, or nothing if anything fails or the process is killed.

        Args:
            path: what :meth:`check_target` returned.
            description: JSON values.
            contents: the bytes of the other files.

        Raises:
            OSError: if the disk is full, or does not let itself be written; what was saved before is as it was.
        """
        digests = {**{name: digest(data) for name, data in contents.items()}, self.text: ZEROS}
        whole = {"format": self.format, "version": VERSION, "digests": digests, **description}
        text = (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()
        sealed = text.replace(ZEROS.encode(), digest(text).encode(), 1)
        replace_directory(path, {**contents, self.text: sealed}, gone=self._unfinished())

    def _unfinished(self) -> frozenset[str]:
        return frozenset(name + UNFINISHED for name in (self.text, *self.others))

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return description and contents. Nothing is written, so a read-only directory will do.

        Raises:
            ValueError: if the directory holds no such object, one of another format version, or a damaged one.
        """
        for attempt in range(READS):
            # a save may take the directory's place between two files: what failed once is read while no save can go on
            with _locked(Path(os.path.realpath(path)).parent) if attempt else nullcontext(False) as alone:
                try:
                    return self._read(_existing(path), str(Path(path)))
                except (OSError, ValueError):
                    if alone or attempt == READS - 1:
                        raise
        raise AssertionError  # not reached

    def _read(self, source: Path, shown: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        lacking = [name for name in (*self.others, self.text) if not (source / name).is_file()]
        text = b"" if self.text in lacking else (source / self.text).read_bytes()
        try:
            description = _parsed(text)
        except ValueError:
            description = {}
        if lacking or description.get("format") != self.format:
            why = f"{', '.join(lacking)} missing" if lacking else f"{self.text} was not written by pyro_flows"
            raise ValueError(f"path: expected the directory of a saved {self.what}, got {shown!r}: {why}.")
        version: Any = description.get("version")
        digests = description.get("digests")
        if version not in range(1, VERSION + 1):
            raise ValueError(
                f"path: {shown!r} has format version {version!r}, this release of pyro_flows reads versions 1 to "
                f"{VERSION}. Read it with the release that wrote it, or fit and save anew."
            )
        contents = {name: (source / name).read_bytes() for name in self.others}
        if digests is not None or version >= FIRST_SEALED:
            digests = digests if isinstance(digests, dict) else {}
            own = str(digests.get(self.text))
            found = {name: digest(data) for name, data in contents.items()}
            found[self.text] = digest(text.replace(own.encode(), ZEROS.encode(), 1))
            wrong = [name for name, value in found.items() if digests.get(name) != value]
            if wrong:
                raise ValueError(damaged(shown, wrong, "is not what was saved: its SHA-256 digest differs"))
        return description, contents


def _working() -> tuple[Path, ...]:
    """Return the working directory and those above it; none if it has been removed."""
    try:
        here = Path.cwd()
    except OSError:
        return ()
    return here, *here.parents


def digest(data: bytes) -> str:
    """Return the SHA-256 digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def damaged(path: str | os.PathLike[str], names: list[str], why: str) -> str:
    """Return the sentence for files that cannot be what was written."""
    return f"path: {str(path)!r} is damaged ({', '.join(names)} {why}). Take a copy of it, or fit and save anew."


def _parsed(text: bytes) -> dict[str, Any]:
    found = json.loads(text.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def plain(value: Any) -> Any:
    """Return ``value`` as JSON has it: lists, dicts, strings, finite numbers; other numbers as strings."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


# one step -------------------------------------------------------------------------------------------------------------


def replace_directory(path: Path, files: Mapping[str, bytes], *, gone: frozenset[str] = frozenset()) -> None:
    """Make ``path`` a directory with these files: written beside it, synced to the disk, and put in place in one step.

    A process that is killed on the way leaves the earlier directory or the new one, each whole. Where the system cannot
    exchange two directories, the earlier one may be left under another name, where :func:`_existing` finds it. Other
    files in the earlier directory (figures, notes) are kept, by hard links. Saves into one folder wait for each other.

    Args:
        path: the directory.
        files: names and contents.
        gone: names of files of the earlier directory that are not kept.

    Raises:
        OSError: naming the path, if something cannot be written; the earlier directory is then as it was.
    """
    target = Path(os.path.realpath(path))
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(TOKEN)}{NEW}")
    dropped = {*files, *gone}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent) as alone:
            _clear(target, alone)
            try:
                fresh.mkdir()
                for name, data in files.items():
                    _write(fresh / name, data)
                if target.is_dir():
                    shutil.copymode(target, fresh)
                    _carry(target, fresh, dropped)
                _sync_folder(fresh)
                earlier = _put(fresh, target)
                _sync_folder(target.parent)
                if earlier is not None:
                    with suppress(OSError):
                        _carry(earlier, target, dropped, os.rename)  # what came while the new files were written
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise _failure(error, path) from error


def _put(fresh: Path, target: Path) -> Path | None:
    """Put ``fresh`` in the place of ``target``; return where the earlier directory is now, if there was one."""
    if not target.exists():
        os.rename(fresh, target)
        return None
    if _exchange(fresh, target):
        return fresh
    aside = fresh.with_suffix(OLD)
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        if not target.exists():
            os.rename(aside, target)
        raise
    with suppress(OSError):
        os.rename(aside, fresh)  # under this name nobody takes it for the latest
    return fresh


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; return whether the system can."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside ``path``, sync it to the disk and put it in place in one step.

    Raises:
        OSError: naming the path, if it cannot be written; the earlier file is then as it was.
    """
    target = Path(os.path.realpath(path))
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(TOKEN)}{NEW}")
    try:
        with _locked(target.parent) as alone:
            _clear(target, alone)
            try:
                _write(fresh, data)
                os.replace(fresh, target)
                _sync_folder(target.parent)
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as error:
        raise _failure(error, path) from error


def _failure(error: OSError, path: Path) -> OSError:
    why = error.strerror or str(error)
    text = f"path: {str(path)!r} could not be written ({why}); what was there is as it was"
    return OSError(error.errno or errno.EIO, text)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in CANNOT_SYNC:
                raise


def _sync_folder(folder: Path) -> None:
    """Make renames last, where the system lets directories be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str], **_: Any) -> None:
    if os.path.isdir(source) and not os.path.islink(source):
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _carry(source: Path, target: Path, dropped: set[str], how: Callable[[Path, Path], None] = _link) -> None:
    """Link (or move) into ``target`` what else is in ``source``, unless it is there."""
    for item in source.iterdir():
        if item.name not in dropped and not os.path.lexists(target / item.name):
            how(item, target / item.name)


# what kills left ------------------------------------------------------------------------------------------------------


def _left(target: Path, ending: str) -> list[Path]:
    """Return what saves to ``target`` made beside it, the latest first."""
    made = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{{2 * TOKEN}}}{re.escape(ending)}")
    try:
        return sorted((item for item in target.parent.iterdir() if made.fullmatch(item.name)), key=_age)
    except OSError:
        return []


def _age(path: Path) -> float:
    """Return the seconds since the directory was changed; infinite if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")


def _existing(path: str | os.PathLike[str]) -> Path:
    """Return the directory, or where a save that was killed between two renames has left it."""
    target = Path(os.path.realpath(path))
    return target if target.exists() else next(iter(_left(target, OLD)), target)


def _clear(target: Path, alone: bool) -> None:
    """Put back what a killed save had moved aside, and remove what killed saves left; needs the lock, or their age."""
    left = [item for item in _left(target, OLD) if alone or _age(item) > DEAD_SECONDS]
    if left and not target.exists():
        os.rename(left.pop(0), target)
    for item in (*left, *_left(target, NEW)):
        if alone or _age(item) > DEAD_SECONDS:
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keep other saves into this folder out; give whether that could be done. The system unlocks what dies."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    alone, last = False, time.monotonic() + LOCK_SECONDS
    try:
        while not alone:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                if time.monotonic() > last:
                    break
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield alone
    finally:
        if alone:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork of the process may hold the descriptor too
        os.close(descriptor)
