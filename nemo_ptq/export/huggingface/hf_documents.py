# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The documents of a Hugging Face directory beside its tensors: configuration, index, tokenizer."""

import json
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.huggingface.hf_weights import load_generation_config
from nemo_ptq.checkpoint.huggingface.published import published_config
from nemo_ptq.checkpoint.metadata import is_hugging_face
from nemo_ptq.checkpoint.tokenizers import transformers_tokenizer
from nemo_ptq.errors import PtqError
from nemo_ptq.export.huggingface.hf_layout import HuggingFaceLayout
from nemo_ptq.export.source import Source
from nemo_ptq.models.hugging_face import HuggingFaceClass
from nemo_ptq.models.registry import Family, unknown_to_class
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.pretrained import import_transformers


def hugging_face_class(family: Family) -> HuggingFaceClass:
    """Returns Hugging Face's class of a family.

    Raises:
        PtqError: If there is none.
    """
    if family.hugging_face is None:
        raise PtqError(f"{family.without_hugging_face}: use export_config.export_format=trtllm")
    return family.hugging_face


def check_exportable(shape: ModelSpec, family: Family, tokenizer: Any) -> None:
    """Refuses a model that its Hugging Face class would compute something else from, and a tokenizer it cannot hold.

    Raises:
        PtqError: If the model differs from its class, or the tokenizer is not one of transformers'.
    """
    if problem := unknown_to_class(hugging_face_class(family), shape):
        raise PtqError(problem)
    transformers_tokenizer(tokenizer)


def stored_vocab_size(source: Source) -> int:
    """Number of rows of the embedding that a directory holds.

    Where the checkpoint's configuration names a size, its rows are the vocabulary; otherwise NeMo has padded the
    tokenizer's vocabulary, and a server that knew of the padding might choose a token from it.
    """
    if source.has_vocab_size:
        return source.shape.vocab_size
    return min(source.shape.vocab_size, len(source.tokenizer.tokenizer))


# Settings of the source that are about its directory, which is not this one.
_OF_THE_SOURCE = ("_name_or_path", "auto_map", "compression_config", "quantization_config")
_ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_config(source: Source, hf_class: HuggingFaceClass) -> dict[str, Any]:
    """Returns config.json, but for what it says about quantization.

    It is the one that the model was published with, where that is known, and otherwise what NeMo's configuration says.
    What the tensors decide is as they are here.
    """
    published = published_config(source.checkpoint, hf_class, source.config)
    if published is None:
        return {**_nemo_config(source, hf_class), **hf_class.written}
    settings = hf_class.read(published)
    config = {name: value for name, value in published.items() if name not in _OF_THE_SOURCE and _is_json(value)}
    if "rope_parameters" in config:  # transformers 4 reads the older names alone
        config |= {name: settings[name] for name in (*_ROTARY, "original_max_position_embeddings") if name in settings}
    for common, own in hf_class.aliases.items():
        if config.pop(common, None) is not None:
            config[own] = settings[own]
    if bool(settings["tie_word_embeddings"]) != source.shape.tied_embeddings:
        config["tie_word_embeddings"] = source.shape.tied_embeddings
    if "attention_head_dim" in config:  # an older name, that transformers 5 does not read
        config["head_dim"] = source.shape.head_size
    dtypes = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return {
        **config,
        **hf_class.written,
        **dict.fromkeys(dtypes, source.settings.torch_dtype_name),
        "vocab_size": stored_vocab_size(source),
    }


def _is_json(value: Any) -> bool:
    """Whether a setting can be written as JSON; infinite limits, the classes' default, cannot."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _nemo_config(source: Source, hf_class: HuggingFaceClass) -> dict[str, Any]:
    transformers = import_transformers()
    nemo, shape = source.config, source.shape
    settings = {
        **{theirs: getattr(nemo, ours) for ours, theirs in hf_class.fields.items()},
        **{name: allowed[0] for name, allowed in hf_class.fixed.items()},
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_size,
        "tie_word_embeddings": shape.tied_embeddings,
        "vocab_size": stored_vocab_size(source),
        **_special_tokens(source),
        **hf_class.nemo_settings(nemo),
    }
    if hf_class.model_type is not None and not hasattr(transformers, hf_class.config_class):
        names = {"architectures": [hf_class.architecture], "model_type": hf_class.model_type}
        return {**names, **settings, "dtype": source.settings.torch_dtype_name}
    config = getattr(transformers, hf_class.config_class)(architectures=[hf_class.architecture], **settings)
    config.dtype = source.settings.torch_dtype_name
    return config.to_diff_dict()


def _special_tokens(source: Source) -> dict[str, Any]:
    """The tokens that begin, end and pad a text; the generation settings may name several that end one."""
    tokenizer, generation = source.tokenizer.tokenizer, getattr(source.config, "generation_config", None)
    own = {name: getattr(tokenizer, name) for name in _TOKENS}
    return {name: value if (found := getattr(generation, name, None)) is None else found for name, value in own.items()}


def write_model_documents(source: Source, layout: HuggingFaceLayout, directory: Path, config: dict[str, Any]) -> None:
    """Writes everything but the tensors.

    Args:
        source: The model.
        layout: Layout of its tensors.
        directory: Directory to write to.
        config: Content of config.json.
    """
    transformers = import_transformers()
    write_json(directory / "config.json", config)
    if len(layout.files) > 1:
        write_json(directory / "model.safetensors.index.json", layout.index)
    source.tokenizer.tokenizer.save_pretrained(directory)
    generation = getattr(source.config, "generation_config", None)
    if generation is None and is_hugging_face(
        source.checkpoint
    ):  # not every configuration of NeMo's has a place for it
        generation = load_generation_config(source.checkpoint)
    if not isinstance(generation, transformers.GenerationConfig):
        generation = transformers.GenerationConfig(**{name: config.get(name) for name in _TOKENS})
    write_json(directory / "generation_config.json", generation.to_diff_dict())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
