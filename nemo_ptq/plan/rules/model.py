# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The model: a family that can be exported, and layers that the readers of the files know."""

from collections.abc import Sequence

from nemo_ptq.errors import PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.registry import Family, unknown_to_class, unknown_to_reader
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.rules.gathering import family_of_model


def family_is_supported(model: ModelSpec, decoder_type: str | None) -> str | None:
    """The model's family has a decoder type, or the user gave one."""
    try:
        family_of_model(model, decoder_type)
    except PtqError as error:
        return str(error)
    return None


def norm_fits_decoder(model: ModelSpec, decoder: str, formats: Sequence[str]) -> str | None:
    """TensorRT-LLM's decoder "gpt" has LayerNorm, the others RMSNorm."""
    expected = "LayerNorm" if decoder == "gpt" else "RMSNorm"
    if _has_decoder(formats) and model.normalization != expected:
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
