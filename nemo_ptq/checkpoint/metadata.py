# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's description of itself, without torch or NeMo, and without running its code."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint import context_graph
from nemo_ptq.checkpoint.adapters.adapter import way_out
from nemo_ptq.checkpoint.allowed_names import AllowedNames
from nemo_ptq.checkpoint.huggingface.description import describe
from nemo_ptq.checkpoint.index import read_index
from nemo_ptq.checkpoint.known_tensors import check_tensors
from nemo_ptq.checkpoint.megatron.description import describe_megatron
from nemo_ptq.checkpoint.megatron.directories import is_megatron
from nemo_ptq.checkpoint.shards import check_shards, listed
from nemo_ptq.checkpoint.small_files import check_small_files
from nemo_ptq.console.quiet import quiet_imports
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.models.spec import SIZES, ModelSpec, check_numbers, spec_of
from nemo_ptq.untrusted import FileError, read_json, read_json_object, read_yaml

EMBEDDING = "module.embedding.word_embeddings.weight"
_DESCRIPTION = "context/model.yaml"
_CONTEXT_FILES = ("context/io.json", _DESCRIPTION)
_WEIGHTS_FILES = ("weights/.metadata", "weights/common.pt", "weights/metadata.json")
_FILES = _CONTEXT_FILES + _WEIGHTS_FILES
_WANTED = (
    "a NeMo 2.0 checkpoint (context/ and weights/), a Hugging Face model (config.json and weights) or a checkpoint of "
    "Megatron's (iter_XXXXXXX/)"
)
# Characters of a value that a message shows.
_SHOWN = 40
_MOST_LOOKED_AT = 100


def read_metadata(checkpoint: Path) -> ModelSpec:
    """Reads the model's description from a checkpoint's files, and checks that all of its files are there.

    Args:
        checkpoint: Directory with `context/` and `weights/`, a Hugging Face directory, or a checkpoint of Megatron-LM
            or Megatron-Bridge.

    Raises:
        ConfigError: If it is none of them, or files are missing or damaged.
    """
    try:
        if is_hugging_face(checkpoint):
            return describe(checkpoint).spec
        if is_megatron(checkpoint):
            return describe_megatron(checkpoint).chosen.spec
        if instead := way_out(checkpoint):
            raise ConfigError([instead])
        _check_files(checkpoint)
    except OSError as error:
        raise ConfigError([f"nemo_checkpoint={checkpoint} cannot be read: {error.strerror}"]) from error
    except PtqError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"nemo_checkpoint: {error}"]) from error
    weights = read_index(checkpoint)
    check_shards(checkpoint, weights.storage_data.values())
    return _describe(checkpoint, read_model_yaml(checkpoint), weights.state_dict_metadata)


def _download(checkpoint: Path) -> str:
    """How to get a model whose name on the hub was given in place of a directory."""
    is_name = len(checkpoint.parts) == 2 and not checkpoint.is_absolute() and not checkpoint.parts[0].startswith(".")
    return f"; `hf download {checkpoint} --local-dir DIR` gets one of that name from the hub" if is_name else ""


def _check_files(checkpoint: Path) -> None:
    name = f"nemo_checkpoint={checkpoint}"
    if not checkpoint.exists():
        raise ConfigError([f"{name} does not exist: give the directory of {_WANTED}{_download(checkpoint)}"])
    if checkpoint.suffix == ".nemo" or (checkpoint / "model_config.yaml").is_file():
        raise ConfigError(
            [
                f"{name} is a NeMo 1 checkpoint, not a NeMo 2.0 one: convert it with NeMo, or import the model's "
                "Hugging Face directory with `nemo-ptq import-hf SRC OUT`"
            ]
        )
    if not checkpoint.is_dir():
        raise ConfigError([f"{name} is a file: give the directory of {_WANTED}"])
    if checkpoint.name in ("context", "weights") and _is_complete(checkpoint.parent):
        raise ConfigError([f"{name} is one half of a checkpoint: give {checkpoint.parent}"])
    if not (checkpoint / "context").is_dir() and not (checkpoint / "weights").is_dir():
        if os.path.lexists(checkpoint / "config.json") and "model_type" not in read_json_object(
            checkpoint / "config.json"
        ):
            raise ConfigError([f"{name}: config.json names no model_type, as that of a Hugging Face model does"])
        raise ConfigError(
            [
                f"{name} is not the directory of {_WANTED}; "
                f"found {listed(sorted(path.name for path in checkpoint.iterdir()))}: {_what_to_give(checkpoint)}"
            ]
        )
    strange = [
        path.relative_to(checkpoint).as_posix()
        for path in (checkpoint / "context").rglob("*")
        if not path.is_file() and not path.is_dir()
    ]
    if strange:  # a pipe, or a link to a device or to nothing; what is in the context is copied into the export
        raise ConfigError([f"{name} is damaged: {listed(sorted(strange))} is neither file nor directory: remove it"])
    for directory, _, _ in os.walk(checkpoint / "context"):
        check_small_files(Path(directory))
    missing = [file for file in _FILES if not (checkpoint / file).is_file()]
    if missing == [_DESCRIPTION]:
        return  # NeMo's classes give its content
    if missing:
        found = [file for file in _FILES if file not in missing]
        raise ConfigError(
            [f"{name} is incomplete: {listed(missing)} missing; found {listed(found)}; copy or save it again"]
        )


def _what_to_give(directory: Path) -> str:
    """The directory that may be meant inside one that is no checkpoint: the hub's cache has models in snapshots/."""
    inside = [path for pattern in ("*/", "snapshots/*/") for path in sorted(directory.glob(pattern))[:_MOST_LOOKED_AT]]
    found = next((path for path in inside if is_hugging_face(path) or is_megatron(path) or _is_complete(path)), None)
    return "give the directory of a checkpoint" if found is None else f"give {found}"


def is_hugging_face(directory: Path) -> bool:
    """Whether a directory is a model as Hugging Face's libraries save it."""
    try:
        content = read_json(directory / "config.json", finite=False)
    except FileError:
        return False
    return isinstance(content, dict) and "model_type" in content


def is_nemo(directory: Path) -> bool:
    """Whether a directory is none of the other kinds of checkpoint, so that it must be a NeMo 2.0 checkpoint."""
    return not is_hugging_face(directory) and not is_megatron(directory)


def _is_complete(checkpoint: Path) -> bool:
    return all((checkpoint / file).is_file() for file in _FILES if file != _DESCRIPTION)


def read_model_yaml(checkpoint: Path) -> dict[str, Any]:
    """Reads `context/model.yaml`: the config's fields, with "model_class" and "tokenizer" beside them.

    Raises:
        ConfigError: If it does not describe a model.
    """
    file = checkpoint / "context" / "model.yaml"
    try:
        model = described_model(checkpoint)
        tokenizer = model.get("tokenizer")
        if not isinstance(tokenizer, dict | None):
            raise TypeError(f"tokenizer is {str(tokenizer)[:_SHOWN]!r}")
        return {**model["config"], "model_class": str(model["_target_"]), "tokenizer": with_plain_names(tokenizer)}
    except (FileError, KeyError, TypeError, AttributeError) as error:
        reason = error.reason if isinstance(error, FileError) else str(error).partition("\n")[0]
        raise ConfigError(
            [f"{file} does not describe a model ({reason}): copy or save the checkpoint again"]
        ) from error
    except PtqError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            [f"{file} is missing, and NeMo's classes do not tell what it would hold ({reason}): save it with NeMo"]
        ) from error


def with_plain_names(tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the settings of a tokenizer with its name as text: NeMo wraps one that was no path as it saved it."""
    if tokenizer is None:
        return None
    return {
        name: value["attr"] if isinstance(value, dict) and isinstance(value.get("attr"), str) else value
        for name, value in tokenizer.items()
    }


def described_model(checkpoint: Path) -> Any:
    """Reads `context/model.yaml` unchanged; where it is missing, makes its content from `context/io.json`.

    That imports NeMo, whose classes know the defaults that io.json leaves out.

    Raises:
        PtqError: If neither describes a model, or io.json names what is not NeMo's.
    """
    context = checkpoint / "context"
    if (context / "model.yaml").exists() or not (context / "io.json").is_file():
        return read_yaml(context / "model.yaml")
    status = (context / "io.json").stat()
    return _made_by_nemo(context, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _made_by_nemo(context: Path, *_: int) -> dict[str, Any]:
    with quiet_imports():
        from nemo_ptq.checkpoint.context_build import description

        allowed = AllowedNames()  # what stands for the file is not a matter of trust
        return description(context_graph.read_model(context, allowed), context, allowed)


def read_model(checkpoint: Path, allowed: AllowedNames) -> context_graph.Call:
    """Reads how a NeMo 2.0 checkpoint's model is built; see :func:`nemo_ptq.checkpoint.context_graph.read_model`.

    Raises:
        ConfigError: If `context/io.json` cannot be read, names what is not allowed, or describes another model than
            `context/model.yaml`, by which a job is planned.
    """
    model = context_graph.read_model(checkpoint / "context", allowed)
    described, config = read_model_yaml(checkpoint), model.arguments["config"].arguments
    problems = [
        f"{checkpoint / 'context'}: {name} is {described[name]!r} in model.yaml and {config[name]!r} in io.json: copy "
        "or save the checkpoint again"
        for name in SIZES
        if name in config and name in described
        # A size that is another number, or none at all, such as 4.0.
        if (type(described[name]), described[name]) != (type(config[name]), config[name])
    ]
    if problems:
        raise ConfigError(problems)
    return model


def _describe(checkpoint: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelSpec:
    if EMBEDDING not in tensors:
        raise ConfigError(
            [
                f"nemo_checkpoint={checkpoint} holds no {EMBEDDING}: only whole GPT-like models can be quantized "
                "(merge LoRA adapters first)"
            ]
        )
    try:
        model = spec_of(
            config,
            tensors[EMBEDDING].size[0],
            model_class=config["model_class"],
            config_class=config["_target_"],
            is_quantized=any("weight_quantizer." in name for name in tensors),
        )
    except KeyError as error:
        raise ConfigError(
            [f"{checkpoint / 'context' / 'model.yaml'} is not of a GPT-like model: {error} is missing"]
        ) from error
    except (PtqError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError([f"{checkpoint / 'context' / 'model.yaml'}: {error}"]) from error
    try:
        check_numbers(model)
        check_tensors(
            model, {name: str(entry.properties.state[0]) for name, entry in tensors.items() if hasattr(entry, "size")}
        )
    except PtqError as error:
        raise ConfigError([f"nemo_checkpoint={checkpoint}: {error}"]) from error
    return model
