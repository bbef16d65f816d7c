# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The report's files in an exported directory."""

from pathlib import Path

from nemo_ptq.report.records import Report, to_json

REPORT = Path("ptq/report.json")
FILES = (REPORT,)
"""All files that :func:`write_report` makes, relative to the directory."""


def write_report(directory: Path, report: Report) -> None:
    """Writes the report into a directory, over one that may be there.

    Args:
        directory: The exported directory.
        report: What to write.
    """
    (directory / REPORT).parent.mkdir(exist_ok=True)
    (directory / REPORT).write_text(to_json(report), encoding="utf-8")
