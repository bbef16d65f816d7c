# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: a command ends with one line and the status that a shell expects, 130 or 143.

While libraries are imported, an exception would be caught halfway by whatever is imported, so the process ends at once.
A job that has reserved its output ends by SystemExit, so that it can tidy up.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PAUSE = 0.05  # seconds


class _Ended(SystemExit):
    """Raised by a signal."""


def _say(number: int) -> None:
    # Not by print(), which the signal may have interrupted.
    os.write(2, f"Error: ended by {signal.Signals(number).name}\n".encode())


def end_at_once(speaks: bool = True) -> None:
    """Has signals end this process from now on, for a command's entry point.

    Args:
        speaks: Whether this process prints a line. With several ranks their launcher does.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        if speaks:
            _say(number)
        os._exit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, end)


@contextmanager
def tidying_up(speaks: bool = True) -> Iterator[None]:
    """Has signals raise SystemExit during a ``with`` block; a second one ends the process at once.

    Args:
        speaks: As for :func:`end_at_once`.
    """
    ended_by: list[int] = []

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        if speaks:
            _say(number)
        leave_silently(number, frame)

    def leave_silently(number: int, frame: FrameType | None) -> NoReturn:
        end_at_once(speaks=False)
        ended_by.append(number)
        raise _Ended(128 + number)

    def raise_again(lost: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised while it clears an object away, such as in a weak reference's callback."""
        if not isinstance(lost.exc_value, _Ended):
            previous_hook(lost)
            return
        number = int(str(lost.exc_value)) - 128
        signal.signal(number, leave_silently)
        # Later, since what is raised in here would be lost as well.
        threading.Timer(_PAUSE, os.kill, (os.getpid(), number)).start()

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    previous_hook, sys.unraisablehook = sys.unraisablehook, raise_again
    previous = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        yield
    except Exception as error:
        if ended_by:  # compiled code that has called Python may raise an error of its own in place of what was raised
            raise _Ended(128 + ended_by[-1]) from error
        raise
    finally:
        sys.unraisablehook = previous_hook
        for number, handler in previous.items():
            signal.signal(number, handler)
