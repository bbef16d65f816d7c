# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint that its model reads, and their shapes. All other weights are refused."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from nemo_ptq.checkpoint.index import weights_of
from nemo_ptq.errors import PtqError
from nemo_ptq.models.mapping import live_name
from nemo_ptq.models.spec import ModelSpec

# NeMo wraps Megatron's model in a LightningModule, whose attribute `module` it is.
PREFIX = "module."
DTYPES = ("float32", "float16", "bfloat16")
"""Data types that weights may have."""
# Of the model and yet no weights: Transformer Engine's states, ModelOpt's quantizers, a buffer that follows from sizes.
_NO_WEIGHTS = re.compile(r"_extra_state(/|$)|_quantizer\.|(^|\.)rotary_pos_emb\.")
# Entries of a training job that Megatron-LM saves beside its model, whose tensors have no prefix.
_TRAINING = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state(/|$)|rerun_state_machine_state(/|$)|param_groups")
# NeMo's LoRA: adapters beside the layers that it wraps.
_ADAPTER = re.compile(r"\.(adapters?|to_wrap|lora_[ab])\.|\.adapter_layer\.|\.lora\.", re.IGNORECASE)
# Halves of a gated layer that are tensors of their own.
_HALVES = re.compile(r"\.(weight|bias)_[wv]$")
# Groups of rows that have a name for themselves: halves of a gated layer, and those of a state space.
_ROWS = re.compile(r"(\.(?:weight|bias))(?:_[wv]|\.(?:z|x|B|C|dt))$")


def prefix_of(checkpoint: Path) -> str:
    """Returns the prefix of the names of a checkpoint's weights; those of Megatron-LM have none."""
    return "" if weights_of(checkpoint) == checkpoint else PREFIX


def is_weight(name: str, prefix: str = PREFIX) -> bool:
    """Whether an entry of a checkpoint is a weight of the model, and neither an optimizer's state nor the like."""
    return name.startswith(prefix) and not _NO_WEIGHTS.search(name) and not _TRAINING.match(name)


def check_tensors(model: ModelSpec, dtypes: Mapping[str, str], prefix: str = PREFIX) -> None:
    """Refuses a checkpoint with weights that its model does not read, or of types that no weights have.

    Args:
        model: The model in the context.
        dtypes: Names of the torch data types of the tensors in the weights, by their names.
        prefix: Prefix of the names of weights.

    Raises:
        PtqError: If there are such weights, LoRA adapters that are not merged among them.
    """
    weights = sorted(name for name in dtypes if is_weight(name, prefix))
    if adapters := [name for name in weights if _ADAPTER.search(name)]:
        raise PtqError(
            f"the checkpoint holds {len(adapters)} tensors of LoRA adapters that are not merged, {adapters[0]} among "
            "them: give the model without them, and adapter= the adapters' own checkpoint"
        )
    known = set(_parameters(model))
    if lost := [name for name in weights if _general(name.removeprefix(prefix)) not in known]:
        raise PtqError(
            f"the model that the context describes has no place for {len(lost)} tensors of the checkpoint, {lost[0]} "
            "among them: give the context of these weights, or take out what does not belong to the model"
        )
    if others := [name for name in weights if dtypes[name] not in DTYPES]:
        raise PtqError(
            f"{len(others)} tensors are of a data type that is not supported, {others[0]} of {dtypes[others[0]]} among "
            f"them: save the checkpoint in {', '.join(DTYPES)}"
        )


def check_shapes(model: ModelSpec, shapes: Mapping[str, Sequence[int]], prefix: str = PREFIX) -> None:
    """Refuses weights that do not fit the description beside them; hybrids are not checked.

    Args:
        model: The model in the description.
        shapes: Shapes of the tensors in the weights, by their names, the axes of stacked layers and experts included.
        prefix: Prefix of the names of weights.

    Raises:
        PtqError: If one has another shape, or is of a layer that the model does not have.
    """
    if model.state_space is not None:
        return
    expected = dict(_shapes(model))
    for name in sorted(name for name in shapes if is_weight(name, prefix)):
        found, key = tuple(shapes[name]), name.removeprefix(prefix)
        wanted = expected.get(_general(key))
        if wanted is None:
            continue
        if _HALVES.search(key):
            wanted = (wanted[0] // 2, *wanted[1:])
        wanted = (
            *_stacked(key, "decoder.layers.", model.num_layers),
            *_stacked(key, "experts.experts.", model.num_experts),
            *wanted,
        )
        layer = re.match(r"decoder\.layers\.(\d+)\.", key)
        if found != wanted or (layer and int(layer[1]) >= model.num_layers):
            raise PtqError(
                f"{name} has the shape {list(found)}, and the model that is described, of {model.num_layers} layers, "
                f"has {list(wanted)} there: give the description of these weights"
            )


def check_complete(model: ModelSpec, names: Iterable[str], prefix: str = PREFIX) -> None:
    """Refuses weights that lack some that the model has.

    Args:
        model: The model in the description.
        names: Names of the tensors in the weights.
        prefix: Prefix of the names of weights.

    Raises:
        PtqError: If one is missing; the output layer may be the embedding.
    """
    found = {_general(name.removeprefix(prefix)) for name in names if is_weight(name, prefix)} | {"output_layer.weight"}
    if missing := [name for name in dict.fromkeys(_parameters(model)) if name not in found]:
        raise PtqError(
            f"the checkpoint has no weights for {len(missing)} parameters of the model that is described, {missing[0]} "
            "among them: give the description of these weights, or copy the checkpoint again"
        )


def _stacked(key: str, where: str, size: int | None) -> tuple[int, ...]:
    """The axis of a tensor that holds all layers, or all experts; none where they have tensors of their own."""
    return (size,) if size and re.search(rf"(^|\.){re.escape(where)}(?=\D)", key) else ()


def _shapes(model: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the parameters of the layers by their general names, with their shapes."""
    for layer in {id(layer): layer for layer in model.layers}.values():
        for module in layer.modules:
            name = f"decoder.layers.*.{re.sub(r'[.][0-9]+[.]', '.*.', module.name)}"
            yield from ((f"{name}.{parameter}", module.shape) for parameter in module.parameters)
            if module.has_bias:
                yield f"{name}.bias", module.shape[:1]


def _general(name: str) -> str:
    """Megatron's name of a parameter in a model, with "*" for layers and experts."""
    live = live_name(_ROWS.sub(r"\1", name), "*", "*")
    return re.sub(r"\.\d+\.", ".*.", live).replace("local_experts.*.*.", "local_experts.*.")


def _parameters(model: ModelSpec) -> Iterator[str]:
    yield from ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight")
    if model.normalization == "LayerNorm":
        yield "decoder.final_layernorm.bias"
    if model.position_embedding_type == "learned_absolute":
        yield "embedding.position_embeddings.weight"
    yield from (name for name, _ in _shapes(model))
