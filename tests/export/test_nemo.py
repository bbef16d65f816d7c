# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Format "nemo": a fresh model that restores it computes the calibrated model's logits, and exports the same files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.preflight import check_job
from nemo_ptq.report.write import FILES
from nemo_ptq.verify.checks import verify
from tests.conftest import Demo
from tests.families import TOKENS as VOCABULARY
from tests.ranks import run_ranks
from tests.test_engine import arguments, digests, run_task

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def export_calibrated(checkpoint: Path, algorithm: str, tp: int, output: Path) -> torch.Tensor | None:
    """Calibrates and exports as a NeMo checkpoint; returns the calibrated model's logits."""
    from nemo_ptq import engine
    from nemo_ptq.console import Reporter
    from tests import steps

    job = check_job(
        nemo_checkpoint=checkpoint,
        quantization_config=QuantizationConfig(algorithm, enable_kv_cache=True),
        export_config=ExportConfig(str(output), export_format="nemo"),
        forward_loop=print,
        calibration_tp=tp,
        world_size=tp,
    )
    with steps.loaded(checkpoint, tp) as model:
        steps.calibrate(model, job.quantization)
        engine.export(model, job, Reporter(False))
        return steps.logits(model, TOKENS)


def restored(checkpoint: Path, tp: int) -> torch.Tensor | None:
    """The logits of what our own loader makes of a checkpoint."""
    from tests import steps

    with steps.loaded(checkpoint, tp) as model:
        return steps.logits(model, TOKENS)


def restored_by_nemo(original: Path, checkpoint: Path, tp: int) -> torch.Tensor | None:
    """The same through NeMo's function, on a model that was built from the unquantized checkpoint.

    NeMo then reads the weights as it does here: by the model's own sharded state dict.
    """
    from megatron.core import dist_checkpointing
    from nemo.collections.llm.modelopt.model_utils import restore_modelopt_state

    from tests import steps

    with steps.loaded(original, tp) as model:
        for parameter in model.module.parameters():
            parameter.data.zero_()
        restore_modelopt_state(model.module, path=str(checkpoint))
        state = {"state_dict": model.module.sharded_state_dict(prefix="module.")}
        read = dist_checkpointing.load(state, str(checkpoint / "weights"))["state_dict"]
        model.module.load_state_dict({key.removeprefix("module."): value for key, value in read.items()}, strict=False)
        return steps.logits(model, TOKENS)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("llama31", "fp8"),
        ("llama31", "int8_sq"),
        ("llama31", "w4a8_awq"),
        pytest.param("llama31", "int4_awq", marks=pytest.mark.slow),
        pytest.param("mixtral", "fp8", marks=pytest.mark.slow),
        pytest.param("gemma", "w4a8_awq", marks=pytest.mark.slow),
        pytest.param("starcoder2", "int8_sq", marks=pytest.mark.slow),
        pytest.param("starcoder", "fp8", marks=pytest.mark.slow),
        pytest.param("nemotron", "fp8", marks=pytest.mark.slow),
        pytest.param("mistral", "int4_awq", marks=pytest.mark.slow),
        pytest.param("gpt_geglu", "int8_sq", marks=pytest.mark.slow),
    ],
)
def test_restoring_gives_the_calibrated_models_logits(
    name: str, algorithm: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    original = checkpoint_of(name)
    for tp in (1, 2):
        output = tmp_path / f"tp{tp}"
        expected = run_ranks(export_calibrated, tp, original, algorithm, tp, output)[0]
        assert all(check.ok for check in verify(output, load_tokenizer=True))
        assert torch.equal(run_ranks(restored, tp, output, tp)[0], expected)
        assert torch.equal(run_ranks(restored_by_nemo, tp, original, output, tp)[0], expected)
    # Another parallelism adds up in another order.
    found = run_ranks(restored, 1, tmp_path / "tp2", 1)[0]
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.1


@pytest.mark.parametrize(
    "algorithm", ["int4_awq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "int8_sq", "nvfp4"))]
)
def test_another_export_from_it_has_the_same_bytes(demo: Demo, algorithm: str, tmp_path: Path) -> None:
    both = arguments(demo, tmp_path / "both", algorithm=algorithm, export={"export_format": "[trtllm,nemo]"})
    run_ranks(run_task, 2, both | {"calibration_tp": 2})
    for tp in (1, 2):
        output = tmp_path / f"again{tp}"
        task = {"nemo_checkpoint": str(tmp_path / "both" / "nemo"), "export_config": ExportConfig(str(output))}
        run_ranks(run_task, tp, task | {"calibration_tp": tp})
        direct, found = digests(tmp_path / "both" / "trtllm"), digests(output)
        different = {name for name in direct.keys() | found.keys() if direct.get(name) != found.get(name)}
        # The manifest names the arguments, which differ, and so does the report, which has measured nothing on text.
        assert different <= {"ptq/manifest.json", *map(str, FILES)}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("nemo") / "out"
    run_ranks(export_calibrated, 1, checkpoint_of("llama31"), "fp8", 1, output)
    return output


def failed(directory: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(directory) if not check.ok}


def test_the_reader_notices_what_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    assert failed(checkpoint) == {}
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "weights" / "modelopt_state" / "common.pt").unlink()
    assert failed(broken).keys() == {"files", "modelopt_state"}
    shutil.rmtree(broken / "context" / "nemo_tokenizer")
    assert "tokenizer" in failed(broken)
    (shard,) = (broken / "weights").glob("__0_0.distcp")
    shard.unlink()
    assert "lacks __0_0.distcp" in failed(broken)["weights"]


def test_a_model_of_another_shape_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    yaml = broken / "context" / "model.yaml"
    yaml.write_text(yaml.read_text().replace("ffn_hidden_size: 512", "ffn_hidden_size: 640"))
    assert "expected [640, 256]" in failed(broken)["shapes"]


def problems_of(**task: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_job(world_size=1, **task)
    return list(caught.value.problems)


def test_what_is_quantized_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    export = ExportConfig(str(tmp_path / "out"))
    job = check_job(nemo_checkpoint=checkpoint, export_config=export, world_size=1)
    assert job.metadata.is_quantized
    assert job.quantization.enable_kv_cache is True  # as it was made
    state = checkpoint / "ptq" / "calibration.safetensors"
    (problem,) = problems_of(nemo_checkpoint=checkpoint, export_config=export, calibration_state=state)
    assert problem.endswith("with a checkpoint that is quantized already: leave it out")
    wish = QuantizationConfig("int8_sq")
    (problem,) = problems_of(nemo_checkpoint=checkpoint, export_config=export, quantization_config=wish)
    assert problem.startswith("quantization_config.algorithm=int8_sq with a calibration_state that was made with fp8")
    export = ExportConfig(str(tmp_path / "out"), export_format="compressed_tensors")
    (problem,) = problems_of(nemo_checkpoint=checkpoint, export_config=export)
    assert "is not for a checkpoint that is quantized already: give the unquantized one" in problem


def test_half_precision_is_refused(demo: Demo, tmp_path: Path) -> None:
    export = ExportConfig(str(tmp_path / "out"), export_format="nemo", dtype="fp16")
    (problem,) = problems_of(nemo_checkpoint=demo.checkpoint, export_config=export, forward_loop=print)
    assert problem.endswith("holds the calibrated model: use bf16")


def test_the_manifest_names_the_format(checkpoint: Path) -> None:
    assert json.loads((checkpoint / "ptq" / "manifest.json").read_text())["format"] == "nemo"
