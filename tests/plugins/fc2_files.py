# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A format: one file with the last linear layer of each MLP, by Megatron's names, and how to check it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from nemo_ptq.export.formats import Format, register
from nemo_ptq.export.layout import Block, Part, whole
from nemo_ptq.export.packing import all_rows, pack_linear
from nemo_ptq.export.source import PackedExport, Source
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.schemes import UNQUANTIZED, Scheme
from nemo_ptq.verify import readers as verified

FILE = "fc2.safetensors"


@dataclass(frozen=True)
class Fc2Layout:
    """The layout table.

    Attributes:
        shape: The model.
        schemes: Scheme of each quantized linear layer.
        dtype: Data type of what is not quantized.
    """

    shape: ModelSpec
    schemes: Mapping[str, Scheme]
    dtype: torch.dtype
    files: Sequence[str] = (FILE,)

    def metadata(self, file: int) -> Mapping[str, str]:
        """See :class:`nemo_ptq.export.layout.Layout`."""
        return {}

    def blocks(self, file: int) -> Iterator[Block]:
        """See :class:`nemo_ptq.export.layout.Layout`."""
        outputs, inputs = self.shape.hidden_size, self.shape.ffn_hidden_size
        yield []
        for layer in range(self.shape.num_layers):
            module = f"decoder.layers.{layer}.mlp.linear_fc2"
            scheme = self.schemes.get(module, UNQUANTIZED)
            yield [
                whole(
                    Part(module, "", field.suffix, field.shape(outputs, inputs, scheme.block_size), field.row_axis),
                    f"{module}.{field.suffix}",
                    field.dtype or self.dtype,
                )
                for field in scheme.fields
            ]
        yield []


def fc2_export(source: Source) -> PackedExport:
    """Prepares the directory."""
    layout = Fc2Layout(source.shape, source.shard_map.schemes, source.dtype)
    config = json.dumps({"fc2_layers": source.shape.num_layers})
    return PackedExport(
        layout,
        lambda name: pack_linear(source.layers.linear(name), all_rows, source.dtype),
        lambda directory: (directory / "config.json").write_text(config),
    )


def is_fc2(directory: Path) -> bool:
    """Whether a directory is in this format."""
    return (directory / FILE).is_file()


def checks(directory: Path, load_tokenizer: bool) -> Iterator[verified.Check]:
    """Yields the checks of a directory."""
    layers = json.loads((directory / "config.json").read_text())["fc2_layers"]
    weights = [name for name in load_file(directory / FILE) if name.endswith("linear_fc2.weight")]
    yield verified.Check("fc2 layers", len(weights) == layers, f"{len(weights)} of {layers}")


register(Format("fc2", "the last linear layer of each MLP", packed_export=f"{__name__}:fc2_export"))
verified.register(verified.Reader("fc2", is_fc2, checks))
