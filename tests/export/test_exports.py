# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One walk writes all formats as each would be written alone, and goes on where an earlier one was left."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.export.manifest_writer import checksum_of
from tests.files import digests
from tests.ranks import run_ranks

FORMATS = ("trtllm", "hf", "compressed_tensors")
LEFT_AT = 2


def exported(model: Any, state: Any, directories: dict[str, Path], **options: Any) -> Any:
    """The exports of a model that has been calibrated, none of its blocks written."""
    from nemo_ptq.export.exports import Exports
    from nemo_ptq.export.shard_map import on_one_rank
    from tests import steps

    quantization = state.header.quantization
    layers = steps.calibrated_layers(model, quantization)
    caches = {name.partition(".k_bmm")[0] for name in state.tensors if ".k_bmm" in name}
    names = [name for block in model.blocks for name in block.modules]
    shard_map = on_one_rank(names, layers.schemes, frozenset(caches))
    for directory in directories.values():
        directory.mkdir(parents=True, exist_ok=True)
    source = steps.source_of(model, ExportConfig("out", export_format=list(FORMATS)), layers, shard_map)
    return Exports(source, directories, None, **options)


def visit(exports: Any, model: Any, state: Any, blocks: range) -> None:
    from nemo_ptq.quantization.state import of_block

    for index in blocks:
        exports.visit(index, model.blocks[index], of_block(state.tensors, index))


def write_in_every_way(checkpoint: Path, algorithm: str, formats: tuple[str, ...], root: Path) -> None:
    """All formats at once, each alone, and all in two processes' turns."""
    from tests import steps

    with steps.loaded(checkpoint) as model:
        state = steps.learn(model, QuantizationConfig(algorithm))
        everything = range(model.num_blocks)
        ways = {"together": formats, **{name: (name,) for name in formats}}
        for way, names in ways.items():
            directories = {name: root / ("together" if way == "together" else "alone") / name for name in names}
            with exported(model, state, directories) as exports:
                visit(exports, model, state, everything)
                checksums = exports.finish()
            assert checksums == {path: checksum_of(path) for paths in exports.files().values() for path in paths}
            if way == "together":
                assert exports.files() == {
                    name: sorted(path for path in directory.iterdir()) for name, directory in directories.items()
                }
        directories = {name: root / "resumed" / name for name in formats}
        with suppress(KeyboardInterrupt), exported(model, state, directories) as exports:
            visit(exports, model, state, everything[:LEFT_AT])
            raise KeyboardInterrupt
        with exported(model, state, directories, resume=True) as exports:
            for index in everything[:LEFT_AT]:
                exports.skip(index)
            visit(exports, model, state, everything[LEFT_AT:])


@pytest.mark.parametrize(
    ("algorithm", "formats"), [("fp8", FORMATS), ("int4_awq", FORMATS), ("int8_sq", ("trtllm", "compressed_tensors"))]
)
def test_all_formats_are_written_at_once(
    algorithm: str, formats: tuple[str, ...], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run_ranks(write_in_every_way, 1, checkpoint_of("llama31"), algorithm, formats, tmp_path)
    together, alone, resumed = (digests(tmp_path / way) for way in ("together", "alone", "resumed"))
    assert len(together) >= len(formats)
    assert together == alone
    assert together == resumed


def refused(checkpoint: Path, output: Path) -> str:
    from tests import steps

    with steps.loaded(checkpoint) as model:
        state = steps.learn(model, QuantizationConfig("int8_sq"))
        directories = {"compressed_tensors": output}
        try:
            with exported(model, state, directories, fixed_by="awq_clip") as exports:
                visit(exports, model, state, range(model.num_blocks))
        except PtqError as error:
            return str(error)
    return "written"


def test_weight_amaxes_from_data_are_of_their_own_scales_only(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Query heads that share a value get one scale, which the algorithm has not found its amaxes for."""
    (message,) = run_ranks(refused, 1, checkpoint_of("llama31"), tmp_path / "out")
    assert message.startswith("export_format=compressed_tensors needs other pre-quantization scales than awq_clip")
