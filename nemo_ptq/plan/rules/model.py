# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The model: a family that can be exported, and layers that the readers of the files know."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.adapters.adapter import check_adapter
from nemo_ptq.checkpoint.metadata import is_hugging_face
from nemo_ptq.config import CUSTOM, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.registry import Family, unknown_to_class, unknown_to_reader
from nemo_ptq.models.spec import WITHOUT_LONG_ROPE, ModelSpec
from nemo_ptq.plan.rules.gathering import family_of_model

_WITHOUT_STATE_SPACES: Mapping[str, str] = {
    "trtllm": "TensorRT-LLM's readers of it have no state spaces",
    "nemo": "ModelOpt's quantizers are not put into state spaces here",
}

_WITHOUT_LONG_ROPE: Mapping[str, str] = {
    "trtllm": "the files of its decoder llama have no place for the factors",
    "nemo": WITHOUT_LONG_ROPE,
}


def family_is_supported(model: ModelSpec, decoder_type: str | None) -> str | None:
    """The model's family has a decoder type, or export_config.decoder_type gives one."""
    try:
        family_of_model(model, decoder_type)
    except PtqError as error:
        return str(error)
    return None


def adapter_fits(checkpoint: Any, model: ModelSpec, adapter: Any) -> str | None:
    """The adapter, if there is one, is a LoRA for this model."""
    if adapter is None:
        return None
    path = Path(checkpoint).expanduser()
    try:
        check_adapter(Path(adapter).expanduser(), path, model, is_hugging_face(path))
    except PtqError as error:
        return str(error)
    return None


def state_spaces_have_a_format(model: ModelSpec, family: Family, formats: Sequence[str]) -> str | None:
    """Layers with a state space go into Hugging Face directories: nothing else that reads them is known."""
    if model.state_space is None:
        return None
    return _only_hugging_face(family.name, formats, _WITHOUT_STATE_SPACES, "it has no place for state spaces")


def state_spaces_are_calibrated_here(
    model: ModelSpec, algorithm: str | None, forward_loop: Any, calibration_state: Any = None
) -> str | None:
    """ModelOpt's own loops and configurations know Megatron's GPT alone."""
    is_custom = QuantizationConfig(algorithm).algorithm_name == CUSTOM
    if model.state_space is None or not (is_custom or forward_loop is not None) or calibration_state is not None:
        return None
    option = "forward_loop" if forward_loop is not None else f"quantization_config.algorithm={algorithm}"
    return f"{option} is not for models with state spaces: use an algorithm by its name, without a forward_loop"


def long_rope_has_a_format(model: ModelSpec, formats: Sequence[str]) -> str | None:
    """Rotary embeddings that are stretched by longrope go into Hugging Face directories."""
    if model.long_rope is None:
        return None
    return _only_hugging_face("models with longrope", formats, _WITHOUT_LONG_ROPE, "it has no place for the factors")


def _only_hugging_face(models: str, formats: Sequence[str], reasons: Mapping[str, str], otherwise: str) -> str | None:
    for name in formats:
        if not FORMATS[name].is_hugging_face:
            return (
                f"export_config.export_format={name} is not for {models}: {reasons.get(name, otherwise)}; use "
                "export_format=hf or compressed_tensors"
            )
    return None


def norm_fits_decoder(model: ModelSpec, decoder: str, formats: Sequence[str]) -> str | None:
    """TensorRT-LLM's decoder "gpt" has LayerNorm, the others RMSNorm."""
    expected = "LayerNorm" if decoder == "gpt" else "RMSNorm"
    if _has_decoder(formats) and model.state_space is None and model.normalization != expected:
        return (
            f"the model has {model.normalization} and TensorRT-LLM's decoder {decoder} only {expected}: "
            "set export_config.decoder_type to one that fits the model"
        )
    return None


def reader_knows_layers(model: ModelSpec, decoder: str, formats: Sequence[str]) -> str | None:
    """TensorRT-LLM's readers compute everything that the model does: no norms of queries and keys, no odd biases."""
    if not _has_decoder(formats):
        return None
    return unknown_to_reader(decoder, model)


def class_knows_layers(model: ModelSpec, family: Family, formats: Sequence[str]) -> str | None:
    """Hugging Face's class of the family computes everything that the model does."""
    if family.hugging_face is None or not any(FORMATS[name].is_hugging_face for name in formats):
        return None
    return unknown_to_class(family.hugging_face, model)


def _has_decoder(formats: Sequence[str]) -> bool:
    """Whether a format's readers build the model from TensorRT-LLM's decoder type."""
    return any(FORMATS[name].is_tensorrt_llm for name in formats)
