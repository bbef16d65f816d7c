# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The export formats, by their names in :data:`nemo_ptq.export.formats.FORMATS`: what writes each of them.

A format is a record there, which says what it can carry, and a writer here. A writer of Hugging Face's or
TensorRT-LLM's files is a layout table (:class:`~nemo_ptq.export.layout.Layout`) that
:class:`~nemo_ptq.export.stream.LayoutWriter` streams, and the documents beside the tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_ptq.export.folding import foldable
from nemo_ptq.export.huggingface import hf_documents
from nemo_ptq.export.huggingface.compressed_tensors import compressed_tensors_export
from nemo_ptq.export.huggingface.unified import unified_export
from nemo_ptq.export.source import PackedExport, Source
from nemo_ptq.export.trtllm import trtllm_config
from nemo_ptq.export.trtllm.trtllm_writer import qnemo_export
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelSpec

# Called on every rank with the calibrated model before anything is written.
Prepare = Callable[[Source], PackedExport]

# Called with the model, its family and NeMo's tokenizer before anything is calibrated: raises PtqError for what the
# format cannot hold, or what its readers would compute something else from.
ModelCheck = Callable[[ModelSpec, Family, Any], None]


PACKED: Mapping[str, Prepare] = {
    "trtllm": qnemo_export,
    "hf": unified_export,
    "compressed_tensors": compressed_tensors_export,
}
"""The formats that are made block by block; "nemo" is Megatron's own (:mod:`nemo_ptq.export.nemo.nemo_writer`)."""

CHECKS: Mapping[str, ModelCheck] = {
    "trtllm": lambda shape, family, tokenizer: trtllm_config.check_exportable(shape, family),
    "hf": hf_documents.check_exportable,
    "compressed_tensors": hf_documents.check_exportable,
    "nemo": lambda shape, family, tokenizer: None,  # NeMo reads whatever NeMo has built
}
# What a format makes of the calibration state before layers are packed; the others take it as it is.
Adapter = Callable[[Mapping[str, torch.Tensor], ModelSpec, float | None], Mapping[str, torch.Tensor]]
ADAPTERS: Mapping[str, Adapter] = {"compressed_tensors": foldable}
