# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about algorithms."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.rules.parallelism import inference_tp_divides
from nemo_ptq.plan.rules.quantization_limits import (
    algorithm_file_fits_model,
    algorithm_file_fits_sizes,
    algorithm_file_is_config,
    awq_blocks_fit_calibration,
    awq_blocks_fit_inference,
    kv_cache_has_algorithm,
    loop_has_something_to_calibrate,
    nvfp4_blocks_fit,
    quality_is_available,
)
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import LLAMA_2_7B, expect

OFF = {"enable": False}
# The sizes of SmolLM2-135M.
SMOLLM2 = replace(
    LLAMA_8B, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3, head_size=64
)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"*self_attention*": OFF, "*lm_head*": OFF, "*router*": OFF, "*mlp.gate.*": OFF}, None),
        ({"*self_attn*": OFF, "*mlp.down_proj*": OFF}, None),  # Hugging Face's names
        ({"*nothing*": OFF}, "has *nothing* in quant_cfg, which matches no quantizer: take it out, or name layers as"),
        ({"*linear_fc3*": OFF}, "has *linear_fc3* in quant_cfg, which matches no quantizer: did you mean linear_fc2?"),
        ({"*wieght_quantizer": {"num_bits": 8}}, "matches no quantizer: did you mean weight_quantizer?"),
        (
            {"*layers.32.*": OFF},
            "has *layers.32.* in quant_cfg, which matches no quantizer: the model has layers 0 to",
        ),
        # Of ModelOpt's own, for models with experts, state spaces or vision.
        ({"*mlp.experts*input_quantizer": {"num_bits": 8}, "*mixer.conv1d*": OFF, "*vision_tower*": OFF}, None),
        ({"*[kv]_bmm_quantizer": {"num_bits": [4, 3]}, "*softmax_quantizer": OFF}, None),
    ],
)
def test_a_file_names_what_modelopt_sees(entries: Any, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    fp8 = {"num_bits": [4, 3], "axis": None}
    quantizers = {"default": OFF, "*weight_quantizer": fp8, "*input_quantizer": fp8, **entries}
    file.write_text(json.dumps({"quant_cfg": quantizers, "algorithm": "max"}))
    expect(algorithm_file_fits_model(str(file), None, 1, LLAMA_8B), message)
    assert algorithm_file_fits_model(str(tmp_path / "none.json"), None, 1, LLAMA_8B) is None
    assert algorithm_file_fits_model("fp8", None, 1, LLAMA_8B) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("quant_cfg: {'*weight_quantizer': {num_bits: 8}}\nalgorithm: max\n", None),
        ("algorithm: max\n", 'it must hold an object with the keys "quant_cfg" and "algorithm"'),
        ("quant_cfg: FP8_DEFAULT_CFG\n", "its quant_cfg is 'FP8_DEFAULT_CFG', and must be an object of patterns and"),
        ("quant_cfg: null\n", "its quant_cfg is None, and must be"),
        ("quant_cfg: []\n", "its quant_cfg is [], and must be"),
        ("quant_cfg: !!python/object/apply:os.getcwd []\n", "its quant_cfg is None, and must be"),
        ("quant_cfg: [fp8]\n", "its quant_cfg has the entry 'fp8', and must be"),
        ("quant_cfg: {8: {num_bits: 8}}\n", "its quant_cfg has the pattern 8, which must be a text"),
        ("quant_cfg: {'*weight_quantizer': fp8}\n", "its quant_cfg has 'fp8' for *weight_quantizer, which must be an"),
        ("quant_cfg: {'*mlp*': {enable: 'false'}}\n", "its quant_cfg has enable 'false' for *mlp*, which must be true"),
    ],
)
def test_a_file_that_is_no_configuration(content: str, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    problem = algorithm_file_is_config(str(file))
    expect(problem, message)
    if problem is not None:
        assert problem.startswith(
            f"quantization_config.algorithm={file} is not a ModelOpt config that can be exported: "
        )
        assert algorithm_file_fits_model(str(file), None, 1, LLAMA_8B) is None  # one mistake is one line


@pytest.mark.parametrize(
    ("model", "algorithm", "block", "tp", "message"),
    [
        (LLAMA_8B, "int4_awq", 128, 8, None),
        (LLAMA_8B, "fp8", 100, 8, None),
        (LLAMA_2_7B, "int4_awq", 128, 2, None),
        (LLAMA_2_7B, "int4_awq", 128, 4, "calibration_tp=4: ffn_hidden_size 11008 must be a multiple of 512"),
        (LLAMA_2_7B, "int4_awq", 64, 4, None),
        (LLAMA_8B, "int4_awq", 100, 1, "does not fit the model: hidden_size 4096 must be a multiple of 100; use awq_"),
        (
            replace(LLAMA_8B, hidden_size=4160),
            "int4_awq",
            128,
            1,
            "hidden_size 4160 must be a multiple of 128; use awq_",
        ),
    ],
)
def test_awq_blocks_at_calibration(model: ModelSpec, algorithm: str, block: int, tp: int, message: str | None) -> None:
    expect(awq_blocks_fit_calibration(algorithm, block, tp, model), message)


@pytest.mark.parametrize(
    ("model", "algorithm", "block", "tp", "message"),
    [
        (LLAMA_8B, "int4_awq", 128, 8, None),
        (LLAMA_8B, "int4_awq", 128, 16, None),  # 8 KV heads are repeated
        (LLAMA_2_7B, "int4_awq", 128, 4, "inference_tp=4: ffn_hidden_size 11008 must be a multiple of 512"),
        (LLAMA_2_7B, "int4_awq", 64, 4, None),
        (LLAMA_8B, "int4_awq", 32, 1, None),
        (replace(LLAMA_8B, ffn_hidden_size=11040), "int4_awq", 32, 1, "ffn_hidden_size 11040 must be a multiple of 64"),
        (LLAMA_8B, "w4a8_awq", 128, 8, None),
        (LLAMA_8B, "w4a8_awq", 64, 1, "awq_block_size=64 is too small for w4a8_awq: use 128"),
        # 32 + 2 * 1 heads of 64: the rows of one rank, 2176, are whole blocks of 64 but not of 256.
        (replace(LLAMA_8B, num_query_groups=1, head_size=64), "int4_awq", 256, 1, "query-key-value rows 2176"),
        (LLAMA_8B, "nvfp4", 128, 64, None),
    ],
)
def test_awq_blocks_at_inference(model: ModelSpec, algorithm: str, block: int, tp: int, message: str | None) -> None:
    expect(awq_blocks_fit_inference(algorithm, block, ("trtllm",), tp, model), message)


@pytest.mark.parametrize(
    ("block", "tp", "ffn", "way_out"),
    [
        (128, 1, 64 * 25, "use awq_block_size=64"),
        (128, 1, 25, "use another algorithm"),
        (256, 2, 256 * 25, "use a smaller calibration_tp or awq_block_size=128"),
        (128, 2, 25, "use a smaller calibration_tp or another algorithm"),
    ],
)
def test_the_way_out_of_blocks_that_do_not_fit_is_one(block: int, tp: int, ffn: int, way_out: str) -> None:
    model = replace(LLAMA_8B, ffn_hidden_size=ffn)
    problem = awq_blocks_fit_calibration("int4_awq", block, tp, model)
    assert problem is not None and problem.endswith(f"; {way_out}")
    inference = awq_blocks_fit_inference("int4_awq", block, ("trtllm",), tp, model)
    assert inference is not None and inference.endswith(f"; {way_out.replace('calibration', 'inference')}")


@pytest.mark.parametrize(
    ("model", "algorithm", "tp", "message"),
    [
        (LLAMA_8B, "nvfp4", 8, None),
        (LLAMA_2_7B, "nvfp4", 2, None),
        (
            LLAMA_2_7B,
            "nvfp4",
            4,
            "ffn_hidden_size 11008: each rank needs multiples of 128 output and 64 input features",
        ),
        (LLAMA_2_7B, "fp8", 4, None),
        (replace(LLAMA_8B, hidden_size=4160), "nvfp4", 1, "hidden_size 4160"),
    ],
)
def test_nvfp4_blocks(model: ModelSpec, algorithm: str, tp: int, message: str | None) -> None:
    expect(nvfp4_blocks_fit(algorithm, ("trtllm",), tp, model), message)


@pytest.mark.parametrize(
    ("model", "algorithm", "formats", "message"),
    [
        (SMOLLM2, "nvfp4", ("hf", "compressed_tensors"), None),
        (SMOLLM2, "nvfp4", ("hf", "trtllm"), "needs multiples of 128 output and 64 input"),
        (SMOLLM2, "w4a16_nvfp4", ("hf",), "needs multiples of 128 output and 128 input"),
        (replace(SMOLLM2, num_experts=4), "nvfp4", ("hf",), "hidden_size 576"),
        (
            replace(SMOLLM2, hidden_size=592),
            "nvfp4",
            ("hf",),
            "hidden_size 592: each rank needs multiples of 32",
        ),
    ],
)
def test_nvfp4_blocks_of_other_servers(
    model: ModelSpec, algorithm: str, formats: tuple[str, ...], message: str | None
) -> None:
    expect(nvfp4_blocks_fit(algorithm, formats, 1, model), message)


def test_kv_cache_needs_an_algorithm() -> None:
    expect(kv_cache_has_algorithm(None, True), "enable_kv_cache=true needs an algorithm")
    expect(kv_cache_has_algorithm("no_quant", True), "enable_kv_cache=true needs an algorithm")
    assert kv_cache_has_algorithm("fp8", True) is None
    assert kv_cache_has_algorithm(None, None) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps({"quant_cfg": {"*": OFF}, "algorithm": "max"}), None),
        ("a.yaml", "quant_cfg: {'*': {enable: false}}\nalgorithm: max\n", None),
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "[", "is not YAML"),
        ("a.yml", "- 1", "is not a ModelOpt config"),
        ("a.json", "{}", "is not a ModelOpt config"),
        ("a.json", None, "cannot be read: No such file or directory"),
    ],
)
def test_algorithm_file(name: str, content: str | None, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    problem = algorithm_file_is_config(str(file))
    expect(problem, message)
    assert problem is None or "\n" not in problem


_MODELS = st.builds(
    lambda heads_per_group, groups, head, ffn, layers: replace(
        LLAMA_8B,
        num_layers=layers,
        num_query_groups=groups,
        num_attention_heads=groups * heads_per_group,
        head_size=head,
        hidden_size=groups * heads_per_group * head,
        ffn_hidden_size=ffn,
    ),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 64).map(lambda multiple: 64 * multiple),
    st.integers(1, 12),
)


@given(_MODELS, st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([64, 128]))
def test_sizes_are_accepted_if_every_shard_is_whole(model: ModelSpec, tp: int, block: int) -> None:
    accepted = not any(
        [
            inference_tp_divides(tp, model),
            awq_blocks_fit_inference("int4_awq", block, ("trtllm",), tp, model),
        ]
    )
    heads, groups = model.num_attention_heads / tp, max(model.num_query_groups / tp, 1)
    ffn, rows = model.ffn_hidden_size / tp, (heads + 2 * groups) * model.head_size
    repeated = tp / model.num_query_groups if tp > model.num_query_groups else 1
    whole = all(count % 1 == 0 for count in (heads, groups, ffn, repeated))
    blocks = all(size % block == 0 for size in (rows, heads * model.head_size, ffn, model.hidden_size / tp))
    assert accepted == (whole and blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"quality": "fast", "algorithm": "no_quant", "forward_loop": print}, None),
        (
            {"algorithm": "no_quant"},
            "quality=balanced is not available, since algorithm=no_quant rounds to the nearest codes alone: use one ",
        ),
        ({"quality": "max"}, None),
        (
            {"quality": "max", "calibration_ep": 2},
            "quality=max is not available, since calibration_ep=2",
        ),
        ({"algorithm": "mine.yaml"}, "since algorithm=mine.yaml rounds to the nearest codes alone"),
        (
            {"formats": ("trtllm", "nemo")},
            "since export_format=nemo holds weights that are not rounded yet: use another format",
        ),
        ({"forward_loop": print}, "give calibration_dataset instead"),
        ({"model": replace(LLAMA_8B, is_quantized=True)}, "give the checkpoint as it was before"),
        ({"calibration_ep": 2}, "since calibration_ep=2, and all experts of a layer are rounded on one rank: use 1"),
        ({"calibration_tp": 3}, "since calibration_tp=3 does not divide hidden_size 4096"),
    ],
)
def test_balanced_is_for_our_own_algorithms_and_packed_formats(changes: dict[str, Any], message: str | None) -> None:
    sound = {
        "quality": "balanced",
        "algorithm": "fp8",
        "formats": ("trtllm",),
        "forward_loop": None,
        "calibration_tp": 1,
        "calibration_ep": 1,
        "model": LLAMA_8B,
    }
    expect(quality_is_available(**{**sound, **changes}), message)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [("fp8", None), ("no_quant", None), ("my.yaml", None), ("int8_dynamic", "nothing is calibrated; leave it out")],
)
def test_a_loop_calibrates_something(algorithm: str, message: str | None) -> None:
    expect(loop_has_something_to_calibrate(algorithm, print), message)
    expect(loop_has_something_to_calibrate(algorithm, None), None)


def test_a_kv_cache_is_calibrated() -> None:
    expect(kv_cache_has_algorithm("fp8_dynamic", True), "the cache has calibrated scales, and nothing is calibrated")
    expect(kv_cache_has_algorithm("fp8_dynamic", None), None)


SIZES = st.sampled_from([192, 320, 384, 1024, 1152, 4160])
NVFP4_FILE = "general/ptq/nvfp4_default-kv_fp8"


@pytest.fixture(scope="module")
def awq_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration as ModelOpt's preset int4_awq."""
    file = tmp_path_factory.mktemp("algorithm") / "awq.json"
    weight = {"num_bits": 4, "block_sizes": {"-1": 128, "type": "static"}}
    quantizers = {"default": OFF, "*weight_quantizer": weight, "*input_quantizer": OFF, "*lm_head*": OFF}
    file.write_text(json.dumps({"quant_cfg": quantizers, "algorithm": "awq_lite"}))
    return str(file)


@given(
    hidden=SIZES,
    inner=SIZES,
    heads=st.sampled_from([2, 6, 8]),
    calibration_tp=st.sampled_from([1, 2]),
    inference_tp=st.sampled_from([1, 2]),
    format=st.sampled_from(["hf", "trtllm"]),
)
def test_a_file_fits_the_sizes_that_its_algorithm_fits(
    hidden: int, inner: int, heads: int, calibration_tp: int, inference_tp: int, format: str, awq_file: str
) -> None:
    model = replace(
        LLAMA_8B,
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        num_query_groups=2,
        head_size=64,
    )
    inference_tp = inference_tp if format == "trtllm" else 1
    for file, problems in (
        (NVFP4_FILE, [nvfp4_blocks_fit("nvfp4", [format], inference_tp, model)]),
        (
            awq_file,
            [
                awq_blocks_fit_calibration("int4_awq", 128, calibration_tp, model),
                awq_blocks_fit_inference("int4_awq", 128, [format], inference_tp, model),
            ],
        ),
    ):
        found = algorithm_file_fits_sizes(file, [format], calibration_tp, inference_tp, model)
        assert bool(found) == any(problems), (found, problems)


def test_what_does_not_fit_a_file_is_named(awq_file: str) -> None:
    model = replace(LLAMA_8B, ffn_hidden_size=14400)
    problem = algorithm_file_fits_sizes(awq_file, ["hf"], 1, 1, model)
    expect(
        problem, "decoder.layers.0.mlp.linear_fc2, of 4096 output and 14400 input features, as int4_awq in blocks of"
    )
    assert str(problem).endswith("exclude, or use other blocks")
    excluded = frozenset(f"decoder.layers.{layer}.mlp.linear_fc2" for layer in range(32))
    assert algorithm_file_fits_sizes(awq_file, ["hf"], 1, 1, model, excluded) is None
    expect(algorithm_file_fits_sizes(awq_file, ["hf"], 64, 1, LLAMA_8B), "with calibration_tp=64 they must be multip")
