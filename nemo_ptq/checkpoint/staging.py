# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A directory appears whole or not at all: it is written beside its place, hidden, and renamed at the end.

Each run writes into a staging directory of its own, so that two of them cannot mix even where locks do not help.
"""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_ptq.checkpoint.output_lock import held
from nemo_ptq.console.interrupts import tidying_up
from nemo_ptq.errors import PtqError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The longest suffix of a directory's name: ".calibration.safetensors", and a staging directory's dot.
_LONGEST_SUFFIX = 25
# Errors of a rename onto an existing path.
_IS_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@dataclass(frozen=True)
class Staging:
    """Where one run writes a directory before it gets its name.

    Attributes:
        output: The directory that it makes.
        root: The staging directory, beside it: ``.OUT.partial-`` and eight digits of the run's own.
        replaces: The :func:`stamp_of` ``output``'s content when the run began; None where there was none.
    """

    output: Path
    root: Path
    replaces: str | None

    @property
    def files(self) -> Path:
        """The directory that will become ``output``."""
        return self.root / "files"

    @property
    def journal(self) -> Path:
        """The data that another process needs to continue."""
        return journal_in(self.root)


def journal_in(root: Path) -> Path:
    """Where a run keeps its journal, below its staging directory."""
    return root / "journal"


def stamp_of(path: Path) -> str:
    """Returns a digest of the names, sizes and times of a file, or of everything in a directory."""
    listed = []
    for entry in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = entry.relative_to(path).as_posix()
        stat = entry.stat() if entry.exists() else entry.lstat()
        listed.append((name,) if entry.is_dir() else (name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def staging_roots(output: Path) -> list[Path]:
    """Returns the staging directories of a directory: of a run that writes it now, or of runs that were killed."""
    own = re.compile(re.escape(f".{output.name}.partial-") + "[0-9a-f]{8}")
    try:
        return sorted(entry for entry in output.parent.iterdir() if own.fullmatch(entry.name))
    except OSError:
        return []


@contextmanager
def reserved(output: Path) -> Iterator[bool]:
    """Keeps other processes from making a directory during a ``with`` block.

    Yields:
        Whether that works: False where the file system has no locks.

    Raises:
        PtqError: If another process makes it, or its lock cannot be written.
    """
    with held(output) as works:
        for root in staging_roots(output):
            if not os.path.lexists(output) and _aside(root).is_dir():
                _aside(root).rename(output)  # the process was killed between two renames
        yield works


def begin(output: Path, continued: Path | None = None, is_alone: bool = True) -> Staging:
    """Makes the staging directory of a run; the caller has :func:`reserved` the directory.

    Args:
        output: The directory that the run will make.
        continued: The staging directory of an earlier run, to be taken over with all that is in it.
        is_alone: Whether no other run can be at work, so that leftovers of earlier ones are removed.
    """
    root = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    if continued is not None:
        continued.rename(root)
    for other in staging_roots(output):
        if is_alone and other != root:
            shutil.rmtree(other, ignore_errors=True)
    staging = Staging(output, root, stamp_of(output) if os.path.lexists(output) else None)
    staging.files.mkdir(parents=True, exist_ok=True)
    return staging


def place_problem(output: Path) -> str | None:
    """Says why no directory can be made at a path, or replaced by a rename: the predicate of a sentence."""
    if output.name in ("", ".."):
        return "does not end in a name: give the path of a directory to make"
    parent = next(parent for parent in output.parents if os.path.isdir(parent))
    longest, length = os.pathconf(parent, "PC_NAME_MAX") - _LONGEST_SUFFIX, len(os.fsencode(output.name))
    if length > longest:
        return f"has a name of {length} bytes, and {longest} leave room for what stands beside it: choose a shorter one"
    if output.is_symlink():
        target = os.readlink(output)
        leads = f"is a link to {target}" if output.exists() else f"is a link to {target}, which does not exist"
        return f"{leads}: give the directory itself"
    if os.path.realpath(output) in _mount_points():
        return "is a mount point, which cannot be renamed: choose a directory in it"
    return None


def _mount_points() -> set[str]:
    """Where file systems and directories are mounted; empty where the system does not say."""
    try:
        lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    except OSError:
        return set()
    # Spaces and the like are written as octal numbers.
    return {re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4]) for line in lines}


def discard(staging: Staging) -> None:
    """Removes the files that a run has written so far."""
    shutil.rmtree(staging.root, ignore_errors=True)


def publish(staging: Staging) -> None:
    """Gives finished files their name, in place of the files that had it when the run began.

    Raises:
        PtqError: If something else stands there now. It is left as it is.
    """
    for path in (*staging.files.rglob("*"), staging.files):
        _sync(path)
    if staging.replaces is None or not os.path.lexists(staging.output):
        try:
            staging.files.rename(staging.output)
        except OSError as error:
            if error.errno in _IS_TAKEN:
                raise _changed(staging, "appeared") from error
            raise
    else:
        _replace(staging)
    _sync(staging.output.parent)
    discard(staging)


def _replace(staging: Staging) -> None:
    """Replaces the existing directory with the files, if it has not changed."""
    files, output, aside = staging.files, staging.output, _aside(staging.root)
    in_one_step = _exchange(files, output)
    if not in_one_step:
        output.rename(aside)
        files.rename(output)
    if stamp_of(files if in_one_step else aside) == staging.replaces:
        return
    if in_one_step:
        _exchange(files, output)
    else:
        output.rename(files)
        aside.rename(output)
    raise _changed(staging, "was changed")


def _changed(staging: Staging, what: str) -> PtqError:
    return PtqError(
        f"{staging.output} {what} while this job ran, so it is left as it is: move it away, or choose another directory"
    )


def _aside(root: Path) -> Path:
    """Where a directory waits while it is replaced in two steps."""
    return root / "replaced"


def _exchange(first: Path, second: Path) -> bool:
    """Has two directories change places in one step; returns False where the file system cannot do that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # the C library has no such function
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _sync(path: Path) -> None:
    """Has the operating system put a file or a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Publishes a directory when the ``with`` block ends, and discards it when the block fails.

    Args:
        output: Where the directory will appear, which the caller has :func:`reserved`. An existing directory is
            replaced.

    Yields:
        The empty directory to fill.

    Raises:
        PtqError: If the existing directory has changed in the meantime.
    """
    with tidying_up():
        staging = begin(output)
        try:
            yield staging.files
            publish(staging)
        finally:
            discard(staging)
