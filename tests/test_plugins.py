# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Adding is local: an algorithm, a format and a data set from one file each outside the package make a whole job."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq import plugins
from nemo_ptq.calibration.datasets import DATASETS
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.launch.flags import read_arguments
from nemo_ptq.options import OPTIONS, describe_options
from nemo_ptq.plan import plan_job
from nemo_ptq.quantization.algorithms import ALGORITHMS
from nemo_ptq.quantization.state_header import read_header, state_file
from nemo_ptq.task import ptq
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.readers import REGISTERED
from tests.families import make_nemo

FILES = ("tests.plugins.headroom", "tests.plugins.fc2_files", "tests.plugins.counting")


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names the plugins as a user does; what they have added is gone afterwards."""
    tables: tuple[dict, ...] = (ALGORITHMS, FORMATS, DATASETS)
    before = [dict(table) for table in tables]
    monkeypatch.setenv(plugins.VARIABLE, ", ".join(FILES))
    plugins.load_plugins.cache_clear()
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    REGISTERED.clear()
    for module in FILES:
        sys.modules.pop(module, None)
    plugins.load_plugins.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nemo("llama2", tmp_path_factory.mktemp("checkpoint") / "llama2")


def quantization(algorithm: str) -> QuantizationConfig:
    return QuantizationConfig(
        algorithm,
        quality="fast",
        calibration_dataset="counting",
        calibration_dataset_size=4,
        calibration_batch_size=4,
        calibration_seq_len=16,
        evaluation_dataset_size=2,
    )


def test_a_job_of_parts_from_outside(outside: None, checkpoint: Path, tmp_path: Path) -> None:
    for algorithm in ("fp8", "fp8_headroom"):
        ptq(
            str(checkpoint),
            ExportConfig(str(tmp_path / algorithm), export_format=["trtllm", "fc2"]),
            quantization_config=quantization(algorithm),
        )
    plain, roomy = (load_file(tmp_path / name / "fc2" / "fc2.safetensors") for name in ("fp8", "fp8_headroom"))
    assert plain.keys() == roomy.keys() and len(plain) == 2 * 3
    for name, tensor in plain.items():
        factor = 2 if name.endswith("activation_scaling_factor") else 1
        assert torch.equal(roomy[name].float(), tensor.float() * factor), name
    name = "transformer.layers.1.mlp.proj.weights_scaling_factor"
    served = load_file(tmp_path / "fp8_headroom" / "trtllm" / "rank0.safetensors")[name]
    assert torch.equal(served, roomy["decoder.layers.1.mlp.linear_fc2.weights_scaling_factor"])
    assert "FP8 with headroom" in (tmp_path / "fp8_headroom" / "fc2" / "ptq" / "README.md").read_text()

    checks = verify(tmp_path / "fp8_headroom" / "fc2")
    assert {check.name for check in checks} >= {"files", "fc2 layers"} and all(check.ok for check in checks)

    # Another export needs the algorithm as well, and no calibration.
    state = state_file(tmp_path / "fp8_headroom")
    assert read_header(state).quantization.algorithm == "fp8_headroom"
    ptq(calibration_state=str(state), export_config=ExportConfig(str(tmp_path / "again"), export_format="fc2"))
    again, first = tmp_path / "again" / "fc2.safetensors", tmp_path / "fp8_headroom" / "fc2" / "fc2.safetensors"
    assert again.read_bytes() == first.read_bytes()


def test_options_and_plan_know_them(outside: None, checkpoint: Path, tmp_path: Path) -> None:
    assert OPTIONS["quantization_config.algorithm"].kind.problem("algorithm", "fp8_headroom") is not None
    plugins.load_plugins()
    for option, name in (
        ("quantization_config.algorithm", "fp8_headroom"),
        ("quantization_config.calibration_dataset", "counting"),
        ("export_config.export_format", "fc2"),
    ):
        assert OPTIONS[option].kind.problem(option, name) is None
        assert name in describe_options()
    words = [str(checkpoint), "-algo", "fp8_headroom", "--calibration_dataset=counting", "--export_format=fc2"]
    plan = plan_job(read_arguments([*words, f"--export_path={tmp_path}/out", "--plan_device=CPU"]), world_size=1)
    assert (plan.algorithm, plan.problems) == ("fp8_headroom", ())


def test_an_entry_point_names_a_plugin(outside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugins.VARIABLE)
    point = EntryPoint("counting", "tests.plugins.counting", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    plugins.load_plugins()
    assert "counting" in DATASETS and "fp8_headroom" not in ALGORITHMS


def test_plugins_are_imported_once(outside: None) -> None:
    plugins.load_plugins()
    plugins.load_plugins()  # a second registration would be refused
    assert len(REGISTERED) == 1


def test_a_plugin_that_cannot_be_imported_is_named(outside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "no_such_plugin")
    with pytest.raises(PtqError, match="the plugin no_such_plugin, named by NEMO_PTQ_PLUGINS, cannot be imported"):
        plugins.load_plugins()
