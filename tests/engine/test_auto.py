# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Algorithm "auto": each layer gets an algorithm of its own, within the bits that were asked for."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.choosing import Choice, choice_of, choose_again, keep_choice, kept_choice
from nemo_ptq.engine.reexport import is_possible, run_reexport
from nemo_ptq.export.mixing import bits_of, layer_groups
from nemo_ptq.job import Job
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.state_header import IN_EXPORT, read_header
from nemo_ptq.report.records import MixedPrecision, read_report
from nemo_ptq.report.write import REPORT
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.conftest import Demo
from tests.engine.test_resume import die_between_blocks, said_by
from tests.engine.test_run import arguments, run_task
from tests.export.hugging_face import TOKENS, distance, transformers_logits
from tests.files import digests
from tests.plan.models import LLAMA_8B, MIXTRAL
from tests.ranks import RankFailed, run_ranks

# Bits that were asked for, formats, and candidates. Formats that are written together mix what all of them can.
CASES = {
    "both": (5.9, ("hf", "compressed_tensors"), None),
    "one": (4.9, ("compressed_tensors",), None),
    "int8": (5.95, ("compressed_tensors",), ["int8_dynamic", "int4_awq"]),
}
EXPERTS = {"experts": (6.0, ("hf",), None)}
# Ends of the names of what stores a quantized weight, the scales of tensors apart.
STORED = (".weight", ".weight_packed", ".weight_scale")


def run_all(checkpoint: Path, root: Path, names: list[str], layout: tuple[int, int] = (1, 1)) -> None:
    """Runs jobs one after the other in this process."""
    from tests import steps

    for name in names:
        bits, formats, candidates = {**CASES, **EXPERTS}[name]
        quantization = QuantizationConfig(
            "auto",
            effective_bits=bits,
            candidates=candidates,
            awq_block_size=64,
            calibration_dataset="builtin",
            calibration_dataset_size=64,
            calibration_seq_len=128,
            evaluation_dataset_size=0,
        )
        job = check_job(
            world_size=layout[0] * layout[1],
            calibration_tp=layout[0],
            calibration_pp=layout[1],
            nemo_checkpoint=str(checkpoint),
            quantization_config=quantization,
            export_config=ExportConfig(str(root / name), export_format=list(formats)),
        )
        steps.run_job(job)


@pytest.fixture(scope="module")
def exports(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("auto")
    run_ranks(run_all, 1, checkpoint_of("llama31"), root, list(CASES))
    return root


def directories(root: Path) -> dict[str, Path]:
    return {f"{name}-{one}": root / name / one for name, (_, formats, _) in CASES.items() for one in formats}


def stored_bits(directory: Path) -> float:
    """Bits that a directory has for each weight of the layers' linear layers, scales of blocks among them."""
    bits = weights = 0
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if "_proj." in name and name.endswith(STORED):
                tensor = file.get_tensor(name)
                bits += 8 * tensor.nbytes if tensor.dim() == 2 and tensor.shape[1] > 1 else 0
                rows_and_columns = tensor.shape if tensor.dtype != torch.uint8 else (2, *tensor.shape)
                is_scale = name.endswith("_scale")
                weights += 0 if is_scale else prod(rows_and_columns) * (8 if tensor.dtype == torch.int32 else 1)
    return bits / weights


def test_the_files_have_the_bits_that_were_asked_for(exports: Path) -> None:
    for name, directory in directories(exports).items():
        asked = CASES[name.partition("-")[0]][0]
        assert 0.98 * asked <= stored_bits(directory) <= 1.001 * asked, name
        mixed = read_report(directory / REPORT).mixed_precision
        assert mixed is not None and mixed.effective_bits == pytest.approx(stored_bits(directory), rel=1e-3)


def test_they_verify_and_say_what_each_layer_is(exports: Path) -> None:
    for name, directory in directories(exports).items():
        assert [check for check in verify(directory) if not check.ok] == [], name
        report = read_report(directory / REPORT)
        schemes = {layer.scheme for layer in report.layers}
        assert len(schemes) > 1, name
        card = (directory / "ptq" / "README.md").read_text()
        assert all(f"| {scheme or 'unquantized'} | " in card for scheme in schemes)
        assert report.mixed_precision is not None
        curve = report.mixed_precision.curve
        assert [bits for bits, _ in curve] == sorted(bits for bits, _ in curve)
        assert [error for _, error in curve] == sorted((error for _, error in curve), reverse=True)
        assert curve[-1] == (16.0, 0.0)


def test_servers_layers_are_quantized_as_one(exports: Path) -> None:
    listed = json.loads((exports / "both" / "hf" / "hf_quant_config.json").read_text())["quantization"]
    assert listed["quant_algo"] == "MIXED_PRECISION"
    found = {name: its["quant_algo"] for name, its in listed["quantized_layers"].items()}
    for layer in range(2):
        for parts in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({found.get(f"model.layers.{layer}.{part}_proj") for part in parts}) == 1


def test_the_library_computes_what_the_reader_does(exports: Path, checkpoint_of: Callable[[str], Path]) -> None:
    original, _ = transformers_logits(checkpoint_of("llama31").with_name("llama31.hf"))
    for name, directory in directories(exports).items():
        ours = logits(directory, TOKENS)
        assert 1e-3 < distance(ours, original) < 0.6, name
        if directory.name == "compressed_tensors":
            found, report = transformers_logits(directory, torch.bfloat16)
            assert report == {}
            assert distance(ours, found) < 0.3, name  # it computes in bfloat16
    both = [logits(exports / "both" / name, TOKENS) for name in ("hf", "compressed_tensors")]
    assert distance(*both) < 0.1  # FP8 is divided in bfloat16 by one of them


def test_another_export_has_the_bytes_of_the_first(exports: Path, tmp_path: Path) -> None:
    first = exports / "both"
    for name in CASES["both"][1]:
        export = ExportConfig(str(tmp_path / name), export_format=name)
        job = check_job(world_size=1, calibration_state=first / "hf", export_config=export)
        assert is_possible(job, 1)
        run_reexport(job)
        before, again = digests(first / name), digests(tmp_path / name)
        assert [file for file in before if file.endswith(".safetensors") and before[file] != again[file]] == []


def test_int8_is_mixed_where_it_is_asked_for(exports: Path) -> None:
    config = json.loads((exports / "int8" / "compressed_tensors" / "config.json").read_text())["quantization_config"]
    ways = {group["format"]: group for group in config["config_groups"].values()}
    assert ways.keys() == {"int-quantized", "pack-quantized"}
    inputs = ways["int-quantized"]["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
    roundings = {layer.rounding for layer in read_report(exports / "int8" / "compressed_tensors" / REPORT).layers}
    assert roundings == {"gptq"}


def test_a_format_takes_what_its_servers_mix(exports: Path, tmp_path: Path) -> None:
    state = exports / "one" / "compressed_tensors"
    assert "int4_awq" in read_header(state / IN_EXPORT).choice.values()
    for name, reason in (("hf", "has layers in int4_awq, which export_format=hf"), ("trtllm", "does not go into")):
        export = ExportConfig(str(tmp_path / "out"), export_format=name)
        with pytest.raises(Exception, match=reason):
            check_job(world_size=1, calibration_state=state, export_config=export)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
def test_over_shards_and_stages(layout: tuple[int, int], checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(run_all, 2, checkpoint_of("llama31"), tmp_path, ["both"], layout, timeout=600)
    for name in CASES["both"][1]:
        assert [check for check in verify(tmp_path / "both" / name) if not check.ok] == []
        assert 0.98 * 5.9 <= stored_bits(tmp_path / "both" / name) <= 5.91


@pytest.mark.slow
def test_experts_of_a_layer_are_quantized_alike(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(run_all, 1, checkpoint_of("mixtral"), tmp_path, list(EXPERTS), timeout=600)
    directory = tmp_path / "experts" / "hf"
    assert [check for check in verify(directory) if not check.ok] == []
    choice = read_header(directory / IN_EXPORT).choice
    for layer in range(2):
        assert len({its for name, its in choice.items() if f"layers.{layer}.mlp.experts." in name}) == 1
    assert len(set(choice.values())) > 1


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_choice(demo: Demo, tmp_path: Path) -> None:
    settings = {"quality": None, "effective_bits": 6.0, "calibration_dataset_size": 16}
    for name, resume in (("whole", False), ("out", False), ("out", True)):
        export = {"export_format": "hf", "resume": resume}
        task = arguments(demo, tmp_path / name, algorithm="auto", quantization=settings, export=export)
        if name == "out" and not resume:
            with pytest.raises(RankFailed, match="died"):
                run_ranks(die_between_blocks, 1, task)
            continue
        (said,) = run_ranks(said_by, 1, task)
        assert ("choosing an algorithm" in said) != resume
    whole, resumed = (digests(tmp_path / name) for name in ("whole", "out"))
    assert [file for file in whole if file.endswith(".safetensors") and whole[file] != resumed[file]] == []
    first, second = (read_report(tmp_path / name / REPORT).mixed_precision for name in ("whole", "out"))
    assert first is not None and first == second


# --- the choice -------------------------------------------------------------------------------------------------------


def made_up_errors(quantization: QuantizationConfig) -> tuple[list[Any], dict[str, dict[str, float]]]:
    """Groups of Llama-3 8B, and errors that fall with the bits, by another factor in each group."""
    groups = layer_groups(quantization, LLAMA_8B, ["compressed_tensors"])
    errors = {
        group.name: {
            option: (1 + place % 7) * 4.0 ** -bits_of(option, quantization)
            for option in group.options
            if option != "no_quant"
        }
        for place, group in enumerate(groups)
    }
    return groups, errors


@pytest.mark.parametrize("bits", [4.125, 4.3, 5.0, 6.0, 8.0, 12.0, 16.0])
def test_a_model_comes_close_to_its_bits(bits: float) -> None:
    quantization = QuantizationConfig("auto", effective_bits=bits)
    groups, errors = made_up_errors(quantization)
    algorithms, record = choice_of(groups, errors, quantization)
    assert 0.99 * bits <= record.effective_bits <= bits * (1 + 1e-6)
    weights = {name: prod(LLAMA_8B.module(name).shape) for name in algorithms}
    assert len(weights) == 4 * 32
    counted = sum(weights[name] * bits_of(option, quantization) for name, option in algorithms.items())
    assert counted / sum(weights.values()) == pytest.approx(record.effective_bits)
    assert len(record.curve) <= 65


def test_experts_are_quantized_alike() -> None:
    quantization = QuantizationConfig("auto", effective_bits=6.0)
    experts = [group for group in layer_groups(quantization, MIXTRAL, ["hf"]) if len(group.linears) > 1]
    assert [len(group.linears) for group in experts] == [16] * 32
    assert {group.options for group in experts} == {("fp8", "nvfp4", "no_quant")}


def test_layers_get_what_their_sizes_allow() -> None:
    odd = replace(LLAMA_8B, ffn_hidden_size=14320)  # whole blocks of 16, but not of 64, and no multiple of 32
    options = {
        group.name.rpartition(".")[2]: group.options
        for group in layer_groups(QuantizationConfig("auto", effective_bits=6.0), odd, ["compressed_tensors"])
    }
    assert options["linear_proj"] == ("fp8", "int4_awq", "nvfp4", "no_quant")
    assert options["linear_fc2"] == ("fp8", "no_quant")


def test_a_choice_is_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    name, curve = "decoder.layers.0.mlp.linear_fc1", ((4.5, 0.5), (16.0, 0.0))
    choice = Choice({name: "fp8"}, MixedPrecision(5.5, 0.25, curve, ((4.5, 0.9),)), {name: {"fp8": 0.25}})
    keep_choice(tmp_path / "journal", choice)
    assert kept_choice(tmp_path / "journal") == choice


# --- a recovery as the aim --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 1.6])
@pytest.mark.parametrize("wanted", [0.9, 0.99, 0.999, 1.0])
def test_bits_are_added_until_the_recovery_is_reached(wanted: float, power: float) -> None:
    """What is lost grows with a power of the predicted error, which the choice does not know."""
    quantization = QuantizationConfig("auto")
    export = ExportConfig("OUT", export_format="compressed_tensors", min_recovery=wanted)
    job = Job(Path("CKPT"), LLAMA_8B, Path("OUT"), quantization, export, "llama")
    groups, errors = made_up_errors(quantization)
    reporter = Reporter(False)

    def recovery(error: float) -> float:
        return math.exp(-((20 * error / len(groups)) ** power))

    choice = Choice(*choice_of(groups, errors, quantization), errors)
    assert choice.record is not None and choice.record.effective_bits == pytest.approx(4.125)
    records = [choice.record]
    while further := choose_again(job, choice, recovery(records[-1].error), reporter):
        choice = further
        assert choice.record is not None
        records.append(choice.record)
    last = records[-1]
    assert recovery(last.error) >= wanted
    assert last.tried == tuple((its.effective_bits, recovery(its.error)) for its in records[:-1])
    assert [its.effective_bits for its in records] == sorted({its.effective_bits for its in records})
    fewest = next(bits for bits, error in last.curve if recovery(error) >= wanted)
    assert last.effective_bits <= fewest + 0.5 if power == 1 else last.effective_bits <= 16
    if wanted == 1:
        assert set(choice.algorithms.values()) == {"no_quant"}


def test_it_is_given_up_some_time() -> None:
    export = ExportConfig("OUT", export_format="compressed_tensors", min_recovery=0.99)
    job = Job(Path("CKPT"), LLAMA_8B, Path("OUT"), QuantizationConfig("auto"), export, "llama")
    groups, errors = made_up_errors(job.quantization)
    choice: Choice | None = Choice(*choice_of(groups, errors, job.quantization), errors)
    bits = []
    while choice is not None:
        assert choice.record is not None
        bits.append(choice.record.effective_bits)
        choice = choose_again(job, choice, 0.98999, Reporter(False))
    assert len(bits) == 6 and bits == sorted(set(bits))


def test_asked_for_bits_are_not_changed() -> None:
    export = ExportConfig("OUT", export_format="compressed_tensors", min_recovery=0.99)
    job = Job(Path("CKPT"), LLAMA_8B, Path("OUT"), QuantizationConfig("auto", effective_bits=6.0), export, "llama")
    groups, errors = made_up_errors(job.quantization)
    choice = Choice(*choice_of(groups, errors, job.quantization), errors)
    assert choose_again(job, choice, 0.5, Reporter(False)) is None


# --- the demo model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recovery_is_reached(demo: Demo, tmp_path: Path) -> None:
    settings = {"quality": None, "calibration_dataset_size": 64, "candidates": "fp8,nvfp4"}
    settings |= {"evaluation_dataset_size": 32}
    export = {"export_format": "compressed_tensors", "min_recovery": 0.997}
    task = arguments(demo, tmp_path / "out", algorithm="auto", quantization=settings, export=export)
    (said,) = run_ranks(said_by, 1, task)
    report = read_report(tmp_path / "out" / REPORT)
    assert report.summary.recovery is not None and report.summary.recovery >= 0.997 and report.summary.passed
    mixed = report.mixed_precision
    assert mixed is not None and 1 <= len(mixed.tried) < 6
    assert said.count(" required") == len(mixed.tried) + 1
    assert all(recovery < 0.997 for _, recovery in mixed.tried)
    assert [bits for bits, _ in mixed.tried] + [mixed.effective_bits] == sorted(
        [mixed.effective_bits, *(bits for bits, _ in mixed.tried)]
    )
    assert mixed.tried[0][0] == pytest.approx(4.5) and mixed.effective_bits < 16
    assert read_header(tmp_path / "out" / IN_EXPORT).quantization.effective_bits == mixed.effective_bits
    assert [check for check in verify(tmp_path / "out") if not check.ok] == []

    again = ExportConfig(str(tmp_path / "again"), export_format="compressed_tensors")
    run_reexport(check_job(world_size=1, calibration_state=tmp_path / "out", export_config=again))
    before, after = digests(tmp_path / "out"), digests(tmp_path / "again")
    assert [file for file in before if file.endswith(".safetensors") and before[file] != after[file]] == []


@pytest.mark.slow
def test_more_bits_lose_less(demo: Demo, tmp_path: Path) -> None:
    losses = []
    for bits in (4.5, 5.5, 7.0, 10.0):
        settings = {"quality": None, "effective_bits": bits, "calibration_dataset_size": 64, "awq_block_size": 64}
        export = {"export_format": "compressed_tensors"}
        task = arguments(demo, tmp_path / str(bits), algorithm="auto", quantization=settings, export=export)
        run_ranks(run_task, 1, task)
        summary = read_report(tmp_path / str(bits) / REPORT).summary
        assert summary.quality == "balanced" and summary.kl_divergence is not None
        losses.append(summary.kl_divergence)
    assert losses == sorted(losses, reverse=True)
