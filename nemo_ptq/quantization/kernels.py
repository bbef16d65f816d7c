# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whether kernels of Triton can be used."""

import os
import shutil
from functools import cache

import torch


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels can work on a tensor: it is on a GPU, for which torch brings Triton, and they can be built."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether Triton is installed, and the C compiler that it needs to build launchers of kernels."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return "CC" in os.environ or any(map(shutil.which, ("cc", "gcc", "clang")))
