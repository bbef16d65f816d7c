# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint -> Megatron-Core model on this rank, at any tensor and pipeline parallelism."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.checkpoint.allowed_names import AllowedNames
from nemo_ptq.checkpoint.blocks import Block, BlockLoader, split_into_blocks
from nemo_ptq.checkpoint.gpt import build_gpt, make_config, settings_for_calibration, unbuildable
from nemo_ptq.checkpoint.model_fields import ModelFields
from nemo_ptq.checkpoint.parts import WeightsSize, fitting
from nemo_ptq.checkpoint.reader import CheckpointReader, open_checkpoint
from nemo_ptq.checkpoint.tokenizer_files import tokenizer_problem
from nemo_ptq.checkpoint.tokenizers import Tokenizer, with_nemos_special_tokens
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec, spec_of
from nemo_ptq.models.state_space import state_space_of
from nemo_ptq.parallel.megatron import LanguageModule
from nemo_ptq.parallel.ranks import Parallelism, this_rank
from nemo_ptq.pretrained import load_pretrained
from nemo_ptq.quantization.state import CalibrationState


@dataclass
class LoadedModel:
    """This rank's part of a model, with the facts about the whole that the rest of the job needs.

    Attributes:
        module: Megatron's GPTModel or MambaModel: this pipeline stage, this tensor-parallel shard.
        config: Megatron's configuration of it, with the fields that only NeMo's has as further attributes.
        config_class: NeMo's class of the configuration, with its module.
        tokenizer: A :class:`~nemo_ptq.checkpoint.tokenizers.Tokenizer`, or one of NeMo's.
        vocab_size: Rows of the embedding in the checkpoint (the tokenizer's size plus the checkpoint's own padding,
            without the further padding for this tensor parallelism).
        has_vocab_size: Whether the checkpoint's configuration names the size itself.
        checkpoint: Where it comes from.
        size: Size of the whole model there.
        device: Where its weights go.
        parallelism: This rank's place.
        blocks: This rank's blocks, in order.
        loader: Reads their weights.
        calibration: Its calibration; None before it is calibrated.
    """

    module: LanguageModule
    config: Any
    config_class: str
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

    @cached_property
    def spec(self) -> ModelSpec:
        """Describes the whole model."""
        return spec_of(vars(self.config), self.vocab_size, config_class=self.config_class)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model: embedding, layers and head."""
        return self.config.num_layers + 2

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.config.share_embeddings_and_output_weights)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def open_model(
    checkpoint: Path,
    device: torch.device,
    *,
    tokenizer_path: str | None = None,
    num_layers_in_first_pipeline_stage: int | None = None,
    num_layers_in_last_pipeline_stage: int | None = None,
    trusted: Sequence[str] = (),
    adapter: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stored: torch.dtype = torch.bfloat16,
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
        adapter: A LoRA adapter that is merged into the weights as they are read; None for none.
        dtype: Data type in which weights are held. Weights that are bfloat16 in the checkpoint stay so, without loss,
            since activations of such a model may exceed float16.
        stored: Data type in which unquantized weights will be stored.

    Raises:
        PtqError: If it does not hold a GPT-like model, or its context names code that is not allowed. As they are read,
            weights that are too large for `stored` are refused as well.
    """
    reader = open_checkpoint(checkpoint, AllowedNames(trusted), adapter)
    parts = [fitting(part, stored) for part in reader.parts]
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
    fields = reader.fields
    if fields is None:
        from nemo_ptq.checkpoint.nemo_model import build_with_nemo  # imports NeMo

        with reader.model_config() as context:
            has_vocab_size = context.config.vocab_size is not None
            model = build_with_nemo(context, device, overrides, dtype, tokenizer_path)
        module, config, tokenizer = model.module, model.config, model.tokenizer
        config_class = f"{type(config).__module__}.{type(config).__qualname__}"
    else:
        has_vocab_size, config_class = fields.fields.get("vocab_size") is not None, fields.config_class
        tokenizer = _tokenizer(reader, fields, tokenizer_path)
        try:
            config = make_config({**fields.fields, **settings_for_calibration(fields.fields, device, dtype, overrides)})
            module = _build(config, fields.model_class)
        except Exception as error:  # Megatron raises any kind of error
            raise PtqError(unbuildable(error)) from error
    module = module.eval().requires_grad_(False)
    return LoadedModel(
        module,
        config,
        config_class,
        tokenizer,
        reader.vocab_size,
        has_vocab_size,
        checkpoint,
        reader.size,
        device,
        parallelism,
        split_into_blocks(module, config.num_layers),
        BlockLoader(parts, device, config.params_dtype, parallelism, config.gated_linear_unit, _row_groups(config)),
    )


def _build(config: Any, model_class: str) -> Any:
    """Builds this rank's part of a model without NeMo."""
    if state_space_of(vars(config)) is None:
        return build_gpt(config, model_class)
    from nemo_ptq.checkpoint.hybrid_model import build_hybrid  # imports Megatron's Mamba

    return build_hybrid(config, config.vocab_size)


def _row_groups(config: Any) -> dict[str, list[int]]:
    """The sizes of groups of rows that are cut for tensor parallelism one by one, by the module within a layer."""
    sizes = state_space_of(vars(config))
    return {} if sizes is None else {module: list(rows.values()) for module, rows in sizes.rows.items()}


def _tokenizer(reader: CheckpointReader, fields: ModelFields, path: str | None) -> Any:
    """The checkpoint's tokenizer, or the one at a path; by NeMo's classes where they alone can load it."""
    if path is None and fields.load_tokenizer is not None:
        return fields.load_tokenizer()
    if path is not None and Path(path).is_dir():
        if problem := tokenizer_problem(Path(path)):
            raise PtqError(problem)
        try:
            # NeMo takes the slow class here, where there is one.
            return Tokenizer(with_nemos_special_tokens(load_pretrained(Path(path), use_fast=False)))
        except Exception as error:  # every tokenizer class raises its own kinds
            raise PtqError(unbuildable(error)) from error
    from nemo_ptq.checkpoint.nemo_model import load_nemo_tokenizer  # imports NeMo

    if path is not None:
        return load_nemo_tokenizer(path)
    with reader.model_config() as context:
        return load_nemo_tokenizer(context.tokenizer)


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
