# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What an interrupted job has left beside its output, and how to continue or remove it. Needs no torch."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_ptq.checkpoint.staging import journal_in, reserved, staging_roots

PROGRESS = "progress.json"
"""The file of a journal that says how far the job has come."""


@dataclass(frozen=True)
class Leftover:
    """An earlier run that can be continued.

    Attributes:
        root: The run's staging directory.
        blocks: Number of finished blocks.
    """

    root: Path
    blocks: int

    @property
    def ways_on(self) -> str:
        """Says how to continue the run, and how to remove it."""
        return f"repeat the command with export_config.resume=true to continue, or remove them with `rm -r {self.root}`"

    def in_the_way_of(self, path: object) -> str:
        """Says to a run that does not continue it that it is there.

        Args:
            path: The run's `export_config.path`, as the user gave it.
        """
        return f"export_config.path={path}: an earlier run has finished {self.blocks} blocks: {self.ways_on}"


def finished_blocks(root: Path) -> int:
    """Returns how many blocks a run has finished for good, by its staging directory."""
    try:
        return int(json.loads((journal_in(root) / PROGRESS).read_text())["next_block"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def find_leftover(output: Path) -> Leftover | None:
    """Returns what can be continued of earlier runs; of several, the one that has come furthest."""
    found = [Leftover(root, blocks) for root in staging_roots(output) if (blocks := finished_blocks(root))]
    return max(found, key=lambda leftover: leftover.blocks, default=None)


def tidy(output: Path) -> Leftover | None:
    """Removes what runs that have died have left of a directory, unless it can be continued: returns that.

    Raises:
        PtqError: If another process makes the directory.
    """
    if not output.parent.is_dir():
        return None
    with reserved(output) as is_alone:
        for root in staging_roots(output):
            if is_alone and not finished_blocks(root):
                shutil.rmtree(root, ignore_errors=True)
        return find_leftover(output)
