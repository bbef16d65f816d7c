# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What other exporters of these files get wrong, one test for each defect, on files that we have really exported.

tests/test_matrix.py shows for the same models that the logits are right; here it is said why.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.dequantize import dequantize_int4
from nemo_ptq.verify.tensor_file import TensorFile
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint, same_bytes
from tests.matrix import quick_first
from tests.ranks import run_ranks

LAYER = "transformer.layers.0."


@dataclass(frozen=True)
class Request:
    """One export: how, for which tensor and pipeline parallelism, and where to."""

    quantization: QuantizationConfig
    layout: tuple[int, int]
    directory: Path


def export_all(checkpoint: Path, calibration: tuple[int, int], requests: Sequence[Request]) -> None:
    """Makes exports on this rank."""
    from tests import steps

    for request in requests:
        steps.run_job(steps.job_of(checkpoint, request.quantization, request.directory, calibration, request.layout))


def export(
    checkpoint: Path,
    algorithm: str,
    directory: Path,
    *,
    calibration: tuple[int, int] = (1, 1),
    layout: tuple[int, int] = (1, 1),
    kv_cache: bool = False,
) -> None:
    request = Request(QuantizationConfig(algorithm, enable_kv_cache=kv_cache), layout, directory)
    run_ranks(export_all, calibration[0] * calibration[1], checkpoint, calibration, [request])


def amax_by_modelopt(checkpoint: Path, quantization: QuantizationConfig) -> dict[str, float]:
    """The amax of the quantizers of a model that ModelOpt has calibrated, where it is a single number."""
    from tests import steps

    with steps.loaded(checkpoint) as model:
        steps.calibrate(model, quantization)
        return {
            name: float(module.amax)
            for name, module in model.module.named_modules()
            if getattr(module, "amax", None) is not None and module.amax.numel() == 1
        }


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def rank_file(directory: Path, rank: int) -> TensorFile:
    return TensorFile(directory / f"rank{rank}.safetensors")


def assert_readable(directory: Path) -> None:
    """Nothing is wrong with an export but that these tests write no manifest and no context."""
    assert [c for c in verify(directory) if not c.ok and c.name not in ("manifest", "tokenizer", "ranges")] == []


@pytest.mark.parametrize(("model", "factor"), [("llama31", 8.0), ("llama32", 32.0)])
def test_1_rotary_scaling_is_told_with_every_number(
    model: str, factor: float, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    export(checkpoint_of(model), NO_QUANT, tmp_path / "out")
    assert config_of(tmp_path / "out")["rotary_scaling"] == {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 64,
    }


def test_2_kv_cache_scales_are_written(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    export(checkpoint_of("llama2"), "fp8", tmp_path / "out", kv_cache=True)
    quantization = QuantizationConfig("fp8", enable_kv_cache=True)
    (amax,) = run_ranks(amax_by_modelopt, 1, checkpoint_of("llama2"), quantization)
    assert config_of(tmp_path / "out")["quantization"]["kv_cache_quant_algo"] == "FP8"
    file = rank_file(tmp_path / "out", 0)
    for layer in range(2):
        attention = f"decoder.layers.{layer}.self_attention.core_attention"
        key, value = (max(amax[f"{attention}.{which}_bmm_quantizer"] / 448, 1.0) for which in "kv")
        for which, expected in (("k", key), ("v", value), ("kv", max(key, value))):
            scale = file.tensor(f"transformer.layers.{layer}.attention.{which}_cache_scaling_factor")
            assert float(scale) == pytest.approx(expected)


# 3, norms of queries and keys, and biases: tests/plan/rules/test_model.py, tests/export/trtllm/test_trtllm_config.py.


@pytest.mark.parametrize(("model", "name"), [("gpt_geglu", "geglu"), ("gpt_swiglu", "swiglu"), ("gpt", "gelu")])
def test_4_a_gated_mlp_has_a_gated_name(
    model: str, name: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    export(checkpoint_of(model), NO_QUANT, tmp_path / "out")
    assert config_of(tmp_path / "out")["hidden_act"] == name
    assert (f"{LAYER}mlp.gate.weight" in rank_file(tmp_path / "out", 0).header) == (model != "gpt")


def weights_only(path: Path, weights: dict[str, Any]) -> Path:
    """Writes a ModelOpt configuration that rounds weights to their nearest, and nothing else."""
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights},
        {"quantizer_name": "*output_layer*", "enable": False},
    ]
    path.write_text(json.dumps({"quant_cfg": entries, "algorithm": "max"}))
    return path


def calibrate_with(checkpoint: Path, config: Path) -> tuple[str, bool]:
    """Returns what a job with a user's configuration raises, and whether it has read data by then."""
    from nemo_ptq.modelopt import quantizers
    from tests import steps

    data_was_read: list[Any] = []
    with steps.loaded(checkpoint) as model:
        try:
            quantizers.calibrate(model.module, QuantizationConfig(str(config)), "llama", data_was_read.append)
        except PtqError as error:
            return str(error), bool(data_was_read)
    return "", bool(data_was_read)


def test_5_weight_only_int8_is_refused_before_any_data_is_read(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = weights_only(tmp_path / "int8.json", {"num_bits": 8, "axis": 0})
    ((problem, data_was_read),) = run_ranks(calibrate_with, 1, checkpoint_of("llama2"), config)
    assert "weight-only int8 lacks the activation scales that its readers require" in problem
    assert not data_was_read


def test_5_weight_only_int4_has_the_scales_that_awqs_reader_wants(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = weights_only(tmp_path / "int4.json", {"num_bits": 4, "block_sizes": {"-1": 128}})
    export(checkpoint_of("llama2"), str(config), tmp_path / "int4", layout=(2, 1))
    export(checkpoint_of("llama2"), NO_QUANT, tmp_path / "plain", layout=(2, 1))
    assert_readable(tmp_path / "int4")
    packed, plain = open_checkpoint(tmp_path / "int4"), open_checkpoint(tmp_path / "plain")
    for name, inputs in (("attention.qkv", 256), ("mlp.proj", 512)):
        assert torch.equal(packed.tensor(f"{LAYER}{name}.prequant_scaling_factor").float(), torch.ones(inputs))
        scale = packed.tensor(f"{LAYER}{name}.weights_scaling_factor")
        weight = dequantize_int4(packed.tensor(f"{LAYER}{name}.weight"), scale)
        error = (weight - plain.tensor(f"{LAYER}{name}.weight").float()).abs()
        assert (error <= scale.repeat_interleave(128, 1) * 0.51).all()


@pytest.mark.parametrize("model", ["llama32", "gemma"])
def test_6_a_tied_output_layer_is_in_the_last_stage(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    export(checkpoint_of(model), "fp8", tmp_path / "out", layout=(2, 2))
    assert_readable(tmp_path / "out")
    for rank in range(2):
        first, last = rank_file(tmp_path / "out", rank), rank_file(tmp_path / "out", rank + 2)
        assert "lm_head.weight" not in first.header
        assert same_bytes(first.tensor("transformer.vocab_embedding.weight"), last.tensor("lm_head.weight"))


def test_7_awq_pads_an_odd_vocabulary_calibrated_at_tp_2(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    export(checkpoint_of("llama2"), "int4_awq", tmp_path / "out", calibration=(2, 1), layout=(2, 1))
    assert_readable(tmp_path / "out")
    whole = open_checkpoint(tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 1024
    for name in ("transformer.vocab_embedding.weight", "lm_head.weight"):
        rows = whole.tensor(name)
        assert rows.shape[0] == 1024
        assert rows[1003:].count_nonzero() == 0
        assert (rows[:1003].abs().amax(1) > 0).all()


@pytest.mark.parametrize("model", quick_first(["llama2", "starcoder"], ["starcoder"]))
def test_8_kv_heads_are_repeated_for_every_algorithm(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """llama2 has four KV heads for eight ranks, StarCoder one for four."""
    ranks = 8 if model == "llama2" else 4
    heads = {"llama2": 4, "starcoder": 1}[model]
    algorithms = ("fp8", "int8_sq", NO_QUANT)
    requests = [
        Request(QuantizationConfig(algorithm, enable_kv_cache=False), (tp, 1), tmp_path / f"{algorithm}-{tp}")
        for algorithm in algorithms
        for tp in (1, ranks)
    ]
    run_ranks(export_all, 1, checkpoint_of(model), (1, 1), requests)
    for algorithm in algorithms:
        directory = tmp_path / f"{algorithm}-{ranks}"
        assert_readable(directory)
        assert config_of(directory)["num_key_value_heads"] == heads
        one, many = open_checkpoint(tmp_path / f"{algorithm}-1"), open_checkpoint(directory)
        assert [name for name in one.names() if not same_bytes(one.tensor(name), many.tensor(name))] == []
        # Neighbours that share a head have the same keys and values, though not the same queries.
        left, right = (rank_file(directory, rank).tensor(f"{LAYER}attention.qkv.weight") for rank in (0, 1))
        size = len(left) // 3
        assert same_bytes(left[size:], right[size:])
        assert not same_bytes(left[:size], right[:size])


def test_13_experts_have_their_gate_second_and_a_scale_each(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("mixtral")
    export(checkpoint, "fp8", tmp_path / "fp8", layout=(2, 1))
    export(checkpoint, NO_QUANT, tmp_path / "plain", layout=(2, 1))
    assert_readable(tmp_path / "fp8")
    for rank in range(2):
        packed, plain = (rank_file(tmp_path / name, rank) for name in ("fp8", "plain"))
        for layer, shape in (("fc", (8, 512, 256)), ("proj", (8, 256, 256))):
            weight = packed.tensor(f"{LAYER}mlp.{layer}.weight")
            scale = packed.tensor(f"{LAYER}mlp.{layer}.weights_scaling_factor")
            exact = plain.tensor(f"{LAYER}mlp.{layer}.weight").float()
            assert tuple(weight.shape) == shape
            assert tuple(scale.shape) == (8, 1)
            # E4M3 keeps three bits of a fraction: half a step is a sixteenth, and the smallest step 2^-9.
            error = (weight.float() * scale[:, :, None] - exact).abs()
            assert (error <= exact.abs() / 16 + scale[:, :, None] * 2**-10 * 1.01).all()
    source = _experts_of(checkpoint)
    fc = open_checkpoint(tmp_path / "plain").tensor(f"{LAYER}mlp.fc.weight")
    for expert, (gate, up) in enumerate(source):
        assert same_bytes(fc[expert], torch.cat([up, gate]))


def _experts_of(checkpoint: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The activated and the other projection of each expert of the first layer, from the Hugging Face directory."""
    from safetensors import safe_open

    with safe_open(checkpoint.with_name(f"{checkpoint.name}.hf") / "model.safetensors", "pt") as file:
        name = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
        return [tuple(file.get_tensor(name.format(i, which)) for which in ("w1", "w3")) for i in range(8)]
