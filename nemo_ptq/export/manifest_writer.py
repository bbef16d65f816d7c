# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The manifest of an export: every file with its size and checksum, and what made them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = Path("ptq/manifest.json")
_CHUNK = 1 << 22


def sha256_of(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_all(files: Iterable[Path]) -> list[str]:
    """Returns the :func:`sha256_of` of each file, several at a time: hashlib lets go of Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256_of, files))


def file_entries(directory: Path, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a directory, by relative path.

    Args:
        directory: The directory.
        digests: SHA-256 of files that have been read already, by relative path; the others are read now.
    """
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            entries[name] = {"size": path.stat().st_size, "sha256": digests.get(name) or sha256_of(path)}
    return entries


def write_manifest(directory: Path, digests: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Writes the manifest: sizes and checksums of every file, its own among them, and what made them.

    Its own SHA-256, under "sha256", is that of the manifest with zeros in the place of it.

    Args:
        directory: The directory, complete but for the manifest.
        digests: As in :func:`file_entries`.
        about: Free-form entries: versions, arguments.
    """
    files = file_entries(directory, digests)
    target = directory / MANIFEST
    target.parent.mkdir(exist_ok=True)
    zeros = "0" * 64
    text = json.dumps({"version": 1, "sha256": zeros, **about, "files": files}, indent=2) + "\n"
    target.write_text(text.replace(zeros, hashlib.sha256(text.encode()).hexdigest(), 1), encoding="utf-8")
