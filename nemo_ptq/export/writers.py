# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The export formats, by their names in :data:`nemo_ptq.export.formats.FORMATS`: what writes each of them.

A format is a record there, which says what it can carry, and a writer here. A writer of Hugging Face's or
TensorRT-LLM's files is a layout table (:class:`~nemo_ptq.export.layout.Layout`) that
:func:`~nemo_ptq.export.stream.write_files` streams, and the documents beside the tensors.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_ptq.export.folding import foldable
from nemo_ptq.export.huggingface import hf_documents
from nemo_ptq.export.huggingface.compressed_tensors import write_compressed_tensors
from nemo_ptq.export.huggingface.unified import write_unified
from nemo_ptq.export.source import Source
from nemo_ptq.export.trtllm import trtllm_config
from nemo_ptq.export.trtllm.trtllm_writer import write_qnemo
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelShape
from nemo_ptq.quantization.state import CalibrationState

# Called on every rank with the model and an existing empty directory; writes all but ptq/, and returns the files that
# this rank has written itself, so that it can compute their checksums.
Writer = Callable[[Source, Path], list[Path]]

# Called with the model, its family and NeMo's tokenizer before anything is calibrated: raises PtqError for what the
# format cannot hold, or what its readers would compute something else from.
ModelCheck = Callable[[ModelShape, Family, Any], None]


def _write_nemo(source: Source, directory: Path) -> list[Path]:
    # Megatron and ModelOpt write this one: the others do not wait for their import.
    from nemo_ptq.export.nemo.nemo_writer import write_nemo

    return write_nemo(source, directory)


WRITERS: Mapping[str, Writer] = {
    "trtllm": write_qnemo,
    "hf": write_unified,
    "compressed_tensors": write_compressed_tensors,
    "nemo": _write_nemo,
}
CHECKS: Mapping[str, ModelCheck] = {
    "trtllm": lambda shape, family, tokenizer: trtllm_config.check_exportable(shape, family),
    "hf": hf_documents.check_exportable,
    "compressed_tensors": hf_documents.check_exportable,
    "nemo": lambda shape, family, tokenizer: None,  # NeMo reads whatever NeMo has built
}
# What a format makes of a calibration before the model is quantized with it; the others take it as it is.
ADAPTERS: Mapping[str, Callable[[CalibrationState, ModelShape], CalibrationState]] = {"compressed_tensors": foldable}
