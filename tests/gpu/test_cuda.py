# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The whole job on a GPU gives what it gives on the CPU, and the GPU packs what the CPU would."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.evaluate import perplexity as perplexity_of_files
from nemo_ptq.verify.trtllm.trtllm_reader import Checkpoint, open_checkpoint, same_bytes
from tests.conftest import Demo

pytestmark = pytest.mark.gpu

ALGORITHMS = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
# Neighbouring bfloat16 numbers lie up to 2^-7 apart, relative to their size.
BF16_STEP = 2.0**-7
SCALES = ("scaling_factor", "scaling_factor_2")
SEQUENCE = 64
HELDOUT = 32


@dataclass(frozen=True)
class Outcome:
    """What one device made of one algorithm.

    Attributes:
        directory: The export.
        perplexity: Of the calibrated Megatron model, on held-out text; None where ModelOpt cannot simulate the format.
        packed_otherwise: Tensors as which the same calibrated state, moved to the CPU, is packed differently.
    """

    directory: Path
    perplexity: float | None
    packed_otherwise: list[str]


def heldout(demo: Demo) -> list[torch.Tensor]:
    """One batch of held-out tokens, int64 (HELDOUT, SEQUENCE)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.hf)
    texts = [json.loads(line)["text"] for line in demo.heldout.read_text(encoding="utf-8").splitlines()]
    tokens = (tokenizer(text)["input_ids"][:SEQUENCE] for text in texts)
    return [torch.tensor([row for row in tokens if len(row) == SEQUENCE][:HELDOUT])]


def run_job(demo: Demo, root: Path, on_gpu: bool) -> dict[str, Outcome]:
    """Calibrates and exports the demo model with every algorithm, on the first GPU or, if all are hidden, the CPU."""
    return {algorithm: _run_algorithm(demo, root / algorithm, algorithm, on_gpu) for algorithm in ALGORITHMS}


def _run_algorithm(demo: Demo, output: Path, algorithm: str, on_gpu: bool) -> Outcome:
    from nemo_ptq.calibration.batches import data_loop, read_job_samples
    from nemo_ptq.checkpoint.loading import load_model
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.evaluation import perplexity
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.modelopt.quantizers import calibrate
    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.parallel.process_groups import pick_device, process_groups
    from nemo_ptq.plan.rules import check_job

    silent, launch = Reporter(enabled=False), read_launch()
    device = pick_device(launch)
    assert (device.type == "cuda") == on_gpu
    job = check_job(
        world_size=1,
        nemo_checkpoint=demo.checkpoint,
        quantization_config=QuantizationConfig(
            algorithm, quality="fast", calibration_dataset=str(demo.calibration), calibration_dataset_size=64
        ),
        export_config=ExportConfig(path=str(output)),
    )
    run_job(job)
    with process_groups(launch, device):
        # ModelOpt rounds activations to NVFP4 on a GPU only.
        simulated = None
        if on_gpu or algorithm != "nvfp4":
            model = load_model(job.checkpoint, device)
            loop = data_loop(model, job.quantization, read_job_samples(job, silent).calibration, silent)
            calibrate(model.module, job.quantization, job.decoder, loop)
            simulated = perplexity(model, heldout(demo))
        otherwise = _packed_otherwise(load_model(job.checkpoint, device), output) if on_gpu else []
    return Outcome(output, simulated, otherwise)


def _packed_otherwise(model: Any, exported: Path) -> list[str]:
    """Packs a model, as an export of it was calibrated, on the GPU and on the CPU; names the tensors that differ."""
    from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
    from nemo_ptq.export.trtllm.trtllm_writer import pack_module
    from nemo_ptq.models.spec import spec_of
    from nemo_ptq.quantization.state import load_state
    from nemo_ptq.quantization.state_header import state_file
    from tests import steps

    state = load_state(state_file(exported))
    layers = steps.calibrated_layers(model, state.header.quantization)
    layers.state.update(state.tensors)
    caches = frozenset(name.partition(".k_bmm")[0] for name in state.tensors if ".k_bmm" in name)
    shape = spec_of(model.config, model.vocab_size)
    layout = QnemoLayout(shape, layers.schemes, caches, torch.bfloat16, 1, 1)
    modules = {place.part.module for block in layout.blocks(0) for tensor in block for place in tensor.placements}

    def pack() -> dict[str, torch.Tensor]:
        return {
            f"{name}.{rows}.{field}": tensor
            for name in modules
            for (rows, field), tensor in pack_module(layers, name, shape, torch.bfloat16).items()
        }

    with torch.inference_mode():
        on_gpu = pack()
        model.module.to("cpu")
        on_cpu = pack()
    assert on_gpu.keys() == on_cpu.keys() and len(on_gpu) > 20
    return [name for name, packed in on_gpu.items() if not same_bytes(packed, on_cpu[name])]


def run_apart(demo: Demo, root: Path, on_gpu: bool) -> dict[str, Outcome]:
    """Calls :func:`run_job` in a process that is started, not forked: CUDA does not survive a fork."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        if not on_gpu:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return pool.submit(run_job, demo, root, on_gpu).result()


@pytest.fixture(scope="module")
def on_gpu(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_apart(demo, tmp_path_factory.mktemp("gpu"), True)


@pytest.fixture(scope="module")
def on_cpu(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_apart(demo, tmp_path_factory.mktemp("cpu"), False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_export_passes_every_check(on_gpu: dict[str, Outcome], algorithm: str) -> None:
    checks = verify(on_gpu[algorithm].directory)
    assert len(checks) > 20
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gpu_packs_what_the_cpu_packs(on_gpu: dict[str, Outcome], algorithm: str) -> None:
    assert on_gpu[algorithm].packed_otherwise == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_perplexity_agrees_between_devices_and_with_the_files(
    demo: Demo, on_gpu: dict[str, Outcome], on_cpu: dict[str, Outcome], algorithm: str
) -> None:
    gpu, cpu = on_gpu[algorithm], on_cpu[algorithm]
    documents = heldout(demo)
    from_files = perplexity_of_files(gpu.directory, documents)
    assert perplexity_of_files(gpu.directory, documents, torch.device("cuda")) == pytest.approx(from_files, rel=0.01)
    assert perplexity_of_files(cpu.directory, documents) == pytest.approx(from_files, rel=0.01)
    assert gpu.perplexity == pytest.approx(from_files, rel=0.01)
    if cpu.perplexity is not None:
        assert gpu.perplexity == pytest.approx(cpu.perplexity, rel=0.01)


def linears_that_differ(found: Checkpoint, expected: Checkpoint) -> list[str]:
    """Layers whose scales differ by more than two roundings: one of a range, one of what is derived from it."""
    return sorted(
        {
            name.rpartition(".")[0]
            for name in expected.names()
            if name.endswith(SCALES)
            and not torch.allclose(
                found.tensor(name).float(), expected.tensor(name).float(), rtol=2 * BF16_STEP, atol=0.0
            )
        }
    )


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "nvfp4"])
def test_scales_agree_between_devices_to_bf16_rounding(
    on_gpu: dict[str, Outcome], on_cpu: dict[str, Outcome], algorithm: str
) -> None:
    gpu, cpu = (open_checkpoint(outcomes[algorithm].directory) for outcomes in (on_gpu, on_cpu))
    assert linears_that_differ(gpu, cpu) == []


@pytest.mark.parametrize("algorithm", ["int4_awq", "w4a8_awq"])
def test_awq_picks_the_same_scale_on_both_devices_for_most_layers(
    on_gpu: dict[str, Outcome], on_cpu: dict[str, Outcome], algorithm: str
) -> None:
    """Where two exponents are as good as each other, a rounding of the activations decides."""
    gpu, cpu = (open_checkpoint(outcomes[algorithm].directory) for outcomes in (on_gpu, on_cpu))
    linears = {name.rpartition(".")[0] for name in cpu.names() if name.endswith(SCALES)}
    assert len(linears_that_differ(gpu, cpu)) <= len(linears) // 8


@pytest.mark.parametrize("algorithm", ["fp8", "nvfp4"])
def test_weights_that_depend_on_no_data_agree_between_devices(
    on_gpu: dict[str, Outcome], on_cpu: dict[str, Outcome], algorithm: str
) -> None:
    gpu, cpu = (open_checkpoint(outcomes[algorithm].directory) for outcomes in (on_gpu, on_cpu))
    names = [name for name in cpu.names() if name.endswith((".weight", ".weights_scaling_factor"))]
    assert [name for name in names if not same_bytes(gpu.tensor(name), cpu.tensor(name))] == []
