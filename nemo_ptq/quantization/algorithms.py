# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The quantization algorithms: one record each, which holds everything specific to it.

A new algorithm is a record that is passed to :func:`register`. If it decides scales in a new way, the record names a
calibration method of its own (:mod:`nemo_ptq.calibration.methods`). Imports nothing heavy: the command line reads this
table.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_ptq.config import AUTO, CUSTOM, NO_QUANT, QuantizationConfig
from nemo_ptq.errors import PtqError, did_you_mean

# Makes settings from the user's configuration and the model's decoder type, e.g. "llama".
Settings = Callable[[QuantizationConfig, str], Mapping[str, Any]]


@dataclass(frozen=True)
class Limit:
    """A lower limit for a figure of a layer.

    Attributes:
        figure: Field of :class:`~nemo_ptq.report.records.Layer`.
        least: The layer stands out below it.
        problem: The problem then, in words.
        advice: The remedy to try.
    """

    figure: str
    least: float
    problem: str
    advice: str


@dataclass(frozen=True)
class Algorithm:
    """A quantization algorithm.

    Attributes:
        name: Its stable name for users.
        label: Its name in reports.
        scheme: How its layers are stored: ModelOpt's name of one of :data:`nemo_ptq.quantization.schemes.SCHEMES`; None
            where that is not known beforehand, or nothing is quantized.
        quant_algo: TensorRT-LLM's name of the scheme.
        method: Dotted path of its calibration method, a class of :mod:`nemo_ptq.calibration.methods` or like one; None
            where nothing is calibrated, or ModelOpt does it.
        settings: Makes the arguments of the method.
        entries: The method's decisions for each linear layer: "amax", "pre_quant_scale", "channel_amax"; empty where
            all of them follow from the weights.
        rounder: Dotted path of the rounder of its layers with quality "balanced", a class of
            :mod:`nemo_ptq.calibration.rounders` or like one; None where it has no such quality. An algorithm that needs
            no data may have one for algorithm "auto", whose jobs read data.
        rounder_settings: Makes the arguments of the rounder.
        rounder_entries: The rounder's decisions for each linear layer; None where they are those of the method.
        moves_weights: Whether quality "balanced" moves a weight toward the unquantized model's output before the
            rounder rounds it, as "max" does always. That makes up for weights of four bits. With eight, most of the
            error is that of the activations: what the move then gains on the calibration's kind of text, it loses on
            other text (docs/accuracy.md).
        preset: Which of ModelOpt's presets (:mod:`nemo_ptq.quantization.presets`) says the same; None where none does.
        preset_method: Makes the preset's calibration method, where it has settings.
        block_size: Input features that share a weight scale: 0 where there are no blocks, None where the user's
            `awq_block_size` says how many.
        least_block_size: Lower limit of `awq_block_size`.
        row_multiple: TensorRT-LLM's kernels take multiples of so many output features of each rank.
        column_multiple: The same of input features.
        dense_multiple: Other servers' kernels take multiples of so many features of each rank, both ways, where a model
            has no experts.
        vocab_multiple: TensorRT-LLM's readers take vocabularies of multiples of this.
        amax_floors: Lower limits of activation amaxes, by decoder type.
        quantizes_kv_cache: Whether the KV cache is quantized if the user says nothing.
        smooths: Whether weights are divided by a pre-quantization scale before they are packed.
        bits: Bits of a weight's code.
        block_scale_bits: Bits of the scale of a block.
        packed_bytes: Bytes of a packed weight, scales included, for each of its elements.
        packing_bytes: Memory that torch needs beside a weight to pack it, in bytes for each of its elements.
        gram_candidates: How many scales are tried over a Gram matrix of each layer's inputs; 0 without such matrices.
        required_recovery: The least baseline perplexity / perplexity with which it passes; None where nothing is lost.
        limits: Limits that figures of layers should keep.
        candidates: Names of the algorithms that it chooses from for each layer if the user names none; empty for an
            algorithm that quantizes all layers alike.
    """

    name: str
    label: str
    scheme: str | None = None
    quant_algo: str | None = None
    method: str | None = None
    settings: Settings = lambda quantization, decoder: {}
    entries: tuple[str, ...] = ("amax",)
    rounder: str | None = None
    rounder_settings: Settings = lambda quantization, decoder: {}
    rounder_entries: tuple[str, ...] | None = None
    moves_weights: bool = True
    preset: str | None = None
    preset_method: Settings | None = None
    block_size: int | None = 0
    least_block_size: int = 1
    row_multiple: int = 1
    column_multiple: int = 1
    dense_multiple: int = 1
    vocab_multiple: int = 1
    amax_floors: Mapping[str, float] = field(default_factory=dict)
    quantizes_kv_cache: bool = False
    smooths: bool = False
    bits: int = 16
    block_scale_bits: int = 0
    packed_bytes: float = 2.0
    packing_bytes: int = 0
    gram_candidates: int = 0
    required_recovery: float | None = None
    limits: tuple[Limit, ...] = ()
    candidates: tuple[str, ...] = ()

    @property
    def quantizes(self) -> bool:
        """Whether there is anything that it quantizes."""
        return self.name != NO_QUANT

    @property
    def needs_data(self) -> bool:
        """Whether it is calibrated on text."""
        return bool(self.entries)

    @property
    def chooses(self) -> bool:
        """Whether it chooses another algorithm for each layer."""
        return bool(self.candidates)

    @property
    def has_balanced(self) -> bool:
        """Whether it has quality "balanced"."""
        return self.chooses or (self.rounder is not None and self.needs_data)

    @property
    def takes_block_size(self) -> bool:
        """Whether the user's `awq_block_size` is a setting of it."""
        return self.block_size is None

    def block_size_of(self, quantization: QuantizationConfig) -> int:
        """Input features that share a weight scale; 0 where there are no blocks."""
        return quantization.awq_block_size if self.block_size is None else self.block_size

    def bits_per_weight(self, quantization: QuantizationConfig) -> float:
        """Bits of a weight on average, its share of a block's scale included; scales of rows and tensors are few."""
        if self.chooses and quantization.effective_bits is not None:
            return quantization.effective_bits
        block_size = self.block_size_of(quantization)
        return self.bits + (self.block_scale_bits / block_size if block_size else 0)

    def packed_bytes_of(self, quantization: QuantizationConfig) -> float:
        """Bytes of a packed weight, scales included, for each of its elements."""
        return self.bits_per_weight(quantization) / 8 if self.chooses else self.packed_bytes


_EXCLUDE = "leave the layer unquantized: name it in quantization_config.exclude"
_MIXED_BLOCKS = "its weights lose much: blocks hold weights of very different sizes"
_OUTLIERS = "its inputs lose much: outliers leave few codes for the others"
_MORE_SAMPLES = "more, and more varied, calibration samples"

# Rounding to FP8 (E4M3) leaves about 31 dB, to INT8 about 40 dB for well-behaved values, to INT4 in blocks about 20 dB,
# whatever the model. Limits are some 6 dB (a doubled error) below.
_FP8_WEIGHTS = Limit(
    "weight_sqnr_db",
    25.0,
    "its weights lose much: most of them are so small beside the largest that FP8 rounds them to few values",
    _EXCLUDE,
)
_INT4_WEIGHTS = Limit(
    "weight_sqnr_db", 15.0, _MIXED_BLOCKS, "a smaller quantization_config.awq_block_size (64), or fp8"
)
_FP8_INPUTS = Limit("input_sqnr_db", 22.0, _OUTLIERS, f"int8_sq, which moves outliers into the weights; or {_EXCLUDE}")
_EIGHT_BIT_OUTPUTS = Limit(
    "output_sqnr_db",
    20.0,
    "its outputs lose much: the errors of weights and inputs add up in large terms that nearly cancel",
    f"{_MORE_SAMPLES}; or {_EXCLUDE}",
)
_FP8_ROWS = replace(
    _FP8_WEIGHTS, problem="its weights lose much: most of a row are so small beside its largest that FP8 has few values"
)
_FOUR_BIT_OUTPUTS = Limit(
    "output_sqnr_db",
    10.0,
    "its outputs lose much: the errors add up in large terms that nearly cancel",
    f"{_MORE_SAMPLES}; or fp8",
)

# Exponents of W4A8 on these decoders are 0 or 1: finer ones overflow in TensorRT-LLM's kernels.
_COARSE_W4A8_DECODERS = ("gemma", "gemma2", "gemma3")
_EXPONENT_STEP = 0.1


def _w4a8_step(decoder: str) -> float:
    return 1.0 if decoder in _COARSE_W4A8_DECODERS else _EXPONENT_STEP


# Squared ReLU leaves many channels nearly unused in a short calibration: activation amaxes of decoder "gpt" are kept
# above one hundredth of the format's largest value, as NVIDIA's own tool does.
_FP8_FLOORS, _INT8_FLOORS = {"gpt": 0.01 * 448.0}, {"gpt": 0.01 * 127.0}

_BUILT_IN = (
    Algorithm(
        "fp8",
        "FP8",
        scheme="fp8",
        quant_algo="FP8",
        method="nemo_ptq.calibration.methods:Max",
        settings=lambda quantization, decoder: {"floor": amax_floor(quantization, decoder)},
        rounder="nemo_ptq.calibration.rounders:Fp8",
        moves_weights=False,
        rounder_settings=lambda quantization, decoder: {"floor": amax_floor(quantization, decoder)},
        preset="fp8",
        amax_floors=_FP8_FLOORS,
        quantizes_kv_cache=True,
        bits=8,
        packed_bytes=1.0,
        packing_bytes=5,
        required_recovery=0.99,
        limits=(_FP8_WEIGHTS, _FP8_INPUTS, _EIGHT_BIT_OUTPUTS),
    ),
    Algorithm(
        "int8_sq",
        "INT8 SmoothQuant",
        scheme="int8_sq",
        quant_algo="W8A8_SQ_PER_CHANNEL",
        method="nemo_ptq.calibration.methods:SmoothQuant",
        settings=lambda quantization, decoder: {
            "alpha": quantization.fixed_alpha,
            "floor": amax_floor(quantization, decoder),
        },
        rounder="nemo_ptq.calibration.rounders:Int8",
        moves_weights=False,
        rounder_settings=lambda quantization, decoder: {
            "alpha": quantization.fixed_alpha,
            "floor": amax_floor(quantization, decoder),
        },
        entries=("amax", "pre_quant_scale", "channel_amax"),
        preset="int8_sq",
        preset_method=lambda quantization, decoder: {"method": "smoothquant", "alpha": quantization.fixed_alpha},
        amax_floors=_INT8_FLOORS,
        smooths=True,
        bits=8,
        packed_bytes=1.0,
        packing_bytes=7,
        required_recovery=0.98,
        limits=(
            Limit(
                "weight_sqnr_db",
                28.0,
                "its weights lose much: SmoothQuant has moved more into them than INT8 can hold",
                "a smaller quantization_config.sq_alpha, which leaves more with the activations; or fp8",
            ),
            Limit(
                "input_sqnr_db",
                22.0,
                _OUTLIERS,
                "a larger quantization_config.sq_alpha, which moves more into the weights; or fp8",
            ),
            _EIGHT_BIT_OUTPUTS,
        ),
    ),
    Algorithm(
        "int4_awq",
        "INT4 AWQ",
        scheme="int4_awq",
        quant_algo="W4A16_AWQ",
        method="nemo_ptq.calibration.methods:Awq",
        settings=lambda quantization, decoder: {
            "block_size": quantization.awq_block_size,
            "exponent_step": _EXPONENT_STEP,
        },
        entries=("pre_quant_scale",),
        rounder="nemo_ptq.calibration.rounders:Int4",
        rounder_settings=lambda quantization, decoder: {"group_size": quantization.awq_block_size},
        rounder_entries=(),
        preset="int4_awq",
        preset_method=lambda quantization, decoder: {"method": "awq_lite", "alpha_step": _EXPONENT_STEP},
        block_size=None,
        row_multiple=64,
        column_multiple=64,
        vocab_multiple=64,
        bits=4,
        block_scale_bits=16,
        packed_bytes=0.54,
        packing_bytes=14,
        smooths=True,
        gram_candidates=11,
        required_recovery=0.95,
        limits=(_INT4_WEIGHTS, _FOUR_BIT_OUTPUTS),
    ),
    Algorithm(
        "w4a8_awq",
        "W4A8 AWQ",
        scheme="w4a8_awq",
        quant_algo="W4A8_AWQ",
        method="nemo_ptq.calibration.methods:Awq",
        settings=lambda quantization, decoder: {
            "block_size": quantization.awq_block_size,
            "exponent_step": _w4a8_step(decoder),
            "rounds_inputs": True,
        },
        entries=("amax", "pre_quant_scale", "channel_amax"),
        rounder="nemo_ptq.calibration.rounders:Int4",
        rounder_settings=lambda quantization, decoder: {
            "group_size": quantization.awq_block_size,
            "rounds_inputs": True,
        },
        rounder_entries=("amax",),
        preset="w4a8_awq",
        preset_method=lambda quantization, decoder: {"method": "awq_lite", "alpha_step": _w4a8_step(decoder)},
        block_size=None,
        least_block_size=128,
        row_multiple=128,
        column_multiple=128,
        vocab_multiple=64,
        bits=4,
        block_scale_bits=16,
        packed_bytes=0.54,
        packing_bytes=14,
        smooths=True,
        gram_candidates=11,
        required_recovery=0.95,
        limits=(_INT4_WEIGHTS, _FP8_INPUTS, _FOUR_BIT_OUTPUTS),
    ),
    Algorithm(
        "nvfp4",
        "NVFP4",
        scheme="nvfp4",
        quant_algo="NVFP4",
        method="nemo_ptq.calibration.methods:Max",
        rounder="nemo_ptq.calibration.rounders:Nvfp4",
        preset="nvfp4",
        block_size=16,
        row_multiple=128,
        column_multiple=64,
        dense_multiple=32,
        bits=4,
        block_scale_bits=8,
        packed_bytes=0.57,
        packing_bytes=40,
        required_recovery=0.95,
        limits=(
            Limit("weight_sqnr_db", 15.0, _MIXED_BLOCKS, f"fp8, or {_EXCLUDE}"),
            Limit("input_sqnr_db", 15.0, f"{_OUTLIERS} of their block", f"fp8, or {_EXCLUDE}"),
            _FOUR_BIT_OUTPUTS,
        ),
    ),
    Algorithm(
        "fp8_dynamic",
        "FP8, dynamic activations",
        scheme="fp8_dynamic",
        quant_algo="FP8_PER_CHANNEL_PER_TOKEN",
        entries=(),
        preset="fp8_dynamic",
        bits=8,
        packed_bytes=1.0,
        packing_bytes=7,
        required_recovery=0.99,
        limits=(_FP8_ROWS, _FP8_INPUTS, _EIGHT_BIT_OUTPUTS),
    ),
    Algorithm(
        "int8_dynamic",
        "INT8, dynamic activations",
        scheme="int8_dynamic",
        quant_algo="INT8_PER_CHANNEL_PER_TOKEN",
        entries=(),
        rounder="nemo_ptq.calibration.rounders:Int8Dynamic",
        moves_weights=False,
        bits=8,
        packed_bytes=1.0,
        packing_bytes=7,
        required_recovery=0.98,
        limits=(
            Limit(
                "weight_sqnr_db",
                28.0,
                "its weights lose much: most of a row are small beside its largest",
                f"fp8_dynamic, or {_EXCLUDE}",
            ),
            Limit("input_sqnr_db", 22.0, _OUTLIERS, "int8_sq, which moves outliers into the weights; or fp8_dynamic"),
            _EIGHT_BIT_OUTPUTS,
        ),
    ),
    Algorithm(
        "w4a16_nvfp4",
        "NVFP4 weights",
        scheme="w4a16_nvfp4",
        quant_algo="W4A16_NVFP4",
        entries=(),
        preset="w4a16_nvfp4",
        block_size=16,
        row_multiple=128,
        column_multiple=64,
        dense_multiple=128,
        bits=4,
        block_scale_bits=8,
        packed_bytes=0.57,
        packing_bytes=40,
        required_recovery=0.95,
        limits=(Limit("weight_sqnr_db", 15.0, _MIXED_BLOCKS, f"fp8_dynamic, or {_EXCLUDE}"), _FOUR_BIT_OUTPUTS),
    ),
    Algorithm(NO_QUANT, "16 bits, unquantized", entries=()),
)
# The layers that a ModelOpt config quantizes are not known before ModelOpt has read it.
_OF_A_FILE = Algorithm(
    CUSTOM,
    "a ModelOpt configuration",
    required_recovery=0.95,
    limits=(_FP8_WEIGHTS, _FP8_INPUTS, _EIGHT_BIT_OUTPUTS),
)

ALGORITHMS: dict[str, Algorithm] = {algorithm.name: algorithm for algorithm in _BUILT_IN}
"""The algorithms that quantize all layers alike, in the order in which messages list them."""

_AUTO = Algorithm(
    AUTO,
    "mixed precision, chosen by layer",
    packing_bytes=40,
    required_recovery=0.95,
    limits=(replace(_FOUR_BIT_OUTPUTS, advice=f"a larger quantization_config.effective_bits; or {_EXCLUDE}"),),
    candidates=("fp8", "int4_awq", "nvfp4"),
)
SELECTABLE: Mapping[str, Algorithm] = ChainMap({AUTO: _AUTO}, ALGORITHMS)
"""The values of `quantization_config.algorithm`: the algorithms, and the choice among them for each layer."""


def register(algorithm: Algorithm) -> None:
    """Adds an algorithm; a plugin (:mod:`nemo_ptq.plugins`) calls it when it is imported.

    Raises:
        PtqError: If there is an algorithm of that name.
    """
    if algorithm.name in (*SELECTABLE, CUSTOM):
        raise PtqError(f"there is an algorithm {algorithm.name} already: give yours another name")
    ALGORITHMS[algorithm.name] = algorithm


def algorithm_named(name: str) -> Algorithm:
    """Returns an algorithm by its name; a file with a ModelOpt config has the name :data:`CUSTOM`.

    Raises:
        PtqError: If there is none.
    """
    if name == CUSTOM:
        return _OF_A_FILE
    if name not in SELECTABLE:
        hint = did_you_mean(name, list(SELECTABLE)) or f"; there are {', '.join(SELECTABLE)}"
        raise PtqError(f"quantization_config.algorithm={name} is not known{hint}")
    return SELECTABLE[name]


def algorithm_of(quantization: QuantizationConfig) -> Algorithm:
    """Returns the algorithm that the user asked for.

    Raises:
        PtqError: If there is none of that name.
    """
    return algorithm_named(quantization.algorithm_name)


def quantization_of_layer(quantization: QuantizationConfig, algorithm: str) -> QuantizationConfig:
    """Returns the configuration that quantizes all layers with the algorithm that was chosen for one of them."""
    return replace(quantization, algorithm=algorithm, effective_bits=None, candidates=None)


def moves_weights(quantization: QuantizationConfig) -> bool:
    """Whether weights of any layer may be moved toward the unquantized model's output: with quality "max" all are.

    The calibration batches then walk through the unquantized model too, beside the quantized one.
    """
    algorithm = algorithm_of(quantization)
    options = [SELECTABLE[name] for name in algorithm.candidates] or [algorithm]
    return quantization.is_max or (quantization.is_balanced and any(option.moves_weights for option in options))


def kv_cache_is_quantized(quantization: QuantizationConfig, decoder: str) -> bool:
    """Whether the KV cache of a model of this decoder type is quantized.

    As in NeMo, an unset `enable_kv_cache` leaves "gpt" decoders alone.
    """
    if quantization.kv_cache_only:
        return True
    if quantization.enable_kv_cache is None:
        return algorithm_of(quantization).quantizes_kv_cache and decoder != "gpt"
    return quantization.enable_kv_cache


def amax_floor(quantization: QuantizationConfig, decoder: str) -> float | None:
    """Returns the lower limit of a job's activation amaxes; None where there is none."""
    return algorithm_of(quantization).amax_floors.get(decoder)
