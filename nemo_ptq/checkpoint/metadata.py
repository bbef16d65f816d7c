# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about itself, without torch or NeMo, and without running its code."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_ptq.checkpoint.huggingface.description import describe
from nemo_ptq.checkpoint.index import read_index
from nemo_ptq.errors import ConfigError, PtqError

EMBEDDING = "module.embedding.word_embeddings.weight"
_CONTEXT_FILES = ("context/io.json", "context/model.yaml")
_WEIGHTS_FILES = ("weights/.metadata", "weights/common.pt", "weights/metadata.json")
_FILES = _CONTEXT_FILES + _WEIGHTS_FILES
# A message names this many files and counts the others.
_NAMES_SHOWN = 6


@dataclass(frozen=True)
class CheckpointMetadata:
    """The model that a checkpoint holds.

    Attributes:
        model_class: NeMo's model class, e.g. "nemo.collections.llm.gpt.model.llama.LlamaModel".
        config_class: NeMo's config class, e.g. "nemo.collections.llm.gpt.model.llama.Llama31Config8B".
        num_layers: Transformer layers.
        hidden_size: Features between layers.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads.
        head_size: Features of one head; not always hidden_size / num_attention_heads.
        ffn_hidden_size: Features inside the MLP, of one expert where there are experts.
        gated_mlp: Whether the MLP multiplies its activation with a gate, so that fc1 has twice the rows.
        vocab_size: Rows of the embedding as stored, padding included.
        num_experts: Experts in a layer; None without mixture of experts.
        seq_length: Positions that the model was made for.
        position_embedding_type: "rope" or "learned_absolute".
        normalization: "RMSNorm" or "LayerNorm".
        tied_embeddings: Whether the output layer is the embedding.
        linear_bias: Whether every linear layer has a bias.
        qkv_bias: Whether the query-key-value projection has one.
        qk_norm: Whether queries and keys are normalised.
        experts_per_token: Experts that each token goes through; 0 without mixture of experts.
        is_quantized: Whether the checkpoint holds ModelOpt's quantizers and their ranges.
    """

    model_class: str
    config_class: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_size: int
    ffn_hidden_size: int
    gated_mlp: bool
    vocab_size: int
    num_experts: int | None
    seq_length: int
    position_embedding_type: str
    normalization: str
    tied_embeddings: bool
    linear_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts_per_token: int = 0
    is_quantized: bool = False


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """Reads what a checkpoint's files say about its model, and checks that all of its files are there.

    Args:
        checkpoint: Directory with `context/` and `weights/`, or a Hugging Face directory.

    Raises:
        ConfigError: If it is neither, or files are missing or damaged.
    """
    try:
        if is_hugging_face(checkpoint):
            return CheckpointMetadata(**describe(checkpoint))
        _check_files(checkpoint)
    except OSError as error:
        raise ConfigError([f"nemo_checkpoint={checkpoint} cannot be read: {error.strerror}"]) from error
    except PtqError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"nemo_checkpoint: {error}"]) from error
    weights = read_index(checkpoint)
    _check_shards(checkpoint, weights.storage_data.values())
    return _describe(checkpoint, read_model_yaml(checkpoint), weights.state_dict_metadata)


def _check_files(checkpoint: Path) -> None:
    name = f"nemo_checkpoint={checkpoint}"
    if not checkpoint.exists():
        raise ConfigError([f"{name} does not exist: give the directory that holds context/ and weights/"])
    if checkpoint.suffix == ".nemo" or (checkpoint / "model_config.yaml").is_file():
        raise ConfigError(
            [
                f"{name} is a NeMo 1 checkpoint, not a NeMo 2.0 one: convert it with NeMo, or import the model's "
                "Hugging Face directory with `nemo-ptq import-hf SRC OUT`"
            ]
        )
    if not checkpoint.is_dir():
        raise ConfigError([f"{name} is a file: give the directory that holds context/ and weights/"])
    if checkpoint.name in ("context", "weights") and _is_complete(checkpoint.parent):
        raise ConfigError([f"{name} is one half of a checkpoint: give {checkpoint.parent}"])
    if not (checkpoint / "context").is_dir() and not (checkpoint / "weights").is_dir():
        raise ConfigError(
            [
                f"{name} is not a NeMo 2.0 checkpoint: context/ and weights/ are missing; "
                f"found {_listed(sorted(path.name for path in checkpoint.iterdir()))}"
            ]
        )
    missing = [file for file in _FILES if not (checkpoint / file).is_file()]
    if missing:
        found = [file for file in _FILES if file not in missing]
        raise ConfigError(
            [f"{name} is incomplete: {_listed(missing)} missing; found {_listed(found)}; copy or save it again"]
        )


def is_hugging_face(directory: Path) -> bool:
    """Whether a directory is a model as Hugging Face's libraries save it."""
    try:
        return "model_type" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _is_complete(checkpoint: Path) -> bool:
    return all((checkpoint / file).is_file() for file in _FILES)


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _check_shards(checkpoint: Path, parts: Iterable[Any]) -> None:
    needed: dict[str, int] = {}
    for part in parts:
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    sizes = {path.name: path.stat().st_size for path in (checkpoint / "weights").iterdir()}
    missing = sorted(needed.keys() - sizes.keys())
    short = sorted(name for name, size in needed.items() if sizes.get(name, size) < size)
    problems = []
    if missing:
        found = f"{len(needed) - len(missing)} of {len(needed)} shards"
        problems.append(f"nemo_checkpoint={checkpoint} is incomplete: weights/ lacks {_listed(missing)}; found {found}")
    if short:
        problems.append(f"nemo_checkpoint={checkpoint} is damaged: {_listed(short)} cut short; copy it again")
    if problems:
        raise ConfigError(problems)


def read_model_yaml(checkpoint: Path) -> dict[str, Any]:
    """Reads `context/model.yaml`: the config's fields, with "model_class" and "tokenizer" beside them.

    Raises:
        ConfigError: If it does not describe a model.
    """
    file = checkpoint / "context" / "model.yaml"
    try:
        model = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return {**model["config"], "model_class": model["_target_"], "tokenizer": model.get("tokenizer")}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [f"{file} does not describe a model ({reason}): copy or save the checkpoint again"]
        ) from error


def _describe(checkpoint: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> CheckpointMetadata:
    if EMBEDDING not in tensors:
        raise ConfigError(
            [
                f"nemo_checkpoint={checkpoint} holds no {EMBEDDING}: only whole GPT-like models can be quantized "
                "(merge LoRA adapters first)"
            ]
        )
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return CheckpointMetadata(
            model_class=config["model_class"],
            config_class=config["_target_"],
            num_layers=config["num_layers"],
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=config.get("num_query_groups") or heads,
            head_size=config.get("kv_channels") or hidden // heads,
            ffn_hidden_size=config.get("moe_ffn_hidden_size") or config.get("ffn_hidden_size") or 4 * hidden,
            gated_mlp=config.get("gated_linear_unit", False),
            vocab_size=tensors[EMBEDDING].size[0],
            num_experts=config.get("num_moe_experts"),
            seq_length=config["seq_length"],
            position_embedding_type=config["position_embedding_type"],
            normalization=config["normalization"],
            tied_embeddings=config["share_embeddings_and_output_weights"],
            linear_bias=bool(config.get("add_bias_linear")),
            qkv_bias=bool(config.get("add_bias_linear") or config.get("add_qkv_bias")),
            qk_norm=bool(config.get("qk_layernorm")),
            experts_per_token=config.get("moe_router_topk", 0) if config.get("num_moe_experts") else 0,
            is_quantized=any("weight_quantizer." in name for name in tensors),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(
            [f"{checkpoint / 'context' / 'model.yaml'} is not of a GPT-like model: {error} is missing"]
        ) from error
