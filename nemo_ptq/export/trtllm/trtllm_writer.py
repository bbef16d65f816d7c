# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The qnemo directory: a TensorRT-LLM checkpoint, with NeMo's context beside it."""

import json
from importlib.metadata import version
from pathlib import Path

import torch

from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.nemo_context import write_context
from nemo_ptq.export.packing import Packed, pack_kv_cache, pack_linear, pack_parameters, row_splitter
from nemo_ptq.export.source import PackedExport, Source
from nemo_ptq.export.trtllm.trtllm_config import check_exportable, qnemo_config
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.spec import ModelSpec


def pack_module(
    layers: CalibratedLayers, name: str, shape: ModelSpec, dtype: torch.dtype, tensor_rank: int = 0
) -> Packed:
    """Packs this rank's shard of a module.

    Args:
        layers: This rank's.
        name: The module's name in the whole model.
        shape: The model's.
        dtype: Data type of what is not quantized.
        tensor_rank: Tensor-parallel rank of the shard.
    """
    if name.endswith("core_attention"):
        return pack_kv_cache(*layers.kv_cache(name))
    if ".linear_" in name:
        return pack_linear(layers.linear(name), row_splitter(name, shape, tensor_rank), dtype)
    # Routers choose experts by small differences: their readers want float32.
    return pack_parameters(layers.plain(name), torch.float32 if name.endswith("router") else dtype)


def qnemo_export(source: Source) -> PackedExport:
    """Prepares a qnemo directory.

    Args:
        source: The calibrated model.

    Raises:
        PtqError: If TensorRT-LLM would load the model wrongly, or the format cannot represent how it is quantized.
    """
    check_exportable(source.shape, source.family)
    layout = QnemoLayout(
        source.shape,
        source.shard_map.schemes,
        source.shard_map.kv_cache,
        source.dtype,
        source.settings.inference_tp,
        source.settings.inference_pp,
    )
    config = qnemo_config(layout, source.family, version("nemo_ptq"))

    def write_documents(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
        write_context(source.checkpoint, directory / "nemo_context", source.tokenizer, source.tokenizer_is_replaced)

    def pack(name: str) -> Packed:
        return pack_module(source.layers, name, source.shape, source.dtype, source.tensor_rank)

    return PackedExport(layout, pack, write_documents)
