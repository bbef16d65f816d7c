# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The export formats: what each can carry. What writes them is in :mod:`nemo_ptq.export.writers`.

Imports nothing heavy: the command line reads this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        name: What users call it.
        summary: What it is, in a few words.
        refused: Algorithms that it cannot carry, with the reason and what to do instead.
        has_parallelism: Whether its files are cut for the tensor and pipeline parallelism of the server.
        is_hugging_face: Whether it is a Hugging Face directory, for a family that has a class there.
        experts: Algorithms that it carries for a mixture of experts, besides no_quant.
    """

    name: str
    summary: str
    refused: Mapping[str, str] = field(default_factory=dict)
    has_parallelism: bool = False
    is_hugging_face: bool = False
    experts: tuple[str, ...] = ("fp8",)


_FORMATS = (
    Format("trtllm", "a qnemo directory: a TensorRT-LLM checkpoint and NeMo's tokenizer", has_parallelism=True),
    Format(
        "hf",
        "ModelOpt's unified Hugging Face checkpoint",
        {"int8_sq": "ModelOpt's unified checkpoint has no SmoothQuant; use export_format=compressed_tensors"},
        is_hugging_face=True,
        experts=("fp8", "nvfp4"),
    ),
    Format(
        "compressed_tensors",
        "a Hugging Face directory in the format of the compressed-tensors library",
        {
            "w4a8_awq": "its readers have no INT4 weights with FP8 activations; use export_format=hf",
            "nvfp4": "it is written for fp8, int8_sq and int4_awq only; use export_format=hf",
        },
        is_hugging_face=True,
    ),
    Format("nemo", "a NeMo 2.0 checkpoint with ModelOpt's quantizers, for training or another export"),
)

FORMATS: Mapping[str, Format] = {format.name: format for format in _FORMATS}
