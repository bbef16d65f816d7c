# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whole jobs of a hybrid: its files hold the model, whatever the parallelism, and whatever it was read from."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.checkpoint.allowed_names import AllowedNames
from nemo_ptq.checkpoint.huggingface.hf_weights import load_tokenizer
from nemo_ptq.checkpoint.index import read_stored
from nemo_ptq.checkpoint.reader import open_checkpoint
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits, open_model
from tests.export.hugging_face import TOKENS, distance
from tests.hybrids import make_nemotron_h
from tests.ranks import run_ranks

# Whole jobs: on a busy machine one file's fixture takes minutes.
pytestmark = pytest.mark.timeout(900)
BOTH = ("hf", "compressed_tensors")
FORMATS: Mapping[str, Sequence[str]] = {
    "no_quant": ("compressed_tensors",),
    "fp8_dynamic": ("compressed_tensors",),
    "fp8": BOTH,
    "int4_awq": BOTH,
    "nvfp4": BOTH,
    "int8_sq": ("compressed_tensors",),
}
# Relative distance from the unquantized model of a token's logits, in the median: random weights are moved far.
NEAR = {"fp8": 0.2, "int4_awq": 0.55, "nvfp4": 0.6, "int8_sq": 0.1, "fp8_dynamic": 0.2}


def run_jobs(
    source: Path, algorithms: Sequence[str], layout: tuple[int, int], directory: Path, quality: str = "fast"
) -> None:
    """Exports a model with several algorithms, each to ``directory / algorithm / format``, on this rank."""
    from nemo_ptq.task import ptq

    texts = source.with_name("texts.txt")
    for algorithm in algorithms:
        quantization = QuantizationConfig(
            algorithm,
            quality=quality,
            calibration_dataset=str(texts),
            calibration_dataset_size=8,
            calibration_batch_size=4,
            calibration_seq_len=24,
            evaluation_dataset_size=0,
        )
        export = ExportConfig(str(directory / algorithm), export_format=list(FORMATS[algorithm]))
        tp, pp = layout
        ptq(str(source), export, calibration_tp=tp, calibration_pp=pp, quantization_config=quantization)


def import_and_run(source: Path, checkpoint: Path, directory: Path) -> None:
    """Imports a model as a NeMo checkpoint, and exports that."""
    from nemo_ptq.checkpoint.huggingface.importer import import_hf

    import_hf(str(source), str(checkpoint))
    shutil.copyfile(source.with_name("texts.txt"), checkpoint.with_name("texts.txt"))
    run_jobs(checkpoint, ["no_quant"], (1, 1), directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Nemotron-H."""
    directory = make_nemotron_h(tmp_path_factory.mktemp("nemotron_h") / "hf")
    lines = (f"the quick brown fox jumps {number} times over the dog\n" for number in range(16))
    directory.with_name("texts.txt").write_text("".join(lines))
    return directory


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All algorithms, from one rank."""
    directory = tmp_path_factory.mktemp("exports")
    run_ranks(run_jobs, 1, source, list(FORMATS), (1, 1), directory, timeout=600.0)
    return directory


def moved(export: Path, source: Path) -> float:
    """How far logits are from those of the unquantized model, on what the job was calibrated on.

    Of other tokens, INT8 clips what is larger than all that it has seen, which moves a random model's logits by half.
    """
    tokenizer = load_tokenizer(source)
    lines = source.with_name("texts.txt").read_text().splitlines()[:8]
    tokens = torch.tensor([tokenizer(line).input_ids[:24] for line in lines])
    return distance(logits(export, tokens), logits(source, tokens))


def unquantized(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_holds(export: Path, source: Path) -> None:
    """Compares an unquantized export with its source, tensor by tensor."""
    found, expected = unquantized(export), unquantized(source)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name].float()), name
        in_float32 = name.endswith((".A_log", ".D", ".dt_bias"))
        assert tensor.dtype == (torch.float32 if in_float32 else torch.bfloat16), name


def test_nothing_is_lost(source: Path, exports: Path) -> None:
    export = exports / "no_quant" / "compressed_tensors"
    assert_holds(export, source)
    config = json.loads((export / "config.json").read_text())
    assert "auto_map" not in config and config["head_dim"] == 64
    assert "Infinity" not in (export / "config.json").read_text()


@pytest.mark.parametrize("algorithm, format", [(algorithm, name) for algorithm in NEAR for name in FORMATS[algorithm]])
def test_the_files_are_the_model_rounded(algorithm: str, format: str, source: Path, exports: Path) -> None:
    export = exports / algorithm / format
    assert [check for check in verify(export) if not check.ok] == []
    assert 1e-3 < moved(export, source) < NEAR[algorithm]
    stored = load_file(export / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith((".conv1d.weight", ".norm.weight", ".A_log", ".D", ".dt_bias", "lm_head.weight")):
            assert tensor.dtype in (torch.bfloat16, torch.float32), name
    layers = {
        name.rpartition(".")[0]
        for name, tensor in stored.items()
        if tensor.dtype not in (torch.bfloat16, torch.float32)
    }
    assert {f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "out_proj")} < layers
    assert {f"backbone.layers.3.mixer.{name}_proj" for name in "qkvo"} < layers
    assert {f"backbone.layers.1.mixer.{name}_proj" for name in ("up", "down")} < layers


def effective_weight(directory: Path, linear: str, norm: str) -> torch.Tensor:
    """What multiplies a normalised input: a layer's weight, its stored scale, and the gain of the norm before it."""
    weights = open_model(directory)
    (stored,) = weights.linear(f"transformer.layers.0.{linear}", torch.device("cpu"))
    found = stored.dequantized()
    scale = torch.ones(()) if found.prequant_scale is None else found.prequant_scale
    return found.weight * scale * weights.tensor(f"transformer.layers.0.{norm}.weight").float()


@pytest.mark.parametrize(("linear", "norm"), [("ssm.in_proj", "norm"), ("ssm.out_proj", "ssm.norm")])
def test_awqs_scales_are_folded_as_they_are_stored(linear: str, norm: str, source: Path, exports: Path) -> None:
    stored, folded = (effective_weight(exports / "int4_awq" / name, linear, norm) for name in BOTH)
    exact = effective_weight(source, linear, norm)
    assert (folded - stored).norm() < 0.05 * exact.norm()  # gains and INT4's scales are rounded to bfloat16
    assert 0.05 * exact.norm() < (folded - exact).norm() < 0.2 * exact.norm()
    gains = [unquantized(exports / "int4_awq" / name)["backbone.layers.0.mixer.norm.weight"] for name in BOTH]
    assert not torch.equal(*gains)


def test_parallelism_does_not_show(source: Path, exports: Path, tmp_path: Path) -> None:
    run_ranks(run_jobs, 4, source, ["no_quant", "fp8_dynamic", "fp8"], (2, 2), tmp_path, timeout=600.0)
    assert_holds(tmp_path / "no_quant" / "compressed_tensors", source)
    file = Path("fp8_dynamic", "compressed_tensors", "model.safetensors")
    assert (tmp_path / file).read_bytes() == (exports / file).read_bytes()
    found, expected = (logits(path / "fp8" / "hf", TOKENS) for path in (tmp_path, exports))
    # Amaxes differ by the order of sums in bfloat16.
    assert distance(found, expected) < 0.1


def test_nemos_checkpoint_has_the_names_that_nemo_gives_it(source: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "nemo"
    run_ranks(import_and_run, 1, source, checkpoint, tmp_path, timeout=600.0)
    stored = read_stored(checkpoint).tensors
    mixer = "module.decoder.layers.0.mixer."
    shapes = {name.removeprefix(mixer): tensor.shape for name, tensor in stored.items() if name.startswith(mixer)}
    rows = {"z": 512, "x": 512, "B": 32, "C": 32, "dt": 32}
    assert {name: tuple(shape) for name, shape in shapes.items()} == {
        **{f"in_proj.weight.{name}": (count, 256) for name, count in rows.items()},
        **{f"conv1d.weight.{name}": (rows[name], 1, 4) for name in "xBC"},
        **{f"conv1d.bias.{name}": (rows[name],) for name in "xBC"},
        **dict.fromkeys(("A_log", "D", "dt_bias"), (32,)),
        **{"in_proj.layer_norm_weight": (256,), "norm.weight": (512,), "out_proj.weight": (256, 512)},
    }
    assert "module.decoder.final_norm.weight" in stored
    # NeMo builds neither of them.
    assert all(open_checkpoint(path, AllowedNames()).fields is not None for path in (source, checkpoint))
    assert_holds(tmp_path / "no_quant" / "compressed_tensors", source)
    torch.testing.assert_close(logits(checkpoint, TOKENS), logits(source, TOKENS))


def convert_there_and_back(source: Path, directory: Path) -> None:
    """Converts a Hugging Face directory to NeMo's format, and that to Hugging Face's."""
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.convert import convert

    convert(source, directory / "nemo", "nemo", None, Reporter(False))
    convert(directory / "nemo", directory / "hf", "hf", None, Reporter(False))


def test_conversions_lose_nothing(source: Path, tmp_path: Path) -> None:
    run_ranks(convert_there_and_back, 1, source, tmp_path, timeout=600.0)
    assert_holds(tmp_path / "hf", source)


def test_megatron_lm_is_no_target_of_conversions(source: Path, tmp_path: Path) -> None:
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.convert import convert

    with pytest.raises(PtqError, match="Megatron-LM has no arguments for layers with state spaces"):
        convert(source, tmp_path / "megatron", "megatron", None, Reporter(False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "quality"),
    [*((algorithm, "balanced") for algorithm in ("fp8", "int4_awq", "nvfp4", "int8_sq")), ("int4_awq", "max")],
)
def test_a_job_that_rounds_by_the_data_at_tensor_parallelism(
    algorithm: str, quality: str, source: Path, tmp_path: Path
) -> None:
    run_ranks(run_jobs, 2, source, [algorithm], (2, 1), tmp_path, quality)
    for name in FORMATS[algorithm]:
        export = tmp_path / algorithm / name
        report = json.loads((export / "ptq" / "report.json").read_text())
        assert report["summary"]["quality"] == quality
        assert [check for check in verify(export) if not check.ok] == []
        assert 1e-3 < moved(export, source) < NEAR[algorithm]
