# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A NeMo 2.0 checkpoint of a quantized model: whether its index has every tensor, in the shape that its model needs."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_ptq.checkpoint.metadata import CheckpointMetadata

Shape = tuple[int, ...]
_LAYER = "module.decoder.layers."


def is_nemo(directory: Path) -> bool:
    """Whether a directory is a NeMo 2.0 checkpoint."""
    return (directory / "weights").is_dir() and (directory / "context").is_dir()


def _layer_weights(model: CheckpointMetadata) -> Iterator[tuple[str, Shape]]:
    """The weights of one layer by their names in it.

    Where there are quantizers, experts are stored one by one, and a gated first MLP layer in two halves; otherwise
    experts are stacked.
    """
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_size
    rows = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_size
    yield "self_attention.linear_qkv.weight", (rows, hidden)
    yield "self_attention.linear_qkv.layer_norm_weight", (hidden,)
    yield "self_attention.linear_proj.weight", (hidden, heads)
    stack: Shape = (model.num_experts,) if model.num_experts and not model.is_quantized else ()
    places = ["mlp."]
    if model.num_experts:
        places = [f"mlp.experts.experts.{expert}." for expert in range(model.num_experts)]
        places = places if model.is_quantized else ["mlp.experts.experts."]
    for place in places:
        if model.gated_mlp and model.is_quantized:
            yield f"{place}linear_fc1.weight_w", (model.ffn_hidden_size, hidden)
            yield f"{place}linear_fc1.weight_v", (model.ffn_hidden_size, hidden)
        else:
            yield f"{place}linear_fc1.weight", (*stack, (1 + model.gated_mlp) * model.ffn_hidden_size, hidden)
        yield f"{place}linear_fc2.weight", (*stack, hidden, model.ffn_hidden_size)


def _layers_weights(model: CheckpointMetadata) -> dict[str, Shape]:
    """The weights of all layers: one by one where there are quantizers, otherwise stacked."""
    if not model.is_quantized:
        return {f"{_LAYER}{name}": (model.num_layers, *shape) for name, shape in _layer_weights(model)}
    return {
        f"{_LAYER}{layer}.{name}": shape for layer in range(model.num_layers) for name, shape in _layer_weights(model)
    }


def weight_problems(model: CheckpointMetadata, stored: Mapping[str, Shape]) -> list[str]:
    """Weights that a checkpoint lacks, or has in another shape than its model.

    Args:
        model: What context/model.yaml says.
        stored: Shapes by name, from the index of the weights.
    """
    expected = {
        "module.embedding.word_embeddings.weight": (model.vocab_size, model.hidden_size),
        "module.decoder.final_layernorm.weight": (model.hidden_size,),
        **_layers_weights(model),
    }
    if not model.tied_embeddings:
        expected["module.output_layer.weight"] = (model.vocab_size, model.hidden_size)
    missing = [f"{name} is missing" for name in expected if name not in stored]
    return missing + [
        f"{name} is {list(stored[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]


def quantizer_problems(directory: Path, model: CheckpointMetadata, stored: Mapping[str, Shape]) -> list[str]:
    """What keeps ModelOpt from restoring the quantizers.

    Args:
        directory: The checkpoint.
        model: What context/model.yaml says.
        stored: Shapes by name, from the index of the weights; of what is no tensor, ().
    """
    common = directory / "weights" / "modelopt_state" / "common.pt"
    problems = [] if common.is_file() else ["weights/modelopt_state/common.pt is missing: quantizers are not restored"]
    linear = re.compile(re.escape(_LAYER) + r"\d+\..*linear_(qkv|proj|fc[12])\.")
    states = {name.partition("._extra_state")[0] for name in stored if "._extra_state" in name}
    with_range = {name.partition(".weight_quantizer.")[0] for name in stored if ".weight_quantizer." in name}
    problems += [
        f"{name} has a range and no _extra_state that says of what"
        for name in sorted(with_range - states)
        if linear.match(f"{name}.")
    ]
    if not with_range:
        problems.append("no weight has a range: nothing is quantized")
    return problems


def quantized_layers(stored: Mapping[str, Shape]) -> int:
    """How many linear layers have a range of their weight."""
    return len({name.partition(".weight_quantizer.")[0] for name in stored if ".weight_quantizer." in name})
