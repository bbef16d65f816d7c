# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The algorithm: its settings agree, and its blocks divide the shards of every rank."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ptq.config import FAST, NO_QUANT, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.export.formats import FORMATS, schemes_problem
from nemo_ptq.models.layers import ModuleSpec
from nemo_ptq.models.mapping import QKV
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.quality import obstacle_to_balanced
from nemo_ptq.quantization.algorithms import Algorithm, algorithm_named, algorithm_of
from nemo_ptq.quantization.modelopt_file import ModelOptConfig, read_config
from nemo_ptq.quantization.modelopt_layers import Quantized, numbered_pattern, quantized_by, unknown_to_modelopt
from nemo_ptq.untrusted import FileError


def algorithm_file_is_config(algorithm: str | None, calibration_state: Any = None) -> str | None:
    """The algorithm file holds a ModelOpt configuration or recipe that can be exported."""
    file = QuantizationConfig(algorithm).algorithm_file
    if file is None or calibration_state is not None:
        return None
    option = f"quantization_config.algorithm={algorithm}"
    try:
        read_config(file)
    except FileError as error:
        return f"{option} {error.reason}" if error.path == file else f"{option} imports {error}"
    except PtqError as error:
        return f"{option} is not a ModelOpt config that can be exported: {error}"
    return None


def algorithm_file_fits_model(
    algorithm: str | None,
    enable_kv_cache: bool | None,
    calibration_pp: int,
    model: ModelSpec,
    calibration_state: Any = None,
) -> str | None:
    """The algorithm file quantizes layers that this model has, in ways that can be exported."""
    config = _config_of(algorithm, calibration_state)
    if config is None:
        return None
    option, patterns = f"quantization_config.algorithm={algorithm}", [entry.pattern for entry in config.entries]
    if unknown := unknown_to_modelopt(patterns, model):
        pattern, hint = unknown
        return f"{option} has {pattern} in quant_cfg, which matches no quantizer{hint}"
    try:
        found = quantized_by(config, model)
    except PtqError as error:
        return f"{option} cannot be exported: {error}"
    if not found.schemes:
        return f"{option} quantizes no linear layer of this model: its patterns are for others; use another one"
    patterns += [entry["quantizer_name"] for entry in found.further]
    if calibration_pp > 1 and (numbered := numbered_pattern(patterns)):
        return (
            f"{option} names a layer by its number ({numbered}), and ModelOpt counts layers in each pipeline stage: "
            "use calibration_pp=1, or quantization_config.exclude for layers that stay unquantized"
        )
    if found.caches and enable_kv_cache is False:
        return f"{option} quantizes the KV cache, and quantization_config.enable_kv_cache=false: leave out one of both"
    return None


def algorithm_file_fits_formats(
    algorithm: str | None,
    formats: Sequence[str],
    model: ModelSpec,
    family: Family,
    unquantized: frozenset[str] = frozenset(),
    calibration_state: Any = None,
) -> str | None:
    """Every export format can hold what the algorithm file quantizes."""
    found = _quantized_by_file(algorithm, calibration_state, model)
    if found is None:
        return None
    option = f"quantization_config.algorithm={algorithm}"
    schemes = {linear: scheme for linear, scheme in found.schemes.items() if linear not in unquantized}
    if problem := schemes_problem(set(schemes.values()), formats):
        return f"{option} {problem}"
    of_experts = {scheme for linear, scheme in schemes.items() if model.module(linear).expert is not None}
    for format in map(FORMATS.__getitem__, formats):
        if wrong := sorted(of_experts - set(format.experts)):
            return (
                f"{option} quantizes experts as {' and '.join(wrong)}, and the readers of export_format={format.name} "
                f"take {' or '.join(format.experts)}: leave them out with quantization_config.exclude=[*experts*]"
            )
        if found.caches and format.is_hugging_face and family.hugging_face and not family.hugging_face.splits_qkv:
            return (
                f"{option} quantizes the KV cache, for whose scales export_format={format.name} has no place with "
                f"{family.name}: take it out, or use export_format=trtllm"
            )
    return None


def algorithm_file_fits_sizes(
    algorithm: str | None,
    formats: Sequence[str],
    calibration_tp: int,
    inference_tp: int,
    model: ModelSpec,
    unquantized: frozenset[str] = frozenset(),
    calibration_state: Any = None,
) -> str | None:
    """The blocks of an algorithm file are whole on each rank, and of sizes that kernels take."""
    found = _quantized_by_file(algorithm, calibration_state, model)
    if found is None:
        return None
    for linear, scheme in found.schemes.items():
        block_size = found.block_sizes[linear]
        if not block_size or linear in unquantized:
            continue
        record, module = algorithm_named(scheme), model.module(linear)
        tp = calibration_tp if module.axis == 1 else 1
        rows, columns, option = 1, block_size * tp, _with("calibration_tp", tp)
        outputs = [_qkv_rows(model, inference_tp)] if tuple(module.rows) == QKV else list(module.rows.values())
        if module.inputs % columns == 0:
            rows, columns = _kernel_sizes(record, block_size, formats, inference_tp, module, model)
            option = _with("inference_tp", inference_tp)
        if module.inputs % columns or any(size % rows for size in outputs):
            return (
                f"quantization_config.algorithm={algorithm} quantizes {linear}, of {outputs[0]} output and "
                f"{module.inputs} input features, as {scheme} in blocks of {block_size}: {option}they must be "
                f"multiples of {rows} and {columns}; leave the layer out with quantization_config.exclude, or use "
                "other blocks"
                f"{' or a smaller parallelism' if option else ''}"
            )
    return None


def _with(option: str, tp: int) -> str:
    return f"with {option}={tp} " if tp > 1 else ""


def _kernel_sizes(
    record: Algorithm, block_size: int, formats: Sequence[str], inference_tp: int, module: ModuleSpec, model: ModelSpec
) -> tuple[int, int]:
    """Multiples of output and input features, over all ranks, that the kernels of the formats' servers take."""
    rows, columns = _kernel_multiples(record, formats, model)
    if not record.takes_block_size:
        return (rows, columns * inference_tp) if module.axis == 1 else (rows * inference_tp, columns)
    if not _any_tensorrt_llm(formats):
        return 1, 1
    # The format's readers round the features of all ranks together.
    both = max(columns, record.least_block_size, block_size) * inference_tp
    return both, both


def _kernel_multiples(record: Algorithm, formats: Sequence[str], model: ModelSpec) -> tuple[int, int]:
    """Multiples of a rank's output and input features that kernels take; other servers' kernels take more sizes."""
    if model.num_experts is None and not _any_tensorrt_llm(formats):
        return record.dense_multiple, record.dense_multiple
    return record.row_multiple, record.column_multiple


def _any_tensorrt_llm(formats: Sequence[str]) -> bool:
    return any(FORMATS[name].is_tensorrt_llm for name in formats)


def _config_of(algorithm: str | None, calibration_state: Any) -> ModelOptConfig | None:
    """The ModelOpt config in a file given as algorithm; None where there is none, or another rule refuses it."""
    file = QuantizationConfig(algorithm).algorithm_file
    if file is None or calibration_state is not None:
        return None
    try:
        return read_config(file)
    except PtqError:
        return None


def _quantized_by_file(algorithm: str | None, calibration_state: Any, model: ModelSpec) -> Quantized | None:
    """How an algorithm file quantizes the model; None where there is no file, or another rule refuses it."""
    config = _config_of(algorithm, calibration_state)
    if config is None:
        return None
    try:
        return quantized_by(config, model)
    except PtqError:
        return None


def kv_cache_has_algorithm(algorithm: str | None, enable_kv_cache: bool | None) -> str | None:
    """A KV cache is only quantized along with the weights, by an algorithm that is calibrated."""
    record = algorithm_of(QuantizationConfig(algorithm))
    if not enable_kv_cache or record.needs_data:
        return None
    option = "quantization_config.enable_kv_cache=true"
    if record.name == NO_QUANT:
        return f"{option} needs an algorithm: with no_quant nothing is calibrated"
    return (
        f"{option} with algorithm={algorithm}: the cache has calibrated scales, and nothing is calibrated; leave it "
        "out, or use fp8"
    )


def loop_has_something_to_calibrate(algorithm: str | None, forward_loop: Any) -> str | None:
    """A calibration loop is for an algorithm that is calibrated."""
    record = algorithm_of(QuantizationConfig(algorithm))
    if forward_loop is not None and record.quantizes and not record.needs_data:
        return f"forward_loop with quantization_config.algorithm={algorithm}: nothing is calibrated; leave it out"
    return None


def awq_blocks_fit_calibration(
    algorithm: str | None,
    awq_block_size: int,
    calibration_tp: int,
    model: ModelSpec,
    unquantized: frozenset[str] = frozenset(),
) -> str | None:
    """The input features that calibration TP shards are whole blocks on each rank."""
    record = algorithm_of(QuantizationConfig(algorithm))
    if not record.takes_block_size:
        return None
    multiple = awq_block_size * calibration_tp
    sizes = {"attention output": _attention_size(model), "ffn_hidden_size": model.ffn_hidden_size}
    if model.state_space is not None:
        sizes["state space output"] = model.state_space.inner_size
    sizes = _of_quantized(sizes, model, unquantized)
    every = {"hidden_size": model.hidden_size, **sizes}
    if wrong := _misfits({"hidden_size": model.hidden_size}, awq_block_size):
        return (
            f"quantization_config.awq_block_size={awq_block_size} does not fit the model: {wrong} must be a multiple "
            f"of {awq_block_size}; {_ways_out('', 1, awq_block_size, record.least_block_size, every)}"
        )
    wrong = _misfits(sizes, multiple)
    if wrong:
        return (
            f"quantization_config.awq_block_size={awq_block_size} does not fit calibration_tp={calibration_tp}: "
            f"{wrong} must be a multiple of {multiple}; "
            f"{_ways_out('calibration_tp', calibration_tp, awq_block_size, record.least_block_size, sizes)}"
        )
    return None


def awq_blocks_fit_inference(
    algorithm: str | None,
    awq_block_size: int,
    formats: Sequence[str],
    inference_tp: int,
    model: ModelSpec,
    unquantized: frozenset[str] = frozenset(),
) -> str | None:
    """TensorRT-LLM's kernels take whole blocks, of at least 64 features (128 for w4a8_awq), on each rank."""
    record = algorithm_of(QuantizationConfig(algorithm))
    if not record.takes_block_size or not _any_tensorrt_llm(formats):
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
    sizes = _of_quantized(sizes, model, unquantized)
    wrong = _misfits(sizes, multiple)
    if wrong:
        least = max(record.column_multiple, record.least_block_size)
        return (
            f"quantization_config.awq_block_size={awq_block_size} does not fit "
            f"export_config.inference_tp={inference_tp}: {wrong} must be a multiple of {multiple}; "
            f"{_ways_out('inference_tp', inference_tp, awq_block_size, least, sizes)}"
        )
    return None


def _ways_out(option: str, tp: int, block_size: int, least: int, sizes: Mapping[str, int]) -> str:
    """Names the fixes for blocks that do not fit, and only those that help."""
    fitting = [size for size in (128, 64, 32) if least <= size < block_size and not _misfits(sizes, size * tp)]
    ways = [f"a smaller {option}"] if tp > 1 else []
    ways.append(f"awq_block_size={fitting[0]}" if fitting else "another algorithm")
    return f"use {' or '.join(ways)}"


def nvfp4_blocks_fit(
    algorithm: str | None,
    formats: Sequence[str],
    inference_tp: int,
    model: ModelSpec,
    unquantized: frozenset[str] = frozenset(),
) -> str | None:
    """NVFP4's kernels take 128 output and 64 input features of each rank at a time.

    Without experts, those of vLLM and of TensorRT-LLM's PyTorch backend, which pad the scales, take 32 of either.
    """
    record = algorithm_of(QuantizationConfig(algorithm))
    if not record.block_size:
        return None
    rows, columns = _kernel_multiples(record, formats, model)
    further: tuple[tuple[str, int, int], ...] = ()
    if (space := model.state_space) is not None:
        further = (
            ("state space rows", sum(space.in_rows.values()), rows),
            ("state space output", space.inner_size, columns),
        )
    both = max(rows, columns)
    wrong = [
        _misfits({"hidden_size": model.hidden_size}, both),
        *(
            _misfits(_of_quantized({name: size}, model, unquantized), multiple * inference_tp)
            for name, size, multiple in (
                ("query-key-value rows", _qkv_rows(model, inference_tp), rows),
                ("attention output", _attention_size(model), columns),
                ("ffn_hidden_size", model.ffn_hidden_size, both),
                *further,
            )
        ),
    ]
    if any(wrong):
        return (
            f"quantization_config.algorithm={algorithm} does not fit export_config.inference_tp={inference_tp}: "
            f"{', '.join(filter(None, wrong))}: each rank needs multiples of {rows} output and {columns} input "
            f"features; use {'a smaller inference_tp or ' if inference_tp > 1 else ''}another algorithm"
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
    kv_cache_only: bool = False,
) -> str | None:
    """Qualities "balanced" and "max" walk block by block, and their codes go into packed files."""
    if quality in (None, FAST) or kv_cache_only:  # another rule says so
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


# For each size, the ends of the names of the linear layers that have it.
_LINEARS = {
    "query-key-value rows": ("linear_qkv",),
    "attention output": ("linear_proj",),
    "ffn_hidden_size": ("linear_fc1", "linear_fc2"),
    "state space rows": ("in_proj",),
    "state space output": ("out_proj",),
}


def _of_quantized(sizes: Mapping[str, int], model: ModelSpec, unquantized: frozenset[str]) -> dict[str, int]:
    """Leaves out the sizes of linear layers that are quantized nowhere."""
    if not unquantized:
        return dict(sizes)
    left = {
        module.name.rpartition(".")[2]
        for layer, spec in enumerate(model.layers)
        for module in spec.modules
        if module.is_quantized and f"decoder.layers.{layer}.{module.name}" not in unquantized
    }
    return {name: size for name, size in sizes.items() if left.intersection(_LINEARS.get(name, left))}


def _misfits(sizes: Mapping[str, int], multiple: int) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size % multiple)
