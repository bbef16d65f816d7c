# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a job that was cut short has left beside its output, and how it is continued or removed. Needs no torch."""

import json
from pathlib import Path

from nemo_ptq.checkpoint.staging import staging_path

PROGRESS = "progress.json"
"""The file of a journal that says how far the job has come."""


def journal_path(output: Path) -> Path:
    """Where the journal of a job is kept while it runs."""
    return output.with_name(f".{output.name}.journal")


def finished_blocks(output: Path) -> int:
    """Returns how many blocks of an earlier run need not be done again."""
    try:
        return int(json.loads((journal_path(output) / PROGRESS).read_text())["next_block"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def how_to_go_on(output: Path) -> str:
    """Says how an earlier run is continued, and how it is removed."""
    kept = f"{journal_path(output)} {staging_path(output)}"
    return f"the same command with export_config.resume=true goes on from there, and `rm -r {kept}` removes them"
