# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""make_plan(): what a job needs, whether it fits with all weights in memory or block by block, and what to change."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from nemo_ptq.config import CUSTOM, FAST, FP8_CACHE, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.export.servers import Export, answers
from nemo_ptq.models.registry import Family, family_of
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.devices import Device, device_named
from nemo_ptq.plan.files import FileSize, context_files, space_problem, weight_files
from nemo_ptq.plan.memory import StepMemory, without_data, worst_memory
from nemo_ptq.plan.residence import LAYERWISE, RESIDENT, runs_layerwise, whole_model_needs
from nemo_ptq.plan.rules import Rule, findings, gather
from nemo_ptq.plan.rules.data import positions_suffice, recovery_is_measured
from nemo_ptq.plan.rules.exclusions import (
    excluded_layers_can_be_named,
    excluded_layers_exist,
    kv_cache_alone_is_possible,
)
from nemo_ptq.plan.rules.format_limits import experts_have_a_format, kv_cache_has_a_format, server_loads_it
from nemo_ptq.plan.rules.gathering import with_quality
from nemo_ptq.plan.rules.layerwise import layerwise_is_possible
from nemo_ptq.plan.rules.mixed_precision import (
    bits_are_reachable,
    bits_go_with_auto,
    choice_is_rounded_balanced,
    formats_mix,
)
from nemo_ptq.plan.rules.model import (
    long_rope_has_a_format,
    state_spaces_are_calibrated_here,
    state_spaces_have_a_format,
)
from nemo_ptq.plan.rules.parallelism import (
    experts_are_sharded_once,
    experts_divide,
    inference_pp_divides,
    inference_tp_divides,
)
from nemo_ptq.plan.rules.quantization_limits import (
    algorithm_file_fits_formats,
    algorithm_file_fits_model,
    algorithm_file_fits_sizes,
    algorithm_file_is_config,
    awq_blocks_fit_calibration,
    awq_blocks_fit_inference,
    kv_cache_has_algorithm,
    loop_has_something_to_calibrate,
    nvfp4_blocks_fit,
    quality_is_available,
)
from nemo_ptq.plan.sharding import Parallelism, model_parameters
from nemo_ptq.plan.work import calibration_work, step_seconds
from nemo_ptq.quantization.algorithms import algorithm_of, kv_cache_is_quantized

# Parallelism that suggestions try: tensor parallelism stays within a node.
_TENSOR_SIZES = (1, 2, 4, 8)
_PIPELINE_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
# A process that has imported torch, Megatron and NeMo.
_PROCESS_BYTES = 800 * 2**20
# Rules that do not concern most jobs are shown only for the jobs that they concern.
_ONLY_WHERE: Mapping[Rule, Callable[[ModelSpec, QuantizationConfig], bool]] = {
    awq_blocks_fit_calibration: lambda model, quantization: algorithm_of(quantization).takes_block_size,
    awq_blocks_fit_inference: lambda model, quantization: algorithm_of(quantization).takes_block_size,
    nvfp4_blocks_fit: lambda model, quantization: bool(algorithm_of(quantization).block_size),
    experts_divide: lambda model, quantization: bool(model.num_experts),
    experts_are_sharded_once: lambda model, quantization: bool(model.num_experts),
    experts_have_a_format: lambda model, quantization: bool(model.num_experts),
    algorithm_file_fits_formats: lambda model, quantization: quantization.algorithm_name == CUSTOM,
    algorithm_file_fits_model: lambda model, quantization: quantization.algorithm_name == CUSTOM,
    algorithm_file_fits_sizes: lambda model, quantization: quantization.algorithm_name == CUSTOM,
    algorithm_file_is_config: lambda model, quantization: quantization.algorithm_name == CUSTOM,
    bits_go_with_auto: lambda model, quantization: False,
    formats_mix: lambda model, quantization: algorithm_of(quantization).chooses,
    choice_is_rounded_balanced: lambda model, quantization: False,
    bits_are_reachable: lambda model, quantization: algorithm_of(quantization).chooses,
    quality_is_available: lambda model, quantization: quantization.is_balanced,
    kv_cache_has_a_format: lambda model, quantization: quantization.kv_cache_qformat != FP8_CACHE,
    kv_cache_has_algorithm: lambda model, quantization: bool(quantization.enable_kv_cache),
    loop_has_something_to_calibrate: lambda model, quantization: False,
    layerwise_is_possible: lambda model, quantization: bool(quantization.layerwise),
    server_loads_it: lambda model, quantization: False,
    excluded_layers_exist: lambda model, quantization: bool(quantization.exclusions),
    excluded_layers_can_be_named: lambda model, quantization: bool(quantization.exclusions),
    kv_cache_alone_is_possible: lambda model, quantization: quantization.kv_cache_only,
    state_spaces_have_a_format: lambda model, quantization: model.state_space is not None,
    state_spaces_are_calibrated_here: lambda model, quantization: False,
    long_rope_has_a_format: lambda model, quantization: model.long_rope is not None,
    recovery_is_measured: lambda model, quantization: False,
    positions_suffice: lambda model, quantization: model.position_embedding_type == "learned_absolute",
}


@dataclass(frozen=True)
class RuleLine:
    """A rule of preflight.

    Attributes:
        name: Name of its function.
        says: The condition that must hold.
        problem: What is wrong and how to fix it, or None.
    """

    name: str
    says: str
    problem: str | None


@dataclass(frozen=True)
class ServerLine:
    """The known outcome of loading one of the exports in a version of a server.

    Attributes:
        format: The export's format.
        server: The server and its version.
        outcome: "loads", "refused" or "unknown".
        known_by: The evidence for it.
        note: Remarks for the user.
    """

    format: str
    server: str
    outcome: str
    known_by: str
    note: str


@dataclass(frozen=True)
class Mode:
    """A way to run the job: with all of a rank's weights in memory, or with one block of them at a time.

    Attributes:
        name: "resident" or "layer-wise".
        memory: For each step, the rank with the highest peak in it.
        seconds: Time of each step.
        read_bytes: Bytes read of the checkpoint's weights.
        needs: Memory that the device must have for the largest step; on a CPU for all ranks and their libraries.
        fits: Whether the device has it.
    """

    name: str
    memory: tuple[StepMemory, ...]
    seconds: Mapping[str, float]
    read_bytes: int
    needs: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a job needs. Sizes are in bytes, times in seconds.

    Attributes:
        model: NeMo's config class.
        decoder: TensorRT-LLM's decoder type, None where the model has none.
        algorithm: The algorithm's name.
        quality: "fast", "balanced" or "max".
        parameters: Number of parameters of the whole model.
        layers: Number of layers of the whole model.
        parallelism: How the calibration is spread over ranks.
        device: The device that each rank runs on.
        rules: The conditions that must hold, in the order in which they are checked.
        modes: The modes in which the job can run.
        mode: The name of the mode that it takes.
        files: What will be written.
        flops: Operations of the calibration, over all ranks.
        servers: The known outcomes of loading the exports in servers.
        suggestions: What to change, if anything.
        fast_because: Why the quality is "fast", where the user leaves it open and it is.
    """

    model: str
    decoder: str | None
    algorithm: str
    quality: str
    parameters: int
    layers: int
    parallelism: Parallelism
    device: Device
    rules: tuple[RuleLine, ...]
    modes: tuple[Mode, ...]
    mode: str
    files: tuple[FileSize, ...]
    flops: int
    servers: tuple[ServerLine, ...] = ()
    suggestions: tuple[str, ...] = ()
    fast_because: str | None = None

    @property
    def chosen(self) -> Mode:
        """The mode that the job takes."""
        return next(mode for mode in self.modes if mode.name == self.mode)

    @property
    def memory(self) -> tuple[StepMemory, ...]:
        """For each step, the rank with the highest peak in it."""
        return self.chosen.memory

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time of each step."""
        return self.chosen.seconds

    @property
    def needs(self) -> int:
        """Memory that the device must have."""
        return self.chosen.needs

    @property
    def fits(self) -> bool:
        """Whether every step fits the device."""
        return self.chosen.fits

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems that keep the job from running, one line each."""
        broken = tuple(rule.problem for rule in self.rules if rule.problem)
        if self.fits:
            return broken
        return (
            *broken,
            f"{_gib(self.needs)} of memory are needed, and {self.device.name} has {_gib(self.device.usable)}",
        )

    @property
    def ok(self) -> bool:
        """Whether the job fits and every rule holds."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        modes = [
            {**asdict(mode), "memory": [{**asdict(step), "device": step.device} for step in mode.memory]}
            for mode in self.modes
        ]
        chosen = next(mode for mode in modes if mode["name"] == self.mode)
        return {
            **asdict(self),
            "modes": modes,
            "memory": chosen["memory"],
            "seconds": dict(self.seconds),
            "needs": self.needs,
            "fits": self.fits,
            "ok": self.ok,
        }


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def make_plan(
    model: ModelSpec,
    quantization: QuantizationConfig | None = None,
    export: ExportConfig | None = None,
    *,
    calibration_tp: int = 1,
    calibration_pp: int = 1,
    calibration_ep: int = 1,
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    world_size: int | None = None,
    device: str | Device = "H100",
    further: Mapping[str, Any] | None = None,
) -> Plan:
    """Plans a job for a model that need not exist.

    Args:
        model: The model's sizes: :func:`nemo_ptq.checkpoint.metadata.read_metadata` reads those of a checkpoint, and
            any other sizes can be made up.
        quantization: How to quantize; None takes the defaults.
        export: What to write; None takes the defaults. Its path is not looked at.
        calibration_tp: Tensor parallelism during calibration.
        calibration_pp: Pipeline parallelism during calibration.
        calibration_ep: Expert parallelism during calibration.
        num_layers_in_first_pipeline_stage: Layers of the first stage, where stages are uneven.
        num_layers_in_last_pipeline_stage: Layers of the last stage, where stages are uneven.
        world_size: Processes; None takes as many as the parallelism needs.
        device: The device that each rank runs on, by a name of :data:`nemo_ptq.plan.devices.GPUS`, or "CPU" for this
            machine.
        further: More values for the rules of preflight to look at, by the names of their parameters; without any, only
            the rules about sizes are applied.

    Raises:
        ConfigError: If the device is not known.

    Example:
        Does Llama-3 70B fit one node of eight GPUs?

        >>> from nemo_ptq.models.spec import ModelSpec
        >>> llama = ModelSpec(
        ...     model_class="LlamaModel", config_class="Llama3Config70B", num_layers=80, hidden_size=8192,
        ...     num_attention_heads=64, num_query_groups=8, head_size=128, ffn_hidden_size=28672, gated_mlp=True,
        ...     vocab_size=128256, num_experts=None, seq_length=8192, position_embedding_type="rope",
        ...     normalization="RMSNorm", tied_embeddings=False, activation="silu",
        ... )
        >>> make_plan(llama, calibration_tp=8, device="H100").ok
        True
        >>> make_plan(llama, device="H100").mode
        'layer-wise'
    """
    quantization = quantization or QuantizationConfig()
    export = export or ExportConfig("OUT")
    device = device_named(device) if isinstance(device, str) else device
    parallelism = Parallelism(
        calibration_tp,
        calibration_pp,
        calibration_ep,
        world_size or calibration_tp * calibration_pp * calibration_ep,
        num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage,
    )
    further = further or {}
    fast_because = None
    if quantization.quality is None:
        values = {
            "forward_loop": None,
            **further,
            "algorithm": quantization.algorithm,
            "export_format": export.export_format,
            "calibration_tp": calibration_tp,
            "calibration_ep": calibration_ep,
            "model": model,
        }
        quantization, fast_because = with_quality(quantization, values)
    plan = _plan(model, quantization, export, parallelism, device, further, world_size)
    suggestions = tuple(_suggestions(plan, model, quantization, export))
    return replace(plan, suggestions=suggestions, fast_because=fast_because)


def _plan(
    model: ModelSpec,
    quantization: QuantizationConfig,
    export: ExportConfig,
    parallelism: Parallelism,
    device: Device,
    further: Mapping[str, Any],
    world_size: int | None,
) -> Plan:
    rules = tuple(_rule_lines(model, quantization, export, parallelism, further, world_size))
    family: Family | None = None
    with suppress(PtqError):  # a rule says so
        family = family_of(model.config_class.rpartition(".")[2], export.decoder_type)
    decoder = None if family is None else family.decoder
    broken = {rule.name for rule in rules if rule.problem}
    if excluded_layers_exist.__name__ in broken:
        quantization = replace(quantization, exclude=None)
    can_be_cut = broken.isdisjoint(rule.__name__ for rule in _LAYOUT_RULES) and decoder is not None
    files: tuple[FileSize, ...] = ()
    if can_be_cut and decoder is not None:
        files = tuple(weight_files(model, decoder, quantization, export))
    written = sum(file.bytes for file in files) or 2 * model_parameters(model)
    has_loop = further.get("forward_loop") is not None
    whole = whole_model_needs(
        export.generate_sample, quantization.algorithm, has_loop, model.is_quantized, export.formats
    )
    modes = tuple(
        _mode(name, model, quantization, export, parallelism, device, written, len(files) or 1, bool(whole))
        for name in ((RESIDENT,) if whole else (RESIDENT, LAYERWISE))
    )
    layerwise = not whole and runs_layerwise(quantization.layerwise, False, modes[0].needs, device.usable)
    return Plan(
        model=model.config_class.rpartition(".")[2],
        decoder=decoder,
        algorithm=quantization.algorithm_name,
        quality=quantization.quality or FAST,
        parameters=model_parameters(model),
        layers=model.num_layers,
        parallelism=parallelism,
        device=device,
        rules=rules,
        modes=modes,
        mode=LAYERWISE if layerwise else RESIDENT,
        files=files,
        flops=calibration_work(model, quantization).flops,
        servers=()
        if family is None or decoder is None
        else tuple(_servers(model, quantization, export, family, decoder)),
    )


def _servers(
    model: ModelSpec, quantization: QuantizationConfig, export: ExportConfig, family: Family, decoder: str
) -> Iterator[ServerLine]:
    kv_cache = kv_cache_is_quantized(quantization, decoder)
    for format in export.formats:
        one = Export(
            format,
            quantization.algorithm_name,
            family.name,
            kv_cache,
            model.tied_embeddings,
            quantization.kv_cache_qformat,
            model.short_context,
        )
        for found in answers(one):
            yield ServerLine(format, found.label, found.outcome, found.known_by, found.note)


def _mode(
    name: str,
    model: ModelSpec,
    quantization: QuantizationConfig,
    export: ExportConfig,
    parallelism: Parallelism,
    device: Device,
    written_bytes: int,
    files: int,
    reads_twice: bool,
) -> Mode:
    layerwise = name == LAYERWISE
    memory = worst_memory(
        model,
        quantization,
        parallelism,
        layerwise=layerwise,
        inference_tp=export.inference_tp,
        is_cpu=device.is_cpu,
    )
    # The whole model is loaded for ModelOpt or format "nemo", and the walk reads its blocks.
    read_bytes = 2 * model_parameters(model) * (2 if reads_twice else 1)
    seconds = step_seconds(
        model,
        quantization,
        parallelism,
        device,
        layerwise=layerwise,
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        files=files,
    )
    needs = _needs(memory, parallelism, device)
    return Mode(name, memory, seconds, read_bytes, needs, needs <= device.usable)


def _needs(memory: tuple[StepMemory, ...], parallelism: Parallelism, device: Device) -> int:
    peak = max(step.device for step in memory)
    return parallelism.ranks * (peak + _PROCESS_BYTES) if device.is_cpu else peak


_LAYOUT_RULES: tuple[Rule, ...] = (
    inference_tp_divides,
    inference_pp_divides,
    awq_blocks_fit_inference,
    nvfp4_blocks_fit,
    experts_have_a_format,
    excluded_layers_can_be_named,
)


def _rule_lines(
    model: ModelSpec,
    quantization: QuantizationConfig,
    export: ExportConfig,
    parallelism: Parallelism,
    further: Mapping[str, Any],
    world_size: int | None,
) -> Iterator[RuleLine]:
    sizes = {field.name: getattr(quantization, field.name) for field in fields(quantization)}
    sizes |= {field.name: getattr(export, field.name) for field in fields(export) if field.name != "path"}
    values = {
        **sizes,
        "model": model,
        "calibration_tp": parallelism.tp,
        "calibration_pp": parallelism.pp,
        "calibration_ep": parallelism.ep,
        "num_layers_in_first_pipeline_stage": parallelism.first,
        "num_layers_in_last_pipeline_stage": parallelism.last,
        "world_size": world_size,
        "launcher": None,
        **further,
    }
    for rule, problem in findings(values):
        if problem or _ONLY_WHERE.get(rule, lambda *_: True)(model, quantization):
            says = (rule.__doc__ or "").partition("\n")[0].rstrip(".")
            yield RuleLine(rule.__name__, says, problem)


def _suggestions(plan: Plan, model: ModelSpec, quantization: QuantizationConfig, export: ExportConfig) -> Iterator[str]:
    """Suggests changes with which a plan fits its device, or fits it with all weights in memory."""
    if plan.mode == LAYERWISE and plan.fits and quantization.layerwise is None:
        needed = f"{_gib(plan.modes[0].needs)} are needed with all weights in memory"
        yield f"layer-wise: {needed}, and {_gib(plan.needs)} with one block of them at a time, which the job does"
        return
    if plan.fits:
        return
    if quantization.layerwise is False and plan.modes[-1].name == LAYERWISE and plan.modes[-1].fits:
        yield (
            "layer-wise: leave out quantization_config.layerwise=false: with one block of weights in memory at a time "
            f"{_gib(plan.modes[-1].needs)} are needed"
        )

    def fits(quantization: QuantizationConfig, parallelism: Parallelism) -> bool:
        memory = worst_memory(
            model,
            quantization,
            parallelism,
            layerwise=plan.mode == LAYERWISE,
            inference_tp=export.inference_tp,
            is_cpu=plan.device.is_cpu,
        )
        return _needs(memory, parallelism, plan.device) <= plan.device.usable

    if plan.device.is_cpu:
        yield "use fewer samples or a smaller batch, or a machine with more memory: all ranks share this one's"
        return
    batch = quantization.calibration_batch_size
    while batch > 1:
        batch //= 2
        smaller = replace(quantization, calibration_batch_size=batch)
        if fits(smaller, plan.parallelism):
            yield f"quantization_config.calibration_batch_size={batch} is the largest batch (halved) that fits"
            break
    sizes = sorted(((tp, pp) for tp in _TENSOR_SIZES for pp in _PIPELINE_SIZES), key=lambda size: (prod(size), size[1]))
    for tp, pp in sizes:
        spread = Parallelism(tp, pp, 1, tp * pp)
        broken = [rule for rule in _rule_lines(model, quantization, export, spread, {}, None) if rule.problem]
        calibration = [rule for rule in broken if rule.name not in {rule.name for rule in plan.rules if rule.problem}]
        if not calibration and fits(quantization, spread):
            yield f"calibration_tp={tp} calibration_pp={pp} is the smallest parallelism that fits {plan.device.name}"
            return
    yield f"no parallelism of up to TP {_TENSOR_SIZES[-1]} x PP {_PIPELINE_SIZES[-1]} fits {plan.device.name}"


def plan_job(
    arguments: Mapping[str, Any], *, world_size: int | None, launcher: str | None = None, device: Device | None = None
) -> Plan:
    """Plans the job that a front door was asked for.

    Args:
        arguments: The arguments of :func:`nemo_ptq.task.ptq` that were given, by name.
        world_size: Processes that would run it; None where that is not known.
        launcher: The launcher that would start them, as for :func:`~nemo_ptq.plan.rules.check_job`.
        device: The device that each would run on; None takes the one that `plan_device` names.

    Raises:
        ConfigError: If an option has an invalid value, or the checkpoint cannot be read.
    """
    export = arguments.get("export_config") or ExportConfig("OUT")
    gathered = gather({**arguments, "export_config": export}, world_size, launcher)
    values = gathered.values
    problems = list(gathered.problems)
    if "checkpoint" not in values and not problems:
        problems.append("nemo_checkpoint is missing: name a NeMo, Hugging Face or Megatron-LM directory")
    if problems:
        raise ConfigError(problems)
    plan = make_plan(
        values["model"],
        gathered.quantization if gathered.state is None else without_data(gathered.quantization),
        export,
        calibration_tp=values["calibration_tp"],
        calibration_pp=values["calibration_pp"],
        calibration_ep=values["calibration_ep"],
        num_layers_in_first_pipeline_stage=values["num_layers_in_first_pipeline_stage"],
        num_layers_in_last_pipeline_stage=values["num_layers_in_last_pipeline_stage"],
        world_size=world_size,
        device=device or device_named(values["plan_device"], "plan_device"),
        further=values,
    )
    if gathered.fast_because is not None:
        plan = replace(plan, fast_because=gathered.fast_because)
    if plan.files:
        plan = replace(plan, files=(*plan.files, *context_files(Path(values["checkpoint"]).expanduser(), export)))
    if "export_config" in arguments and "path" in values:
        says = "The file system of the output has room for it"
        is_known = gathered.quantization.algorithm_name != CUSTOM
        problem = space_problem(values["path"], plan.files, export.resume) if is_known else None
        plan = replace(plan, rules=(*plan.rules, RuleLine(space_problem.__name__, says, problem)))
    return plan
