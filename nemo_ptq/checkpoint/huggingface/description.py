# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Describes a Hugging Face directory as a NeMo model, in a few milliseconds: without torch, transformers or NeMo.

Everything that the import refuses is refused here, so that a plan knows it as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.huggingface.hf_files import read_json
from nemo_ptq.checkpoint.huggingface.quantized import check_unquantized
from nemo_ptq.checkpoint.huggingface.stored_tensors import StoredTensor, check_tensors, stored_tensors, weights_dtype
from nemo_ptq.checkpoint.huggingface.tied_head import check_tied_head
from nemo_ptq.checkpoint.small_files import check_small_files
from nemo_ptq.errors import PtqError
from nemo_ptq.models.hf_settings import shown
from nemo_ptq.models.hugging_face import HuggingFaceClass, Settings
from nemo_ptq.models.registry import class_of_architecture, hugging_face_classes
from nemo_ptq.models.spec import ModelSpec, check_sizes, spec_of

# Files of PEFT's adapters, which a model's directory may have as well.
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class HuggingFaceDescription:
    """A Hugging Face directory whose import is possible.

    Attributes:
        hf_class: The model's class.
        settings: The settings of config.json, with those that it leaves out.
        spec: The imported model.
        nemo_class: Name of NeMo's configuration class.
        common: Those of its arguments that every family has.
        special: Arguments that replace or add to them.
        tensors: The tensors in the files, by name.
        dtype: Name of the weights' data type.
    """

    hf_class: HuggingFaceClass
    settings: Settings
    spec: ModelSpec
    nemo_class: str
    common: dict[str, Any]
    special: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    dtype: str


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
    named = content.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise PtqError(
            f"config.json has architectures {shown(named)}: it must be a list with the name of the model's class, such "
            f'as ["{_likely_architecture(content.get("model_type"))}"]'
        )
    if not isinstance(model_type := content.get("model_type"), str):
        raise PtqError(
            f"config.json has model_type {shown(model_type)}: it must be the name of the model's type, such as "
            '"llama", by which transformers and servers know it'
        )
    hf_class = class_of_architecture(named[0])
    if not _is_type_of(model_type, hf_class):
        raise PtqError(
            f"config.json has model_type {shown(model_type)}, but {named[0]} in architectures is of another type: "
            "transformers goes by the one, and servers by the other; give the file that the model was published with"
        )
    check_unquantized(directory, content)
    return hf_class, hf_class.read(content)


def _is_type_of(model_type: Any, hf_class: HuggingFaceClass) -> bool:
    """Whether this is the `model_type` of a class in config.json."""
    return f"{str(model_type).replace('_', '')}config" == hf_class.config_class.lower()


def _likely_architecture(model_type: Any) -> str:
    """The class of models of a type, or that of most models."""
    found = (name for name, known in hugging_face_classes().items() if _is_type_of(model_type, known))
    return next(found, "LlamaForCausalLM")


def nemo_arguments(hf_class: HuggingFaceClass, settings: Settings) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """As :meth:`~nemo_ptq.models.hugging_face.HuggingFaceClass.nemo_arguments`, with sizes that a model can have.

    Raises:
        PtqError: If NeMo has no such model.
    """
    name, common, special = hf_class.nemo_arguments(settings)
    try:
        check_sizes({**common, **special}, hf_class.fields)
    except PtqError as error:
        raise PtqError(f"config.json: {error}") from error
    return name, common, special


def settings_spec(hf_class: HuggingFaceClass, settings: Settings) -> ModelSpec:
    """Describes the model of a config.json.

    Raises:
        PtqError: If NeMo has no such model.
    """
    return _spec(hf_class, settings, *nemo_arguments(hf_class, settings))


def _spec(
    hf_class: HuggingFaceClass, settings: Settings, name: str, common: dict[str, Any], special: dict[str, Any]
) -> ModelSpec:
    multiple = special.get("make_vocab_size_divisible_by", 1)
    return spec_of(
        {**hf_class.nemo_fixed, **common, **special},
        -(-settings["vocab_size"] // multiple) * multiple,
        model_class=hf_class.nemo_model,
        config_class=f"{hf_class.nemo_module}.{name}",
    )


def _check_merged(directory: Path) -> None:
    """Refuses an adapter in the model's directory: transformers merges it in, and most servers do not."""
    if (directory / _ADAPTER).is_file():
        raise PtqError(
            f"{directory} has a LoRA adapter ({_ADAPTER}) beside the model, and readers differ in whether they merge "
            "it: move its files to another directory and name that by adapter=, or remove them if the weights have it "
            "merged"
        )


def describe(directory: Path) -> HuggingFaceDescription:
    """Describes a Hugging Face directory; plan and import both begin with it.

    Args:
        directory: Has a config.json and weights.

    Raises:
        PtqError: As :func:`read_settings`, and if NeMo has no such model, files are missing or damaged, or the tensors
            are not those of such a model.
    """
    hf_class, settings = read_settings(directory)
    check_small_files(directory)
    _check_merged(directory)
    name, common, special = nemo_arguments(hf_class, settings)
    tensors = stored_tensors(directory)
    spec = _spec(hf_class, settings, name, common, special)
    check_tensors(hf_class, settings, spec, tensors)
    check_tied_head(hf_class, settings, tensors)
    dtype = weights_dtype(settings, tensors[hf_class.embedding])
    return HuggingFaceDescription(hf_class, settings, spec, name, common, special, tensors, dtype)
