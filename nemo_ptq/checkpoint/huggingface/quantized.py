# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories that are quantized already, and how to get at the model before that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError

# The file that ModelOpt writes beside a config.json, which need not mention the quantization itself.
_MODELOPT = "hf_quant_config.json"
# Settings of config.json; the second one is that of older compressed-tensors.
_SETTINGS = ("quantization_config", "compression_config")
_SAVE = "and write it with save_pretrained"
_WAYS_OUT: Mapping[str, str] = {
    "compressed-tensors": f"load it in transformers with CompressedTensorsConfig(run_compressed=False) {_SAVE}",
    "fp8": "multiply its weights by their weight_scale_inv, as its publisher's own script does",
    "mxfp4": f"load it in transformers with Mxfp4Config(dequantize=True) {_SAVE}",
}
_SHOWN = 40


def check_unquantized(directory: Path, content: Mapping[str, Any]) -> None:
    """Refuses a directory whose weights are quantized.

    Args:
        directory: The directory.
        content: The content of its config.json.

    Raises:
        PtqError: If they are.
    """
    setting = next((name for name in _SETTINGS if content.get(name)), None)  # null or empty says that it is not
    if setting is None and not (directory / _MODELOPT).is_file():
        return
    described = content.get(setting) if setting else None
    method = described.get("quant_method") if isinstance(described, dict) else None
    found = f"{_MODELOPT} is there" if setting is None else f"config.json has a {setting}"
    if method is not None:
        found += f" of {str(method)[:_SHOWN]}"
    way_out = f", or {_WAYS_OUT[method]}" if isinstance(method, str) and method in _WAYS_OUT else ""
    raise PtqError(f"{directory} is quantized already ({found}): give the model as it was before quantization{way_out}")
