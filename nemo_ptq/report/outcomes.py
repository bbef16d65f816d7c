# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the algorithms of a sweep came to, side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """One algorithm of a sweep.

    Attributes:
        algorithm: Name of the algorithm.
        path: The exported directory.
        failure: Why there is none.
        export_bytes: Size of its weights and scales.
        compression: Size of the checkpoint's weights over that.
        perplexity: Perplexity of the quantized model; None if not measured, as below.
        recovery: Perplexity of the unquantized model over that.
        kl_divergence: Against the unquantized model, in nats per token.
        seconds: All steps together.
        peak_memory_bytes: Peak memory of the step and the rank that needed most.
    """

    algorithm: str
    path: str
    failure: str | None = None
    export_bytes: int | None = None
    compression: float | None = None
    perplexity: float | None = None
    recovery: float | None = None
    kl_divergence: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None

    def texts(self) -> list[str]:
        """What stands in each of :data:`COLUMNS`."""
        if self.failure is not None:
            return ["FAILED", *[""] * (len(COLUMNS) - 1)]
        values = [(getattr(self, field), write) for field, write in COLUMNS.values()]
        return ["" if value is None else write(value) for value, write in values]


COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "size, GB": ("export_bytes", lambda value: f"{value / 1e9:.3g}"),
    "times smaller": ("compression", lambda value: f"{value:.2f}"),
    "perplexity": ("perplexity", lambda value: f"{value:.3f}"),
    "recovery": ("recovery", lambda value: f"{value:.4f}"),
    "KL, nats": ("kl_divergence", lambda value: f"{value:.4f}"),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
    "peak GB": ("peak_memory_bytes", lambda value: f"{value / 1e9:.3g}"),
}
"""The comparison: for each column's head the field of an outcome, and how it is written."""
