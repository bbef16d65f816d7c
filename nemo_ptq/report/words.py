# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers and names as people read them."""

from nemo_ptq.report.records import Summary

_KINDS = {
    "in_proj": "state space in (in_proj)",
    "out_proj": "state space out (out_proj)",
    "qkv": "attention in (qkv)",
    "proj": "attention out (proj)",
    "fc1": "MLP in (fc1)",
    "fc2": "MLP out (fc2)",
    "experts.fc1": "experts in (fc1)",
    "experts.fc2": "experts out (fc2)",
}


def kind_name(kind: str) -> str:
    """A kind of linear layer, with its short name in parentheses."""
    return _KINDS.get(kind, kind)


def human_bytes(count: float) -> str:
    """A size in decimal units, three digits of it.

    Example:
        >>> human_bytes(5_256_848)
        '5.26 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def human_count(count: int) -> str:
    """A large number as models are named by, three digits of it.

    Example:
        >>> human_count(8_030_261_248)
        '8.03B'
    """
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:,}"


def seconds(duration: float) -> str:
    """A duration, to a tenth of a second below a minute.

    Example:
        >>> seconds(75.2)
        '1 min 15 s'
    """
    if duration < 59.95:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def verdict(summary: Summary) -> tuple[str, bool]:
    """Pass or fail in a word or two, and whether it is bad."""
    if summary.passed is None:
        return ("verified, quality not measured" if summary.required_recovery else "verified"), False
    return ("pass", False) if summary.passed else ("fail", True)


def index_ranges(indices: list[int]) -> str:
    """Lists numbers, runs of them with their ends only.

    Example:
        >>> index_ranges([0, 1, 2, 5, 7, 8])
        '0 to 2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
