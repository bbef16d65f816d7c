# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Falcon, which is refused."""

from nemo_ptq.models.registry import Family

FAMILIES = (
    Family(
        "Falcon",
        "Falcon",
        None,
        refused="its attention and its MLP work side by side on one norm's output",
        refused_architectures=("FalconForCausalLM", "RWForCausalLM"),
    ),
)
