# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How far a job has come, in its staging directory, so that a killed or failed one can be continued.

Between two blocks every rank writes what it needs to go on: the hidden states of its streams, the calibration state so
far, and what it has measured. The packed blocks are in the staged files already. A journal is written no more often
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
    """What one rank needs to continue.

    Attributes:
        next_block: The first block that is not finished.
        tensors: By name; read, they are on the CPU.
        notes: What JSON can hold.
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
        directory: Where it is; made when the job begins.
        identity: What must be the same for a run to be continued, by the name that the user knows it by.
        enabled: Whether anything is written.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], enabled: bool = True) -> None:
        self._directory, self._enabled = directory, enabled
        self._identity = json.loads(json.dumps(identity, default=str))
        self._rank, self._generation = dist.get_rank(), 0
        self._last, self._cost = time.monotonic(), 0.0

    def check(self) -> None:
        """Refuses an earlier run that this one cannot go on from, before any file of it is touched.

        Raises:
            PtqError: If it was of other arguments, data or versions, or cannot be read.
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
        """Reads how far an earlier run has come.

        Raises:
            PtqError: If it was of other arguments, data or versions, or its files are damaged.
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
        """Whether the journal is to be written now: rank 0 decides."""
        waited = time.monotonic() - self._last
        answer = [self._enabled and waited >= max(_LEAST_SECONDS, _PATIENCE * self._cost)]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def write(self, progress: Progress) -> None:
        """Writes how far this run has come; what was written before is replaced when all ranks are done."""
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
