"""Files and directories that are whole or not there: written beside their place, and put into it in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

NEW, OLD = ".new", ".old"  # endings of what a save makes beside its target
TOKEN = 6  # random bytes in these names
LOCK_SECONDS = 20.0  # to wait for another save into the same folder
DEAD_SECONDS = 3600.0  # after which a left-over is nobody's, where locks cannot tell
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of file systems that have no such thing
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


# one step -------------------------------------------------------------------------------------------------------------


def replace_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Make ``path`` a directory with these files: written beside it, synced to the disk, and put in place in one step.

    A process that is killed on the way leaves the earlier directory or the new one, each whole, and so does an OSError,
    which names the path. Where the system cannot exchange two directories, the earlier one may be left under another
    name, where :func:`existing` finds it. Other files in the earlier directory (figures, notes) are kept, by hard
    links. Saves into one folder wait for each other.
    """
    with _beside(path, parents=True) as (target, fresh):
        fresh.mkdir()
        for name, data in files.items():
            _write(fresh / name, data)
        if target.is_dir():
            shutil.copymode(target, fresh)
            _carry(target, fresh, set(files))
        _sync_folder(fresh)
        earlier = _put(fresh, target)
        _sync_folder(target.parent)
        if earlier is not None:
            with suppress(OSError):
                _carry(earlier, target, set(files), os.rename)  # what came while the new files were written


def replace_file(path: Path, data: bytes) -> None:
    """Write a file beside ``path``, sync it to the disk and put it in place in one step; an error leaves the earlier
    one.
    """
    with _beside(path) as (target, fresh):
        _write(fresh, data)
        os.replace(fresh, target)
        _sync_folder(target.parent)


def check_folder(folder: Path) -> None:
    """Raise an OSError if a folder, which may have to be made first, takes no files; leave nothing there."""
    place = folder.absolute()
    while not place.is_dir():
        if place.exists() or place.is_symlink():
            raise NotADirectoryError(0, f"{str(place)!r} is no directory")
        place = place.parent
    tempfile.TemporaryDirectory(prefix=".pyro-flows-", dir=place).cleanup()


@contextmanager
def _beside(path: Path, *, parents: bool = False) -> Iterator[tuple[Path, Path]]:
    """Give a place and one beside it to write to, while no other save can go on; nothing stays beside it."""
    target = Path(os.path.realpath(path))
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(TOKEN)}{NEW}")
    try:
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent) as alone:
            _clear(target, alone)
            try:
                yield target, fresh
            finally:
                _remove(fresh)
    except OSError as error:
        why = error.strerror or str(error)
        text = f"path: {str(path)!r} could not be written ({why}); what was there is as it was"
        raise OSError(error.errno or errno.EIO, text) from error


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
    finally:
        if not target.exists():
            os.rename(aside, target)
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


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str], **_: object) -> None:
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


def existing(path: str | os.PathLike[str]) -> Path:
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
            _remove(item)


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
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
