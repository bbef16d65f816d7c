# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The files that a job will write, and their sizes.

The reader, :mod:`nemo_ptq.verify.trtllm.expected_tensors`, lists the tensors: it knows every name, type and shape from
config.json alone, and no export passes that differs from it by a byte.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from nemo_ptq.config import CUSTOM, ExportConfig, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.safetensors_header import lay_out
from nemo_ptq.export.trtllm.exclusions import exclude_modules
from nemo_ptq.models.registry import ARCHITECTURES
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.sharding import linear_parameters, model_parameters
from nemo_ptq.quantization.algorithms import Algorithm, algorithm_of, kv_cache_is_quantized
from nemo_ptq.quantization.excluded import unquantized_layers
from nemo_ptq.quantization.state_header import WEIGHTS_IN_EXPORT
from nemo_ptq.verify.model_config import DEFAULT_EXCLUDE_MODULES, Config, Mapping, Moe, Quantization
from nemo_ptq.verify.trtllm.expected_tensors import ALGORITHMS, rank_tensors

# Where a format keeps the context; Hugging Face's have the tokenizer's files among their own.
_CONTEXTS = {"trtllm": "nemo_context/", "nemo": "context/"}
_TOKENIZERS = {"megatron": "release/tokenizer/"}
# The least share of an inexact size that the file will really have.
_ABOUT = 0.9
_NEMOS_OWN = ("io.json", "model.yaml", "hf_config.json")


@dataclass(frozen=True)
class FileSize:
    """A file that will be written.

    Attributes:
        name: Relative to the output directory.
        bytes: Its size.
        exact: Whether it will have exactly this size.
    """

    name: str
    bytes: int
    exact: bool = True


def reader_config(model: ModelSpec, decoder: str, quantization: QuantizationConfig, export: ExportConfig) -> Config:
    """The reader's view of the exported model; only the fields that decide names, types and shapes are right."""
    tp, pp, algorithm = export.inference_tp, export.inference_pp, algorithm_of(quantization)
    vocab = -(-model.vocab_size // algorithm.vocab_multiple) * algorithm.vocab_multiple
    excluded: tuple[str, ...] = DEFAULT_EXCLUDE_MODULES
    if quantization.exclusions:
        excluded = tuple(exclude_modules(model, unquantized_layers(quantization, model), pp))
    return Config(
        architecture=ARCHITECTURES[decoder],
        decoder=decoder,
        dtype=export.torch_dtype_name,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        hidden_size=model.hidden_size,
        head_size=model.head_size,
        intermediate_size=model.ffn_hidden_size,
        vocab_size=vocab,
        max_position_embeddings=model.seq_length,
        norm_epsilon=1e-5,
        rmsnorm=model.normalization == "RMSNorm",
        hidden_act="swiglu" if model.gated_mlp else "gelu",
        position_embedding_type="rope_gpt_neox"
        if model.position_embedding_type == "rope"
        else model.position_embedding_type,
        rotary_pct=1.0,
        rotary_base=10000.0,
        rotary_scaling=None,
        share_embedding_table=model.tied_embeddings,
        attention_bias=model.linear_bias or (model.qkv_bias and decoder != "gpt"),
        mlp_bias=model.linear_bias,
        mapping=Mapping(tp * pp, tp, pp, tp, 1),
        quantization=Quantization(
            algorithm=None if quantization.kv_cache_only else algorithm.quant_algo,
            kv_cache_algorithm="FP8" if kv_cache_is_quantized(quantization, decoder) else None,
            group_size=quantization.awq_block_size,
            exclude_modules=excluded,
        ),
        moe=Moe(model.num_experts, model.experts_per_token or 1, 1) if model.num_experts else None,
        qk_norm=model.qk_norm,
        post_norms=model.gemma is not None,
    )


def rank_files(config: Config) -> Iterator[FileSize]:
    """Yields the rank files of an export, in rank order."""
    tp = config.mapping.tp_size
    for rank in range(config.mapping.world_size):
        tensors = {name: (spec.dtype, spec.shape) for name, spec in rank_tensors(config, rank // tp).items()}
        _, _, size = lay_out(tensors, {"rank": str(rank)})
        yield FileSize(f"rank{rank}.safetensors", size)


def weight_files(
    model: ModelSpec, decoder: str, quantization: QuantizationConfig, export: ExportConfig
) -> Iterator[FileSize]:
    """The files with the weights.

    A Hugging Face directory has about as many bytes as TensorRT-LLM's, where that has the algorithm; NeMo's and
    Megatron's weights are not packed.
    """
    for name in export.formats:
        prefix = f"{name}/" if export.has_subdirectories else ""
        format = FORMATS[name]
        if quantization.is_balanced:
            plain = sum(prod(model.module(name).shape) for name in unquantized_layers(quantization, model))
            weights = algorithm_of(quantization).packed_bytes_of(quantization) * (linear_parameters(model) - plain)
            yield FileSize(f"{prefix}{WEIGHTS_IN_EXPORT}", int(weights), exact=False)
        if format.is_tensorrt_llm:
            for file in rank_files(reader_config(model, decoder, quantization, export)):
                exact = quantization.algorithm_name != CUSTOM
                yield replace(file, name=prefix + file.name, exact=exact)
        elif not format.is_packed:
            yield FileSize(f"{prefix}{format.folder}/*.distcp", 2 * model_parameters(model), exact=False)
        elif model.state_space is not None or _is_counted(algorithm_of(quantization)):
            linears, each = linear_parameters(model), algorithm_of(quantization).packed_bytes_of(quantization)
            size = 2 * (model_parameters(model) - linears) + each * linears
            yield FileSize(f"{prefix}*.safetensors", int(size), exact=False)
        else:
            whole = reader_config(model, decoder, quantization, replace(export, inference_tp=1, inference_pp=1))
            yield FileSize(f"{prefix}*.safetensors", sum(file.bytes for file in rank_files(whole)), exact=False)


def context_files(checkpoint: Path, export: ExportConfig) -> Iterator[FileSize]:
    """Yields each format's part of a NeMo checkpoint's context: all of it, or the tokenizer's files alone."""
    context = checkpoint / "context"
    files = {path: path.stat().st_size for path in context.rglob("*") if path.is_file()}
    tokenizer = sum(size for path, size in files.items() if path.name not in _NEMOS_OWN)
    for name in export.formats:
        prefix = f"{name}/" if export.has_subdirectories else ""
        place, size = _CONTEXTS.get(name), sum(files.values())
        if place is None:
            place, size = _TOKENIZERS.get(name, "tokenizer*"), tokenizer
        if size:
            yield FileSize(prefix + place, size, exact=False)


def _is_counted(algorithm: Algorithm) -> bool:
    """Whether sizes are estimated from bytes per weight: TensorRT-LLM's reader does not know the algorithm."""
    return algorithm.chooses or algorithm.quant_algo not in (None, *ALGORITHMS)


def space_problem(path: Any, files: Iterable[FileSize], resume: bool) -> str | None:
    """Says in one line that the file system of the output has no room for it, if it has none.

    Args:
        path: The output, as the user gave it.
        files: The files that will be written, in addition to those that are there now.
        resume: Whether the job goes on from an earlier run, which has claimed the space if there is one.
    """
    output = Path(path).expanduser().absolute()
    parent = next((parent for parent in output.parents if os.path.isdir(parent)), output)
    if resume or (parent == parent.parent and parent != output.parent):  # planned for another machine
        return None
    usage = shutil.disk_usage(parent)
    needed = sum(file.bytes if file.exact else int(_ABOUT * file.bytes) for file in files)
    if not usage.total or needed <= usage.free:  # some file systems do not tell
        return None
    return (
        f"export_config.path={path}: {needed:,} bytes will be written, and the file system of {parent} has only "
        f"{usage.free:,} free: remove something there, or choose another directory"
    )
