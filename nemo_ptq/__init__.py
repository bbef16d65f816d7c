# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of NeMo 2.0 checkpoints. Names are imported when they are first used."""

from importlib import import_module

# Not from typing: `python -m` would look for it in the working directory first.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from nemo_ptq.config import ExportConfig, QuantizationConfig
    from nemo_ptq.task import ptq

__all__ = ["ExportConfig", "QuantizationConfig", "__version__", "ptq"]
__version__ = "0.1.0"

_MODULES = {"ExportConfig": "nemo_ptq.config", "QuantizationConfig": "nemo_ptq.config", "ptq": "nemo_ptq.task"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
