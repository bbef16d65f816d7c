# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The job's steps on one rank, for tests that look between them. Imports Megatron and NeMo: for functions on ranks."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_ptq.calibration import algorithms
from nemo_ptq.calibration.forward import forward_batches
from nemo_ptq.checkpoint.loading import LoadedModel, load_model
from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.console import Reporter
from nemo_ptq.export.layout import QnemoLayout
from nemo_ptq.export.ownership import gather_ownership, global_modules
from nemo_ptq.export.qnemo import write_rank_files
from nemo_ptq.export.qnemo_config import qnemo_config
from nemo_ptq.export.shape import shape_of
from nemo_ptq.families import Family, family_of
from nemo_ptq.launch import read_launch
from nemo_ptq.quiet import quiet_libraries
from nemo_ptq.runtime import process_groups
from tests.families import TOKENS

CPU = torch.device("cpu")


@contextmanager
def loaded(checkpoint: Path, tp: int = 1, pp: int = 1, ep: int = 1) -> Iterator[LoadedModel]:
    """Loads this rank's part of a model, on the CPU wherever the tests run."""
    quiet_libraries()
    groups = process_groups(read_launch(), CPU, tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep)
    with groups:
        yield load_model(checkpoint, CPU)


def family(model: LoadedModel) -> Family:
    """The model's family."""
    return family_of(type(model.config).__name__)


def random_batches() -> list[torch.Tensor]:
    """Token ids as calibration data: four full batches, and one of a single short sequence."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, TOKENS, size, generator=generator) for size in [(4, 32)] * 4 + [(1, 7)]]


def calibrate(
    model: LoadedModel, quantization: QuantizationConfig, batches: Sequence[torch.Tensor] | None = None
) -> None:
    """Calibrates a model in place."""
    tokens = random_batches() if batches is None else batches

    def loop(module: torch.nn.Module) -> None:
        for _ in forward_batches(module, tokens):
            pass

    if quantization.algorithm_name != NO_QUANT:
        decoder = family(model).decoder
        assert decoder is not None
        algorithms.calibrate(model.module, quantization, decoder, loop)


def export(model: LoadedModel, directory: Path, tp: int = 1, pp: int = 1) -> None:
    """Writes the rank files and config.json of a calibrated model."""
    modules = global_modules(model.module)
    ownership = gather_ownership(modules)
    shape = shape_of(model.config, model.vocab_size)
    layout = QnemoLayout(shape, ownership.schemes, ownership.kv_cache, torch.bfloat16, tp, pp)
    directory.mkdir(parents=True, exist_ok=True)
    write_rank_files(directory, modules, ownership, layout, Reporter(False))
    if dist.get_rank() == 0:
        config = qnemo_config(layout, family(model), "0")
        (directory / "config.json").write_text(json.dumps(config))
    dist.barrier()


def in_float32(model: LoadedModel) -> None:
    """Turns a model's arithmetic to float32, whatever its weights were rounded to before."""
    model.module.float()
    model.module.config.params_dtype = torch.float32
