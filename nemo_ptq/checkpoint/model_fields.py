# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The fields of NeMo's configuration, from which :mod:`~nemo_ptq.checkpoint.gpt` builds a model, without NeMo."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from nemo_ptq.checkpoint.allowed_names import AllowedNames, Name, is_activation, is_dtype, is_enum_member
from nemo_ptq.checkpoint.context_graph import Call, is_of_training
from nemo_ptq.checkpoint.gpt import ACTIVATION_FUNCTIONS, HYBRID_CLASS, MODEL_CLASSES, squared_relu
from nemo_ptq.checkpoint.metadata import read_model_yaml
from nemo_ptq.checkpoint.settings import Context
from nemo_ptq.checkpoint.tokenizers import Tokenizer
from nemo_ptq.models.spec import NEMOTRON_H_ACTIVATION

_MODULES = frozenset(name.rpartition(".")[0] for name in MODEL_CLASSES)
# A class in one of those modules whose model is another.
_OTHER_CONFIGS = "Llama4"
# Parts of a model that only NeMo's classes can add.
_UNKNOWN_PARTS = ("multi_latent_attention", "mtp_num_layers")
# Entries of model.yaml beside the fields.
_NOT_FIELDS = ("_target_", "model_class", "tokenizer", "generation_config")


@dataclass(frozen=True)
class ModelFields:
    """A model before it is built.

    Attributes:
        model_class: NeMo's class of it, with its module.
        config_class: NeMo's class of its configuration, with its module.
        fields: The configuration's fields; functions and data types are themselves.
        load_tokenizer: Loads the tokenizer; None where only NeMo can.
    """

    model_class: str
    config_class: str
    fields: Mapping[str, Any]
    load_tokenizer: Callable[[], Tokenizer] | None


class _NotKnown(Exception):
    """A value is one that only NeMo's classes understand."""


def fields_in_context(checkpoint: Path, model: Call, allowed: AllowedNames) -> ModelFields | None:
    """Reads a model's fields from the context of a NeMo 2.0 checkpoint.

    Args:
        checkpoint: Directory with ``context/``.
        model: The content of its io.json, which takes precedence; other fields are as in model.yaml, where NeMo writes
            the defaults of its classes as well.
        allowed: The names that io.json may use; names that the user has added are unknown here.

    Returns:
        None for a model that only NeMo's own classes can build.

    Raises:
        PtqError: If model.yaml, or a file that the context names, cannot be read.
    """
    config = model.arguments["config"]
    model_class, config_class = str(model.function), str(config.function)
    named = (model.function, config.function)
    if model_class not in MODEL_CLASSES or config.function.module not in _MODULES:
        return None
    if config.function.name.startswith(_OTHER_CONFIGS) or any(map(allowed.is_trusted, named)):
        return None
    try:
        fields = _defaults(read_model_yaml(checkpoint)) | {
            name: _resolved(value, allowed) for name, value in config.arguments.items() if name != "generation_config"
        }
    except _NotKnown:
        return None
    if any(fields.get(name) for name in _UNKNOWN_PARTS):
        return None
    if model_class == HYBRID_CLASS and fields.get("hybrid_override_pattern") is None:
        return None
    settings = SimpleNamespace(generation_config=_as_yaml(config.arguments.get("generation_config")))
    tokenizer = _as_yaml(model.arguments.get("tokenizer")) or {}
    context = Context(checkpoint / "context", settings, config.function.name, tokenizer)
    if not context.generation_is_known:
        return None
    fields["generation_config"] = context.load_generation_config()
    return ModelFields(
        model_class,
        config_class,
        fields,
        (lambda: Tokenizer(context.load_tokenizer())) if context.tokenizer_is_known else None,
    )


def _defaults(described: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a model.yaml except functions and objects, of which a built model needs only the activation.

    Raises:
        _NotKnown: If the activation is unknown.
    """
    fields = {
        name: value
        for name, value in described.items()
        if name not in _NOT_FIELDS and not is_of_training(name) and not isinstance(value, dict)
    }
    activation = described.get("activation_func")
    if isinstance(activation, dict):
        module, _, name = str(activation.get("_target_")).rpartition(".")
        named = f"{module}.{name}".endswith(NEMOTRON_H_ACTIVATION)
        fields["activation_func"] = squared_relu if named else _function(Name(module, name))
    return fields


def _resolved(value: Any, allowed: AllowedNames) -> Any:
    """A value of io.json's with what it names in it: activations, data types and members of enumerations.

    Raises:
        _NotKnown: If it names something else.
    """
    if isinstance(value, list | tuple):
        return type(value)(_resolved(item, allowed) for item in value)
    if isinstance(value, dict):
        return {key: _resolved(item, allowed) for key, item in value.items()}
    if isinstance(value, Call):
        raise _NotKnown
    if not isinstance(value, Name):
        return value
    if is_dtype(value):
        return getattr(torch, value.name)
    if is_enum_member(value) and not allowed.is_trusted(value):
        return _member(value)
    return _function(value)


def _member(name: Name) -> Any:
    member: Any = import_module(name.module)
    for part in name.name.split("."):
        member = getattr(member, part, None)
    if not isinstance(member, enum.Enum):
        raise _NotKnown
    return member


def _function(name: Name) -> Any:
    if not is_activation(name):
        raise _NotKnown
    known = ACTIVATION_FUNCTIONS.get(name.name)
    if known is None and not name.module.startswith("torch"):
        raise _NotKnown
    return known or getattr(F, name.name)


def _as_yaml(value: Any) -> Any:
    """A value of io.json's as model.yaml has it."""
    if isinstance(value, Call):
        return {"_target_": str(value.function), **{name: _as_yaml(item) for name, item in value.arguments.items()}}
    return {"_target_": str(value)} if isinstance(value, Name) else value
