# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as Megatron-LM and Megatron-Bridge leave them, written by megatron-core's distributed checkpointing."""

import pickle
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ITERATION = "iter_0000012"
_BASE: Mapping[str, Any] = {
    "num_layers": 2,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 32,
    "seq_length": 64,
    "max_position_embeddings": 256,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.02,
}
_LAYER_NORM = {"normalization": "LayerNorm", "norm_epsilon": 1e-5}
# What somebody who trains these models gives Megatron-LM, by the names of tests/families.py.
ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "llama3": {**_BASE, "swiglu": True, "rotary_base": 500000},
    "qwen2": {**_BASE, "swiglu": True, "add_qkv_bias": True},
    "qwen3": {
        **_BASE,
        **{"swiglu": True, "qk_layernorm": True, "kv_channels": 64, "untie_embeddings_and_output_weights": False},
    },
    "mistral": {**_BASE, "swiglu": True, "window_size": (127, 0)},
    "mixtral": {
        **_BASE,
        **{"swiglu": True, "num_experts": 8, "moe_router_topk": 2, "norm_epsilon": 1e-5, "rotary_base": 1000000},
    },
    "qwen3_moe": {
        **_BASE,
        **{"swiglu": True, "num_experts": 8, "moe_router_topk": 3, "moe_ffn_hidden_size": 256, "qk_layernorm": True},
        "ffn_hidden_size": 768,
    },
    "nemotron": {**_BASE, **_LAYER_NORM, "squared_relu": True, "apply_layernorm_1p": True, "rotary_percent": 0.5},
    "starcoder2": {**_BASE, **_LAYER_NORM, "add_bias_linear": True},
    "starcoder": {
        **_BASE,
        **_LAYER_NORM,
        **{"add_bias_linear": True, "position_embedding_type": "learned_absolute", "num_query_groups": 1},
        **{"hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 4, "kv_channels": 128},
        "untie_embeddings_and_output_weights": False,
    },
    "gpt": {**_BASE, **_LAYER_NORM, "add_bias_linear": True, "rotary_percent": 0.5, "apply_layernorm_1p": True},
}


def training_arguments(**changes: Any) -> Namespace:
    """Arguments of a training job: what every Megatron-LM adds to those of the model."""
    import dataclasses

    import torch
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TransformerConfig)
        if field.default is not dataclasses.MISSING
    }
    for renamed in ("layernorm_epsilon", "layernorm_zero_centered_gamma", "num_moe_experts", "activation_func"):
        del defaults[renamed]
    training = {
        "attention_backend": AttnBackend.auto,
        "bf16": True,
        "data_path": ["/data/corpus"],
        "lr": 1e-4,
        "params_dtype": torch.bfloat16,
        "save": "/checkpoints/run",
        "swiglu": False,
        "tokenizer_model": "/models/tokenizer",
        "tokenizer_type": "HuggingFaceTokenizer",
        "train_iters": 1000,
        "use_distributed_optimizer": True,
    }
    return Namespace(**{**defaults, **training, **changes})


def write_megatron_lm(
    source: Path, root: Path, arguments: Namespace, layout: tuple[int, int] = (1, 1), as_core_019: bool = False
) -> None:
    """Writes what Megatron-LM's training leaves; every rank calls it.

    Args:
        source: NeMo checkpoint of the same model, whose weights it gets.
        root: The directory to make.
        arguments: Of the training.
        layout: Tensor and pipeline parallelism, which make up the world.
        as_core_019: Whether what ranks have in common is an object among the tensors, as from Megatron-Core 0.19 on.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from nemo_ptq.export.sharded_model import InTurn
    from tests import steps

    with steps.loaded(source, *layout) as model:
        directory = root / ITERATION
        if steps.is_first():
            directory.mkdir(parents=True)
        dist.barrier()
        moment = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.zeros(4), replica_id=dist.get_rank()
        )
        common = {"args": arguments, "checkpoint_version": 3.0, "iteration": 12}
        if as_core_019:
            common = {"common_state": ShardedObject("common_state", common, (1,), (0,), dist.get_rank())}
        weights = model.module.sharded_state_dict(prefix="")
        if not arguments.untie_embeddings_and_output_weights:  # NeMo's StarCoder has the embedding twice
            weights.pop("output_layer.weight", None)
        sharded = {"model": weights, "optimizer": {"exp_avg": moment}}
        dist_checkpointing.save({**common, **sharded}, str(directory), InTurn())
        if steps.is_first():
            if as_core_019:
                (directory / "common.pt").unlink()
            (root / "latest_checkpointed_iteration.txt").write_text("12")
        dist.barrier()


def as_bridge(root: Path, output: Path, provider: str, model: Mapping[str, Any], tokenizer: Path) -> Path:
    """Makes what Megatron-Bridge leaves of what Megatron-LM has: its configuration is a YAML file.

    Args:
        root: From :func:`write_megatron_lm`.
        output: The directory to make.
        provider: Megatron-Bridge's class, with its module.
        model: Fields of it.
        tokenizer: Hugging Face directory, of which the tokenizer's files are taken.

    Returns:
        `output`.
    """
    import torch

    iteration = output / "iter_0000000"
    shutil.copytree(root / ITERATION, iteration)
    common = torch.load(iteration / "common.pt", weights_only=False)
    del common["args"]
    torch.save(common, iteration / "common.pt")
    (iteration / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, iteration / "tokenizer" / name)
    config = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": {"_target_": provider, **model},
        "train": {"_target_": "megatron.bridge.training.config.TrainingConfig", "train_iters": 1000},
    }
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"step": torch.tensor(0)}, output / "latest_train_state.pt")
    return output


def called(name: str, *arguments: Any) -> dict[str, Any]:
    """How run_config.yaml describes a function, or with arguments a member of an enumeration."""
    if not arguments:
        return {"_target_": name, "_call_": False}
    return {"_target_": name, "_call_": True, "_args_": list(arguments)}


def change_arguments(iteration: Path, **changes: Any) -> None:
    """Changes the arguments in an iteration's common.pt."""
    import torch

    common = torch.load(iteration / "common.pt", weights_only=False)
    vars(common["args"]).update(changes)
    torch.save(common, iteration / "common.pt", pickle_module=pickle)
