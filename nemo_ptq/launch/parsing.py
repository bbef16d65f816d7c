# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Errors of NeMo-Run's parser, as problems of one line each."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_run.cli.cli_parser import CLIException

from nemo_ptq.errors import ConfigError


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Adds exceptions raised inside to the problems. Users' factories raise any kind, so every exception counts."""
    parser = logging.getLogger("nemo_run.cli.cli_parser")
    was_disabled, parser.disabled = parser.disabled, True  # it would print each problem a second time
    try:
        yield
    except ConfigError as error:
        problems.extend(error.problems)
    except Exception as error:
        problems.append(_first_line(error))
    finally:
        parser.disabled = was_disabled


def _first_line(error: Exception) -> str:
    """The message of an exception without the context that NeMo-Run's parser adds."""
    cause = error.__cause__ if isinstance(error, CLIException) and error.__cause__ else error
    message = str(cause).partition(" (Argument: ")[0].strip()
    return message.splitlines()[0] if message else type(cause).__name__
