# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Everything that can be known to be wrong with a job before anything is started, found in well under a second.

Each rule is a small function whose parameters name what it looks at: options by the last part of their name, and
`model`, the checkpoint's :class:`~nemo_ptq.checkpoint.metadata.CheckpointMetadata`. It returns one line that gives the
value, the rule and the fix, or None. A rule is left out when something that it looks at already has a problem of its
own, so that one mistake is one line.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from nemo_ptq.calibration.state_header import StateHeader, read_header, state_file
from nemo_ptq.calibration.text_files import is_text_file, read_text_file
from nemo_ptq.checkpoint.metadata import CheckpointMetadata, read_metadata
from nemo_ptq.config import CUSTOM, DTYPES, NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.families import FUSED_QKV, family_of, unknown_to_reader
from nemo_ptq.formats import FORMATS, read_formats
from nemo_ptq.job import Job
from nemo_ptq.options import EXPORT_OPTIONS, QUANTIZATION_OPTIONS, TASK_OPTIONS, Option
from nemo_ptq.tracking.trackers import absolute_address, check_address

Rule = Callable[..., str | None]

# The format whose readers need more than the others.
TRTLLM = "trtllm"
# Largest parallelism that a fix suggests.
_MOST_RANKS = 64
# NVFP4's kernels want multiples of these of each rank's output and input features.
_NVFP4_OUT, _NVFP4_IN = 128, 64


def check_job(
    *,
    world_size: int | None,
    nemo_checkpoint: str | os.PathLike[str] | None = None,
    export_config: ExportConfig | None = None,
    calibration_tp: int = 1,
    calibration_pp: int = 1,
    calibration_ep: int = 1,
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    quantization_config: QuantizationConfig | None = None,
    forward_loop: Callable[[Any], Any] | None = None,
    tokenizer_path: str | None = None,
    calibration_state: str | os.PathLike[str] | None = None,
    legacy_ckpt: bool = False,
    tracking: str | None = None,
    model_path: str | os.PathLike[str] | None = None,
    plan_only: bool = False,
) -> Job:
    """Checks all arguments of the main job against each other, the checkpoint, the data and the launcher.

    Args:
        world_size: Processes that run the job, or will; None where that is not known.
        nemo_checkpoint: See :func:`nemo_ptq.task.ptq`, for this and all others.
        export_config: What to write.
        calibration_tp: Tensor parallelism during calibration.
        calibration_pp: Pipeline parallelism during calibration.
        calibration_ep: Expert parallelism during calibration.
        num_layers_in_first_pipeline_stage: Layers of the first stage.
        num_layers_in_last_pipeline_stage: Layers of the last stage.
        devices: Processes on each node, as the user sees it.
        num_nodes: Nodes, as the user sees it.
        quantization_config: How to quantize.
        forward_loop: The user's calibration loop.
        tokenizer_path: Another tokenizer.
        calibration_state: A calibration to export again from.
        legacy_ckpt: Whether the checkpoint may come from another Transformer Engine.
        tracking: Where the figures go.
        model_path: Another name for `nemo_checkpoint`.
        plan_only: Whether the job is only planned, which is for the caller to do: see :mod:`nemo_ptq.plan`.

    Returns:
        The job to run.

    Raises:
        ConfigError: With every problem.
    """
    task = {
        "nemo_checkpoint": nemo_checkpoint,
        "model_path": model_path,
        "calibration_tp": calibration_tp,
        "calibration_pp": calibration_pp,
        "calibration_ep": calibration_ep,
        "num_layers_in_first_pipeline_stage": num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": num_layers_in_last_pipeline_stage,
        "devices": devices,
        "num_nodes": num_nodes,
        "forward_loop": forward_loop,
        "tokenizer_path": tokenizer_path,
        "calibration_state": calibration_state,
        "legacy_ckpt": legacy_ckpt,
        "tracking": tracking,
        "plan_only": plan_only,
    }
    gathered = gather(task, quantization_config, export_config, world_size)
    problems = [*gathered.problems, *(problem for _, problem in findings(gathered.values) if problem)]
    if problems:
        raise ConfigError(problems)

    assert export_config is not None
    model: CheckpointMetadata = gathered.values["model"]
    return Job(
        checkpoint=Path(gathered.values["checkpoint"]).expanduser().absolute(),
        metadata=model,
        output=Path(export_config.path).expanduser().absolute(),
        quantization=gathered.quantization,
        export=export_config,
        decoder=_decoder(model, export_config.decoder_type),
        calibration_tp=calibration_tp,
        calibration_pp=calibration_pp,
        calibration_ep=calibration_ep,
        num_layers_in_first_pipeline_stage=num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=num_layers_in_last_pipeline_stage,
        forward_loop=forward_loop,
        tokenizer_path=tokenizer_path,
        calibration_state=gathered.state,
        legacy_ckpt=legacy_ckpt,
        tracking=tracking and absolute_address(tracking),
    )


@dataclass(frozen=True)
class Gathered:
    """What the rules look at.

    Attributes:
        values: The options that are of the right kind, and what the files say of themselves, by the names that the
            rules' parameters have.
        problems: One line for each option that is of the wrong kind, and for each file that cannot be read.
        quantization: How to quantize: what the user asked for, or what the saved calibration was made with.
        state: The file of the saved calibration, if one is used.
    """

    values: Mapping[str, Any]
    problems: Sequence[str]
    quantization: QuantizationConfig
    state: Path | None


def gather(
    task: Mapping[str, Any],
    quantization: QuantizationConfig | None,
    export: ExportConfig | None,
    world_size: int | None,
) -> Gathered:
    """Collects what the rules look at.

    Args:
        task: The options of the task, by name.
        quantization: How to quantize; None takes the defaults.
        export: What to write.
        world_size: Processes that run the job, or will; None where that is not known.
    """
    quantization = QuantizationConfig() if quantization is None else quantization
    problems: list[str] = []
    values = {"world_size": world_size, **_sound("", TASK_OPTIONS, task, problems)}
    header, state = None, None
    if "calibration_state" in values:
        state = _saved_calibration(values["calibration_state"], task.get("nemo_checkpoint") or task.get("model_path"))
    if state is not None:
        try:
            header = values["header"] = read_header(state)
        except ConfigError as error:
            problems.extend(error.problems)
    if header is not None and isinstance(quantization, QuantizationConfig):
        problems.extend(_other_quantization(quantization, header.quantization))
        quantization = header.quantization
    if isinstance(quantization, QuantizationConfig):
        values |= _sound("quantization_config.", QUANTIZATION_OPTIONS, _shallow(quantization), problems)
    else:
        problems.append(f"quantization_config={quantization!r} is not valid: it must be a QuantizationConfig")
    if isinstance(export, ExportConfig | None):
        given = {} if export is None else _shallow(export)
        if given.get("path") is None:
            problems.append("export_config.path is missing: name the directory to make")
            given.pop("path", None)
        values |= _sound("export_config.", EXPORT_OPTIONS, given, problems)
    else:
        problems.append(f"export_config={export!r} is not valid: it must be an ExportConfig")

    named = task.get("nemo_checkpoint") or task.get("model_path")
    checkpoint = named or (header.checkpoint if header else None)
    if {"nemo_checkpoint", "model_path"} <= values.keys() and checkpoint is not None:
        values["checkpoint"] = checkpoint
        try:
            values["model"] = read_metadata(Path(checkpoint).expanduser())
        except ConfigError as error:
            problems.extend(error.problems)
    if header is not None or ("model" in values and values["model"].is_quantized):
        # What is calibrated needs no data any more.
        for name in ("calibration_dataset", "calibration_seq_len"):
            values.pop(name, None)
    return Gathered(values, problems, quantization, state)


def _sound(prefix: str, options: Mapping[str, Option], given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the values that are of the right kind, and adds what is wrong with the others to the problems."""
    found = {name: options[name].kind.problem(prefix + name, value) for name, value in given.items()}
    problems.extend(problem for problem in found.values() if problem)
    return {name: given[name] for name, problem in found.items() if problem is None}


def _shallow(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _saved_calibration(calibration_state: Any, checkpoint: Any) -> Path | None:
    """The file of the calibration that the user gives, or that lies in a checkpoint with quantizers (format "nemo")."""
    if calibration_state is not None:
        return state_file(calibration_state).absolute()
    if checkpoint is not None and (Path(checkpoint).expanduser() / "weights" / "modelopt_state").is_dir():
        state = state_file(checkpoint).absolute()
        return state if state.is_file() else None
    return None


def _other_quantization(given: QuantizationConfig, used: QuantizationConfig) -> Iterator[str]:
    """What the user asks of the quantization that the saved calibration was not made with; defaults ask for nothing."""
    default = QuantizationConfig()
    for field in fields(given):
        value, made_with = getattr(given, field.name), getattr(used, field.name)
        if value not in (getattr(default, field.name), made_with):
            yield (
                f"quantization_config.{field.name}={value} with a calibration_state that was made with {made_with}: "
                "leave it out, or calibrate without calibration_state"
            )


def findings(values: Mapping[str, Any]) -> Iterator[tuple[Rule, str | None]]:
    """Applies each rule that has everything it looks at.

    Args:
        values: What there is to look at, by the names that the rules' parameters have.

    Yields:
        Each such rule, and its problem if it is broken.
    """
    for rule in RULES:
        names = inspect.signature(rule).parameters
        if names.keys() <= values.keys():
            yield rule, rule(**{name: values[name] for name in names})


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def checkpoint_is_named(nemo_checkpoint: Any, model_path: Any, calibration_state: Any) -> str | None:
    """One of the two names of the checkpoint is given, or both agree; a saved calibration knows its own."""
    if nemo_checkpoint is None and model_path is None and calibration_state is None:
        return "nemo_checkpoint is missing: name the directory of a NeMo 2.0 checkpoint"
    if None not in (nemo_checkpoint, model_path) and str(nemo_checkpoint) != str(model_path):
        return f"nemo_checkpoint={nemo_checkpoint} and model_path={model_path} mean the same option: give one of them"
    return None


def family_is_supported(model: CheckpointMetadata, decoder_type: str | None) -> str | None:
    """The model's family has a decoder type, or the user gave one."""
    try:
        _decoder(model, decoder_type)
    except PtqError as error:
        return str(error)
    return None


def _decoder(model: CheckpointMetadata, decoder_type: str | None) -> str:
    decoder = family_of(model.config_class.rpartition(".")[2], decoder_type).decoder
    assert decoder is not None
    return decoder


def family_has_class(model: CheckpointMetadata, decoder_type: str | None, export_format: Any) -> str | None:
    """A Hugging Face directory is for a family that has a class there."""
    formats = [name for name in read_formats(export_format) if FORMATS[name].is_hugging_face]
    try:
        family = family_of(model.config_class.rpartition(".")[2], decoder_type)
    except PtqError:
        return None
    if formats and family.architecture is None:
        return (
            f"export_config.export_format={formats[0]}: Hugging Face has no model class for {family.name} "
            f"({model.config_class.rpartition('.')[2]}); use export_format=trtllm"
        )
    return None


def kv_cache_has_layers(
    model: CheckpointMetadata, decoder_type: str | None, export_format: Any, enable_kv_cache: bool | None
) -> str | None:
    """In a Hugging Face directory the scales of a KV cache belong to k_proj and v_proj."""
    formats = [name for name in read_formats(export_format) if FORMATS[name].is_hugging_face]
    if not formats or not enable_kv_cache or family_has_class(model, decoder_type, export_format):
        return None
    try:
        family = family_of(model.config_class.rpartition(".")[2], decoder_type)
    except PtqError:
        return None
    if family.architecture in FUSED_QKV:
        return (
            f"quantization_config.enable_kv_cache=true with export_format={formats[0]}: {family.name} has one layer "
            "for queries, keys and values, and the format no place for its scales; leave it out, or use "
            "export_format=trtllm"
        )
    return None


def norm_fits_decoder(model: CheckpointMetadata, decoder_type: str | None, export_format: Any) -> str | None:
    """TensorRT-LLM's decoder "gpt" has LayerNorm, the others RMSNorm."""
    if TRTLLM not in read_formats(export_format):
        return None
    try:
        decoder = _decoder(model, decoder_type)
    except PtqError:
        return None
    expected = "LayerNorm" if decoder == "gpt" else "RMSNorm"
    if model.normalization != expected:
        return (
            f"the model has {model.normalization} and TensorRT-LLM's decoder {decoder} only {expected}: "
            "set export_config.decoder_type to one that fits the model"
        )
    return None


def reader_knows_layers(model: CheckpointMetadata, decoder_type: str | None, export_format: Any) -> str | None:
    """TensorRT-LLM's readers compute everything that the model does: no norms of queries and keys, no odd biases."""
    if TRTLLM not in read_formats(export_format):
        return None
    try:
        decoder = _decoder(model, decoder_type)
    except PtqError:
        return None
    return unknown_to_reader(decoder, qk_norm=model.qk_norm, qkv_bias=model.qkv_bias, linear_bias=model.linear_bias)


def tokenizer_exists(tokenizer_path: Any) -> str | None:
    """A tokenizer given as a path is there; anything else may be a name on the hub."""
    is_path = tokenizer_path is not None and str(tokenizer_path).startswith(("/", ".", "~"))
    if is_path and not Path(tokenizer_path).expanduser().exists():
        return f"tokenizer_path={tokenizer_path} does not exist: give a tokenizer's directory or file"
    return None


def tracker_is_known(tracking: str | None) -> str | None:
    """The tracker is one that we have, and its package is installed."""
    return None if tracking is None else check_address(tracking)


# --- calibration ------------------------------------------------------------------------------------------------------


def _listed(sizes: Iterable[int]) -> str:
    *most, last = map(str, sizes)
    return " or ".join(filter(None, [", ".join(most), last]))


def _divisors(*sizes: int) -> str:
    """Lists the parallelisms that divide all sizes, for a fix."""
    return _listed(ranks for ranks in range(1, _MOST_RANKS + 1) if all(size % ranks == 0 for size in sizes))


def _indivisible(tp: int, model: CheckpointMetadata) -> list[str]:
    """Which sizes of the model a tensor parallelism does not divide; query groups may be shared by ranks."""
    sizes = {"attention heads": model.num_attention_heads, "ffn_hidden_size": model.ffn_hidden_size}
    wrong = [f"{size} {name}" for name, size in sizes.items() if size % tp]
    groups = model.num_query_groups
    return [*wrong, f"{groups} query groups"] if groups % tp and tp % groups else wrong


def calibration_tp_divides(calibration_tp: int, model: CheckpointMetadata) -> str | None:
    """Every calibration rank has whole query heads and an equal part of the MLP; ranks may share a query group."""

    def wrong(tp: int) -> list[str]:
        rows = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_size
        # Ranks that share a query group cut its rows anywhere; INT4 packs them in pairs.
        is_cut = tp > model.num_query_groups and rows % (2 * tp)
        return _indivisible(tp, model) or ([f"{rows} query-key-value rows in pairs"] if is_cut else [])

    if found := wrong(calibration_tp):
        fitting = _listed(tp for tp in range(1, _MOST_RANKS + 1) if not wrong(tp))
        return f"calibration_tp={calibration_tp} does not divide {', '.join(found)}: use {fitting}"
    return None


def stages_are_whole(
    calibration_pp: int,
    num_layers_in_first_pipeline_stage: int | None,
    num_layers_in_last_pipeline_stage: int | None,
    model: CheckpointMetadata,
) -> str | None:
    """The layers that the first and the last stage leave are spread evenly over the other stages."""
    uneven = {
        "num_layers_in_first_pipeline_stage": num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": num_layers_in_last_pipeline_stage,
    }
    given = {name: layers for name, layers in uneven.items() if layers is not None}
    if not given:
        if model.num_layers % calibration_pp == 0:
            return None
        return (
            f"calibration_pp={calibration_pp} does not divide {model.num_layers} layers: "
            f"use {_divisors(model.num_layers)}, or set {' or '.join(uneven)}"
        )
    stages, layers = calibration_pp - len(given), model.num_layers - sum(given.values())
    if stages < 0 or calibration_pp == 1:
        return f"{' and '.join(given)} need calibration_pp=2 or more, not {calibration_pp}: leave them out"
    if layers < stages or layers % max(stages, 1) or (stages == 0 and layers != 0):
        shown = " and ".join(f"{name}={count}" for name, count in given.items())
        return (
            f"{shown} do not fit {model.num_layers} layers in calibration_pp={calibration_pp} stages: "
            "the other stages must share what is left evenly"
        )
    return None


def experts_divide(calibration_ep: int, model: CheckpointMetadata) -> str | None:
    """Every rank of an expert-parallel group has the same number of experts."""
    if calibration_ep > 1 and model.num_experts is None:
        return f"calibration_ep={calibration_ep} is for mixture-of-experts models, and this one has none: use 1"
    if model.num_experts is not None and model.num_experts % calibration_ep:
        fitting = _divisors(model.num_experts)
        return f"calibration_ep={calibration_ep} does not divide {model.num_experts} experts: use {fitting}"
    return None


def experts_are_sharded_once(calibration_tp: int, calibration_ep: int) -> str | None:
    """ModelOpt calibrates experts that are spread over ranks or sharded within, not both."""
    if calibration_ep > 1 and calibration_tp > 1:
        return (
            f"calibration_ep={calibration_ep} with calibration_tp={calibration_tp}: ModelOpt calibrates experts with "
            "one of the two only; use calibration_tp=1 or calibration_ep=1"
        )
    return None


def experts_have_a_format(algorithm: str | None, export_format: Any, model: CheckpointMetadata) -> str | None:
    """Few formats describe quantized experts in more than FP8; pre-quantization scales none of them has for experts."""
    name = QuantizationConfig(algorithm).algorithm_name
    for format in map(FORMATS.__getitem__, read_formats(export_format)):
        known = (*format.experts, NO_QUANT)
        if model.num_experts is not None and name not in (*known, CUSTOM):
            return (
                f"quantization_config.algorithm={algorithm} cannot be exported for a mixture of experts: the readers "
                f"of export_format={format.name} take quantized experts in {' or '.join(format.experts)} only; "
                f"use {' or '.join(known)}"
            )
    return None


def ranks_are_enough(
    world_size: int | None, calibration_tp: int, calibration_pp: int, calibration_ep: int
) -> str | None:
    """The world is TP * PP * DP, and experts are spread over data-parallel ranks."""
    needed = calibration_tp * calibration_pp * calibration_ep
    if world_size is not None and world_size % needed:
        sizes = f"calibration_tp={calibration_tp} * calibration_pp={calibration_pp}"
        if calibration_ep > 1:
            sizes += f" * calibration_ep={calibration_ep}"
        return (
            f"world size {world_size} is not a multiple of {sizes} = {needed}: start {needed} processes "
            f"(run.executor=torchrun run.executor.ntasks_per_node={needed}, or torchrun --nproc_per_node {needed})"
        )
    return None


def devices_match(world_size: int | None, devices: int | None, num_nodes: int | None) -> str | None:
    """What the user says of devices and nodes is what the launcher started."""
    if world_size is None or (devices is None and num_nodes is None):
        return None
    if devices is None or num_nodes is None:
        matches = world_size % (devices or num_nodes or 1) == 0
    else:
        matches = devices * num_nodes == world_size
    if matches:
        return None
    given = " * ".join(f"{name}={value}" for name, value in (("devices", devices), ("num_nodes", num_nodes)) if value)
    return f"{given} does not match the launcher's world size of {world_size}: leave it out, or start as many processes"


# --- calibration data and algorithm -----------------------------------------------------------------------------------


def data_is_readable(
    calibration_dataset: str, calibration_dataset_size: int, evaluation_dataset_size: int, forward_loop: Any
) -> str | None:
    """Each sample of a local file that would be used is one."""
    if forward_loop is None and is_text_file(calibration_dataset):
        samples = calibration_dataset_size + evaluation_dataset_size
        try:
            for _ in islice(read_text_file(calibration_dataset), samples):
                pass
        except PtqError as error:
            return f"quantization_config.{error}"
    return None


def positions_suffice(calibration_seq_len: int, model: CheckpointMetadata) -> str | None:
    """A model with learned position embeddings has none beyond its sequence length."""
    if model.position_embedding_type == "learned_absolute" and calibration_seq_len > model.seq_length:
        return (
            f"quantization_config.calibration_seq_len={calibration_seq_len} is longer than the model's "
            f"{model.seq_length} positions: use at most {model.seq_length}"
        )
    return None


def algorithm_file_is_config(algorithm: str | None, calibration_state: Any = None) -> str | None:
    """A file given as algorithm holds a ModelOpt config; a saved calibration has read it already."""
    file = QuantizationConfig(algorithm).algorithm_file
    if file is None or calibration_state is not None:
        return None
    option = f"quantization_config.algorithm={algorithm}"
    try:
        content = yaml.safe_load(file.read_text()) if file.suffix != ".json" else json.loads(file.read_text())
    except OSError as error:
        return f"{option} cannot be read: {error.strerror}"
    except (ValueError, yaml.YAMLError) as error:
        return f"{option} cannot be parsed: {' '.join(str(error).split())}"
    if not isinstance(content, dict) or "quant_cfg" not in content:
        return f'{option} is not a ModelOpt config: it must hold an object with the keys "quant_cfg" and "algorithm"'
    return None


def model_is_quantized_once(calibration_state: Any, model: CheckpointMetadata) -> str | None:
    """A saved calibration is for the checkpoint as it was before."""
    if calibration_state is not None and model.is_quantized:
        return f"calibration_state={calibration_state} with a checkpoint that is quantized already: leave it out"
    return None


def state_is_of_the_model(header: StateHeader, calibration_state: Any, model: CheckpointMetadata) -> str | None:
    """A saved calibration was made of a model of the same shape."""
    if calibration_state is None or model.is_quantized:
        return None
    other = [
        f"{field.name} {then}, not {now}"
        for field in fields(model)
        if (then := header.model.get(field.name)) is not None
        and then != (now := getattr(model, field.name))
        and not field.name.endswith("_class")
    ]
    if other:
        return (
            f"calibration_state={calibration_state} was made of another model ({', '.join(other)}): "
            f"give the checkpoint that was calibrated (then {header.checkpoint})"
        )
    return None


def state_is_repeatable(header: StateHeader, calibration_state: Any) -> str | None:
    """The ranges of the weights follow from the weights and the state."""
    if calibration_state is not None and not header.is_repeatable:
        return (
            f"calibration_state={calibration_state} is of ModelOpt's algorithm {header.method}, which searches the "
            "weights' ranges; they are not part of the state: calibrate again"
        )
    return None


def state_leaves_no_data_to_run(calibration_state: Any, forward_loop: Any) -> str | None:
    """A saved calibration needs no loop over data."""
    if calibration_state is not None and forward_loop is not None:
        return "calibration_state and forward_loop: with a saved calibration nothing is calibrated; give one of them"
    return None


def kv_cache_has_algorithm(algorithm: str | None, enable_kv_cache: bool | None) -> str | None:
    """A KV cache is only quantized along with the weights."""
    if enable_kv_cache and algorithm in (None, NO_QUANT):
        return "quantization_config.enable_kv_cache=true needs an algorithm: with no_quant nothing is calibrated"
    return None


# --- export -----------------------------------------------------------------------------------------------------------


def formats_carry_algorithm(algorithm: str | None, export_format: Any) -> str | None:
    """Every format asked for can hold what the algorithm makes."""
    name = QuantizationConfig(algorithm).algorithm_name
    for format in read_formats(export_format):
        if reason := FORMATS[format].refused.get(name):
            return f"quantization_config.algorithm={algorithm} does not go into export_format={format}: {reason}"
    return None


def nemo_is_stored_in_bfloat16(export_format: Any, dtype: Any) -> str | None:
    """What NeMo trains on is the model as it was calibrated."""
    if "nemo" in read_formats(export_format) and DTYPES[str(dtype)] != "bfloat16":
        return f"export_config.dtype={dtype} is not for export_format=nemo, which holds the calibrated model: use bf16"
    return None


def compressed_tensors_folds_again(export_format: Any, model: CheckpointMetadata) -> str | None:
    """Its pre-quantization scales are folded into weights that no such scale was multiplied into before."""
    if model.is_quantized and "compressed_tensors" in read_formats(export_format):
        return (
            "export_config.export_format=compressed_tensors is not for a checkpoint that is quantized already: give "
            "the unquantized one, and this one as calibration_state, or use another format"
        )
    return None


def formats_have_parallelism(export_format: Any, inference_tp: int, inference_pp: int) -> str | None:
    """A parallelism of the files is for a format whose files are cut for it."""
    formats = read_formats(export_format)
    if any(FORMATS[format].has_parallelism for format in formats):
        return None
    given = {"inference_tp": inference_tp, "inference_pp": inference_pp}
    wrong = [f"export_config.{name}={value}" for name, value in given.items() if value > 1]
    if wrong:
        return (
            f"{' and '.join(wrong)}: the files of export_format={','.join(formats)} have no parallelism, servers cut "
            "them as they load them; leave it out, and tell the server"
        )
    return None


def inference_tp_divides(inference_tp: int, model: CheckpointMetadata) -> str | None:
    """Every exported rank has whole heads and an equal part of the MLP; fewer KV heads than ranks are repeated."""
    if wrong := _indivisible(inference_tp, model):
        fitting = _listed(tp for tp in range(1, _MOST_RANKS + 1) if not _indivisible(tp, model))
        return f"export_config.inference_tp={inference_tp} does not divide {', '.join(wrong)}: use {fitting}"
    return None


def inference_pp_divides(inference_pp: int, model: CheckpointMetadata) -> str | None:
    """Every exported pipeline stage has the same number of layers."""
    if model.num_layers % inference_pp:
        fitting = _divisors(model.num_layers)
        return f"export_config.inference_pp={inference_pp} does not divide {model.num_layers} layers: use {fitting}"
    return None


def _qkv_rows(model: CheckpointMetadata, tp: int) -> int:
    """Output features of the query-key-value projection over all ranks, repeated KV heads included."""
    return (model.num_attention_heads + 2 * max(model.num_query_groups, tp)) * model.head_size


def _attention_size(model: CheckpointMetadata) -> int:
    """Input features of the attention's output projection over all ranks."""
    return model.num_attention_heads * model.head_size


def _misfits(sizes: Mapping[str, int], multiple: int) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size % multiple)


def awq_blocks_fit_calibration(
    algorithm: str | None, awq_block_size: int, calibration_tp: int, model: CheckpointMetadata
) -> str | None:
    """The input features that calibration TP shards are whole blocks on each rank."""
    if not QuantizationConfig(algorithm).is_awq:
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
    algorithm: str | None, awq_block_size: int, export_format: Any, inference_tp: int, model: CheckpointMetadata
) -> str | None:
    """TensorRT-LLM's kernels take whole blocks, of at least 64 features (128 for w4a8_awq), on each rank."""
    if not QuantizationConfig(algorithm).is_awq or TRTLLM not in read_formats(export_format):
        return None
    least = 128 if algorithm == "w4a8_awq" else 64
    if algorithm == "w4a8_awq" and awq_block_size < least:
        return f"quantization_config.awq_block_size={awq_block_size} is too small for w4a8_awq: use 128"
    multiple = max(least, awq_block_size) * inference_tp
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


def nvfp4_blocks_fit(algorithm: str | None, inference_tp: int, model: CheckpointMetadata) -> str | None:
    """NVFP4's kernels take 128 output and 64 input features of each rank at a time."""
    if algorithm != "nvfp4":
        return None
    both = max(_NVFP4_OUT, _NVFP4_IN)
    wrong = [
        _misfits({"hidden_size": model.hidden_size}, both),
        _misfits({"query-key-value rows": _qkv_rows(model, inference_tp)}, _NVFP4_OUT * inference_tp),
        _misfits({"attention output": _attention_size(model)}, _NVFP4_IN * inference_tp),
        _misfits({"ffn_hidden_size": model.ffn_hidden_size}, both * inference_tp),
    ]
    if any(wrong):
        return (
            f"quantization_config.algorithm=nvfp4 does not fit export_config.inference_tp={inference_tp}: "
            f"{', '.join(filter(None, wrong))}: each rank needs multiples of {_NVFP4_OUT} output and {_NVFP4_IN} input "
            "features; use a smaller inference_tp or another algorithm"
        )
    return None


# --- the output directory ---------------------------------------------------------------------------------------------


def output_is_apart(path: Any, checkpoint: Any) -> str | None:
    """The export neither touches the checkpoint nor replaces a directory that holds it."""
    output, source = (Path(item).expanduser().resolve() for item in (path, checkpoint))
    if output == source or source in output.parents or output in source.parents:
        return f"export_config.path={path} and the checkpoint {checkpoint} lie in each other: choose another directory"
    return None


def output_is_free(path: Any, overwrite: bool) -> str | None:
    """Nothing stands at the path, or an earlier export does and may be replaced."""
    output = Path(path).expanduser()
    if not output.exists():
        return None
    if not overwrite:
        return f"export_config.path={path} exists: choose another, or set export_config.overwrite=true to replace it"
    if not output.is_dir() or (any(output.iterdir()) and not _is_export(output)):
        return f"export_config.path={path} is not an export, so it is not overwritten: choose another"
    return None


def _is_export(directory: Path) -> bool:
    """Whether a directory is one format's, or has a subdirectory for each of several."""
    names = {entry.name for entry in directory.iterdir()}
    return (
        "config.json" in names
        or (directory / "ptq" / "manifest.json").is_file()
        or all(name in FORMATS and (directory / name / "ptq" / "manifest.json").is_file() for name in names)
    )


def output_is_writable(path: Any) -> str | None:
    """The nearest directory above the path that exists can be written."""
    output = Path(path).expanduser().absolute()
    parent = next(directory for directory in (*output.parents, output) if directory.exists())
    if not parent.is_dir():
        return f"export_config.path={path} cannot be made: {parent} is not a directory"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"export_config.path={path} cannot be made: {parent} is not writable; choose another"
    return None


RULES: tuple[Rule, ...] = (
    checkpoint_is_named,
    family_is_supported,
    family_has_class,
    norm_fits_decoder,
    reader_knows_layers,
    tokenizer_exists,
    tracker_is_known,
    ranks_are_enough,
    devices_match,
    calibration_tp_divides,
    stages_are_whole,
    experts_divide,
    experts_are_sharded_once,
    experts_have_a_format,
    algorithm_file_is_config,
    kv_cache_has_algorithm,
    kv_cache_has_layers,
    model_is_quantized_once,
    state_is_of_the_model,
    state_is_repeatable,
    state_leaves_no_data_to_run,
    awq_blocks_fit_calibration,
    data_is_readable,
    positions_suffice,
    formats_carry_algorithm,
    compressed_tensors_folds_again,
    formats_have_parallelism,
    nemo_is_stored_in_bfloat16,
    inference_tp_divides,
    inference_pp_divides,
    awq_blocks_fit_inference,
    nvfp4_blocks_fit,
    output_is_apart,
    output_is_free,
    output_is_writable,
)
