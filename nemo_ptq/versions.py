# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The packages whose versions decide what an export holds."""

from functools import cache
from importlib.metadata import version

_PACKAGES = ("nemo_ptq", "nvidia-modelopt", "megatron-core", "nemo_toolkit", "torch", "transformers")


@cache
def producer() -> dict[str, str]:
    """The versions of what makes an export here, by the packages' names; they stand in all that it leaves."""
    return {package: version(package) for package in _PACKAGES}
