# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rounded weights of a model beside its calibration state, so that another export rounds nothing again.

Quality "balanced" rounds by what the data shows: codes do not follow from the checkpoint and the calibration state.
They are kept in one file, whatever the parallelism they were made at, by Megatron's names and with its order of rows:

    decoder.layers.0.mlp.linear_fc1.weight                      packed as the scheme stores it
    decoder.layers.0.mlp.linear_fc1.weights_scaling_factor
    decoder.layers.0.mlp.linear_fc1.weights_scaling_factor_2    where the scheme has one

It is written like the files of a format, while the blocks walk by.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from nemo_ptq.checkpoint.parts import shares_inputs
from nemo_ptq.errors import PtqError
from nemo_ptq.export.layout import Block, FileTensor, Part, joined, whole
from nemo_ptq.export.packing import Packed, all_rows, pack_linear, row_splitter
from nemo_ptq.export.source import Source
from nemo_ptq.models.mapping import QKV
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.parallel.ranks import Ranks
from nemo_ptq.quantization.rounded_weight import RoundedWeight
from nemo_ptq.quantization.schemes import Scheme
from nemo_ptq.quantization.state_header import WEIGHTS_IN_EXPORT
from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.manifest import MANIFEST, read_manifest

_CODES, _SCALE, _SCALE_2 = "weight", "weights_scaling_factor", "weights_scaling_factor_2"
_KEPT = (_CODES, _SCALE, _SCALE_2)


def _groups(module: str, shape: ModelSpec) -> Sequence[str]:
    """The groups of a layer's rows that ranks cut one by one; queries, keys and values are cut together."""
    rows = tuple(shape.module(module).rows)
    return ("",) if rows == QKV else rows


@dataclass(frozen=True)
class RoundedLayout:
    """The layout table of the file.

    Attributes:
        shape: The model.
        schemes: Scheme of each quantized linear layer.
        files: Name of the file.
    """

    shape: ModelSpec
    schemes: Mapping[str, Scheme]
    files: Sequence[str]

    def metadata(self, file: int) -> Mapping[str, str]:
        """See :meth:`~nemo_ptq.export.layout.Layout.metadata`."""
        return {}

    def blocks(self, file: int) -> Iterator[Block]:
        """See :meth:`~nemo_ptq.export.layout.Layout.blocks`."""
        yield []
        for layer, spec in enumerate(self.shape.layers):
            names = [f"decoder.layers.{layer}.{module.name}" for module in spec.modules]
            yield [tensor for name in names if name in self.schemes for tensor in self._linear(name)]
        yield []

    def _linear(self, name: str) -> Iterator[FileTensor]:
        scheme, spec, groups = self.schemes[name], self.shape.module(name), _groups(name, self.shape)
        for field in scheme.fields:
            if field.suffix not in _KEPT:
                continue
            assert field.dtype is not None
            target, axis = f"{name}.{field.suffix}", field.axis(spec.axis == 0)
            if axis is None:
                size = field.shape(spec.outputs(), spec.inputs, scheme.block_size)
                yield whole(Part(name, "", field.suffix, size, None), target, field.dtype)
                continue
            pieces = []
            for rows in groups:
                size = field.shape(spec.outputs(rows), spec.inputs, scheme.block_size)
                pieces.append((Part(name, rows, field.suffix, size, axis), 0, size[axis]))
            yield joined(target, field.dtype, pieces, axis)


def pack_rounded(source: Source, name: str) -> Packed:
    """Packs this rank's shard of a linear layer for the file."""
    split = row_splitter(name, source.shape) if len(_groups(name, source.shape)) > 1 else all_rows
    return pack_linear(source.layers.linear(name), split, source.dtype)


class RoundedWeights:
    """Reads the rounded weights of a model from the file.

    Args:
        file: The file.
        schemes: Scheme of each quantized linear layer of this rank.
        shape: The model.
        ranks: Returns the ranks that share a linear layer, by its name.
    """

    def __init__(
        self, file: Path, schemes: Mapping[str, Scheme], shape: ModelSpec, ranks: Callable[[str], Ranks]
    ) -> None:
        self._file = safe_open(file, framework="pt")
        self._names = frozenset(self._file.keys())
        self._schemes, self._shape, self._ranks = schemes, shape, ranks

    def __call__(self, name: str) -> RoundedWeight | None:
        """Returns this rank's shard of a weight, on the CPU; None of what is not quantized."""
        scheme = self._schemes.get(name)
        if scheme is None:
            return None
        fields = {field.suffix: field for field in scheme.fields}
        found = {
            suffix: self._file.get_tensor(f"{name}.{suffix}") for suffix in _KEPT if f"{name}.{suffix}" in self._names
        }
        codes = _unpacked(found[_CODES], scheme)
        codes = self._own(codes, name, 1 if shares_inputs(name) else 0)
        scale = self._own(found[_SCALE], name, fields[_SCALE].axis(not shares_inputs(name)))
        return RoundedWeight(codes, scale, found[_SCALE_2].reshape(1) if _SCALE_2 in found else None)

    def _own(self, tensor: torch.Tensor, name: str, axis: int | None) -> torch.Tensor:
        ranks = self._ranks(name)
        if axis is None or ranks.size == 1:
            return tensor
        spec, groups = self._shape.module(name), (tensor,)
        if axis == 0:
            groups = tensor.split([spec.outputs(rows) for rows in _groups(name, self._shape)])
        return torch.cat([ranks.shard(rows, axis) for rows in groups], axis)


def check_unchanged(file: Path) -> None:
    """Compares the file with what the manifest of its export says of it, where it lies in one.

    Raises:
        PtqError: If it was changed after it was written.
    """
    directory = file.parents[len(WEIGHTS_IN_EXPORT.parts) - 1]
    if file != directory / WEIGHTS_IN_EXPORT or not (directory / MANIFEST).is_file():
        return
    entry = read_manifest(directory).get(WEIGHTS_IN_EXPORT.as_posix())
    if entry is None or not entry.is_of(file):
        raise PtqError(f"{file} is not as it was made, says the export's manifest: copy the export again")


def _unpacked(stored: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.codes == "fp4":
        return dq.unpack_uint4(stored)
    return dq.unpack_int4(stored) if scheme.codes == "int4" else stored


def place_in_all(given: Path | None, directories: Mapping[str, Path], files: Mapping[str, list[Path]]) -> None:
    """Puts the rounded weights beside the calibration state of every directory.

    Args:
        given: The file of an earlier export; None if the first directory has it already.
        directories: Directory of each format.
        files: This rank's files of each format, to which the rounded weights are added.
    """
    first, *others = (directory / WEIGHTS_IN_EXPORT for directory in directories.values())
    if given is not None:
        shutil.copyfile(given, first)
    for other in others:
        place(first, other)
    for name, directory in directories.items():
        files[name].append(directory / WEIGHTS_IN_EXPORT)


def place(file: Path, target: Path) -> None:
    """Makes a file appear in another directory of the same job: a link where the file system has such, or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    with suppress(OSError):
        os.link(file, target)
        return
    shutil.copyfile(file, target)
