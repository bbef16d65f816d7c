# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ptq/manifest.json against the files that are there."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.model_config import load_json

MANIFEST = "ptq/manifest.json"

# Under which name each version of the manifest has the checksums of the files.
_CHECKSUMS: Mapping[int, str] = {1: "sha256", 2: "blake3"}

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """The manifest's entry of one file.

    Attributes:
        size: In bytes.
        kind: Kind of checksum: "blake3" or, in manifests of version 1, "sha256".
        checksum: In lower-case hexadecimal.
    """

    size: int
    kind: str
    checksum: str

    def is_of(self, file: Path) -> bool:
        """Whether a file has this checksum."""
        digest = blake3(max_threads=blake3.AUTO) if self.kind == "blake3" else hashlib.sha256()
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
        return bool(digest.hexdigest() == self.checksum)


def exports_below(directory: Path) -> list[Path]:
    """Returns the subdirectories that are exports, as a job with several formats has them; none if it is one itself."""
    if (directory / MANIFEST).exists() or not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if (path / MANIFEST).is_file())


def read_manifest(directory: Path) -> dict[str, Entry]:
    """Reads the manifest's files by their relative paths.

    Raises:
        PtqError: It is missing or malformed, or has been changed: its own checksum is that of its bytes with zeros in
            the checksum's place.
    """
    if not os.path.lexists(directory / MANIFEST):
        raise PtqError(f"{MANIFEST} is missing: this is not an export of nemo_ptq, or was not copied whole")
    raw = load_json(directory / MANIFEST)
    version = raw.get("version")
    if not isinstance(version, int) or version not in _CHECKSUMS:
        raise PtqError(f"{MANIFEST}: version is {version!r}, expected one of {', '.join(map(str, _CHECKSUMS))}")
    own = raw.get("sha256")
    if not isinstance(own, str) or len(own) != 64:
        raise PtqError(f"{MANIFEST}: sha256 is {own!r}, expected its own checksum")
    content = (directory / MANIFEST).read_bytes().replace(own.encode(), b"0" * 64, 1)
    if hashlib.sha256(content).hexdigest() != own:
        raise PtqError(f"{MANIFEST} has another sha256 than it says: it was changed after it was written")
    files = raw.get("files")
    if not isinstance(files, dict) or not files:
        raise PtqError(f"{MANIFEST}: files is no object, or empty")
    return {name: _parse_entry(name, entry, _CHECKSUMS[version]) for name, entry in files.items()}


def _parse_entry(name: str, raw: Any, kind: str) -> Entry:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise PtqError(f"{MANIFEST}: {name!r} points outside the directory")
    size, checksum = (raw.get("size"), raw.get(kind)) if isinstance(raw, dict) else (None, None)
    if not isinstance(size, int) or isinstance(size, bool) or not isinstance(checksum, str):
        raise PtqError(f"{MANIFEST}: the entry of {name!r} needs an integer size and a string {kind}")
    return Entry(size, kind, checksum)


def file_problems(directory: Path, entries: dict[str, Entry]) -> list[str]:
    """Files that are listed and not there, or there and not listed; links count as problems of their own."""
    found = {
        path.relative_to(directory).as_posix(): path
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    found.pop(MANIFEST, None)
    links = [f"{name} is a link or no regular file" for name, path in found.items() if not _is_regular(path)]
    missing = [f"{name} is missing" for name in entries.keys() - found.keys()]
    extra = [f"{name} is not in the manifest" for name in found.keys() - entries.keys()]
    return sorted(missing) + sorted(extra) + sorted(links)


def checksum_problems(directory: Path, entries: dict[str, Entry]) -> list[str]:
    """Listed files whose size or checksum is another; files that are not there are left to ``file_problems``."""
    problems, same_size = [], []
    for name, entry in sorted(entries.items()):
        path = directory / name
        if not _is_regular(path):
            continue
        size = path.stat().st_size
        if size != entry.size:
            problems.append(f"{name} has {size} bytes, the manifest says {entry.size}")
        else:
            same_size.append(name)
    # Hashing lets go of Python's lock, so files are read side by side.
    with ThreadPoolExecutor() as pool:
        as_listed = pool.map(lambda name: entries[name].is_of(directory / name), same_size)
        for name, is_same in zip(same_size, as_listed, strict=True):
            if not is_same:
                problems.append(f"{name} has another {entries[name].kind} than the manifest says")
    return sorted(problems)


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
