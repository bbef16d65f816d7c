# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Text from outside (names of files, what files say) on its way to a terminal."""

import re

# Control characters but for tab and newline, halves of characters (bytes of a path that are no UTF-8), and characters
# that turn the direction of writing.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_LONGEST_LINE = 1000


def printable(text: object) -> str:
    r"""Returns a text with what a terminal would obey, or cannot show, written out.

    Example:
        >>> printable("a\x1b[31m/b")
        'a\\x1b[31m/b'
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], str(text))


def shortened(text: str) -> str:
    """Returns a text whose lines have at most a thousand characters: of longer ones the beginning and the end.

    Values that a user or a file gives stand in messages, and may be of any length.
    """
    return "\n".join(
        line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 + 5 :]}"
        for line in text.split("\n")
    )


def one_line(text: object) -> str:
    """Returns a :func:`printable` text in one line."""
    return printable(text).replace("\n", "\\n")
