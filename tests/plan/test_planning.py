# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Plans for models that need not exist: what fits, what does not, and what would."""

import doctest
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint import metadata
from nemo_ptq.checkpoint.index import read_index
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan import Plan, make_plan, plan_job, planning
from nemo_ptq.plan.devices import GPUS, Device, this_cpu
from nemo_ptq.plan.memory import StepMemory
from nemo_ptq.plan.sharding import Parallelism, model_parameters, stages
from nemo_ptq.quantization.algorithms import algorithm_named
from tests.conftest import Demo
from tests.plan.models import LLAMA_8B, LLAMA_70B, MIXTRAL, NEMOTRON_340B


def step_of(plan: Plan, name: str) -> StepMemory:
    (step,) = [step for step in plan.memory if step.step == name]
    return step


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(planning)
    assert results.attempted and not results.failed


def test_needs_neither_torch_nor_nemo() -> None:
    code = "import sys, nemo_ptq.plan; print(*{'torch', 'nemo', 'megatron', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("model", "billions"), [(LLAMA_8B, 8.030), (LLAMA_70B, 70.554), (MIXTRAL, 46.703), (NEMOTRON_340B, 341.029)]
)
def test_parameters_are_those_that_the_models_are_known_for(model: ModelSpec, billions: float) -> None:
    assert round(model_parameters(model) / 1e9, 3) == billions


@pytest.mark.parametrize("name", ["llama32", "mixtral", "starcoder", "gpt"])
def test_parameters_are_those_that_a_checkpoint_stores(checkpoint_of: Callable[[str], Path], name: str) -> None:
    checkpoint = checkpoint_of(name)
    stored = read_index(checkpoint).state_dict_metadata.values()
    elements = sum(prod(tensor.size) for tensor in stored if hasattr(tensor, "size"))
    assert model_parameters(metadata.read_metadata(checkpoint)) == elements


@pytest.mark.parametrize("parallelism", [Parallelism(2), Parallelism(4, 2), Parallelism(1, 4, first=5, last=9)])
def test_ranks_hold_the_model_once(parallelism: Parallelism) -> None:
    of_ranks = list(stages(LLAMA_8B, parallelism))
    assert sum(stage.num_layers for stage in of_ranks) == LLAMA_8B.num_layers
    # Norms stand on every tensor-parallel rank.
    norms = (parallelism.tp - 1) * (2 * LLAMA_8B.num_layers + 1) * LLAMA_8B.hidden_size
    held = parallelism.tp * sum(stage.parameters for stage in of_ranks)
    assert held == model_parameters(LLAMA_8B) + norms


def test_a_tied_embedding_is_on_both_ends_of_a_pipeline() -> None:
    tied = replace(LLAMA_8B, tied_embeddings=True)
    table = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    assert model_parameters(tied) == model_parameters(LLAMA_8B) - table
    assert sum(stage.parameters for stage in stages(tied, Parallelism(pp=2))) == model_parameters(LLAMA_8B)


FAST = QuantizationConfig(quality="fast")
RESIDENT = replace(FAST, layerwise=False)


def test_what_does_not_fit_is_told_what_would() -> None:
    plan = make_plan(NEMOTRON_340B, RESIDENT, calibration_tp=8, device="H100")
    assert not plan.fits and not plan.ok
    assert plan.problems[-1].endswith("GiB of memory are needed, and H100 has 75.2 GiB")
    layerwise, smallest = plan.suggestions
    assert layerwise.startswith("layer-wise: leave out quantization_config.layerwise=false")
    assert smallest == "calibration_tp=4 calibration_pp=3 is the smallest parallelism that fits H100"
    assert make_plan(NEMOTRON_340B, RESIDENT, calibration_tp=4, calibration_pp=3, device="H100").ok
    assert not make_plan(NEMOTRON_340B, RESIDENT, calibration_tp=4, calibration_pp=2, device="H100").fits


def test_a_model_larger_than_memory_is_planned_layer_wise() -> None:
    plan = make_plan(LLAMA_70B, device="H100")
    resident, layerwise = plan.modes
    assert (resident.name, resident.fits, layerwise.name, layerwise.fits) == ("resident", False, "layer-wise", True)
    assert plan.mode == "layer-wise" and plan.ok and plan.memory == layerwise.memory
    (suggestion,) = plan.suggestions
    assert suggestion.startswith("layer-wise: ") and suggestion.endswith("at a time, which the job does")
    # Nothing is read twice.
    assert resident.read_bytes == layerwise.read_bytes == 2 * model_parameters(LLAMA_70B)
    # Where the weights fit they stay, unless the user says otherwise.
    assert make_plan(LLAMA_8B).mode == "resident" and not make_plan(LLAMA_8B).suggestions
    assert make_plan(LLAMA_8B, QuantizationConfig(layerwise=True)).mode == "layer-wise"


def test_layer_wise_memory_does_not_grow_with_the_layers() -> None:
    for algorithm in ("fp8", "int4_awq", "no_quant"):
        quantization = QuantizationConfig(algorithm, layerwise=True)
        few, many = (make_plan(replace(LLAMA_8B, num_layers=layers), quantization) for layers in (4, 64))
        assert few.memory == many.memory and few.parameters < many.parameters


@pytest.mark.parametrize(
    ("quantization", "export", "further"),
    [
        (QuantizationConfig(), ExportConfig("OUT", generate_sample=True), {}),
        (QuantizationConfig(), ExportConfig("OUT", export_format="nemo"), {}),
        (QuantizationConfig("my.yaml"), ExportConfig("OUT"), {}),
        (QuantizationConfig(), ExportConfig("OUT"), {"forward_loop": print}),
    ],
)
def test_what_needs_the_whole_model_is_planned_with_it(
    quantization: QuantizationConfig, export: ExportConfig, further: dict[str, Any]
) -> None:
    plan = make_plan(LLAMA_70B, quantization, export, device="H100", further=further)
    assert [mode.name for mode in plan.modes] == ["resident"] and not plan.fits


def test_hidden_states_wait_on_the_host_layer_wise() -> None:
    resident, layerwise = make_plan(LLAMA_8B, FAST, calibration_tp=2).modes
    waiting = (512 * 128 + 2 * 8 * 256) * LLAMA_8B.hidden_size * 2
    for mode, on_device in ((resident, waiting), (layerwise, 0)):
        (calibrate,) = [step for step in mode.memory if step.step == "calibrate"]
        assert (calibrate.states, calibrate.host) == (on_device, waiting - on_device)
    # Copying them takes time.
    assert layerwise.seconds["calibrate"] > resident.seconds["calibrate"]


def test_a_tied_embedding_stays_for_the_head() -> None:
    tied, apart = (
        make_plan(replace(LLAMA_8B, tied_embeddings=tied), QuantizationConfig(layerwise=True)) for tied in (True, False)
    )
    table = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size * 2
    assert step_of(tied, "calibrate").weights - step_of(apart, "calibrate").weights == table


def test_a_batch_that_is_too_large_is_halved_until_it_fits() -> None:
    quantization = QuantizationConfig("fp8", calibration_batch_size=512, calibration_seq_len=4096, layerwise=True)
    plan = make_plan(LLAMA_8B, quantization, device="H100")
    assert not plan.fits
    batch = next(suggestion for suggestion in plan.suggestions if "batch" in suggestion)
    size = int(batch.partition(" ")[0].rpartition("=")[2])
    assert make_plan(LLAMA_8B, replace(quantization, calibration_batch_size=size), device="H100").fits
    assert not make_plan(LLAMA_8B, replace(quantization, calibration_batch_size=2 * size), device="H100").fits


def test_broken_rules_are_lines_with_their_fix() -> None:
    plan = make_plan(LLAMA_8B, QuantizationConfig("int4_awq"), ExportConfig("OUT", inference_tp=3), calibration_pp=5)
    broken = {rule.name: rule.problem for rule in plan.rules if rule.problem}
    assert broken.keys() == {"stages_are_whole", "inference_tp_divides", "awq_blocks_fit_inference"}
    assert "use 1, 2, 4, 8" in str(broken["inference_tp_divides"])
    assert plan.files == () and not plan.ok and plan.fits


def test_rules_that_are_about_something_else_are_left_out() -> None:
    def names(*settings: object) -> set[str]:
        return {rule.name for rule in make_plan(*settings).rules}  # type: ignore[arg-type]

    assert "awq_blocks_fit_inference" not in names(LLAMA_8B) and "experts_divide" not in names(LLAMA_8B)
    assert "awq_blocks_fit_inference" in names(LLAMA_8B, QuantizationConfig("w4a8_awq"))
    assert "experts_divide" in names(MIXTRAL)


def test_expert_parallelism_spreads_the_experts() -> None:
    whole, spread = (make_plan(MIXTRAL, RESIDENT, calibration_ep=ep).memory[0].weights for ep in (1, 4))
    experts = 2 * MIXTRAL.num_layers * 8 * 3 * MIXTRAL.hidden_size * MIXTRAL.ffn_hidden_size
    assert whole - spread == experts * 3 // 4
    assert make_plan(MIXTRAL, calibration_ep=4).parallelism.ranks == 4


def test_a_rank_holds_the_hidden_states_of_its_share_of_the_samples() -> None:
    quantization = QuantizationConfig("int4_awq", quality="fast", calibration_dataset_size=4096)
    one, four = (step_of(make_plan(LLAMA_8B, quantization, world_size=ranks), "calibrate") for ranks in (1, 4))
    states = 4096 * 128 * LLAMA_8B.hidden_size * 2
    assert one.states - four.states == states * 3 // 4


def test_documents_are_compared_up_to_a_limit() -> None:
    states = {}
    for documents in (0, 2, 8, 64):  # 2^28 logits are 8 documents of 256 tokens
        plan = make_plan(LLAMA_8B, QuantizationConfig(evaluation_dataset_size=documents))
        states[documents] = step_of(plan, "calibrate").states
    document = 256 * LLAMA_8B.hidden_size * 2
    assert [states[documents] - states[0] for documents in (2, 8, 64)] == [4 * document, 16 * document, 16 * document]


def test_all_ranks_share_the_memory_of_a_cpu() -> None:
    small = replace(this_cpu(), memory=40 * 2**30)
    assert make_plan(LLAMA_8B, device=small).mode == "resident"
    # Calibrated on four ranks the weights are there once, but the libraries four times.
    plan = make_plan(LLAMA_8B, RESIDENT, calibration_tp=4, device=replace(small, memory=20 * 2**30))
    assert not plan.fits and plan.needs > 4 * max(step.device for step in plan.memory)
    assert all(step.host == 0 for step in plan.memory)


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
def test_a_faster_device_takes_less_time(device: Device) -> None:
    plan = make_plan(LLAMA_8B, FAST, device=device)
    assert plan.device == device and all(seconds > 0 for seconds in plan.seconds.values())
    faster = make_plan(LLAMA_8B, FAST, device=replace(device, bf16_tflops=2 * device.bf16_tflops))
    assert faster.seconds["calibrate"] == pytest.approx(plan.seconds["calibrate"] / 2)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device=H10 is not known: did you mean H100"):
        make_plan(LLAMA_8B, device="H10")


def test_the_task_names_its_device(demo: Demo) -> None:
    def device_of(**arguments: Any) -> str:
        return plan_job({"nemo_checkpoint": str(demo.checkpoint), **arguments}, world_size=1).device.name

    assert device_of() == "H100"
    assert device_of(plan_device="l40s") == "L40S"
    with pytest.raises(ConfigError, match="plan_device=L40 is not known: did you mean L4"):
        device_of(plan_device="L40")
    with pytest.raises(ConfigError, match="plan_device=40 is not valid: it must be the name of a device"):
        device_of(plan_device=40)


@pytest.mark.parametrize(
    ("algorithm", "streams", "inputs", "grams"),
    [
        # What enters proj, of the hidden size, and fc2, of the inner width, is kept.
        ("fp8", 1, LLAMA_8B.hidden_size + LLAMA_8B.ffn_hidden_size, 1),
        # And what enters qkv and fc1 in the unquantized model.
        ("int4_awq", 2, 3 * LLAMA_8B.hidden_size + LLAMA_8B.ffn_hidden_size, 2),
    ],
)
def test_quality_balanced_is_some_passes_their_streams_inputs_of_a_block_and_gram_matrices(
    algorithm: str, streams: int, inputs: int, grams: int
) -> None:
    fast, balanced = (make_plan(LLAMA_8B, QuantizationConfig(algorithm, quality=q)) for q in ("fast", "balanced"))
    assert balanced.ok
    once = make_plan(LLAMA_8B, FAST)
    assert balanced.flops > 2 * streams * once.flops
    assert balanced.seconds["calibrate"] > 2 * streams * once.seconds["calibrate"]
    before, after = step_of(fast, "calibrate"), step_of(balanced, "calibrate")
    waiting = (streams - 1) * LLAMA_8B.hidden_size + inputs
    assert after.states - before.states == 512 * 128 * 2 * waiting
    # Float32 matrices of the widest.
    assert after.statistics >= 4 * grams * LLAMA_8B.ffn_hidden_size**2


def test_quality_max_is_the_residual_streams_and_an_eighth_of_the_samples_once_more_beyond_balanced() -> None:
    balanced, best = (make_plan(LLAMA_8B, QuantizationConfig("int4_awq", quality=q)) for q in ("balanced", "max"))
    assert best.ok and best.quality == "max"
    assert balanced.flops < best.flops < 1.15 * balanced.flops
    before, after = step_of(balanced, "calibrate"), step_of(best, "calibrate")
    # What the outputs of proj and fc2 are added to, and one sample in eight on its way through a third model.
    assert after.states - before.states == (2 * 512 + 64) * 128 * 2 * LLAMA_8B.hidden_size
    # A float32 matrix of the shape of fc2.
    assert after.statistics >= before.statistics + 4 * LLAMA_8B.ffn_hidden_size * LLAMA_8B.hidden_size
    # Experts' inputs are not kept: that leaves proj.
    before, after = (
        step_of(make_plan(MIXTRAL, QuantizationConfig("int4_awq", quality=q)), "calibrate") for q in ("balanced", "max")
    )
    waiting = [step.states + step.host for step in (before, after)]
    assert waiting[1] - waiting[0] == (512 + 64) * 128 * 2 * MIXTRAL.hidden_size


def test_the_quality_is_balanced_unless_the_user_or_something_else_says_otherwise() -> None:
    assert make_plan(LLAMA_8B).quality == "balanced" and make_plan(LLAMA_8B).fast_because is None
    assert make_plan(LLAMA_8B).flops == make_plan(LLAMA_8B, QuantizationConfig(quality="balanced")).flops
    assert (make_plan(LLAMA_8B, FAST).quality, make_plan(LLAMA_8B, FAST).fast_because) == ("fast", None)
    unrounded = make_plan(LLAMA_8B, export=ExportConfig("OUT", export_format="nemo"))
    reason = "export_format=nemo holds weights that are not rounded yet"
    assert (unrounded.quality, unrounded.fast_because) == ("fast", reason)
    assert make_plan(MIXTRAL, calibration_ep=2).quality == "fast"


def test_without_an_algorithm_there_is_no_calibration() -> None:
    plan = make_plan(LLAMA_8B, QuantizationConfig("no_quant"))
    assert [step.step for step in plan.memory] == ["load", "export", "verify"] == list(plan.seconds)
    assert plan.flops == 0


@pytest.mark.parametrize("algorithm", ["fp8_dynamic", "int8_dynamic", "w4a16_nvfp4"])
def test_what_needs_no_data_is_planned_without(algorithm: str) -> None:
    """However much data the defaults name, and where fewer ranks hold it."""
    export = ExportConfig("OUT", export_format="compressed_tensors")
    settings = QuantizationConfig(algorithm, calibration_seq_len=100_000, layerwise=True)
    plan = make_plan(LLAMA_8B, settings, export, calibration_pp=2)
    assert plan.ok and plan.flops == 0 and "calibrate" not in plan.seconds
    assert "calibrate" not in [step.step for step in plan.memory]
    fp8 = make_plan(LLAMA_8B, replace(settings, algorithm="fp8", calibration_seq_len=128), export, calibration_pp=2)
    assert max(step.host for step in plan.memory) < max(step.host for step in fp8.memory)
    (file,) = plan.files
    linears = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14336)
    assert file.bytes == pytest.approx(4 * 4096 * 128256 + algorithm_named(algorithm).packed_bytes * linears, rel=0.01)


def test_servers_are_lines_of_a_plan() -> None:
    export = ExportConfig("OUT", export_format=["hf", "trtllm"])
    lines = {(line.format, line.server): line for line in make_plan(LLAMA_8B, export=export).servers}
    assert lines["hf", "vLLM 0.24"].outcome == "loads" and lines["hf", "vLLM 0.24"].known_by == "run"
    assert lines["hf", "transformers 5.19"].note.startswith("not for transformers")
    assert lines["trtllm", "TensorRT-LLM engines up to 1.2"].outcome == "loads"
    assert ("trtllm", "vLLM 0.24") not in lines


def test_a_plan_says_that_a_server_cannot_tie_embeddings() -> None:
    plan = make_plan(replace(LLAMA_8B, tied_embeddings=True), export=ExportConfig("OUT", export_format="hf"))
    lines = {line.server: line for line in plan.servers}
    assert lines["vLLM 0.24"].outcome == "refused" and "cannot tie the output layer" in lines["vLLM 0.24"].note
    assert lines["vLLM 0.32"].outcome == "loads"


def test_plain_data_is_json() -> None:
    plan = make_plan(LLAMA_8B, calibration_tp=2)
    read = json.loads(json.dumps(plan.as_dict()))
    assert read["ok"] is True and read["parallelism"]["tp"] == 2
    assert read["memory"][0]["weights"] == plan.memory[0].weights
    assert [mode["name"] for mode in read["modes"]] == ["resident", "layer-wise"] and read["mode"] == "resident"
    assert max(step["device"] for step in read["memory"]) == read["needs"] == plan.needs
