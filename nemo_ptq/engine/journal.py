# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A job's progress, in its staging directory, so that a killed or failed job can be continued.

Between two blocks every rank writes what it needs to continue: the hidden states of its streams, the calibration state
so far, and its measurements. The packed blocks are in the staged files already. A journal is written no more often
than costs one part in twenty of the walk's time.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from nemo_ptq.errors import PtqError
from nemo_ptq.export.leftover import PROGRESS
from nemo_ptq.export.safetensors_stream import SafetensorsStream, TensorSpec

_NOTES = "nemo_ptq.notes"
# Seconds of walking for each second of writing the journal, and between two journals at least.
_PATIENCE, _LEAST_SECONDS = 20.0, 2.0


@dataclass(frozen=True)
class Progress:
    """Progress of one rank.

    Attributes:
        next_block: The first block that is not finished.
        tensors: Tensors by name; on the CPU when read back.
        notes: Further values, as JSON.
    """

    next_block: int
    tensors: Mapping[str, torch.Tensor]
    notes: Mapping[str, Any]


def flattened(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested arguments under their dotted names.

    Example:
        >>> flattened({"calibration_tp": 2, "export_config": {"path": "OUT"}})
        {'calibration_tp': 2, 'export_config.path': 'OUT'}
    """
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


class Journal:
    """The journal of one job on one rank; all ranks call its methods together.

    Args:
        directory: The journal's directory, which :meth:`begin` makes.
        identity: Values that must be the same when the run is continued, by the names that the user knows.
        enabled: Whether to write anything.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], enabled: bool = True) -> None:
        self._directory, self._enabled = directory, enabled
        self._identity = json.loads(json.dumps(identity, default=str))
        self._rank, self._generation = dist.get_rank(), 0
        self._last, self._cost = time.monotonic(), 0.0

    def check(self) -> None:
        """Refuses an earlier run that cannot be continued, before any of its files is touched.

        Raises:
            PtqError: If its arguments, data or versions differ, or it cannot be read.
        """
        try:
            self._check(json.loads((self._directory / PROGRESS).read_text())["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PtqError(
                f"export_config.resume=true, but {self._directory} cannot be read ({error}): remove it and start again"
            ) from error

    def begin(self) -> None:
        """Makes the directory."""
        if self._rank == 0:
            self._directory.mkdir(exist_ok=True)
        dist.barrier()

    def read(self) -> Progress:
        """Reads the progress of an earlier run.

        Raises:
            PtqError: If its arguments, data or versions differ, or its files are damaged.
        """
        try:
            content = json.loads((self._directory / PROGRESS).read_text())
            self._check(content["identity"])
            self._generation = int(content["generation"])
            file = self._file(self._generation)
            with safe_open(file, framework="numpy") as opened:
                notes = json.loads(opened.metadata()[_NOTES])
            return Progress(int(content["next_block"]), load_file(file), notes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PtqError(
                f"export_config.resume=true, but {self._directory} cannot be read ({error}): remove it and start again"
            ) from error

    def _check(self, before: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {before.get(name)!r} and is {self._identity.get(name)!r}"
            for name in sorted(before.keys() | self._identity.keys())
            if before.get(name) != self._identity.get(name)
        ]
        if changed:
            raise PtqError(
                f"export_config.resume=true cannot continue {self._directory}: {'; '.join(changed)}. Give what was "
                "given then, or remove that directory and start again"
            )

    def is_due(self) -> bool:
        """Whether to write the journal now; rank 0 decides."""
        waited = time.monotonic() - self._last
        answer = [self._enabled and waited >= max(_LEAST_SECONDS, _PATIENCE * self._cost)]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def write(self, progress: Progress) -> None:
        """Writes this run's progress; the previous journal is replaced once all ranks are done."""
        start = time.monotonic()
        file = self._file(self._generation + 1)
        specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in progress.tensors.items()]
        file.unlink(missing_ok=True)
        # Hidden states are the largest thing that is kept between two blocks: at most two tensors are copied at a time.
        with SafetensorsStream(file, specs, {_NOTES: json.dumps(progress.notes)}) as stream:
            for name, value in progress.tensors.items():
                copy = _on_cpu(value)
                stream.wait()
                stream.write(name, copy)
        dist.barrier()
        if self._rank == 0:
            content = {
                "next_block": progress.next_block,
                "generation": self._generation + 1,
                "identity": self._identity,
            }
            scratch = self._directory / f"{PROGRESS}.new"
            with scratch.open("w", encoding="utf-8") as text:
                json.dump(content, text)
                text.flush()
                os.fsync(text.fileno())
            scratch.rename(self._directory / PROGRESS)
        dist.barrier()
        self._file(self._generation).unlink(missing_ok=True)
        self._generation += 1
        self._last = time.monotonic()
        self._cost = self._last - start

    def _file(self, generation: int) -> Path:
        return self._directory / f"rank{self._rank}.{generation}.safetensors"


def _on_cpu(value: torch.Tensor) -> torch.Tensor:
    """Returns a tensor on the CPU: from a GPU in page-locked memory, which copies are fast to."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value) if value.is_cuda else value
