# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Errors that are meant for the user: printed as they are, without a traceback."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


class PtqError(Exception):
    """Something the user can fix. The message names the value, the rule and the fix."""


class VerificationError(PtqError):
    """An export that does not pass its own verification. It is removed."""


class RecoveryError(PtqError):
    """A quantized model whose recovery is below the user's limit."""


class JobFailed(PtqError):
    """A job that was started has failed.

    Args:
        message: The message.
        ended_by: Number of the signal that has ended the command, and the job with it; None for none.
    """

    def __init__(self, message: str, ended_by: int | None = None) -> None:
        self.ended_by = ended_by
        super().__init__(message)


class ConfigError(PtqError):
    """Every problem found in a job's arguments, reported together.

    Args:
        problems: One readable line for each problem, in the order in which the user would fix them.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(name: str, known: Mapping[str, str] | Iterable[str]) -> str:
    """Suggests the known name closest to `name`: ": did you mean X?", or nothing where none is close.

    Args:
        name: The user's spelling.
        known: Names that exist; of a mapping, its keys are compared and its values suggested.
    """
    suggestions = known if isinstance(known, Mapping) else {candidate: candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), suggestions, n=1)
    return f": did you mean {suggestions[matches[0]]}?" if matches else ""
