# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The page that compares the algorithms of a sweep."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ptq.report import words
from nemo_ptq.report.outcomes import COLUMNS, Outcome
from nemo_ptq.report.page import make_chart, make_environment
from nemo_ptq.report.plots import comparison_chart

# What is drawn: the title, the field of an outcome, and how it is written.
_PANELS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "size": ("export_bytes", words.human_bytes),
    "KL divergence, nats per token": ("kl_divergence", lambda value: f"{value:.4f}"),
    "time": ("seconds", words.seconds),
    "peak memory of a rank": ("peak_memory_bytes", words.human_bytes),
}


def render_sweep(checkpoint: str, outcomes: Sequence[Outcome], directory: Path) -> str:
    """Writes the HTML page.

    Args:
        checkpoint: The quantized checkpoint.
        outcomes: Outcome of each algorithm.
        directory: Where the page will be: it links to the reports below.
    """
    done = [outcome for outcome in outcomes if outcome.failure is None]
    panels: dict[str, Any] = {
        title: ([getattr(outcome, field) for outcome in done], show)
        for title, (field, show) in _PANELS.items()
        if done and all(getattr(outcome, field) is not None for outcome in done)
    }
    chart = make_chart(
        "comparison",
        comparison_chart([outcome.algorithm for outcome in done], panels) if panels else None,
        f"{', '.join(panels)} of {', '.join(outcome.algorithm for outcome in done)}",
    )
    rows = [(outcome.algorithm, outcome.texts(), _link(outcome, directory)) for outcome in outcomes]
    failures = [(outcome.algorithm, outcome.failure) for outcome in outcomes if outcome.failure]
    return (
        make_environment()
        .get_template("sweep.html.j2")
        .render(checkpoint=checkpoint, heads=list(COLUMNS), rows=rows, chart=chart, failures=failures)
    )


def _link(outcome: Outcome, directory: Path) -> str | None:
    pages = sorted(Path(outcome.path).glob("ptq/report.html")) or sorted(Path(outcome.path).glob("*/ptq/report.html"))
    return pages[0].relative_to(directory).as_posix() if pages else None
