# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The algorithm: its settings agree, and its blocks divide the shards of every rank."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ptq.config import FAST, NO_QUANT, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.quality import obstacle_to_balanced
from nemo_ptq.quantization.algorithms import algorithm_of
from nemo_ptq.untrusted import FileError, read_json, read_yaml


def algorithm_file_is_config(algorithm: str | None, calibration_state: Any = None) -> str | None:
    """A file given as algorithm holds a ModelOpt config; a saved calibration has read it already."""
    file = QuantizationConfig(algorithm).algorithm_file
    if file is None or calibration_state is not None:
        return None
    option = f"quantization_config.algorithm={algorithm}"
    try:
        content = read_yaml(file) if file.suffix != ".json" else read_json(file)
    except FileError as error:
        return f"{option} {error.reason}"
    if not isinstance(content, dict) or "quant_cfg" not in content:
        return f'{option} is not a ModelOpt config: it must hold an object with the keys "quant_cfg" and "algorithm"'
    return None


def kv_cache_has_algorithm(algorithm: str | None, enable_kv_cache: bool | None) -> str | None:
    """A KV cache is only quantized along with the weights."""
    if enable_kv_cache and algorithm in (None, NO_QUANT):
        return "quantization_config.enable_kv_cache=true needs an algorithm: with no_quant nothing is calibrated"
    return None


def awq_blocks_fit_calibration(
    algorithm: str | None, awq_block_size: int, calibration_tp: int, model: ModelSpec
) -> str | None:
    """The input features that calibration TP shards are whole blocks on each rank."""
    if not algorithm_of(QuantizationConfig(algorithm)).takes_block_size:
        return None
    multiple = awq_block_size * calibration_tp
    wrong = _misfits({"attention output": _attention_size(model), "ffn_hidden_size": model.ffn_hidden_size}, multiple)
    if wrong:
        return (
            f"quantization_config.awq_block_size={awq_block_size} does not fit calibration_tp={calibration_tp}: "
            f"{wrong} must be a multiple of {multiple}; use a smaller calibration_tp or awq_block_size"
        )
    return None


def awq_blocks_fit_inference(
    algorithm: str | None, awq_block_size: int, formats: Sequence[str], inference_tp: int, model: ModelSpec
) -> str | None:
    """TensorRT-LLM's kernels take whole blocks, of at least 64 features (128 for w4a8_awq), on each rank."""
    record = algorithm_of(QuantizationConfig(algorithm))
    if not record.takes_block_size or not any(FORMATS[name].is_tensorrt_llm for name in formats):
        return None
    if awq_block_size < record.least_block_size:
        least = record.least_block_size
        return f"quantization_config.awq_block_size={awq_block_size} is too small for {algorithm}: use {least}"
    multiple = max(record.column_multiple, awq_block_size) * inference_tp
    sizes = {
        "hidden_size": model.hidden_size,
        "query-key-value rows": _qkv_rows(model, inference_tp),
        "attention output": _attention_size(model),
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    wrong = _misfits(sizes, multiple)
    if wrong:
        return (
            f"quantization_config.awq_block_size={awq_block_size} does not fit "
            f"export_config.inference_tp={inference_tp}: {wrong} must be a multiple of {multiple}; "
            "use a smaller inference_tp or awq_block_size"
        )
    return None


def nvfp4_blocks_fit(algorithm: str | None, inference_tp: int, model: ModelSpec) -> str | None:
    """NVFP4's kernels take 128 output and 64 input features of each rank at a time."""
    record = algorithm_of(QuantizationConfig(algorithm))
    if not record.block_size:
        return None
    rows, columns = record.row_multiple, record.column_multiple
    both = max(rows, columns)
    wrong = [
        _misfits({"hidden_size": model.hidden_size}, both),
        _misfits({"query-key-value rows": _qkv_rows(model, inference_tp)}, rows * inference_tp),
        _misfits({"attention output": _attention_size(model)}, columns * inference_tp),
        _misfits({"ffn_hidden_size": model.ffn_hidden_size}, both * inference_tp),
    ]
    if any(wrong):
        return (
            f"quantization_config.algorithm={algorithm} does not fit export_config.inference_tp={inference_tp}: "
            f"{', '.join(filter(None, wrong))}: each rank needs multiples of {rows} output and {columns} input "
            "features; use a smaller inference_tp or another algorithm"
        )
    return None


def quality_is_available(
    quality: str | None,
    algorithm: str | None,
    formats: Sequence[str],
    forward_loop: Any,
    calibration_tp: int,
    calibration_ep: int,
    model: ModelSpec,
) -> str | None:
    """Quality "balanced" walks block by block, and its codes go into packed files."""
    if quality in (None, FAST):
        return None
    obstacle = obstacle_to_balanced(algorithm, formats, forward_loop, calibration_tp, calibration_ep, model)
    if obstacle is None:
        return None
    reason, fix = obstacle
    return f"quantization_config.quality={quality} is not available, since {reason}: {fix}, or leave quality out"


def _qkv_rows(model: ModelSpec, tp: int) -> int:
    """Output features of the query-key-value projection over all ranks, repeated KV heads included."""
    return (model.num_attention_heads + 2 * max(model.num_query_groups, tp)) * model.head_size


def _attention_size(model: ModelSpec) -> int:
    """Input features of the attention's output projection over all ranks."""
    return model.num_attention_heads * model.head_size


def _misfits(sizes: Mapping[str, int], multiple: int) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size % multiple)
