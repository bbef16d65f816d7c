# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How each quantization scheme stores one linear layer: its tensors, their shapes and how tensor parallelism cuts them.

Source of the table: the TensorRT-LLM checkpoint format,
https://nvidia.github.io/TensorRT-LLM/architecture/checkpoint.html.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_ptq.errors import PtqError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Field:
    """One tensor of a stored linear layer.

    Attributes:
        suffix: End of its name, e.g. "weights_scaling_factor".
        dtype: Stored data type; None means that of the unquantized layers.
        shape: Its shape, from out-features, in-features and block size.
        column_axis: Dimension along which it is cut where the layer's outputs are sharded; None if it is replicated.
        row_axis: Dimension along which it is cut where the layer's inputs are sharded; None if it is replicated.
        each_group: Whether each group of rows that is stored as a layer of its own has another, though it is not cut.
    """

    suffix: str
    dtype: torch.dtype | None
    shape: Callable[[int, int, int], Shape]
    column_axis: int | None
    row_axis: int | None
    each_group: bool = False

    def axis(self, sharded_outputs: bool) -> int | None:
        """Dimension along which tensor parallelism cuts this tensor."""
        return self.column_axis if sharded_outputs else self.row_axis


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme of weights and activations.

    Attributes:
        modelopt_format: ModelOpt's name of it, from its ``get_quantization_format``; for a scheme that is not taken
            from ModelOpt's quantizers, the name of our algorithm.
        quant_algo: TensorRT-LLM's or ModelOpt's name of it, or one like theirs; None is unquantized.
        fields: The tensors that store a layer, its bias not counted.
        row_multiple: Out-features of a shard must be a multiple of this.
        column_multiple: In-features of a shard must be a multiple of this, and of the block size.
        block_size: In-features that share a weight scale; 0 where there are no blocks.
        largest_weight: The value of a weight's largest code, before scaling. NVFP4's scales are codes as well.
        largest_input: The same for an input, and for a weight that is rounded twice.
        codes: The format that weights are rounded to: "fp8", "int8", "int4" or "fp4".
        amaxes: The unit with a weight amax of its own: the "tensor", its "rows" or its "blocks".
        dynamic_inputs: Whether a server takes the scales of inputs from each token's own largest magnitude.
    """

    modelopt_format: str | None
    quant_algo: str | None
    fields: tuple[Field, ...]
    row_multiple: int = 1
    column_multiple: int = 1
    block_size: int = 0
    largest_weight: float = 1.0
    largest_input: float = 1.0
    codes: str = ""
    amaxes: str = "tensor"
    dynamic_inputs: bool = False

    @property
    def quantization_keys(self) -> dict[str, Any]:
        """The entries about the scheme in the format's config.json, beyond its name."""
        if self.quant_algo in ("W4A16_AWQ", "W4A8_AWQ"):
            return {"group_size": self.block_size, "has_zero_point": False, "pre_quant_scale": True}
        return {"group_size": self.block_size} if self.block_size else {}


_SCALAR: Callable[[int, int, int], Shape] = lambda o, i, g: (1,)  # noqa: E731
_ACTIVATION = Field("activation_scaling_factor", torch.float32, _SCALAR, None, None)
_PREQUANT = Field("prequant_scaling_factor", None, lambda o, i, g: (i,), None, 0)
_BLOCK_SCALES = Field("weights_scaling_factor", torch.float32, lambda o, i, g: (o, i // g), 0, 1)
_ROW_SCALES = Field("weights_scaling_factor", torch.float32, lambda o, i, g: (o,), 0, None)
_FP8_WEIGHT = Field("weight", torch.float8_e4m3fn, lambda o, i, g: (o, i), 0, 1)
_INT8_WEIGHT = Field("weight", torch.int8, lambda o, i, g: (o, i), 0, 1)
_INT4_WEIGHT = Field("weight", torch.int8, lambda o, i, g: (o // 2, i), 0, 1)
_NVFP4_WEIGHT = (
    Field("weight", torch.uint8, lambda o, i, g: (o, i // 2), 0, 1),
    Field("weights_scaling_factor", torch.float8_e4m3fn, lambda o, i, g: (o, i // g), 0, 1),
    Field("weights_scaling_factor_2", torch.float32, lambda o, i, g: (), None, None),
)

UNQUANTIZED = Scheme(None, None, (Field("weight", None, lambda o, i, g: (o, i), 0, 1),))

SCHEMES = (
    UNQUANTIZED,
    Scheme(
        "fp8",
        "FP8",
        (
            _FP8_WEIGHT,
            Field("weights_scaling_factor", torch.float32, _SCALAR, None, None),
            _ACTIVATION,
        ),
        largest_weight=448.0,
        largest_input=448.0,
        codes="fp8",
    ),
    Scheme(
        "int8_sq",
        "W8A8_SQ_PER_CHANNEL",
        (_INT8_WEIGHT, _ROW_SCALES, _ACTIVATION, _PREQUANT),
        largest_weight=127.0,
        largest_input=127.0,
        codes="int8",
        amaxes="rows",
    ),
    Scheme(
        "int4_awq",
        "W4A16_AWQ",
        (_INT4_WEIGHT, _BLOCK_SCALES, _PREQUANT),
        64,
        64,
        largest_weight=7.0,
        codes="int4",
        amaxes="blocks",
    ),
    Scheme(
        "w4a8_awq",
        "W4A8_AWQ",
        (
            _INT4_WEIGHT,
            _BLOCK_SCALES,
            _PREQUANT,
            _ACTIVATION,
            Field("weights_scaling_factor_2", torch.float32, _SCALAR, None, None),
        ),
        128,
        128,
        largest_weight=7.0,
        largest_input=448.0,
        codes="int4",
        amaxes="blocks",
    ),
    Scheme(
        "nvfp4",
        "NVFP4",
        (*_NVFP4_WEIGHT, Field("activation_scaling_factor", torch.float32, lambda o, i, g: (), None, None)),
        128,
        64,
        largest_weight=6.0 * 448.0,
        largest_input=6.0 * 448.0,
        codes="fp4",
    ),
    Scheme(
        "fp8_dynamic",
        "FP8_PER_CHANNEL_PER_TOKEN",
        (_FP8_WEIGHT, _ROW_SCALES),
        largest_weight=448.0,
        codes="fp8",
        amaxes="rows",
        dynamic_inputs=True,
    ),
    Scheme(
        "int8_dynamic",
        "INT8_PER_CHANNEL_PER_TOKEN",
        (_INT8_WEIGHT, _ROW_SCALES),
        largest_weight=127.0,
        codes="int8",
        amaxes="rows",
        dynamic_inputs=True,
    ),
    Scheme("w4a16_nvfp4", "W4A16_NVFP4", _NVFP4_WEIGHT, 128, 64, largest_weight=6.0 * 448.0, codes="fp4"),
)


def scheme_for(modelopt_format: str | None, block_size: int = 0) -> Scheme:
    """Returns the scheme that ModelOpt calls ``modelopt_format``, with this block size.

    Raises:
        PtqError: If the export formats cannot hold it.
    """
    for scheme in SCHEMES:
        if scheme.modelopt_format == modelopt_format:
            return replace(scheme, block_size=block_size)
    known = ", ".join(str(scheme.modelopt_format) for scheme in SCHEMES if scheme.modelopt_format)
    raise PtqError(
        f"ModelOpt calibrated a layer as {modelopt_format}, which a TensorRT-LLM checkpoint cannot hold; it holds: "
        f"{known} (weight-only int8 lacks the activation scales that its readers require)"
    )


def the_scheme(schemes: Iterable[Scheme]) -> Scheme:
    """Returns the one scheme of a model, UNQUANTIZED where it has none.

    Raises:
        PtqError: If it has several.
    """
    found = set(schemes)
    if len(found) > 1:
        names = ", ".join(sorted(str(scheme.quant_algo) for scheme in found))
        raise PtqError(
            f"the configuration quantizes layers in {len(found)} ways ({names}); a TensorRT-LLM checkpoint can have "
            "one way and unquantized layers beside it, mixed precision cannot go into it: use "
            "export_config.export_format=hf or compressed_tensors"
        )
    return found.pop() if found else UNQUANTIZED
