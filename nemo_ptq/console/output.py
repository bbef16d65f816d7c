# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Output that cannot be written: a full disk, a device that is always full, a reader that has gone."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_ptq.errors import PtqError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a file system that has no room, for this user or for so large a file."""
CANNOT_WRITE = (*NO_ROOM, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE)
"""These, and those of one that fails, has become read-only, or belongs to somebody else."""


@contextmanager
def written_output() -> Iterator[None]:
    """Sees to it that what a ``with`` block prints is written when it ends.

    Raises:
        PtqError: If there is no room for it. What is left is dropped, so that Python does not try again when it ends.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as Python has them where they are closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop()  # whoever read it has seen enough
        sys.exit(1)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        _drop()
        raise PtqError(f"the output cannot be written: {error.strerror}") from error


def _drop() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
