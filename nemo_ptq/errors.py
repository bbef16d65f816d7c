# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Errors that are meant for the user: printed as they are, without a traceback."""

from collections.abc import Sequence


class PtqError(Exception):
    """Something the user can fix. The message names the value, the rule and the fix."""


class VerificationError(PtqError):
    """An export that does not pass its own verification. It is removed."""


class ConfigError(PtqError):
    """Every problem found in a job's arguments, reported together.

    Args:
        problems: One readable line for each problem, in the order in which the user would fix them.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
