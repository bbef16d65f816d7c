# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Further figures for the report of a directory that is there already."""

import os
from collections.abc import Callable
from pathlib import Path

from nemo_ptq.checkpoint.staging import atomic_directory, reserved
from nemo_ptq.errors import PtqError
from nemo_ptq.export.manifest_writer import MANIFEST, write_manifest
from nemo_ptq.report.records import Report, read_report
from nemo_ptq.report.write import FILES, REPORT, write_report
from nemo_ptq.untrusted import FileError, read_json


def has_report(directory: Path) -> bool:
    """Whether a directory has a report that this process may replace."""
    return (directory / REPORT).is_file() and all(
        os.access(place, os.W_OK) for place in (directory, directory.parent, directory / REPORT)
    )


def update_report(directory: Path, change: Callable[[Report], Report]) -> None:
    """Writes a directory's report and manifest anew, with other figures.

    The directory is replaced as a whole, as an export is: it is built beside its place, of links to all files that stay
    as they are, and renamed. Readers see the old one or the new one.

    Args:
        directory: An exported directory with a report.
        change: Makes the new report of the old one, as :func:`~nemo_ptq.report.compose.with_quality` does.

    Raises:
        PtqError: If its report or manifest cannot be read, the file system has no hard links, or another process makes
            the directory.
    """
    with reserved(directory.resolve()):
        _update(directory.resolve(), change)


def _update(directory: Path, change: Callable[[Report], Report]) -> None:
    report = change(read_report(directory / REPORT))
    try:
        manifest = read_json(directory / MANIFEST)
        # Of a manifest of version 1 the files are read again.
        checksums = {name: entry["blake3"] for name, entry in manifest["files"].items() if "blake3" in entry}
        about = {name: value for name, value in manifest.items() if name not in ("version", "sha256", "files")}
    except (FileError, KeyError, TypeError, AttributeError) as error:
        raise PtqError(f"{directory / MANIFEST} cannot be read: {error}") from error
    rewritten = {*map(str, FILES), str(MANIFEST)}
    try:
        with atomic_directory(directory) as staging:
            for file in directory.rglob("*"):
                name = file.relative_to(directory)
                if file.is_file() and str(name) not in rewritten:
                    (staging / name).parent.mkdir(parents=True, exist_ok=True)
                    os.link(file, staging / name)
            write_report(staging, report)
            write_manifest(
                staging, {name: checksum for name, checksum in checksums.items() if name not in rewritten}, about
            )
    except OSError as error:
        raise PtqError(f"{directory / REPORT} cannot be replaced ({error}): use --no-update-report") from error
