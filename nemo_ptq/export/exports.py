# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""All formats of a job, written side by side while the blocks of the model walk by."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from nemo_ptq.calibration.observing import State
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.checkpoint.parts import is_linear
from nemo_ptq.errors import PtqError
from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.formats import FORMATS, Format
from nemo_ptq.export.rounded_weights import RoundedLayout, pack_rounded
from nemo_ptq.export.source import PackedExport, Source
from nemo_ptq.export.stream import LayoutWriter


@dataclass
class _Format:
    """One format of a job.

    Attributes:
        record: The format's record.
        layers: The calibrated layers as the format can hold them.
        export: Its layout, packing and documents.
        writer: Writes its files.
    """

    record: Format
    layers: CalibratedLayers
    export: PackedExport
    writer: LayoutWriter


class Exports:
    """Writes the packed formats of a job: a :class:`~nemo_ptq.calibration.pipeline.BlockVisitor`.

    Every rank has one, and uses it in a ``with`` block, after which the files with tensors are complete.

    Args:
        source: The model; the state of each block is added to its layers as the walk comes by.
        directories: An existing directory for each format; those that are not packed are left alone.
        amax_floor: Lower bound of activation amaxes; None for none.
        fixed_by: The algorithm that computed weight amaxes from data, if any: they are valid only for its own
            pre-quantization scales.
        resume: Continue the files that are in the directories.
        rounded_file: The file to write with the rounded weights, where layers have them and no file does yet.

    Raises:
        PtqError: If a format cannot represent how the model is quantized.
    """

    def __init__(
        self,
        source: Source,
        directories: Mapping[str, Path],
        amax_floor: float | None,
        fixed_by: str | None = None,
        resume: bool = False,
        rounded_file: Path | None = None,
    ) -> None:
        self._source, self._amax_floor, self._fixed_by, self._layers = source, amax_floor, fixed_by, source.layers
        self._open = ExitStack()
        self._formats: list[_Format] = []
        for name, directory in directories.items():
            record = FORMATS[name]
            if not record.is_packed:
                continue
            # A format with an adapter has a state of its own, and weight amaxes that follow from it.
            own = replace(source.layers, state={}, weight_amaxes={}) if record.adapts_state else source.layers
            export = record.prepare(replace(source, layers=own))
            writer = LayoutWriter(directory, export.layout, export.pack, source.shard_map, source.rank, resume)
            self._formats.append(_Format(record, own, export, self._open.enter_context(writer)))
        self._rounded: LayoutWriter | None = None
        if rounded_file is not None:
            layout = RoundedLayout(source.shape, source.shard_map.schemes, [rounded_file.name])
            pack = partial(pack_rounded, source)
            writer = LayoutWriter(rounded_file.parent, layout, pack, source.shard_map, source.rank, resume)
            self._rounded = self._open.enter_context(writer)

    def visit(self, index: int, block: Block | None, state: State) -> None:
        """See :meth:`BlockVisitor.visit`."""
        linears = [name for name in (block.modules if block else {}) if is_linear(name)]
        self._layers.state.update(state)
        self._layers.agree_on_weights(linears)
        for format in self._formats:
            if format.layers is not self._layers:
                self._adapt(format, state, linears)
        for writer in self._writers:
            writer.write(index)

    @property
    def _writers(self) -> list[LayoutWriter]:
        return [*(format.writer for format in self._formats), *([self._rounded] if self._rounded else [])]

    def _adapt(self, format: _Format, state: State, linears: list[str]) -> None:
        adapted = format.record.adapt(state, self._source.shape, self._amax_floor)
        format.layers.state.update(adapted)
        for name in linears:
            scale = f"{name}.input_quantizer.pre_quant_scale"
            if scale in state and not torch.equal(adapted[scale], state[scale]):
                if self._fixed_by is not None:
                    raise PtqError(
                        f"export_format={format.record.name} needs other pre-quantization scales than {self._fixed_by} "
                        "has found, and that algorithm computes weight amaxes from data: use another export_format or "
                        "algorithm"
                    )
            elif name in self._layers.weight_amaxes:
                format.layers.weight_amaxes[name] = self._layers.weight_amaxes[name]
        format.layers.agree_on_weights(linears)

    def skip(self, index: int) -> None:
        """Skips a block that an earlier process has written."""
        for writer in self._writers:
            writer.skip(index)

    def sync(self) -> None:
        """Flushes the written data to the disk."""
        for writer in self._writers:
            writer.sync()

    def finish(self) -> dict[Path, str]:
        """Waits until this rank's files are written; returns the checksum of each.

        Raises:
            OSError: If something could not be written.
        """
        return {path: checksum for writer in self._writers for path, checksum in writer.finish().items()}

    def files(self) -> dict[str, list[Path]]:
        """Returns the files with tensors that this rank writes, by format."""
        return {format.record.name: list(format.writer.files) for format in self._formats}

    @property
    def writes_rounded(self) -> bool:
        """Whether this rank writes the file with the rounded weights."""
        return self._rounded is not None and bool(self._rounded.files)

    def write_documents(self, directories: Mapping[str, Path]) -> None:
        """Writes everything but the tensors; rank 0 calls it."""
        for format in self._formats:
            format.export.write_documents(directories[format.record.name])

    def __enter__(self) -> "Exports":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
