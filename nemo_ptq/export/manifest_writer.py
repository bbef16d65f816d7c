# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The manifest of an export: every file with its size and checksum, and what made them.

Checksums are BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs): as strong as SHA-256, and several times as fast even
on one core.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

MANIFEST = Path("ptq/manifest.json")
VERSION = 2
# Read at a time by one thread, and how many read side by side: one reads more slowly than all cores hash.
_CHUNK, _READERS = 1 << 22, 4


def checksum_of(path: Path) -> str:
    """Returns a file's BLAKE3 in hexadecimal."""
    digest, size = blake3(max_threads=blake3.AUTO), path.stat().st_size
    chunks = [memoryview(bytearray(min(_CHUNK, size))) for _ in range(min(_READERS, os.cpu_count() or 1))]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(len(chunks)) as pool:
        for start in range(0, size, len(chunks) * _CHUNK):
            places = range(start, size, _CHUNK)
            counts = pool.map(partial(_fill, file.fileno()), chunks, places)
            for chunk, count in zip(chunks, counts, strict=False):
                digest.update(chunk[:count])
    return digest.hexdigest()


def _fill(file: int, chunk: memoryview, place: int) -> int:
    """Reads a file from a place on until a chunk is full, or the file ends; returns how many bytes it were."""
    filled = 0
    while filled < len(chunk) and (count := os.preadv(file, [chunk[filled:]], place + filled)):
        filled += count
    return filled


def checksums_of(files: Iterable[Path], known: Mapping[Path, str]) -> list[str]:
    """Returns the :func:`checksum_of` of each file; those that are not known are read, side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda file: known.get(file) or checksum_of(file), files))


def file_entries(directory: Path, checksums: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file in a directory, by relative path.

    Args:
        directory: The directory.
        checksums: Known checksums by relative path; other files are read now.
    """
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            entries[name] = {"size": path.stat().st_size, "blake3": checksums.get(name) or checksum_of(path)}
    return entries


def write_manifest(directory: Path, checksums: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Writes the manifest: sizes and checksums of every file, its own among them, and what made them.

    Its own checksum is a SHA-256, under "sha256": that of the manifest with zeros in the place of it.

    Args:
        directory: The directory, complete except for the manifest.
        checksums: As in :func:`file_entries`.
        about: Free-form entries: versions, arguments.
    """
    files = file_entries(directory, checksums)
    target = directory / MANIFEST
    target.parent.mkdir(exist_ok=True)
    zeros = "0" * 64
    text = json.dumps({"version": VERSION, "sha256": zeros, **about, "files": files}, indent=2) + "\n"
    target.write_text(text.replace(zeros, hashlib.sha256(text.encode()).hexdigest(), 1), encoding="utf-8")
