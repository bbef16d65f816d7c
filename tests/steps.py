# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The job's steps on one rank, for tests that look between them. Imports Megatron and NeMo: for functions on ranks."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.moe.experts import SequentialMLP

from nemo_ptq.calibration.batches import JobSamples
from nemo_ptq.calibration.forward import forward_batches
from nemo_ptq.calibration.methods import method_for
from nemo_ptq.calibration.observing import State, TokenCounts
from nemo_ptq.calibration.pipeline import BlockVisitor, ScaleLearner, gather_counts, walk
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block, parameters_of
from nemo_ptq.checkpoint.loading import LoadedModel, load_model
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.checkpoint.parts import is_linear
from nemo_ptq.config import FAST, NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.console.quiet import quiet_libraries
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine import run as engine
from nemo_ptq.export.calibrated import CalibratedLayers, algorithm_scheme
from nemo_ptq.export.layout import Layout
from nemo_ptq.export.module_tensors import Linear, Plain
from nemo_ptq.export.packing import pack_kv_cache, pack_linear, pack_parameters, row_splitter
from nemo_ptq.export.shard_map import ShardMap, gather_shard_map
from nemo_ptq.export.source import Source
from nemo_ptq.export.stream import LayoutWriter
from nemo_ptq.export.trtllm.trtllm_config import qnemo_config
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.export.trtllm.trtllm_writer import pack_module
from nemo_ptq.job import Job
from nemo_ptq.modelopt import quantizers as modelopt
from nemo_ptq.modelopt.experts import with_idle_experts_covered
from nemo_ptq.modelopt.megatron_layers import global_modules, linear_of
from nemo_ptq.modelopt.transfer import fingerprint, gather_state
from nemo_ptq.models.registry import Family, family_of
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.parallel.process_groups import process_groups
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.algorithms import algorithm_of, kv_cache_is_quantized
from nemo_ptq.quantization.schemes import UNQUANTIZED
from nemo_ptq.quantization.state import CalibrationState
from nemo_ptq.quantization.state_header import IN_EXPORT, StateHeader
from nemo_ptq.report.measure import Measured, Measurement
from nemo_ptq.verify.dequantize import fake_quantize_nvfp4
from nemo_ptq.versions import producer
from tests.families import TOKENS
from tests.packed import Heads, Packed, dequantize, fields_of, joined, rows_of, weight_problem

CPU = torch.device("cpu")


@contextmanager
def loaded(checkpoint: Path, tp: int = 1, pp: int = 1, ep: int = 1) -> Iterator[LoadedModel]:
    """Loads this rank's part of a model, on the CPU wherever the tests run."""
    quiet_libraries()
    groups = process_groups(read_launch(), CPU, tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep)
    with groups:
        yield load_model(checkpoint, CPU)


def family(model: LoadedModel) -> Family:
    """The model's family."""
    return family_of(model.config_class.rpartition(".")[2])


def random_batches() -> list[torch.Tensor]:
    """Token ids as calibration data: four full batches, and one of a single short sequence."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, TOKENS, size, generator=generator) for size in [(4, 32)] * 4 + [(1, 7)]]


# --- the product's own calibration and export -------------------------------------------------------------------------


def job_of(
    checkpoint: Path,
    quantization: QuantizationConfig,
    output: Path,
    layout: tuple[int, ...] = (1, 1),
    inference: tuple[int, int] = (1, 1),
    formats: Any = "trtllm",
) -> Job:
    """A job whose calibration has a TP, a PP and an EP, for :func:`run_job`, which gives it its data.

    The loop that stands for the data in the check cannot be run layer by layer, as the pipeline can.
    """
    tp, pp, ep = (*layout, 1)[:3]
    export = ExportConfig(str(output), export_format=formats, inference_tp=inference[0], inference_pp=inference[1])
    job = check_job(
        world_size=tp * pp * ep,
        calibration_tp=tp,
        calibration_pp=pp,
        calibration_ep=ep,
        nemo_checkpoint=str(checkpoint),
        quantization_config=replace(quantization, layerwise=None, quality="fast"),
        export_config=export,
        forward_loop=print if algorithm_of(quantization).needs_data else None,
    )
    return replace(job, quantization=replace(quantization, quality=quantization.quality or FAST))


def run_job(job: Job, batches: Sequence[torch.Tensor] | None = None) -> None:
    """Runs a job on this rank, all of it, with token ids in place of text.

    The block pipeline calibrates what it can, ModelOpt the user's own configurations.

    Args:
        job: The job; where it has a calibration, there is no other.
        batches: What every data-parallel rank reads, int64 (batch, sequence) each; None takes the usual ones.
    """
    tokens = random_batches() if batches is None else batches
    loop = _loop(tokens) if job.is_custom and job.calibration_state is None else None
    job = replace(job, forward_loop=loop)
    with (
        patch.object(engine, "read_job_samples", lambda *_: JobSamples()),
        patch.object(engine, "calibration_batches", lambda *_: list(tokens)),
        patch.object(engine, "pick_device", lambda _: CPU),
    ):
        engine.run_job(job)


def run_jobs(jobs: Sequence[Job], batches: Sequence[torch.Tensor] | None = None) -> None:
    """Calibrates once, for the first job, and exports for every one, on this rank."""
    first, *others = jobs
    run_job(first, batches)
    (directory, *_) = first.directories(first.output).values()
    state = None if first.quantization.algorithm_name == NO_QUANT else directory / IN_EXPORT
    for job in others:
        run_job(replace(job, calibration_state=state))


def learn(
    model: LoadedModel,
    quantization: QuantizationConfig,
    batches: Sequence[torch.Tensor] | None = None,
    visitors: Sequence[BlockVisitor] = (),
    streams: Sequence[Stream] = (),
    drop: bool = False,
    counts: TokenCounts | None = None,
) -> CalibrationState:
    """Calibrates a model with the block pipeline; its weights stay as they are.

    Args:
        model: This rank's part of the model.
        quantization: How, with one of our algorithms.
        batches: What this data-parallel rank reads; None takes the usual ones.
        visitors: Use the blocks as well.
        streams: The batches that these walk with.
        drop: Free each block's weights behind the walk.
        counts: Gets the tokens that each expert of the whole model has seen.
    """
    runner = BlockRunner(model.module, CPU, model.parallelism, CPU)
    learner = None
    if quantization.algorithm_name != NO_QUANT:
        stream = Stream(random_batches() if batches is None else batches)
        quantizes_kv_cache = kv_cache_is_quantized(quantization, _decoder(model))
        method = method_for(quantization, _decoder(model))
        learner = ScaleLearner(runner, model.parallelism, stream, method, quantizes_kv_cache)
    walking = [*([learner.stream] if learner else []), *streams]
    mine: dict[str, torch.Tensor] = {}
    walk(
        model,
        runner,
        learner,
        walking,
        visitors,
        drop=drop,
        reporter=Reporter(False),
        finished=lambda _, state: mine.update(state),
    )
    if counts is not None and learner is not None:
        counts.update(gather_counts(learner.counts, model.parallelism))
    everyones: list[Any] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    tensors = {name: value for part in everyones for name, value in part.items()}
    return CalibrationState(_header(model, quantization, ""), {name: tensors[name] for name in sorted(tensors)})


def calibrated_layers(model: LoadedModel, quantization: QuantizationConfig) -> CalibratedLayers:
    """The layers of a model that :func:`learn` calibrates: a visitor adds each block's state."""
    names = [name for block in model.blocks for name in block.modules if is_linear(name)]
    is_quantized = quantization.algorithm_name != NO_QUANT
    return CalibratedLayers(
        parameters_of(model.blocks),
        {},
        dict.fromkeys(names, algorithm_scheme(quantization)) if is_quantized else {},
        bool(model.config.layernorm_zero_centered_gamma),
        tensor=model.parallelism.tensor,
        expert_tensor=model.parallelism.expert_tensor,
    )


@dataclass(frozen=True)
class AddState:
    """A visitor that completes calibrated layers block by block, as exports do."""

    layers: CalibratedLayers

    def visit(self, index: int, block: Block | None, state: State) -> None:
        """See :meth:`BlockVisitor.visit`."""
        self.layers.state.update(state)
        self.layers.agree_on_weights(name for name in (block.modules if block else {}) if is_linear(name))


def measure(
    model: LoadedModel,
    quantization: QuantizationConfig,
    layers: CalibratedLayers,
    texts: Sequence[torch.Tensor],
    drop: bool = False,
) -> Measured:
    """Calibrates ``layers``, which are the model's, and measures what that changes on some texts."""
    runner = BlockRunner(model.module, CPU, model.parallelism, CPU)
    reference, quantized = (Stream(texts), Stream(texts)) if texts else (None, None)
    measurement = Measurement(model, runner, layers, reference, quantized)
    names = [name for block in model.blocks for name in block.modules]
    shard_map = gather_shard_map(names, model.parallelism.tensor.rank, layers.schemes, [])
    streams = [reference, quantized] if reference and quantized else []
    learn(model, quantization, visitors=[AddState(layers), measurement], streams=streams, drop=drop)
    return measurement.gather(shard_map)


def _decoder(model: LoadedModel) -> str:
    decoder = family(model).decoder
    assert decoder is not None
    return decoder


def _header(model: LoadedModel, quantization: QuantizationConfig, weights: str) -> StateHeader:
    is_quantized = quantization.algorithm_name != NO_QUANT
    config = modelopt.as_json(modelopt.modelopt_config(quantization, _decoder(model))) if is_quantized else {}
    return StateHeader(
        checkpoint=str(model.checkpoint),
        weights=weights,
        model=read_metadata(model.checkpoint).identity,
        decoder=_decoder(model),
        quantization=quantization,
        modelopt_config=config,
        producer=producer(),
    )


def _loop(tokens: Sequence[torch.Tensor]) -> Callable[[Any], None]:
    def loop(module: Any) -> None:
        for _ in forward_batches(module, tokens):
            pass

    return loop


# --- the oracle: a model with ModelOpt's quantizers, and what an export of it packs -----------------------------------


def calibrate(
    model: LoadedModel, quantization: QuantizationConfig, batches: Sequence[torch.Tensor] | None = None
) -> None:
    """Has ModelOpt calibrate a model in place; its state is the model's ``calibration`` afterwards."""
    if quantization.algorithm_name == NO_QUANT:
        return
    loop = _loop(random_batches() if batches is None else batches)
    if model.config.num_moe_experts:
        loop = with_idle_experts_covered(loop, lambda _: None)
    header = _header(model, quantization, fingerprint(model.module))
    modelopt.calibrate(model.module, quantization, _decoder(model), loop)
    model.calibration = gather_state(model.module, header)


def is_first() -> bool:
    """Whether this is rank 0."""
    return dist.get_rank() == 0


def plain_of(module: Any) -> Plain:
    """Describes a norm, an embedding or a router of Megatron's."""
    offset = 1.0 if getattr(module, "zero_centered_gamma", False) else 0.0
    return Plain(module.weight, getattr(module, "bias", None), offset)


def quantizes_kv_cache(core_attention: Any) -> bool:
    """Whether ModelOpt quantizes the keys and values that this attention caches."""
    quantizer = getattr(core_attention, "k_bmm_quantizer", None)
    return quantizer is not None and quantizer.is_enabled


def kv_cache_of(core_attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the largest magnitudes of the keys and the values that an attention caches, one element each."""
    return core_attention.k_bmm_quantizer.export_amax(), core_attention.v_bmm_quantizer.export_amax()


@dataclass(frozen=True)
class MegatronLayers:
    """This rank's layers of a model with ModelOpt's quantizers, where exports want ``CalibratedLayers``.

    Attributes:
        modules: What exports are made of, from :func:`global_modules`.
        state: The calibration state's entries, for formats that fold scales.
    """

    modules: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: LoadedModel) -> Any:
        """Those of a model, with its ``calibration`` if it has one."""
        return cls(global_modules(model.module), {} if model.calibration is None else model.calibration.tensors)

    def linear(self, name: str) -> Linear:
        """A linear layer, its weight smoothed by ModelOpt."""
        return linear_of(self.modules[name])

    def plain(self, name: str) -> Plain:
        """A norm, an embedding or a router."""
        return plain_of(self.modules[name])

    def kv_cache(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest magnitudes of keys and values."""
        return kv_cache_of(self.modules[name])

    def pre_quant_scale(self, name: str) -> torch.Tensor | None:
        """What the input of a linear layer is multiplied with, or None."""
        return self.linear(name).pre_quant_scale if name in self.modules else None


def shard_map_of(model: LoadedModel) -> ShardMap:
    """Who holds what of a model, and how ModelOpt has quantized it; every rank calls it."""
    modules = global_modules(model.module)
    schemes = {name: linear_of(module).scheme for name, module in modules.items() if is_linear(name)}
    return gather_shard_map(
        modules,
        model.parallelism.tensor.rank,
        {name: scheme for name, scheme in schemes.items() if scheme != UNQUANTIZED},
        [name for name, module in modules.items() if name.endswith("core_attention") and quantizes_kv_cache(module)],
    )


def source_of(
    model: LoadedModel, settings: ExportConfig, layers: Any = None, shard_map: ShardMap | None = None
) -> Source:
    """A model as the writers of formats see it: one with ModelOpt's quantizers, unless it is said otherwise."""
    return Source(
        layers=layers or MegatronLayers.of(model),
        rank=dist.get_rank(),
        tensor_rank=model.parallelism.tensor.rank,
        tensor_ranks=model.parallelism.tensor.size,
        shard_map=shard_map or shard_map_of(model),
        shape=model.spec,
        family=family(model),
        config=model.config,
        has_vocab_size=model.has_vocab_size,
        tokenizer=model.tokenizer,
        tokenizer_is_replaced=False,
        checkpoint=model.checkpoint,
        settings=settings,
    )


def write(layout: Layout, pack: Callable[[str], Packed], model: LoadedModel, directory: Path) -> None:
    """Writes all files of a layout; every rank calls it."""
    directory.mkdir(parents=True, exist_ok=True)
    with LayoutWriter(directory, layout, pack, shard_map_of(model), dist.get_rank()) as writer:
        for block in range(writer.num_blocks):
            writer.write(block)


def export(model: LoadedModel, directory: Path, tp: int = 1, pp: int = 1) -> None:
    """Writes the rank files and config.json of a model that ModelOpt has calibrated."""
    shard_map, layers = shard_map_of(model), MegatronLayers.of(model)
    shape = model.spec
    layout = QnemoLayout(shape, shard_map.schemes, shard_map.kv_cache, torch.bfloat16, tp, pp)
    pack = lambda name: pack_module(layers, name, shape, torch.bfloat16, model.parallelism.tensor.rank)  # noqa: E731
    write(layout, pack, model, directory)
    if dist.get_rank() == 0:
        config = qnemo_config(layout, family(model), "0")
        (directory / "config.json").write_text(json.dumps(config))
    dist.barrier()


def in_float32(model: LoadedModel) -> None:
    """Turns a model's arithmetic to float32, whatever its weights were rounded to before."""
    model.module.float()
    model.module.config.params_dtype = torch.float32


def serve(model: LoadedModel, algorithm: str) -> list[str]:
    """Turns a calibrated model into what a server computes with its export, in float32.

    Weights become what is packed of them, and so do gains, pre-quantization scales and KV cache scales. The rounding
    of activations stays ModelOpt's, but for NVFP4, which ModelOpt simulates on GPUs only. Experts' outputs are weighed,
    where Megatron weighs the inputs of their second layers.

    Returns:
        Where packed weights are not those that the model simulates, one line each.
    """
    in_float32(model)
    shape = model.spec
    heads = _heads(shape)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    problems = []
    for name, module in global_modules(model.module).items():
        if ".linear_" in name:
            packed = pack_linear(linear_of(module), row_splitter(name, shape, tensor_rank), torch.bfloat16)
            problems += [f"{name}: {problem}" for problem in _weight_problems(name, module, packed, algorithm, shape)]
            groups = rows_of(name, module.weight, heads, shape.gated_mlp)
            rows = {group: dequantize(algorithm, fields_of(packed, group)) for group in groups}
            module.weight.data = joined(name, rows, heads)
            _serve_inputs(module, packed, algorithm)
        if getattr(module, "zero_centered_gamma", False):
            module.weight.data = pack_parameters(plain_of(module), torch.bfloat16)["", "weight"].float() - 1.0
        if name.endswith("core_attention") and quantizes_kv_cache(module):
            scale = pack_kv_cache(*kv_cache_of(module))["", "kv_cache_scaling_factor"]
            for quantizer in (module.k_bmm_quantizer, module.v_bmm_quantizer):
                quantizer.amax = scale.reshape(quantizer.amax.shape) * 448.0
    for module in model.module.modules():
        if isinstance(module, SequentialMLP):
            for expert in module.local_experts:
                expert.forward = partial(_weigh_output, expert.forward)
    return problems


def _weigh_output(forward: Callable[..., Any], hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, None]:
    return forward(hidden)[0] * weight[:, None], None


def _heads(shape: ModelSpec) -> Heads:
    """The heads of this rank's shard."""
    heads = (
        shape.num_attention_heads + 2 * shape.num_query_groups
    ) // parallel_state.get_tensor_model_parallel_world_size()
    first = heads * parallel_state.get_tensor_model_parallel_rank()
    return Heads(shape.num_attention_heads // shape.num_query_groups, shape.head_size, first)


def _weight_problems(name: str, linear: Any, packed: Packed, algorithm: str, shape: ModelSpec) -> Iterator[str]:
    heads = _heads(shape)
    simulated = linear.weight
    if algorithm == "nvfp4":
        simulated = fake_quantize_nvfp4(simulated, packed["", "weights_scaling_factor_2"])
    elif algorithm != NO_QUANT:
        simulated = linear.weight_quantizer(simulated)
    exact = rows_of(name, linear.weight, heads, shape.gated_mlp)
    for group, rows in rows_of(name, simulated, heads, shape.gated_mlp).items():
        problem = weight_problem(algorithm, fields_of(packed, group), rows, exact[group])
        if problem:
            yield problem


def _serve_inputs(linear: Any, packed: Packed, algorithm: str) -> None:
    if algorithm == NO_QUANT:
        return
    linear.weight_quantizer.disable()
    if ("", "prequant_scaling_factor") in packed:
        linear.input_quantizer.pre_quant_scale = packed["", "prequant_scaling_factor"].float()
    if algorithm == "nvfp4":
        linear.input_quantizer.disable()
        scale = packed["", "activation_scaling_factor"]
        linear.register_forward_pre_hook(lambda _, inputs: (fake_quantize_nvfp4(inputs[0], scale), *inputs[1:]))


def logits(model: LoadedModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """float32 (batch, sequence, vocabulary) on the ranks of the last stage."""
    (output,) = forward_batches(model.module, [tokens])
    if output is None:
        return None
    return gather_from_tensor_model_parallel_region(output)[..., : model.vocab_size].float()


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether there are two tensors with the same shape, data type and bits."""
    if left is None or right is None or left.dtype != right.dtype:
        return False
    return left.shape == right.shape and torch.equal(left, right)
