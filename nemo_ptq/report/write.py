# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The report's files in an exported directory."""

from pathlib import Path

from nemo_ptq.report.records import Report, to_json

REPORT = Path("ptq/report.json")
PAGE = Path("ptq/report.html")
PICTURE = Path("ptq/report.png")
CARD = Path("ptq/README.md")
FILES = (REPORT, PAGE, PICTURE, CARD)
"""All files that :func:`write_report` makes, relative to the directory."""


def write_report(directory: Path, report: Report) -> None:
    """Writes the report into a directory, over one that may be there.

    Args:
        directory: The exported directory.
        report: The report.
    """
    # Imports matplotlib: only the rank that writes waits for it.
    from nemo_ptq.report.page import render_card, render_page, render_png

    (directory / REPORT).parent.mkdir(exist_ok=True)
    (directory / REPORT).write_text(to_json(report), encoding="utf-8")
    (directory / PAGE).write_text(render_page(report), encoding="utf-8")
    (directory / PICTURE).write_bytes(render_png(report))
    (directory / CARD).write_text(render_card(report), encoding="utf-8")
