# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Limits of time and memory for programs that come with data, such as templates: a sandbox has neither."""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn


@contextmanager
def limited(seconds: float, more_bytes: int) -> Iterator[None]:
    """Ends what runs in a ``with`` block, by an exception, once it takes too long or too much memory.

    The limit of memory is this process's for the time being. That of time needs a signal, which only the main thread
    gets; in others there is none.

    Args:
        seconds: Time that it may take.
        more_bytes: Memory that it may allocate beyond what the process has.

    Raises:
        TimeoutError: If it takes longer.
        MemoryError: If it allocates more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more_bytes
    most = min(limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        if threading.current_thread() is threading.main_thread():
            with _timed(seconds):
                yield
        else:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _timed(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before, start = signal.signal(signal.SIGALRM, end), time.monotonic()
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # A timer that was running goes on.
        left = max(remaining - (time.monotonic() - start), 1e-3) if remaining else 0.0
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)
