# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint -> Megatron-Core model on this rank, at any tensor and pipeline parallelism."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
import torch
import torch.nn.functional as F
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from nemo.collections.common.tokenizers.tokenizer_utils import get_tokenizer
from nemo.collections.llm.fn.activation import openai_gelu

from nemo_ptq.checkpoint.allowed_names import AllowedNames
from nemo_ptq.checkpoint.blocks import Block, BlockLoader, split_into_blocks
from nemo_ptq.checkpoint.hybrid_model import build_hybrid, hybrid_stack_spec, is_hybrid, row_groups
from nemo_ptq.checkpoint.layer_spec import (
    HAVE_TRANSFORMER_ENGINE,
    LocalAndGlobalRotary,
    calibration_layer_spec,
    has_gemma3_attention,
)
from nemo_ptq.checkpoint.parts import WeightsSize
from nemo_ptq.checkpoint.reader import open_checkpoint
from nemo_ptq.errors import PtqError
from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.parallel.ranks import Parallelism, this_rank
from nemo_ptq.quantization.state import CalibrationState


@dataclass
class LoadedModel:
    """This rank's part of a model, with what the rest of the job needs to know about the whole.

    Attributes:
        module: Megatron's GPTModel: this pipeline stage, this tensor-parallel shard.
        config: The NeMo config that built it, e.g. ``Llama31Config8B``.
        tokenizer: NeMo's tokenizer.
        vocab_size: Rows of the embedding in the checkpoint (the tokenizer's size plus the checkpoint's own padding,
            not what this tensor parallelism pads further).
        has_vocab_size: Whether the checkpoint's configuration names the size itself.
        checkpoint: Where it comes from.
        size: What the whole model takes there.
        device: Where its weights go.
        parallelism: This rank's place.
        blocks: This rank's blocks, in order.
        loader: Reads their weights.
        calibration: What has been learned of it, None before it is calibrated.
    """

    module: GPTModel
    config: Any
    tokenizer: Any
    vocab_size: int
    has_vocab_size: bool
    checkpoint: Path
    size: WeightsSize
    device: torch.device
    parallelism: Parallelism
    blocks: list[Block]
    loader: BlockLoader
    calibration: CalibrationState | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model: embedding, layers and head."""
        return self.config.num_layers + 2

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.config.share_embeddings_and_output_weights)


def _adjust_to_machine(
    config: fdl.Config, device: torch.device, dtype: torch.dtype, overrides: Mapping[str, Any]
) -> None:
    """Rewrites the training machine's settings in a checkpoint's model config for calibration on this one.

    Args:
        config: Fiddle config of a NeMo ``GPTConfig``, changed in place.
        device: Where the model will live.
        dtype: In which its weights are held, bfloat16 or float16.
        overrides: Parallel sizes and other fields to set.
    """
    settings: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # So that nothing asks for CUDA's memory while the model is built on the meta device.
        "use_cpu_initialization": True,
        # The weights are read from the checkpoint, so nothing is gained by initialising them first.
        "perform_initialization": False,
        "sequence_parallel": False,
        "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "tp_comm_overlap": False,
        "deterministic_mode": False,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "cpu_offloading": False,
        "fp8": None,
        "enable_cuda_graph": False,
        "attention_backend": AttnBackend.auto,
        "bias_activation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_layer_spec": calibration_layer_spec,
        "mamba_stack_spec": hybrid_stack_spec,
        **overrides,
    }
    if not HAVE_TRANSFORMER_ENGINE:
        settings |= {
            "apply_rope_fusion": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
            "use_te_rng_tracker": False,
            "moe_permute_fusion": False,
            "use_transformer_engine_full_layer_spec": False,
        }
    if device.type == "cpu":
        # The all-to-all dispatcher orders its copies with CUDA streams.
        settings["moe_token_dispatcher_type"] = "allgather"
    if config.activation_func is F.gelu:
        # Servers compute the tanh approximation under this name, and so do Megatron's fused kernels.
        settings["activation_func"] = openai_gelu
    # Options come and go with Megatron's versions; one that does not exist needs no turning off.
    known = inspect.signature(fdl.get_callable(config)).parameters
    for name in settings.keys() & known.keys():
        setattr(config, name, settings[name])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def build_model(
    context: fdl.Config, device: torch.device, overrides: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Builds this rank's part of a model without memory for its weights: they are on torch's meta device.

    Args:
        context: Fiddle config of a NeMo model such as ``LlamaModel``, changed in place to suit this machine.
        device: Where the weights will go.
        overrides: Fields of the model's config to set, parallel sizes among them.
        dtype: In which its weights are held.

    Returns:
        NeMo's model, whose ``module`` is Megatron's.

    Raises:
        PtqError: If NeMo's classes do not take what the context says, or the tokenizer cannot be loaded.
    """
    _adjust_to_machine(context.config, device, dtype, overrides)
    context.optim = None
    # NeMo's model class, not its config alone: Gemma's scales the embedding.
    try:
        model = fdl.build(context)
        # Where stages share the embedding Megatron exchanges it between them, which the meta device has none of.
        with replaced(LanguageModule, "setup_embeddings_and_output_layer", lambda module: None), torch.device("meta"):
            if is_hybrid(model.config):
                model.module = build_hybrid(model.config, overrides["vocab_size"])
            else:
                model.configure_model()
            if has_gemma3_attention(model.config):
                model.module.rotary_pos_emb = LocalAndGlobalRotary(model.module.rotary_pos_emb)
    except Exception as error:  # configurations and tokenizers raise what they like
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PtqError(
            f"NeMo cannot make the model and tokenizer that the checkpoint describes ({reason}): copy it again, or "
            "give another tokenizer with tokenizer_path"
        ) from error
    model.module = model.module.eval().requires_grad_(False)
    return model


def open_model(
    checkpoint: Path,
    device: torch.device,
    *,
    tokenizer_path: str | None = None,
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    trusted: Sequence[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> LoadedModel:
    """Builds this rank's part of a model, none of its weights in memory.

    Runs inside :func:`nemo_ptq.parallel.process_groups.process_groups`, whose parallel sizes it takes.

    Args:
        checkpoint: A NeMo 2.0 checkpoint, or a Hugging Face directory.
        device: Where the weights will go.
        tokenizer_path: A tokenizer to use in place of the checkpoint's own.
        num_layers_in_first_pipeline_stage: Layers of the first stage, where stages are uneven.
        num_layers_in_last_pipeline_stage: Layers of the last stage, where stages are uneven.
        trusted: Dotted names that a NeMo checkpoint's context may use beside those that are always allowed.
        dtype: In which weights are held. Those that are bfloat16 in the checkpoint stay so: nothing is lost by it, and
            activations of such a model may exceed float16.

    Raises:
        PtqError: If it does not hold a GPT-like model, or its context names code that is not allowed.
    """
    reader = open_checkpoint(checkpoint, AllowedNames(trusted))
    if all(part.dtype == torch.bfloat16 for part in reader.parts):
        dtype = torch.bfloat16
    parallelism = this_rank()
    overrides: dict[str, Any] = {
        "tensor_model_parallel_size": parallelism.tensor.size,
        "pipeline_model_parallel_size": parallelism.stages,
        "expert_model_parallel_size": parallelism.expert.size,
        "expert_tensor_parallel_size": parallelism.expert_tensor.size,
        "num_layers_in_first_pipeline_stage": num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": num_layers_in_last_pipeline_stage,
        "vocab_size": _round_up(reader.vocab_size, parallelism.tensor.size),
    }
    with reader.model_config() as context:
        has_vocab_size = context.config.vocab_size is not None
        if tokenizer_path is not None:
            context.tokenizer = fdl.Config(get_tokenizer, tokenizer_path)
        model = build_model(context, device, overrides, dtype)
    return LoadedModel(
        model.module,
        model.config,
        model.tokenizer,
        reader.vocab_size,
        has_vocab_size,
        checkpoint,
        reader.size,
        device,
        parallelism,
        split_into_blocks(model.module, model.config.num_layers),
        BlockLoader(
            reader.parts,
            device,
            model.config.params_dtype,
            parallelism,
            model.config.gated_linear_unit,
            row_groups(model.config),
        ),
    )


def load_model(checkpoint: Path, device: torch.device, **options: Any) -> LoadedModel:
    """Opens a model as :func:`open_model` does, and reads all of this rank's weights.

    Args:
        checkpoint: A NeMo 2.0 checkpoint, or a Hugging Face directory.
        device: Where the weights go.
        options: As for :func:`open_model`.

    Raises:
        PtqError: If it does not hold a GPT-like model, or lacks weights.
    """
    model = open_model(checkpoint, device, **options)
    for block in model.blocks:
        model.loader.load(block)
    return model
