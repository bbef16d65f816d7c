# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The job's steps on one rank, for tests that look between them. Imports Megatron and NeMo: for functions on ranks."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.moe.experts import SequentialMLP

from nemo_ptq.calibration.forward import forward_batches
from nemo_ptq.checkpoint.loading import LoadedModel, load_model
from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.console.quiet import quiet_libraries
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine import run as engine
from nemo_ptq.export.packing import pack_kv_cache, pack_linear, pack_parameters, row_splitter
from nemo_ptq.export.stream import write_files
from nemo_ptq.export.trtllm.trtllm_config import qnemo_config
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.export.trtllm.trtllm_writer import pack_module
from nemo_ptq.modelopt.megatron_layers import (
    MegatronLayers,
    gather_shard_map,
    global_modules,
    kv_cache_of,
    linear_of,
    plain_of,
    quantizes_kv_cache,
)
from nemo_ptq.models.registry import Family, family_of
from nemo_ptq.models.spec import ModelSpec, spec_of
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.parallel.process_groups import process_groups
from nemo_ptq.verify.dequantize import fake_quantize_nvfp4
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
    return family_of(type(model.config).__name__)


def random_batches() -> list[torch.Tensor]:
    """Token ids as calibration data: four full batches, and one of a single short sequence."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, TOKENS, size, generator=generator) for size in [(4, 32)] * 4 + [(1, 7)]]


def calibrate(
    model: LoadedModel, quantization: QuantizationConfig, batches: Sequence[torch.Tensor] | None = None
) -> None:
    """Calibrates a model in place."""
    tokens = random_batches() if batches is None else batches

    def loop(module: torch.nn.Module) -> None:
        for _ in forward_batches(module, tokens):
            pass

    decoder = family(model).decoder
    assert decoder is not None
    engine.calibrate(model, quantization, decoder, loop, Reporter(False))


def is_first() -> bool:
    """Whether this is rank 0."""
    return dist.get_rank() == 0


def export(model: LoadedModel, directory: Path, tp: int = 1, pp: int = 1) -> None:
    """Writes the rank files and config.json of a calibrated model."""
    modules = global_modules(model.module)
    shard_map, layers = gather_shard_map(modules), MegatronLayers(model.module, modules)
    shape = spec_of(model.config, model.vocab_size)
    layout = QnemoLayout(shape, shard_map.schemes, shard_map.kv_cache, torch.bfloat16, tp, pp)
    directory.mkdir(parents=True, exist_ok=True)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    pack = lambda name: pack_module(layers, name, shape, torch.bfloat16, tensor_rank)  # noqa: E731
    write_files(directory, layout, pack, shard_map, Reporter(False), dist.get_rank())
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
    shape = spec_of(model.config, model.vocab_size)
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
