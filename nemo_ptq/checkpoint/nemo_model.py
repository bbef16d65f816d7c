# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers by NeMo's own classes, for what :mod:`~nemo_ptq.checkpoint.gpt` does not know.

That is a class of the user's own, say, or a tokenizer that transformers cannot load. Importing NeMo takes long.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import fiddle as fdl
import torch
from nemo.collections.common.tokenizers.tokenizer_utils import get_tokenizer

from nemo_ptq.checkpoint.gpt import settings_for_calibration, unbuildable
from nemo_ptq.checkpoint.hybrid_model import build_hybrid, hybrid_stack_spec, is_hybrid
from nemo_ptq.checkpoint.layer_spec import LocalAndGlobalRotary, calibration_layer_spec, has_gemma3_attention
from nemo_ptq.errors import PtqError
from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.parallel.megatron import LanguageModule


def build_with_nemo(
    context: fdl.Config,
    device: torch.device,
    overrides: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer_path: str | None = None,
) -> Any:
    """Builds this rank's part of a model without memory for its weights: they are on torch's meta device.

    Args:
        context: Fiddle config of a NeMo model such as ``LlamaModel``, changed in place to suit this machine.
        device: Where the weights will go.
        overrides: Fields of the model's config to set, parallel sizes among them.
        dtype: Data type in which its weights are held.
        tokenizer_path: A tokenizer to use in place of the context's own.

    Returns:
        NeMo's model, whose ``module`` is Megatron's, with its ``config`` and ``tokenizer``.

    Raises:
        PtqError: If NeMo's classes refuse the context's values, or the tokenizer cannot be loaded.
    """
    config = context.config
    # Options come and go with Megatron's versions; one that does not exist needs no turning off.
    known = inspect.signature(fdl.get_callable(config)).parameters
    given = {name: getattr(config, name) for name in ("activation_func",) if hasattr(config, name)}
    settings = settings_for_calibration(given, device, dtype, overrides)
    settings |= {"transformer_layer_spec": calibration_layer_spec, "mamba_stack_spec": hybrid_stack_spec}
    for name, value in settings.items():
        if name in known:
            setattr(config, name, value)
    context.optim = None
    if tokenizer_path is not None:
        context.tokenizer = fdl.Config(get_tokenizer, tokenizer_path)
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
                rotary = model.module.rotary_pos_emb
                model.module.rotary_pos_emb = LocalAndGlobalRotary(rotary.rope_local, rotary)
    except Exception as error:  # configurations and tokenizers raise any kind of error
        raise PtqError(unbuildable(error)) from error
    return model


def load_nemo_tokenizer(tokenizer: Any) -> Any:
    """Builds a tokenizer of NeMo's.

    Args:
        tokenizer: Fiddle config of it, or an argument of :func:`get_tokenizer`.

    Raises:
        PtqError: If it cannot be loaded.
    """
    try:
        return fdl.build(fdl.Config(get_tokenizer, tokenizer) if isinstance(tokenizer, str) else tokenizer)
    except Exception as error:
        raise PtqError(unbuildable(error)) from error
