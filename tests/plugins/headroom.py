# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An algorithm: FP8 whose activations may become twice as large as in the calibration."""

from typing import Any

from nemo_ptq.calibration.methods import Max
from nemo_ptq.quantization.algorithms import ALGORITHMS, Algorithm, register

HEADROOM = 2.0


class Headroom(Max):
    """Decides as fp8's method does, and leaves room above the amax."""

    def decide(self, *arguments: Any) -> Any:
        """See :meth:`nemo_ptq.calibration.methods.Method.decide`."""
        entries = super().decide(*arguments)
        return {**entries, "amax": entries["amax"] * HEADROOM}


register(
    Algorithm(
        "fp8_headroom",
        "FP8 with headroom",
        scheme="fp8",
        quant_algo="FP8",
        method=f"{__name__}:Headroom",
        preset="fp8",
        packed_bytes=1.0,
        packing_bytes=5,
        required_recovery=0.9,
        limits=ALGORITHMS["fp8"].limits,
    )
)
