# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""NeMo's and Megatron-LM's checkpoints: whether their index has every tensor, in the shape that the model needs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.model_config import Hybrid
from nemo_ptq.verify.nemo.hybrids import hybrid_of, state_space_weights

Shape = tuple[int, ...]
_LAYER = "module.decoder.layers."
_EMBEDDING = "module.embedding.word_embeddings.weight"
_FILES = ("context/io.json", "context/model.yaml", "weights/common.pt", "weights/metadata.json", "weights/.metadata")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a checkpoint's model.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Features between layers.
        query_heads: Heads of queries.
        key_heads: Heads of keys, and as many of values.
        head_size: Features of a head.
        ffn_size: Features inside of the MLP, or of each expert.
        is_gated: Whether the MLP has a gate, and so twice the rows in its first layer.
        num_experts: Experts of a layer, 0 where there are none.
        vocab_size: Rows of the embedding.
        is_tied: Whether the embedding is the output layer as well.
        has_quantizers: Whether ModelOpt's quantizers are stored.
        is_stacked: Whether a tensor holds all layers, and all experts; otherwise they are named one by one.
        hybrid: Kinds of the layers, if there are several.
    """

    num_layers: int
    hidden_size: int
    query_heads: int
    key_heads: int
    head_size: int
    ffn_size: int
    is_gated: bool
    num_experts: int
    vocab_size: int
    is_tied: bool
    has_quantizers: bool
    is_stacked: bool
    hybrid: Hybrid | None = None


def is_nemo(directory: Path) -> bool:
    """Whether a directory is a NeMo 2.0 checkpoint."""
    return (directory / "weights").is_dir() and (directory / "context").is_dir()


def missing_files(directory: Path) -> list[str]:
    """Files that every checkpoint has, and this one lacks."""
    return [f"{name} is missing" for name in _FILES if not (directory / name).is_file()]


def read_sizes(source: str, model: Any, stored: Mapping[str, Shape]) -> Sizes:
    """Reads the sizes of the model from its description, and those that it leaves open from the weights' index.

    Args:
        source: Name of the description, for messages.
        model: Fields of the model, under NeMo's names.
        stored: Shapes by name, from the index of the weights.

    Raises:
        PtqError: If they do not describe a GPT-like model.
    """
    if _EMBEDDING not in stored:
        raise PtqError(f"the index of the weights has no {_EMBEDDING}: they are not of a GPT-like model")
    try:
        heads, hidden = model["num_attention_heads"], model["hidden_size"]
        return Sizes(
            num_layers=model["num_layers"],
            hidden_size=hidden,
            query_heads=heads,
            key_heads=model.get("num_query_groups") or heads,
            head_size=model.get("kv_channels") or hidden // heads,
            ffn_size=model.get("moe_ffn_hidden_size") or model.get("ffn_hidden_size") or 4 * hidden,
            is_gated=bool(model.get("gated_linear_unit")),
            num_experts=model.get("num_moe_experts") or 0,
            vocab_size=stored[_EMBEDDING][0],
            is_tied=bool(model["share_embeddings_and_output_weights"]),
            has_quantizers=any(".weight_quantizer." in name for name in stored),
            is_stacked=not any(name.startswith(f"{_LAYER}0.") for name in stored),
            hybrid=hybrid_of(model),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PtqError(f"{source} is not of a GPT-like model: {error!r}") from error


def _layer_weights(model: Sizes) -> Iterator[tuple[str, Shape]]:
    """The weights of one layer by their names in it.

    Where layers are named one by one, experts are as well, and a gated first MLP layer is stored in two halves.
    """
    hidden, heads = model.hidden_size, model.query_heads * model.head_size
    rows = (model.query_heads + 2 * model.key_heads) * model.head_size
    yield "self_attention.linear_qkv.weight", (rows, hidden)
    yield "self_attention.linear_qkv.layer_norm_weight", (hidden,)
    yield "self_attention.linear_proj.weight", (hidden, heads)
    stack: Shape = (model.num_experts,) if model.num_experts and model.is_stacked else ()
    places = ["mlp."]
    if model.num_experts:
        places = [f"mlp.experts.experts.{expert}." for expert in range(model.num_experts)]
        places = ["mlp.experts.experts."] if model.is_stacked else places
    for place in places:
        if model.is_gated and not model.is_stacked:
            yield f"{place}linear_fc1.weight_w", (model.ffn_size, hidden)
            yield f"{place}linear_fc1.weight_v", (model.ffn_size, hidden)
        else:
            yield f"{place}linear_fc1.weight", (*stack, (1 + model.is_gated) * model.ffn_size, hidden)
        yield f"{place}linear_fc2.weight", (*stack, hidden, model.ffn_size)


def _hybrid_layer_weights(model: Sizes, hybrid: Hybrid, kind: str) -> Iterator[tuple[str, Shape]]:
    """The weights of one layer of a hybrid by their names in it."""
    if kind == "M":
        yield from state_space_weights(hybrid, model.hidden_size)
        return
    part = "self_attention." if kind == "*" else "mlp."
    yield from ((name, shape) for name, shape in _layer_weights(model) if name.startswith(part))


def _layers_weights(model: Sizes) -> dict[str, Shape]:
    """The weights of all layers."""
    if model.hybrid is not None:
        return {
            f"{_LAYER}{layer}.{name}": shape
            for layer, kind in enumerate(model.hybrid.pattern)
            for name, shape in _hybrid_layer_weights(model, model.hybrid, kind)
        }
    if model.is_stacked:
        return {f"{_LAYER}{name}": (model.num_layers, *shape) for name, shape in _layer_weights(model)}
    return {
        f"{_LAYER}{layer}.{name}": shape for layer in range(model.num_layers) for name, shape in _layer_weights(model)
    }


def weight_problems(model: Sizes, stored: Mapping[str, Shape]) -> list[str]:
    """Weights that a checkpoint lacks, or has in another shape than its model.

    Args:
        model: From :func:`read_sizes`.
        stored: Shapes by name, from the index of the weights.
    """
    expected = {
        _EMBEDDING: (model.vocab_size, model.hidden_size),
        f"module.decoder.{'final_layernorm' if model.hybrid is None else 'final_norm'}.weight": (model.hidden_size,),
        **_layers_weights(model),
    }
    if not model.is_tied:
        expected["module.output_layer.weight"] = (model.vocab_size, model.hidden_size)
    missing = [f"{name} is missing" for name in expected if name not in stored]
    return missing + [
        f"{name} is {list(stored[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]


def quantizer_problems(weights: Path, stored: Mapping[str, Shape]) -> list[str]:
    """Problems that keep ModelOpt from restoring the quantizers.

    Args:
        weights: Directory with the torch_dist files.
        stored: Shapes by name, from the index of the weights; of what is no tensor, ().
    """
    common = weights / "modelopt_state" / "common.pt"
    missing = f"{weights.name}/modelopt_state/common.pt is missing: quantizers are not restored"
    problems = [] if common.is_file() else [missing]
    linear = re.compile(re.escape(_LAYER) + r"\d+\..*linear_(qkv|proj|fc[12])\.")
    states = {name.partition("._extra_state")[0] for name in stored if "._extra_state" in name}
    with_range = {name.partition(".weight_quantizer.")[0] for name in stored if ".weight_quantizer." in name}
    problems += [
        f"{name} has an amax and no _extra_state that says of what"
        for name in sorted(with_range - states)
        if linear.match(f"{name}.")
    ]
    if not with_range:
        problems.append("no weight has an amax: nothing is quantized")
    return problems


def quantized_layers(stored: Mapping[str, Shape]) -> int:
    """How many linear layers have a weight amax."""
    return len({name.partition(".weight_quantizer.")[0] for name in stored if ".weight_quantizer." in name})
