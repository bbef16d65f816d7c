# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Packed linear layers turned back into Megatron's weights, from the description of the format alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nemo_ptq.verify import dequantize as dq

Packed = Mapping[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class Heads:
    """Attention heads: queries that share a key and a value, rows of each head, and which head a shard begins with."""

    per_group: int
    size: int
    first: int = 0

    def kinds(self, count: int) -> list[str]:
        """What the heads of a shard are: "q", "k" or "v"."""
        places = [index % (self.per_group + 2) - self.per_group for index in range(self.first, self.first + count)]
        return ["q" if place < 0 else "kv"[place] for place in places]


def rows_of(name: str, whole: torch.Tensor, heads: Heads, gated: bool) -> dict[str, torch.Tensor]:
    """Megatron's rows in the groups of the format, taken one head at a time.

    Args:
        name: Megatron's name of the linear layer.
        whole: (out, ...), a weight or a bias.
        heads: The model's.
        gated: Whether the model's MLP is gated.
    """
    if name.endswith("linear_qkv"):
        split = whole.split(heads.size)
        kinds = heads.kinds(len(split))
        return {
            kind: torch.cat([head for head, its in zip(split, kinds, strict=True) if its == kind]) for kind in kinds
        }
    if name.endswith("linear_fc1") and gated:
        return {"gate": whole[: len(whole) // 2], "up": whole[len(whole) // 2 :]}
    return {"": whole}


def joined(name: str, rows: Mapping[str, torch.Tensor], heads: Heads) -> torch.Tensor:
    """The other way round than :func:`rows_of`."""
    if not name.endswith("linear_qkv"):
        return torch.cat([rows[kind] for kind in ("gate", "up") if kind in rows] or [rows[""]])
    of_kind = {kind: iter(tensor.split(heads.size)) for kind, tensor in rows.items()}
    count = sum(len(tensor) for tensor in rows.values()) // heads.size
    return torch.cat([next(of_kind[kind]) for kind in heads.kinds(count)])


def fields_of(packed: Packed, rows: str) -> dict[str, torch.Tensor]:
    """The fields of one group of rows, with those that all groups share."""
    shared = {field: tensor for (group, field), tensor in packed.items() if group == ""}
    return shared | {field: tensor for (group, field), tensor in packed.items() if group == rows}


def dequantize(algorithm: str, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 (out, in): the weight of one group of rows."""
    weight, scale = fields["weight"], fields.get("weights_scaling_factor", torch.empty(0))
    scale_2 = fields.get("weights_scaling_factor_2", torch.empty(0))
    return {
        "no_quant": lambda: weight.float(),
        "fp8": lambda: dq.dequantize_fp8(weight, scale),
        "int8_sq": lambda: dq.dequantize_int8(weight, scale),
        "int4_awq": lambda: dq.dequantize_int4(weight, scale),
        "w4a8_awq": lambda: dq.dequantize_w4a8(weight, scale, scale_2),
        "nvfp4": lambda: dq.dequantize_nvfp4(weight, scale, scale_2),
    }[algorithm]()


def weight_problem(
    algorithm: str, fields: Mapping[str, torch.Tensor], simulated: torch.Tensor, exact: torch.Tensor
) -> str | None:
    """Compares what was packed of one group of rows with the weight that the calibrated model simulates.

    They may differ where a weight lies in the middle between two codes: ModelOpt multiplies with the inverse of the
    scale when it simulates, and divides by the scale when it packs.

    Args:
        algorithm: How it was quantized.
        fields: What was packed.
        simulated: float32 (out, in).
        exact: float32 (out, in): the weight before rounding.
    """
    found = dequantize(algorithm, fields)
    different = ~torch.isclose(found, simulated, rtol=1e-5, atol=1e-7)
    found, simulated, exact = found[different], simulated[different], exact[different]
    if algorithm == "w4a8_awq":
        # Rounded twice: the weight lies between two INT4 codes, or its INT4 code between two of FP8.
        scale = fields["weights_scaling_factor"]
        int4 = dq.dequantize_int4(fields["weight"], scale)[different]
        codes = exact / scale.repeat_interleave(different.shape[1] // scale.shape[1], dim=1)[different]
        ties = _are_between(found, simulated, int4) | ((codes - codes.floor() - 0.5).abs() < 1e-3)
    else:
        ties = _are_between(found, simulated, exact)
    return None if ties.all() else f"{int((~ties).sum())} weights differ, and are no ties"


def _are_between(left: torch.Tensor, right: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    return ((left - middle).abs() - (right - middle).abs()).abs() <= 1e-3 * (left - right).abs()
