# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One job at a time makes a directory: a lock file beside it names the process that does.

The lock is flock's, so it ends with the process that holds it, however that ends; the file alone means nothing.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from nemo_ptq.errors import PtqError

# Errors of a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
# A process that only checks for a lock holds it for a moment: a refused attempt is repeated after these pauses, in
# seconds.
_ATTEMPTS, _PAUSE = 5, 0.1


def lock_path(output: Path) -> Path:
    """Where the lock of a directory is."""
    return output.parent / f".{output.name}.lock"


def owner_of(output: Path) -> str | None:
    """Says which process makes a directory now: its number, its host and since when. None if no process does."""
    try:
        descriptor = os.open(lock_path(output), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


@contextmanager
def held(output: Path) -> Iterator[bool]:
    """Holds the lock of a directory, which need not exist, during a ``with`` block.

    Yields:
        Whether other processes are kept away: False where the file system has no locks.

    Raises:
        PtqError: If another process holds it, or the lock file cannot be written.
    """
    path = lock_path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, works = _acquire(output)
    except OSError as error:
        raise PtqError(
            f"{path} cannot be written ({error.strerror}): correct that, or choose another directory"
        ) from error
    try:
        yield works
    finally:
        # Before the lock is released: the next holder must not lose its file.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(output: Path) -> tuple[int, bool]:
    path = lock_path(output)
    for attempt in range(_ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            works = _flock(descriptor)
            if works is None:
                owner = _describe(descriptor)
            elif not _is_at(descriptor, path):
                owner = "a process that has just ended"  # and has removed the file that was opened here
            else:
                _sign(descriptor, path)
                return descriptor, works
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if attempt + 1 < _ATTEMPTS:
            time.sleep(_PAUSE)
    raise PtqError(f"{output} is being written by {owner}: wait until it has ended, or choose another directory")


def _sign(descriptor: int, path: Path) -> None:
    """Writes the owner into a lock file; a file that cannot be written is removed."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(me).encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _flock(descriptor: int) -> bool | None:
    """Takes the lock; returns None where another process has it, False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _describe(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
