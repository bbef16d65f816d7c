# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Text from outside in a Markdown document: names of files and data sets are not formatting."""

import re

from nemo_ptq.console.text import one_line

# Characters that begin formatting anywhere in a line. An underscore within a word does not.
_FORMATTING = re.compile(r"[\\`*\[\]<>&|~]|(?<!\w)_|_(?!\w)")


def code(text: object, in_table: bool = False) -> str:
    r"""Returns a code span.

    Args:
        text: The content.
        in_table: Whether it is in a table's cell, which a bar would end.

    Example:
        >>> code("a`b")
        '``a`b``'
    """
    line = one_line(text)
    ticks = "`" * (_longest_run(line) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    span = f"{ticks}{padding}{line}{padding}{ticks}"
    return span.replace("|", r"\|") if in_table else span


def plain(text: object) -> str:
    r"""Returns a text that is shown as it is.

    Example:
        >>> plain("llama_2 <b>")
        'llama_2 \\<b\\>'
    """
    return _FORMATTING.sub(lambda match: f"\\{match[0]}", one_line(text))


def fence(text: str) -> str:
    """Returns what opens and ends a block of code that holds a text."""
    return "`" * max(3, _longest_run(text) + 1)


def _longest_run(text: str) -> int:
    """How many backticks stand next to each other at most."""
    return max(map(len, re.findall("`+", text)), default=0)
