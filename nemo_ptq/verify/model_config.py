# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""config.json as a frozen record: types checked, the reader's own defaults filled in, nothing judged yet."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.untrusted import FileError, read_json_object

# Patterns that the reader takes where exclude_modules is absent or empty.
DEFAULT_EXCLUDE_MODULES = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding")

# Activations that make the reader's gpt decoder build a gated MLP; llama and gemma always have one.
GATED_ACTIVATIONS = frozenset({"swiglu", "fast-swiglu", "geglu"})

# The decoders whose readers normalise queries and keys.
QK_NORM_DECODERS = ("qwen3", "qwen3_moe", "gemma3")
# Those that normalise what attention and MLP return as well.
POST_NORM_DECODERS = ("gemma2", "gemma3")


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        type: "linear" (positions divided by ``factor``), "llama3" (frequency bands, Llama 3.1 and later) or "longrope"
            (each frequency divided by a factor of its own).
        factor: Context extension.
        low_freq_factor: llama3: wavelengths above original / low are stretched by the whole factor.
        high_freq_factor: llama3: wavelengths below original / high are left alone.
        original_max_position_embeddings: llama3 and longrope: context length of the pre-training, in tokens.
        short_factor: longrope: factors for sequences up to that length.
        long_factor: longrope: factors for longer sequences.
        attention_factor: longrope: factor of cosines and sines.
    """

    type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Mapping:
    """Parallel layout of the rank files; rank = tp_rank + pp_rank * tp_size."""

    world_size: int
    tp_size: int
    pp_size: int
    moe_tp_size: int
    moe_ep_size: int


@dataclass(frozen=True)
class Moe:
    """Mixture of experts; normalization_mode 1 is a softmax over the chosen experts' logits."""

    num_experts: int
    top_k: int
    normalization_mode: int


@dataclass(frozen=True)
class Hybrid:
    """Layers with a state space, with attention or with an MLP, one of the three in each.

    Attributes:
        pattern: One character a layer: M of a state space, * of attention, - of an MLP.
        heads: Heads of a state space.
        head_size: Channels of each.
        state_size: Width of the state of each channel.
        groups: Groups of heads that share B and C, and of the channels that are normalised together.
        kernel: Positions that the convolution looks at.
    """

    pattern: str
    heads: int
    head_size: int
    state_size: int
    groups: int
    kernel: int = 4

    @property
    def inner_size(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_size


@dataclass(frozen=True)
class Quantization:
    """The quantization section.

    Attributes:
        algorithm: ``quant_algo``: None, "FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ" or "NVFP4".
        kv_cache_algorithm: ``kv_cache_quant_algo``: None, "FP8" or "INT8".
        group_size: Weights per scale along the input features.
        exclude_modules: Patterns of modules that keep their weights; never empty.
    """

    algorithm: str | None
    kv_cache_algorithm: str | None
    group_size: int
    exclude_modules: tuple[str, ...]

    def exclusion(self, module: str) -> str | None:
        """The first pattern that keeps ``module`` (its full name in the rank's file) unquantized, or None."""
        return next((pattern for pattern in self.exclude_modules if fnmatchcase(module, pattern)), None)

    def algorithm_of(self, module: str) -> str | None:
        """The algorithm that ``module`` (its full name in the rank's file) is quantized with, or None."""
        return None if self.exclusion(module) else self.algorithm


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model as the forward pass needs to know it, for every kind of files. Sizes are global.

    Attributes:
        decoder: TensorRT-LLM's name, or its nearest: Gemmas scale their embeddings, and "gpt" has a gate
            by its activation alone.
        dtype: Name of the model's torch data type.
        hidden_act: The activation, by the names that TensorRT-LLM and Hugging Face have for it.
        position_embedding_type: "rope_gpt_neox", "learned_absolute" or "none".
        rotary_pct: Share of each head that is rotated.
        attention_window: Positions that each one attends to, itself included; None for all before it.
        global_layers: Layers that attend to all positions before, where the others have a window.
        qk_norm: Whether the heads of queries and keys are normalised.
        post_norms: Whether the outputs of attention and MLP are normalised as well.
        attention_scale: Factor of the scores; None for 1 / sqrt(head size).
        attention_cap: Soft cap of the scores, cap * tanh(score / cap); None for none.
        logit_cap: Soft cap of the logits; None for none.
        local_rotary_base: Base of the rotary frequencies of layers with a window, which are not scaled; None where it
            is that of the others.
        hybrid: Kinds of the layers, if there are several.
    """

    decoder: str
    dtype: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rmsnorm: bool
    hidden_act: str
    position_embedding_type: str
    rotary_pct: float
    rotary_base: float
    rotary_scaling: RotaryScaling | None
    share_embedding_table: bool
    moe: Moe | None
    attention_window: int | None = None
    global_layers: frozenset[int] = frozenset()
    qk_norm: bool = False
    post_norms: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    local_rotary_base: float | None = None
    hybrid: Hybrid | None = None

    @property
    def gated(self) -> bool:
        """Whether the MLP computes proj(act(fc x) * gate x)."""
        return self.decoder != "gpt" or self.hidden_act in GATED_ACTIVATIONS

    def window(self, layer: int) -> int | None:
        """Positions that each one attends to in a layer, itself included; None for all before it."""
        return None if layer in self.global_layers else self.attention_window

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_size * self.rotary_pct)

    @property
    def lm_head_is_shared(self) -> bool:
        """Whether the output layer is the embedding, and not in the files."""
        return self.share_embedding_table


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """config.json of a qnemo directory, as TensorRT-LLM's reader understands it."""

    architecture: str
    attention_bias: bool
    mlp_bias: bool
    mapping: Mapping
    quantization: Quantization

    @property
    def is_qwen(self) -> bool:
        """Whether the decoder is one of Qwen's, which have no bias on the attention's output projection."""
        return self.decoder.startswith("qwen")

    @property
    def layers_per_stage(self) -> int:
        """Decoder layers in each pipeline stage."""
        return self.num_hidden_layers // self.mapping.pp_size

    @property
    def heads_per_rank(self) -> int:
        """Query heads in each rank's file."""
        return self.num_attention_heads // self.mapping.tp_size

    @property
    def kv_heads_per_rank(self) -> int:
        """Key (and value) heads in each rank's file, at least one."""
        return -(-self.num_key_value_heads // self.mapping.tp_size)

    @property
    def kv_replicas(self) -> int:
        """Ranks that hold a copy of the same key and value head."""
        return max(1, self.mapping.tp_size // self.num_key_value_heads)

    @property
    def lm_head_is_shared(self) -> bool:
        """Whether lm_head.weight is left out because vocab_embedding.weight stands in the same rank file."""
        return self.share_embedding_table and self.mapping.pp_size == 1


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; NaN and Infinity, which JSON does not have, are refused but in the limit of time steps.

    Raises:
        PtqError: The file cannot be read or does not hold a JSON object.
    """
    try:
        return read_json_object(path, infinite=("time_step_limit",))
    except FileError as error:
        raise PtqError(f"{path.name} {error.reason}") from error


# Far beyond any model; what is counted by these comes to an end.
MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_SIZE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a positive integer": _is_size,
    "a positive integer up to 10000": lambda value: _is_size(value) and value <= MOST_LAYERS,
    "an integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a positive number": lambda value: _is_number(value) and value > 0,
    "a positive integer or null": lambda value: value is None or _is_size(value),
    "a positive number or null": lambda value: value is None or (_is_number(value) and value > 0),
    "true or false": lambda value: isinstance(value, bool),
    "a string": lambda value: isinstance(value, str),
    "a string or null": lambda value: value is None or isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "an object or null": lambda value: value is None or isinstance(value, dict),
    "a list of strings or null": lambda value: (
        value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    ),
}
_REQUIRED = object()


class _Section:
    """Takes typed values out of one JSON object and remembers every problem."""

    def __init__(self, raw: dict[str, Any], name: str, problems: list[str]) -> None:
        self._raw, self._name, self._problems = raw, name, problems

    def take(self, key: str, kind: str, default: Any = _REQUIRED) -> Any:
        if key not in self._raw and default is not _REQUIRED:
            return default
        value = self._raw.get(key, _REQUIRED)
        if value is not _REQUIRED and _KINDS[kind](value):
            return value
        found = "is missing" if value is _REQUIRED else f"is {value!r}"
        self._problems.append(f"{self._name}{key} {found}, expected {kind}")
        return None

    def section(self, key: str) -> "_Section":
        raw = self.take(key, "an object or null", None)
        return _Section(raw or {}, f"{key}.", self._problems)


def parse_config(raw: dict[str, Any]) -> Config:
    """Turns config.json's object into a record, with the reader's defaults for what is absent.

    Raises:
        ConfigError: Keys that the reader requires are missing, or values have the wrong type; all of them.
    """
    problems: list[str] = []
    top = _Section(raw, "", problems)
    architecture = top.take("architecture", "a string")
    hidden_size = top.take("hidden_size", "a positive integer")
    heads = top.take("num_attention_heads", "a positive integer")
    decoder = top.take("decoder", "a string", (architecture or "").removesuffix("ForCausalLM").lower())
    # The gpt decoder has one key for all its biases; llama and gemma read one for each block and ignore "bias".
    bias = top.take("bias", "true or false", True)
    attention_bias = top.take("attn_bias", "true or false", False)
    mlp_bias = top.take("mlp_bias", "true or false", False)
    layers = top.take("num_hidden_layers", "a positive integer up to 10000")
    pattern = top.take("_sliding_window_pattern", "a positive integer or null", None)
    window = top.take("sliding_window", "a positive integer or null", None)
    scalar = top.take("query_pre_attn_scalar", "a positive number or null", None)
    config = Config(
        architecture=architecture,
        decoder=decoder,
        dtype=top.take("dtype", "a string"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=top.take("num_key_value_heads", "a positive integer", heads),
        hidden_size=hidden_size,
        head_size=top.take("head_size", "a positive integer", (hidden_size or 0) // (heads or 1)),
        intermediate_size=top.take("intermediate_size", "a positive integer", 4 * (hidden_size or 0)),
        vocab_size=top.take("vocab_size", "a positive integer"),
        max_position_embeddings=top.take("max_position_embeddings", "a positive integer", 0),
        norm_epsilon=top.take("norm_epsilon", "a positive number", 1e-5),
        rmsnorm=top.take("rmsnorm", "true or false", decoder != "gpt"),
        hidden_act=top.take("hidden_act", "a string", "gelu"),
        position_embedding_type=top.take("position_embedding_type", "a string", "learned_absolute"),
        rotary_pct=top.take("rotary_pct", "a positive number", 1.0),
        rotary_base=top.take("rotary_base", "a positive number", 10000.0),
        rotary_scaling=_parse_rotary_scaling(top),
        share_embedding_table=top.take("share_embedding_table", "true or false", False),
        attention_bias=bias if decoder == "gpt" else attention_bias,
        mlp_bias=bias if decoder == "gpt" else mlp_bias,
        mapping=_parse_mapping(top),
        quantization=_parse_quantization(top),
        moe=_parse_moe(top),
        # Most readers take a window as an option of theirs.
        attention_window=window,
        global_layers=frozenset(range(pattern - 1, layers or 0, pattern) if pattern else ()),
        qk_norm=decoder in QK_NORM_DECODERS,
        post_norms=decoder in POST_NORM_DECODERS,
        attention_scale=None if scalar is None else scalar**-0.5,
        attention_cap=top.take("attn_logit_softcapping", "a positive number or null", None),
        logit_cap=top.take("final_logit_softcapping", "a positive number or null", None),
        local_rotary_base=top.take("rope_local_base_freq", "a positive number or null", None),
    )
    if problems:
        raise ConfigError([f"config.json: {problem}" for problem in problems])
    return config


def _parse_rotary_scaling(top: _Section) -> RotaryScaling | None:
    if not top.take("rotary_scaling", "an object or null", None):
        return None
    section = top.section("rotary_scaling")
    return RotaryScaling(
        type=section.take("type", "a string"),
        factor=section.take("factor", "a positive number", 8.0),
        low_freq_factor=section.take("low_freq_factor", "a positive number", 1.0),
        high_freq_factor=section.take("high_freq_factor", "a positive number", 4.0),
        original_max_position_embeddings=section.take("original_max_position_embeddings", "a positive integer", 8192),
    )


def _parse_mapping(top: _Section) -> Mapping:
    section = top.section("mapping")
    tp_size = section.take("tp_size", "a positive integer up to 10000", 1)
    return Mapping(
        world_size=section.take("world_size", "a positive integer up to 10000", 1),
        tp_size=tp_size,
        pp_size=section.take("pp_size", "a positive integer up to 10000", 1),
        moe_tp_size=section.take("moe_tp_size", "a positive integer", tp_size),
        moe_ep_size=section.take("moe_ep_size", "a positive integer", 1),
    )


def _parse_quantization(top: _Section) -> Quantization:
    section = top.section("quantization")
    patterns = section.take("exclude_modules", "a list of strings or null", None)
    return Quantization(
        algorithm=section.take("quant_algo", "a string or null", None),
        kv_cache_algorithm=section.take("kv_cache_quant_algo", "a string or null", None),
        group_size=section.take("group_size", "a positive integer", 128),
        exclude_modules=tuple(patterns or DEFAULT_EXCLUDE_MODULES),
    )


def _parse_moe(top: _Section) -> Moe | None:
    if not top.take("moe", "an object or null", None):
        return None
    section = top.section("moe")
    return Moe(
        num_experts=section.take("num_experts", "a positive integer up to 10000"),
        top_k=section.take("top_k", "a positive integer"),
        normalization_mode=section.take("normalization_mode", "an integer", 1),
    )
