# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, and with it the file's size, from names, data types and shapes alone.

Format: https://github.com/huggingface/safetensors#format. It needs no torch, so that a file can be sized up before
there is anything to put in it.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

DTYPE_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
"""Size of each data type in bytes, in safetensors' own order of types, by which it sorts tensors to align them."""

_DTYPE_ORDER = tuple(DTYPE_BYTES)
_ALIGNMENT = 8


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Lays out a file.

    Args:
        tensors: Data type, as the header spells it, and shape of each tensor, in any order.
        metadata: Free-form entries for the header.

    Returns:
        The file's header with its length in front, the offset of each tensor from the file's beginning, and the size
        of the whole file in bytes.
    """
    order = sorted(tensors, key=lambda name: (-_DTYPE_ORDER.index(tensors[name][0]), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, position = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + DTYPE_BYTES[dtype] * prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    header = len(header).to_bytes(8, "little") + header
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + position
