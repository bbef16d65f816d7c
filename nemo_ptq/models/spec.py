# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The one description of a model: its sizes, and the options that decide its tensors and its computation.

It is read from the fields of NeMo's configuration, wherever those come from: a built model, a checkpoint's context, or
a config.json of Hugging Face's. Imports nothing heavy.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.layers import LayerSpec, ModuleSpec, gpt_layer
from nemo_ptq.models.state_space import StateSpace, hybrid_layers, state_space_of

# Our name of each activation, by that of NeMo's function.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "openai_gelu": "gelu", "squared_relu": "squared-relu"}
NEMOTRON_H_ACTIVATION = "NemotronHConfigBase.<lambda>"
"""The end of the squared ReLU's name in NeMo's configuration of Nemotron-H, where it is a lambda."""
SIZES: Mapping[str, int] = {
    "num_layers": 10_000,
    "hidden_size": 2**24,
    "num_attention_heads": 2**16,
    "num_query_groups": 2**16,
    "kv_channels": 2**16,
    "ffn_hidden_size": 2**24,
    "moe_ffn_hidden_size": 2**24,
    "num_moe_experts": 10_000,
    "moe_router_topk": 10_000,
    "mamba_state_dim": 2**16,
    "mamba_head_dim": 2**16,
    "mamba_num_groups": 2**16,
    "mamba_num_heads": 2**16,
    "vocab_size": 2**31,
    "seq_length": 2**31,
}
"""The sizes in NeMo's configuration, and the largest value of each, far beyond any model."""
# Characters of a value that a message shows.
_SHOWN = 40
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
# Fields that a saved calibration's header has of its model, in its order: files hold these names.
_IDENTITY = (
    "model_class",
    "config_class",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_size",
    "ffn_hidden_size",
    "gated_mlp",
    "vocab_size",
    "num_experts",
    "seq_length",
    "position_embedding_type",
    "normalization",
    "tied_embeddings",
    "linear_bias",
    "qkv_bias",
    "qk_norm",
    "experts_per_token",
    "is_quantized",
)


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3.1's frequency-dependent stretching of the rotary embedding, as NeMo configures it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LongRope:
    """How Phi's models for long texts stretch their rotary embedding; NeMo's configuration has no field for it.

    Attributes:
        short_factors: Divisors of the frequencies in sequences of up to `context` tokens.
        long_factors: Divisors of the frequencies in longer sequences.
        context: Length of the sequences that the model was trained on first.
        attention_factor: Factor of cosines and sines at every length.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    context: int
    attention_factor: float


WITHOUT_LONG_ROPE = "NeMo's Phi3Config has no fields for its factors"
"""Why a model with longrope is no NeMo checkpoint."""


@dataclass(frozen=True)
class GemmaAttention:
    """The parts of attention that Gemma 2 and 3 have beyond other families.

    Attributes:
        scalar: Scores are divided by its root.
        cap: Soft limit of the scores; None for no limit.
        logit_cap: Soft limit of the model's logits; None for no limit.
        window: Positions that each one attends to in layers with a window, itself included.
        pattern: Layers in a repeating group, whose last layer has no window.
        local_base: Base of the rotary frequencies in layers with a window; None where it is that of the others.
    """

    scalar: float
    cap: float | None
    logit_cap: float | None
    window: int
    pattern: int
    local_base: float | None


def gpt_layers(model: "ModelSpec") -> Sequence[LayerSpec]:
    """Describes the layers of Megatron's GPT, which are all alike."""
    return (gpt_layer(model),) * model.num_layers


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A GPT-like model as a whole, whatever its parallelism. Names are NeMo's, where it has one.

    Attributes:
        model_class: NeMo's model class, e.g. "nemo.collections.llm.gpt.model.llama.LlamaModel"; "" where not known.
        config_class: NeMo's config class, e.g. "nemo.collections.llm.gpt.model.llama.Llama31Config8B".
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads.
        head_size: Width of one head; not always hidden_size / num_attention_heads.
        ffn_hidden_size: Inner width of one MLP, or of one expert.
        gated_mlp: Whether the MLP multiplies its activation with a gate, so that fc1 has twice the rows.
        vocab_size: Rows of the embedding as stored, padding included.
        num_experts: Experts of each MLP; None where it is dense.
        seq_length: Positions that the model was made for.
        position_embedding_type: "rope", "learned_absolute" or "none".
        normalization: "RMSNorm" or "LayerNorm".
        tied_embeddings: Whether the output layer is the embedding.
        linear_bias: Whether every linear layer has a bias; experts have none.
        qkv_bias: Whether the query-key-value projection has one.
        qk_norm: Whether queries and keys are normalised.
        gemma: Further parts of the attention of Gemma 2 and 3, which also normalise the outputs of attention and MLP;
            None for other families.
        state_space: The layers of a hybrid; None for a model without state spaces.
        experts_per_token: Experts that each token goes through; 0 without mixture of experts.
        is_quantized: Whether the checkpoint holds ModelOpt's quantizers and their amaxes.
        norm_epsilon: Added to the variance.
        activation: "gelu", "silu" or "squared-relu"; NeMo's name for any other.
        rotary_percent: Share of a head that is rotated.
        rotary_base: Base of the rotary frequencies; of layers that attend to all positions, where there are two.
        rotary_linear_factor: Factor by which positions are interpolated, or None.
        rotary_scaling: Llama 3.1's scaling, or None.
        long_rope: Phi's scaling, or None.
        make_layers: Describes the transformer layers, in their order; they may differ.
    """

    model_class: str = ""
    config_class: str = ""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_size: int
    ffn_hidden_size: int
    gated_mlp: bool
    vocab_size: int
    num_experts: int | None
    seq_length: int
    position_embedding_type: str
    normalization: str
    tied_embeddings: bool
    linear_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts_per_token: int = 0
    is_quantized: bool = False
    norm_epsilon: float = 1e-5
    activation: str = "gelu"
    rotary_percent: float = 1.0
    rotary_base: float = 10000
    rotary_linear_factor: float | None = None
    rotary_scaling: RotaryScaling | None = None
    long_rope: LongRope | None = None
    gemma: GemmaAttention | None = None
    state_space: StateSpace | None = None
    make_layers: Callable[["ModelSpec"], Sequence[LayerSpec]] = field(default=gpt_layers, compare=False, repr=False)

    @cached_property
    def layers(self) -> Sequence[LayerSpec]:
        """The transformer layers."""
        return self.make_layers(self)

    def module(self, name: str) -> ModuleSpec:
        """Describes a module of a transformer layer.

        Args:
            name: Megatron's name in the whole model, such as "decoder.layers.3.mlp.linear_fc1".

        Raises:
            KeyError: If the layer has no such module with weights.
        """
        layer, _, own = name.removeprefix("decoder.layers.").partition(".")
        return self.layers[int(layer)][own]

    def has(self, name: str) -> bool:
        """Whether there is a module, by Megatron's name in the whole model; true for names outside the layers."""
        if not name.startswith("decoder.layers."):
            return True
        layer, _, own = name.removeprefix("decoder.layers.").partition(".")
        return own in self.layers[int(layer)]

    @property
    def short_context(self) -> int | None:
        """Tokens of a text that longrope's short factors are for; None without longrope."""
        return None if self.long_rope is None else self.long_rope.context

    @property
    def layer_kinds(self) -> Sequence[tuple[LayerSpec, int]]:
        """The kinds of layers, and how many there are of each, in the order in which they first appear."""
        counts = Counter(map(id, self.layers))
        return [(layer, counts[id(layer)]) for layer in {id(layer): layer for layer in self.layers}.values()]

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that a saved calibration has of its model, by the names above."""
        return {name: getattr(self, name) for name in _IDENTITY}


def spec_of(config: Any, vocab_size: int, **known: Any) -> ModelSpec:
    """Reads a model's description from NeMo's configuration.

    Args:
        config: A built NeMo ``GPTConfig``, or a mapping with such fields. What a mapping leaves out is as in
            Megatron.
        vocab_size: Rows of the embedding in the checkpoint.
        known: Fields of :class:`ModelSpec` that the configuration lacks.

    Raises:
        KeyError: If the configuration lacks a field that every GPT-like model has.
        PtqError: If a size is not valid.
    """
    if not isinstance(config, Mapping):
        name = f"{type(config).__module__}.{type(config).__qualname__}"
        return spec_of(vars(config), vocab_size, **{"config_class": name, **known})
    check_sizes({**config, "vocab_size": vocab_size})
    heads, hidden, experts = config["num_attention_heads"], config["hidden_size"], config.get("num_moe_experts")
    interpolation = config.get("seq_len_interpolation_factor")
    if config.get("interleaved_attn_pattern"):
        interpolation = config.get("rope_scaling_factor")
    if (state_space := state_space_of(config)) is not None:
        known = {"make_layers": hybrid_layers, **known}
    return ModelSpec(
        num_layers=config["num_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=config.get("num_query_groups") or heads,
        head_size=config.get("kv_channels") or hidden // heads,
        ffn_hidden_size=config.get("moe_ffn_hidden_size") or config.get("ffn_hidden_size") or 4 * hidden,
        gated_mlp=config.get("gated_linear_unit", False),
        vocab_size=vocab_size,
        num_experts=experts,
        seq_length=config["seq_length"],
        position_embedding_type=config["position_embedding_type"],
        normalization=config["normalization"],
        tied_embeddings=config["share_embeddings_and_output_weights"],
        linear_bias=bool(config.get("add_bias_linear")),
        qkv_bias=bool(config.get("add_bias_linear") or config.get("add_qkv_bias")),
        # NeMo's Gemma 3 has no field for it.
        qk_norm=bool(config.get("qk_layernorm") or config.get("interleaved_attn_pattern")),
        experts_per_token=config.get("moe_router_topk", 0) if experts else 0,
        norm_epsilon=config.get("layernorm_epsilon", 1e-5),
        activation=_activation(config.get("activation_func", "gelu")),
        rotary_percent=config.get("rotary_percent", 1.0),
        # NeMo's default, an integer: files hold it as it is, with or without an import before.
        rotary_base=_rotary_base(config.get("rotary_base", 10000)),
        rotary_linear_factor=None if interpolation in (None, 1, 1.0) else float(interpolation),
        rotary_scaling=_rotary_scaling(config),
        long_rope=config.get("long_rope"),
        gemma=gemma_attention(config),
        state_space=state_space,
        **known,
    )


def check_sizes(config: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Checks the sizes in NeMo's configuration before anything is computed from them.

    Args:
        config: Fields of NeMo's configuration.
        names: Their names in messages, where the file has other names.

    Raises:
        PtqError: If one is not a whole number that a model could have.
    """
    for name, most in SIZES.items():
        size = config.get(name)
        if size is None and name not in _NEEDED:
            continue
        if name in config and not (isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= most):
            shown = (names or {}).get(name, name)
            raise PtqError(f"{shown} is {repr(size)[:_SHOWN]}: it must be a whole number from 1 to {most}")


NUMBER_LIMITS = {"layernorm_epsilon": (0.0, 1.0), "rotary_base": (1.0, 1e12), "rotary_percent": (0.0, 1.0)}
"""What a number is above, and at most, by NeMo's name of it. The largest base that a known model has is about 1e9."""


def check_numbers(model: ModelSpec) -> None:
    """Refuses a description that no model can have.

    Raises:
        PtqError: If a number is out of its limits, or the query groups do not divide the heads.
    """
    numbers = {"layernorm_epsilon": model.norm_epsilon}
    if model.position_embedding_type == "rope":
        numbers |= {"rotary_base": model.rotary_base, "rotary_percent": model.rotary_percent}
    for name, value in numbers.items():
        above, most = NUMBER_LIMITS[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
            raise PtqError(
                f"the context has {name} {value!r}: it must be a number above {above:g}, and at most {most:g}"
            )
    if model.num_attention_heads % model.num_query_groups:
        raise PtqError(
            f"the context has num_query_groups {model.num_query_groups}, which does not divide num_attention_heads "
            f"{model.num_attention_heads}"
        )


def _activation(function: Any) -> str:
    """Our name of an activation, from a function, a context's description of one, or NeMo's name."""
    if isinstance(function, Mapping):
        function = str(function["_target_"])
    name = getattr(function, "__qualname__", str(function))
    if name.endswith(NEMOTRON_H_ACTIVATION):
        return "squared-relu"
    name = name.rpartition(".")[2]
    return ACTIVATIONS.get(name, name)


def gemma_attention(config: Mapping[str, Any]) -> GemmaAttention | None:
    """Reads the parts of Gemma 2 or 3 from NeMo's configuration; None for another model."""
    caps = config.get("attn_logit_softcapping"), config.get("final_logit_softcapping")
    if config.get("query_pre_attn_scalar") is not None:
        return GemmaAttention(config["query_pre_attn_scalar"], *caps, config["window_size"][0], 2, None)
    if config.get("interleaved_attn_pattern") is None:
        return None
    scale, pattern = config.get("softmax_scale"), sum(config["interleaved_attn_pattern"])
    scalar = config["kv_channels"] if scale is None else round(scale**-2, 6)
    return GemmaAttention(scalar, *caps, config["window_size"], pattern, config["rotary_base"][0])


def _rotary_base(value: Any) -> Any:
    """The base of layers that attend to all positions, where those with a window have another, which comes first."""
    return value[-1] if isinstance(value, tuple | list) and value else value


def _rotary_scaling(config: Mapping[str, Any]) -> RotaryScaling | None:
    if config.get("scale_factor") is None or "old_context_len" not in config:
        return None
    return RotaryScaling(
        config["scale_factor"], config["low_freq_factor"], config["high_freq_factor"], config["old_context_len"]
    )
