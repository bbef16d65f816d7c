# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The qnemo directory: a TensorRT-LLM checkpoint, with NeMo's context beside it."""

import json
from importlib.metadata import version
from pathlib import Path

import torch

from nemo_ptq.export.layers import Layers
from nemo_ptq.export.nemo_context import write_context
from nemo_ptq.export.packing import Packed, pack_kv_cache, pack_linear, pack_parameters, row_splitter
from nemo_ptq.export.source import Source
from nemo_ptq.export.stream import write_files
from nemo_ptq.export.trtllm.trtllm_config import check_exportable, qnemo_config
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.spec import ModelShape


def pack_module(layers: Layers, name: str, shape: ModelShape, dtype: torch.dtype, tensor_rank: int = 0) -> Packed:
    """Packs this rank's shard of a module.

    Args:
        layers: This rank's.
        name: The module's name in the whole model.
        shape: The model's.
        dtype: Data type of what is not quantized.
        tensor_rank: Which tensor-parallel shard it is.
    """
    if name.endswith("core_attention"):
        return pack_kv_cache(*layers.kv_cache(name))
    if ".linear_" in name:
        return pack_linear(layers.linear(name), row_splitter(name, shape, tensor_rank), dtype)
    # Routers choose experts by small differences: their readers want float32.
    return pack_parameters(layers.plain(name), torch.float32 if name.endswith("router") else dtype)


def write_qnemo(source: Source, directory: Path) -> list[Path]:
    """Writes a qnemo directory; every rank calls it.

    Args:
        source: The calibrated model.
        directory: An existing directory that all ranks see.

    Returns:
        The files with tensors that this rank has written.

    Raises:
        PtqError: If the readers of the format would load the model wrongly, or cannot be told how it is quantized.
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
    files = write_files(
        directory,
        layout,
        lambda name: pack_module(source.layers, name, source.shape, source.dtype, source.tensor_rank),
        source.shard_map,
        source.reporter,
        source.rank,
    )
    if source.rank == 0:
        (directory / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
        write_context(source.checkpoint, directory / "nemo_context", source.tokenizer, source.tokenizer_is_replaced)
    return files
