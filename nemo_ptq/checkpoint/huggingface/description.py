# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the config.json of a Hugging Face directory says, in a few milliseconds: without torch, transformers or NeMo."""

from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.huggingface.hf_files import read_json, weight_files
from nemo_ptq.errors import PtqError
from nemo_ptq.models.hugging_face import HuggingFaceClass, Settings
from nemo_ptq.models.registry import class_of_architecture
from nemo_ptq.models.spec import ModelSpec, check_sizes, spec_of

# Sizes that arithmetic is done with, and the field of NeMo's configuration that has the same limits.
_SIZES = {
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "num_moe_experts": "num_local_experts",
}


def read_settings(directory: Path) -> tuple[HuggingFaceClass, Settings]:
    """Reads config.json.

    Args:
        directory: A Hugging Face directory.

    Returns:
        The model's class and its settings, those that the file leaves out included.

    Raises:
        PtqError: If there is no such file, it names no class that is known, the model is quantized already, or NeMo
            cannot have such a model.
    """
    content = read_json(directory / "config.json")
    if "quantization_config" in content:
        raise PtqError(
            f"{directory} is quantized already (config.json has a quantization_config): give the model as it was "
            "before quantization"
        )
    named = content.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "(none given)"
    hf_class = class_of_architecture(architecture)
    return hf_class, hf_class.read(content)


def nemo_arguments(directory: Path, hf_class: HuggingFaceClass, settings: Settings) -> tuple[str, dict[str, Any], Any]:
    """As :meth:`~nemo_ptq.models.hugging_face.HuggingFaceClass.nemo_arguments`, with errors that name the file."""
    file = directory / "config.json"
    own = {ours: settings.get(theirs) for ours, theirs in _SIZES.items()}
    if settings.get("vocab_size") is None:
        raise PtqError(f"{file} has no vocab_size: give the file that the model was published with")
    try:
        check_sizes({name: size for name, size in own.items() if size is not None}, _SIZES)
        name, common, special = hf_class.nemo_arguments(settings)
        check_sizes({**common, **special}, hf_class.fields)
    except PtqError as error:
        raise PtqError(f"{file}: {error}") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError, LookupError) as error:
        raise PtqError(f"{file} has a setting that is no size: {error}") from error
    return name, common, special


def describe(directory: Path) -> ModelSpec:
    """Describes the model that the import of a Hugging Face directory is.

    Args:
        directory: Its config.json names the architecture, and its weights are there.

    Raises:
        PtqError: As :func:`read_settings`, or if files with weights are missing.
    """
    hf_class, settings = read_settings(directory)
    weight_files(directory)
    name, common, special = nemo_arguments(directory, hf_class, settings)
    multiple = special.get("make_vocab_size_divisible_by", 1)
    return spec_of(
        {**hf_class.nemo_fixed, **common, **special},
        -(-settings["vocab_size"] // multiple) * multiple,
        model_class=hf_class.nemo_model,
        config_class=f"{hf_class.nemo_module}.{name}",
    )
