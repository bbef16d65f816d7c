# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What no job can beat: reading a checkpoint's bytes, and writing an export's."""

import os
import time
from pathlib import Path

_CHUNK = 1 << 26


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files below a directory, in order."""
    return sorted(directory.rglob("*.safetensors"))


def read_files(files: list[Path]) -> float:
    """Reads files from beginning to end; returns the seconds."""
    buffer, start = bytearray(_CHUNK), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def write_files(sizes: list[int], directory: Path) -> float:
    """Writes a file of each size, in bytes, and removes it; returns the seconds of writing."""
    buffer, seconds = memoryview(os.urandom(_CHUNK)), 0.0
    for size in sizes:
        start = time.perf_counter()
        with (directory / "bare").open("wb", buffering=0) as file:
            for left in range(size, 0, -_CHUNK):
                file.write(buffer[: min(left, _CHUNK)])
            os.fsync(file.fileno())
        seconds += time.perf_counter() - start
        (directory / "bare").unlink()
    return seconds
