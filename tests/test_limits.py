# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What runs within limits is ended by an exception, and leaves the process as it was."""

import resource
import signal
import threading

import pytest

from nemo_ptq.limits import limited

GIB = 1 << 30


def test_what_takes_too_long_is_ended() -> None:
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TimeoutError, match=r"more than 0\.05 s"), limited(0.05, GIB):
        while True:
            pass
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before


def test_what_takes_too_much_memory_is_ended() -> None:
    with pytest.raises(MemoryError), limited(60, GIB):
        bytearray(2 * GIB)
    assert len(bytearray(GIB // 4)) == GIB // 4


def test_what_stays_within_runs_to_its_end() -> None:
    with limited(60, GIB):
        found = sum(range(1000))
    assert found == 499_500


def test_a_timer_that_was_running_goes_on() -> None:
    """The tests' own, for one."""
    rang = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rang.set())
    was_left, _ = signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with limited(60, GIB):
            assert not rang.is_set()
        assert rang.wait(10)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, was_left)


def test_other_threads_have_no_limit_of_time() -> None:
    found: list[int] = []

    def work() -> None:
        with limited(0.001, GIB):
            found.append(sum(range(100_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [4_999_950_000]
