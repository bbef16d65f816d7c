# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Format "nemo": a fresh model that restores it computes the calibrated model's logits, and exports the same files."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.plan.rules import check_job
from nemo_ptq.report.write import FILES
from nemo_ptq.verify.checks import verify
from tests.conftest import Demo
from tests.engine.test_run import arguments, run_task
from tests.families import TOKENS as VOCABULARY
from tests.files import digests
from tests.matrix import MODELS, Record, algorithms_of, record
from tests.ranks import run_ranks

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Seen:
    """This rank's part of a model.

    Attributes:
        tensors: Its weights, and the ranges and scales of its quantizers.
        logits: What it computes; None for NVFP4, which ModelOpt simulates on GPUs only.
    """

    tensors: Mapping[str, torch.Tensor]
    logits: torch.Tensor | None

    def differences(self, other: "Seen") -> list[str]:
        """Names of what another model does not have exactly so."""
        names = sorted(self.tensors.keys() | other.tensors.keys())
        different = [name for name in names if not equal(self.tensors.get(name), other.tensors.get(name))]
        return [*different, *([] if equal(self.logits, other.logits) else ["logits"])]


def equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether two tensors are the same, or there is neither."""
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left, right)


def seen(model: Any, algorithm: str) -> Seen:
    """Looks at a model."""
    from tests import steps

    tensors = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    return Seen(tensors, None if algorithm == "nvfp4" else steps.logits(model, TOKENS))


def export_calibrated(checkpoint: Path, algorithm: str, tp: int, output: Path, formats: str) -> None:
    """Calibrates a model and exports it."""
    from tests import steps

    quantization = QuantizationConfig(algorithm, enable_kv_cache=algorithm != NO_QUANT)
    steps.run_job(steps.job_of(checkpoint, quantization, output, (tp, 1), formats=formats))


def calibrated_by_modelopt(checkpoint: Path, algorithm: str) -> Seen:
    """What ModelOpt makes of the unquantized checkpoint on the same data."""
    from nemo_ptq.checkpoint.loading import load_model
    from tests import steps

    model = load_model(checkpoint, steps.CPU)
    steps.calibrate(model, QuantizationConfig(algorithm, enable_kv_cache=algorithm != NO_QUANT))
    return seen(model, algorithm)


def restored(checkpoint: Path, algorithm: str) -> Seen:
    """What our own loader makes of a checkpoint."""
    from nemo_ptq.checkpoint.loading import load_model
    from nemo_ptq.modelopt.restore import restore_quantizers
    from tests import steps

    model = load_model(checkpoint, steps.CPU)
    restore_quantizers(model.module, checkpoint)
    return seen(model, algorithm)


def restored_by_nemo(original: Path, checkpoint: Path, algorithm: str) -> Seen:
    """The same through NeMo's function, on a model that was built from the unquantized checkpoint.

    NeMo then reads the weights as it does here: by the model's own sharded state dict.
    """
    from megatron.core import dist_checkpointing
    from nemo.collections.llm.modelopt.model_utils import restore_modelopt_state

    from nemo_ptq.checkpoint.loading import load_model
    from tests import steps

    model = load_model(original, steps.CPU)
    for parameter in model.module.parameters():
        parameter.data.zero_()
    restore_modelopt_state(model.module, path=str(checkpoint))
    state = {"state_dict": model.module.sharded_state_dict(prefix="module.")}
    read = dist_checkpointing.load(state, str(checkpoint / "weights"))["state_dict"]
    model.module.load_state_dict({key.removeprefix("module."): value for key, value in read.items()}, strict=False)
    return seen(model, algorithm)


@dataclass(frozen=True)
class Cell:
    """What came of a model and an algorithm, on one rank.

    Attributes:
        logits: The calibrated model's.
        differences: Tensors that a restored model does not have exactly as the calibrated one.
    """

    logits: torch.Tensor | None
    differences: Sequence[str]


def run_cells(
    original: Path, source: Path | None, algorithms: Sequence[str], tp: int, directory: Path
) -> dict[str, Cell]:
    """Exports a model with several algorithms and restores it in every way, on this rank.

    Args:
        original: The unquantized NeMo checkpoint.
        source: The Hugging Face directory that it comes from.
        algorithms: How to quantize.
        tp: Tensor parallelism.
        directory: Gets a directory for each algorithm.
    """
    from nemo_ptq.parallel.process_groups import process_groups
    from tests import steps

    found = {}
    steps.quiet_libraries()
    for algorithm in algorithms:
        output = directory / algorithm
        export_calibrated(original, algorithm, tp, output, "[nemo,trtllm]")
        if source is not None:
            export_calibrated(source, algorithm, tp, output / "straight", "nemo")
        with process_groups(steps.read_launch(), steps.CPU, tensor_parallel=tp, pipeline_parallel=1):
            calibrated = calibrated_by_modelopt(original, algorithm)
            models = {
                "our loader": restored(output / "nemo", algorithm),
                "NeMo": restored_by_nemo(original, output / "nemo", algorithm),
            }
            if source is not None:
                models["from Hugging Face"] = restored(output / "straight", algorithm)
        different = [f"{way}: {name}" for way, model in models.items() for name in calibrated.differences(model)]
        found[algorithm] = Cell(calibrated.logits, different)
    return found


def restored_alone(checkpoint: Path, algorithm: str) -> torch.Tensor | None:
    """The logits at TP 1."""
    from nemo_ptq.modelopt.restore import restore_quantizers
    from tests import steps

    with steps.loaded(checkpoint) as model:
        restore_quantizers(model.module, checkpoint)
        return seen(model, algorithm).logits


def check_cells(
    checkpoint: Path, model: str, algorithms: Sequence[str], directory: Path, record_property: Record
) -> None:
    source = checkpoint.with_name(f"{model}.hf")
    for tp in (1, 2):
        place = directory / f"tp{tp}"
        ranks = run_ranks(
            run_cells, tp, checkpoint, source if source.exists() else None, algorithms, tp, place, timeout=600
        )
        for algorithm in algorithms:
            assert [problem for rank in ranks for problem in rank[algorithm].differences] == []
            for written in (place / algorithm / "nemo", place / algorithm / "straight"):
                if written.exists():
                    assert [check for check in verify(written, load_tokenizer=True) if not check.ok] == []
            check_export(place / algorithm, algorithm, tp)
    for algorithm in algorithms:
        outcome = "equal tensors"
        if algorithm != "nvfp4":  # another parallelism adds up in another order
            (found,) = run_ranks(restored_alone, 1, directory / "tp2" / algorithm / "nemo", algorithm)
            expected = ranks[0][algorithm].logits
            assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.1, algorithm
            outcome = "equal"
        record(record_property, "nemo", model=model, algorithm=algorithm, outcome=outcome)


def check_export(directory: Path, algorithm: str, tp: int) -> None:
    """The whole job makes of the checkpoint what was exported beside it."""
    # What is quantized already says how; what is not wants to be told that it stays so.
    how = {"quantization_config": QuantizationConfig(NO_QUANT)} if algorithm == NO_QUANT else {}
    again = directory / "again"
    job = {"nemo_checkpoint": str(directory / "nemo"), "export_config": ExportConfig(str(again)), **how}
    run_ranks(run_task, tp, {**job, "calibration_tp": tp})
    assert_same_bytes(directory / "trtllm", again)


def assert_same_bytes(direct: Path, again: Path) -> None:
    """But for the manifest, which names the arguments, and the report, which has measured nothing on text."""
    left, right = digests(direct), digests(again)
    different = {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}
    assert different <= {"ptq/manifest.json", *map(str, FILES)}


CHECKPOINT_OF = Callable[[str], Path]


def test_restoring_gives_the_calibrated_model(
    checkpoint_of: CHECKPOINT_OF, tmp_path: Path, record_property: Record
) -> None:
    algorithms = ["w4a8_awq"]  # all of them in test_every_cell
    check_cells(checkpoint_of("llama31"), "llama31", algorithms, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", MODELS)
def test_every_cell(model: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path, record_property: Record) -> None:
    check_cells(checkpoint_of(model), model, algorithms_of("nemo", model), tmp_path, record_property)


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
        assert_same_bytes(tmp_path / "both" / "trtllm", output)


@pytest.fixture(scope="module")
def unquantized(checkpoint_of: CHECKPOINT_OF, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nemo")
    run_ranks(run_cells, 1, checkpoint_of("llama31"), None, ["fp8", NO_QUANT], 1, directory)
    return directory / NO_QUANT / "nemo"


@pytest.fixture(scope="module")
def checkpoint(unquantized: Path) -> Path:
    return unquantized.parent.with_name("fp8") / "nemo"


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


def test_a_model_of_another_shape_is_noticed(checkpoint: Path, unquantized: Path, tmp_path: Path) -> None:
    for original, expected in ((checkpoint, "[640, 256]"), (unquantized, "[2, 1280, 256]")):
        assert failed(original) == {}
        broken = Path(shutil.copytree(original, tmp_path / expected))
        yaml = broken / "context" / "model.yaml"
        yaml.write_text(yaml.read_text().replace("ffn_hidden_size: 512", "ffn_hidden_size: 640"))
        assert f"expected {expected}" in failed(broken)["shapes"]


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
