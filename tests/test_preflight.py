# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every mistake in a job's arguments is found before anything starts, in one line each, all lines together."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_ptq import preflight
from nemo_ptq.checkpoint.metadata import CheckpointMetadata, read_metadata
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.preflight import RULES, check_job
from tests.conftest import Demo
from tests.plan.models import LLAMA_8B

LLAMA_2_7B = replace(LLAMA_8B, num_query_groups=32, ffn_hidden_size=11008)
MIXTRAL = replace(LLAMA_8B, config_class="x.MixtralConfig8x7B", num_experts=8)
STARCODER = replace(
    LLAMA_8B, config_class="x.StarcoderConfig15B", num_query_groups=1, normalization="LayerNorm",
    position_embedding_type="learned_absolute",
)  # fmt: skip


def problems_of(
    demo: Demo,
    output: Path,
    *,
    quantization: dict[str, Any] | None = None,
    export: dict[str, Any] | None = None,
    **task: Any,
) -> list[str]:
    """The problems of a job that is right but for what is given."""
    arguments = {
        "nemo_checkpoint": str(demo.checkpoint),
        "world_size": 1,
        "quantization_config": QuantizationConfig(**(quantization or {})),
        "export_config": ExportConfig(**{"path": str(output), **(export or {})}),
        **task,
    }
    try:
        check_job(**arguments)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_sound_job_is_resolved(demo: Demo, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(output.parent)
    quantization = QuantizationConfig("fp8", calibration_dataset=str(demo.calibration))
    job = check_job(
        model_path=str(demo.checkpoint),
        export_config=ExportConfig("out", inference_tp=2),
        quantization_config=quantization,
        calibration_tp=2,
        world_size=4,
        devices=2,
        num_nodes=2,
    )
    assert (job.checkpoint, job.output) == (demo.checkpoint, output)
    assert job.metadata == read_metadata(demo.checkpoint)
    assert job.quantization is quantization
    assert (job.calibration_tp, job.calibration_pp, job.export.inference_tp) == (2, 1, 2)
    assert job.decoder == "llama"
    assert job.quantizes_kv_cache


def test_defaults_apply_where_no_quantization_config_is_given(demo: Demo, output: Path) -> None:
    job = check_job(nemo_checkpoint=demo.checkpoint, export_config=ExportConfig(str(output)), world_size=None)
    assert job.quantization == QuantizationConfig()


def test_the_users_decoder_type_counts(demo: Demo, output: Path) -> None:
    export = ExportConfig(str(output), decoder_type="gemma")
    assert check_job(nemo_checkpoint=demo.checkpoint, export_config=export, world_size=1).decoder == "gemma"


def test_all_problems_come_together_one_line_each(demo: Demo, output: Path) -> None:
    output.mkdir()
    problems = problems_of(
        demo,
        output,
        calibration_tp=3,
        calibration_pp="two",
        tokenizer_path="/no/such/tokenizer",
        quantization={"algorithm": "fp9", "sq_alpha": 2, "calibration_dataset": "/no/such.jsonl"},
        export={"dtype": "float8", "inference_pp": 3},
        legacy_ckpt=1,
    )
    named = [
        "calibration_pp='two' is not valid: it must be a whole number of at least 1",
        "legacy_ckpt=1 is not valid: it must be true or false",
        "quantization_config.algorithm=fp9 is not known: did you mean fp8?",
        "quantization_config.sq_alpha=2 is not valid: it must be a number from 0 to 1",
        "export_config.dtype=float8 is not known: did you mean float16?",
        "tokenizer_path=/no/such/tokenizer does not exist",
        "calibration_tp=3 does not divide",
        "quantization_config.calibration_dataset=/no/such.jsonl cannot be read",
        "export_config.inference_pp=3 does not divide",
        f"export_config.path={output} exists",
    ]
    assert [problem.startswith(name) for problem, name in zip(problems, named, strict=True)] == [True] * len(named)
    assert not any("\n" in problem for problem in problems)


def test_what_is_missing_altogether_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_job(world_size=1)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "export_config.path is missing",
        "nemo_checkpoint is missing",
    ]


def test_other_objects_in_place_of_configs_are_refused(demo: Demo) -> None:
    with pytest.raises(ConfigError) as caught:
        check_job(nemo_checkpoint=demo.checkpoint, quantization_config="fp8", export_config={"path": "x"}, world_size=1)  # type: ignore[arg-type]
    assert [problem.rpartition(" ")[2] for problem in caught.value.problems] == ["QuantizationConfig", "ExportConfig"]


def test_two_names_of_the_checkpoint_must_agree(demo: Demo, output: Path) -> None:
    assert problems_of(demo, output, model_path=str(demo.checkpoint)) == []
    (problem,) = problems_of(demo, output, model_path="/other")
    assert problem.endswith("mean the same option: give one of them")


def test_the_problems_of_the_checkpoint_come_along(demo: Demo, output: Path) -> None:
    problems = problems_of(demo, output, nemo_checkpoint=str(demo.checkpoint / "context"), devices=3)
    assert len(problems) == 2
    assert f"give {demo.checkpoint}" in "".join(problems)


def test_checking_needs_neither_torch_nor_nemo_nor_a_second(demo: Demo, output: Path) -> None:
    program = (
        "import sys, time; start = time.perf_counter();"
        "from nemo_ptq.preflight import check_job; from nemo_ptq.config import ExportConfig;"
        "check_job(nemo_checkpoint=sys.argv[1], export_config=ExportConfig(sys.argv[2]), world_size=1);"
        "print(time.perf_counter() - start, *{'torch', 'nemo', 'nemo_run', 'megatron'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, demo.checkpoint, output],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    seconds, *modules = result.stdout.split()
    assert modules == []
    assert float(seconds) < 1.0


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tp", "fix"),
    [
        (LLAMA_8B, 1, None),
        (LLAMA_8B, 8, None),
        (LLAMA_8B, 3, "use 1, 2, 4, 8, 16 or 32"),
        (LLAMA_8B, 16, None),
        (replace(LLAMA_8B, num_query_groups=12, num_attention_heads=48), 8, "12 query groups: use 1, 2 or 4"),
        (replace(LLAMA_8B, ffn_hidden_size=14340), 8, "14340 ffn_hidden_size: use 1, 2 or 4"),
        (STARCODER, 2, None),
        (replace(STARCODER, num_attention_heads=4, head_size=3), 4, "18 query-key-value rows in pairs: use 1"),
    ],
)
def test_calibration_tp(model: CheckpointMetadata, tp: int, fix: str | None) -> None:
    _expect(preflight.calibration_tp_divides(tp, model), fix)


@pytest.mark.parametrize(
    ("pp", "first", "last", "message"),
    [
        (1, None, None, None),
        (4, None, None, None),
        (3, None, None, "does not divide 32 layers: use 1, 2, 4, 8, 16 or 32, or set num_layers_in_first"),
        (3, 10, None, None),
        (3, 10, 12, None),
        (2, 20, 12, None),
        (3, 11, None, "num_layers_in_first_pipeline_stage=11 do not fit 32 layers in calibration_pp=3 stages"),
        (2, 20, 20, "do not fit"),
        (2, 10, 12, "do not fit"),
        (4, 16, 16, "do not fit"),
        (1, 32, None, "need calibration_pp=2 or more, not 1: leave them out"),
        (1, 16, 16, "need calibration_pp=2 or more"),
    ],
)
def test_pipeline_stages(pp: int, first: int | None, last: int | None, message: str | None) -> None:
    _expect(preflight.stages_are_whole(pp, first, last, LLAMA_8B), message)


@given(
    pp=st.integers(1, 8),
    first=st.none() | st.integers(1, 16),
    last=st.none() | st.integers(1, 16),
    layers=st.integers(1, 32),
)
def test_stages_that_are_accepted_hold_all_layers(pp: int, first: int | None, last: int | None, layers: int) -> None:
    given_layers = [count for count in (first, last) if count is not None]
    others = pp - len(given_layers)
    accepted = preflight.stages_are_whole(pp, first, last, replace(LLAMA_8B, num_layers=layers)) is None
    possible = any(sum(given_layers) + others * each == layers for each in range(1 if others else 0, layers + 1))
    assert accepted == (possible and others >= 0 and (pp > 1 or not given_layers))


@pytest.mark.parametrize(
    ("model", "ep", "message"),
    [
        (LLAMA_8B, 1, None),
        (LLAMA_8B, 2, "is for mixture-of-experts models"),
        (MIXTRAL, 8, None),
        (MIXTRAL, 3, "does not divide 8 experts: use 1, 2, 4 or 8"),
    ],
)
def test_calibration_ep(model: CheckpointMetadata, ep: int, message: str | None) -> None:
    _expect(preflight.experts_divide(ep, model), message)


def test_experts_are_spread_or_sharded() -> None:
    assert preflight.experts_are_sharded_once(2, 1) is None
    assert preflight.experts_are_sharded_once(1, 2) is None
    _expect(preflight.experts_are_sharded_once(2, 2), "use calibration_tp=1 or calibration_ep=1")


@pytest.mark.parametrize(
    ("model", "algorithm", "message"),
    [
        (MIXTRAL, "fp8", None),
        (MIXTRAL, None, None),
        (LLAMA_8B, "int4_awq", None),
        (MIXTRAL, "int4_awq", "algorithm=int4_awq cannot be exported for a mixture of experts"),
    ],
)
def test_formats_of_experts(model: CheckpointMetadata, algorithm: str | None, message: str | None) -> None:
    _expect(preflight.experts_have_a_format(algorithm, "trtllm", model), message)


@pytest.mark.parametrize(
    ("algorithm", "format", "message"),
    [
        ("int8_sq", "trtllm", None),
        ("int8_sq", "compressed_tensors", None),
        ("int8_sq", "hf", "does not go into export_format=hf: ModelOpt's unified checkpoint has no SmoothQuant"),
        ("int8_sq", ["trtllm", "hf"], "use export_format=compressed_tensors"),
        ("w4a8_awq", "hf", None),
        ("w4a8_awq", "compressed_tensors", "use export_format=hf"),
        ("nvfp4", "[hf,compressed_tensors]", "use export_format=hf"),
        (None, ["trtllm", "hf", "compressed_tensors"], None),
    ],
)
def test_formats_of_algorithms(algorithm: str | None, format: Any, message: str | None) -> None:
    _expect(preflight.formats_carry_algorithm(algorithm, format), message)


@pytest.mark.parametrize(
    ("algorithm", "format", "message"),
    [
        ("nvfp4", "hf", None),
        ("fp8", "compressed_tensors", None),
        ("int4_awq", "hf", "export_format=hf take quantized experts in fp8 or nvfp4 only"),
        ("int8_sq", "compressed_tensors", "use fp8 or no_quant"),
    ],
)
def test_experts_in_hugging_face_formats(algorithm: str, format: str, message: str | None) -> None:
    _expect(preflight.experts_have_a_format(algorithm, format, MIXTRAL), message)


@pytest.mark.parametrize("format", ["hf", "compressed_tensors"])
def test_a_hugging_face_format_needs_a_class_there(format: str) -> None:
    gpt = replace(LLAMA_8B, config_class="x.GPTConfig", normalization="LayerNorm")
    _expect(
        preflight.family_has_class(gpt, None, format), "no model class for GPT (GPTConfig); use export_format=trtllm"
    )
    assert preflight.family_has_class(gpt, None, "trtllm") is None
    assert preflight.family_has_class(LLAMA_8B, None, format) is None
    _expect(preflight.kv_cache_has_layers(STARCODER, None, format, True), "no place for its scales")
    assert preflight.kv_cache_has_layers(STARCODER, None, format, None) is None
    assert preflight.kv_cache_has_layers(LLAMA_8B, None, format, True) is None


@pytest.mark.parametrize(
    ("format", "tp", "message"),
    [
        ("trtllm", 2, None),
        ("[trtllm,hf]", 2, None),
        ("hf", 1, None),
        ("hf", 2, "inference_tp=2: the files of export_format=hf have no parallelism"),
    ],
)
def test_parallelism_is_for_formats_that_have_it(format: str, tp: int, message: str | None) -> None:
    _expect(preflight.formats_have_parallelism(format, tp, 1), message)


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "message"),
    [
        (4, 2, 2, 1, None),
        (8, 2, 2, 1, None),
        (None, 2, 2, 1, None),
        (1, 2, 1, 1, "calibration_tp=2 * calibration_pp=1 = 2: start 2 processes"),
        (6, 2, 2, 1, "world size 6 is not a multiple of"),
        (2, 2, 1, 2, "calibration_tp=2 * calibration_pp=1 * calibration_ep=2 = 4"),
    ],
)
def test_world_size(world: int | None, tp: int, pp: int, ep: int, message: str | None) -> None:
    _expect(preflight.ranks_are_enough(world, tp, pp, ep), message)


@pytest.mark.parametrize(
    ("world", "devices", "nodes", "message"),
    [
        (16, 8, 2, None),
        (16, 8, None, None),
        (16, None, 2, None),
        (None, 3, 5, None),
        (16, 8, 1, "devices=8 * num_nodes=1 does not match the launcher's world size of 16"),
        (16, 3, None, "devices=3 does not match"),
        (16, None, 3, "num_nodes=3 does not match"),
    ],
)
def test_devices_and_nodes(world: int | None, devices: int | None, nodes: int | None, message: str | None) -> None:
    _expect(preflight.devices_match(world, devices, nodes), message)


@pytest.mark.parametrize(
    ("model", "tp", "message"),
    [
        (LLAMA_8B, 8, None),
        (LLAMA_8B, 16, None),  # KV heads are repeated
        (
            LLAMA_8B,
            3,
            "does not divide 32 attention heads, 14336 ffn_hidden_size, 8 query groups: use 1, 2, 4, 8, 16 or 32",
        ),
        (STARCODER, 4, None),
        (replace(LLAMA_8B, num_attention_heads=48, num_query_groups=12), 8, "12 query groups"),
    ],
)
def test_inference_tp(model: CheckpointMetadata, tp: int, message: str | None) -> None:
    _expect(preflight.inference_tp_divides(tp, model), message)


def test_inference_pp() -> None:
    assert preflight.inference_pp_divides(4, LLAMA_8B) is None
    _expect(preflight.inference_pp_divides(5, LLAMA_8B), "inference_pp=5 does not divide 32 layers: use 1, 2, 4, 8")


@pytest.mark.parametrize(
    ("model", "algorithm", "block", "tp", "message"),
    [
        (LLAMA_8B, "int4_awq", 128, 8, None),
        (LLAMA_8B, "fp8", 100, 8, None),
        (LLAMA_2_7B, "int4_awq", 128, 2, None),
        (LLAMA_2_7B, "int4_awq", 128, 4, "calibration_tp=4: ffn_hidden_size 11008 must be a multiple of 512"),
        (LLAMA_2_7B, "int4_awq", 64, 4, None),
        (LLAMA_8B, "int4_awq", 100, 1, "attention output 4096, ffn_hidden_size 14336 must be a multiple of 100"),
    ],
)
def test_awq_blocks_at_calibration(
    model: CheckpointMetadata, algorithm: str, block: int, tp: int, message: str | None
) -> None:
    _expect(preflight.awq_blocks_fit_calibration(algorithm, block, tp, model), message)


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
def test_awq_blocks_at_inference(
    model: CheckpointMetadata, algorithm: str, block: int, tp: int, message: str | None
) -> None:
    _expect(preflight.awq_blocks_fit_inference(algorithm, block, "trtllm", tp, model), message)


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
def test_nvfp4_blocks(model: CheckpointMetadata, algorithm: str, tp: int, message: str | None) -> None:
    _expect(preflight.nvfp4_blocks_fit(algorithm, tp, model), message)


def test_family() -> None:
    assert preflight.family_is_supported(LLAMA_8B, None) is None
    unknown = replace(LLAMA_8B, config_class="my.OwnConfig")
    _expect(preflight.family_is_supported(unknown, None), "OwnConfig")
    assert preflight.family_is_supported(unknown, "llama") is None
    _expect(preflight.family_is_supported(replace(LLAMA_8B, config_class="x.Falcon7BConfig"), None), "not supported")


def test_layers_that_readers_leave_out() -> None:
    def problem(model: CheckpointMetadata, export_format: str = "trtllm") -> str | None:
        return preflight.reader_knows_layers(model, None, export_format)

    assert problem(LLAMA_8B) is None
    assert problem(replace(LLAMA_8B, qkv_bias=True, linear_bias=True)) is None
    assert problem(replace(STARCODER, qkv_bias=True, linear_bias=True)) is None
    _expect(problem(replace(LLAMA_8B, qk_norm=True)), "ignore the norms of queries and keys")
    assert problem(replace(LLAMA_8B, qk_norm=True), "hf") is None  # said by that format's own check
    _expect(problem(replace(LLAMA_8B, qkv_bias=True)), "wants a bias on the query-key-value projection and the output")


def test_norm() -> None:
    assert preflight.norm_fits_decoder(LLAMA_8B, None, "trtllm") is None
    assert preflight.norm_fits_decoder(STARCODER, None, "trtllm") is None
    _expect(preflight.norm_fits_decoder(LLAMA_8B, "gpt", "trtllm"), "decoder gpt only LayerNorm")
    _expect(
        preflight.norm_fits_decoder(replace(LLAMA_8B, normalization="LayerNorm"), None, "trtllm"), "llama only RMSNorm"
    )


def test_learned_positions() -> None:
    assert preflight.positions_suffice(9000, LLAMA_8B) is None
    assert preflight.positions_suffice(8192, STARCODER) is None
    _expect(preflight.positions_suffice(8193, STARCODER), "calibration_seq_len=8193 is longer than the model's 8192")


def test_kv_cache_needs_an_algorithm() -> None:
    _expect(preflight.kv_cache_has_algorithm(None, True), "enable_kv_cache=true needs an algorithm")
    _expect(preflight.kv_cache_has_algorithm("no_quant", True), "enable_kv_cache=true needs an algorithm")
    assert preflight.kv_cache_has_algorithm("fp8", True) is None
    assert preflight.kv_cache_has_algorithm(None, None) is None


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "~/no/such"])
def test_a_tokenizer_that_is_a_path_must_exist(name: str) -> None:
    _expect(preflight.tokenizer_exists(name), f"tokenizer_path={name} does not exist")


def test_other_tokenizers_may_exist(tmp_path: Path) -> None:
    assert preflight.tokenizer_exists(None) is None
    assert preflight.tokenizer_exists(tmp_path) is None
    assert preflight.tokenizer_exists("organisation/model") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', None),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', None),
        ('{"text": "a"}\n{"text": "b"\n', "line 2: not JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', 'line 2: needs a "text" string or a "messages" list'),
        ("", "holds no sample"),
    ],
)
def test_data_file(content: str, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    problem = preflight.data_is_readable(str(file), 512, 8, None)
    _expect(problem, message)
    assert problem is None or problem.startswith(f"quantization_config.calibration_dataset={file}")


def test_only_the_samples_that_will_be_used_are_read(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert preflight.data_is_readable(str(file), 1, 1, None) is None
    _expect(preflight.data_is_readable(str(file), 2, 1, None), "line 3")
    assert preflight.data_is_readable(str(file), 3, 0, lambda model: None) is None  # the user's loop has its own data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps({"quant_cfg": {}, "algorithm": "max"}), None),
        ("a.yaml", "quant_cfg: {}\nalgorithm: max\n", None),
        ("a.json", "{", "cannot be parsed"),
        ("a.yaml", "[", "cannot be parsed"),
        ("a.yml", "- 1", "is not a ModelOpt config"),
        ("a.json", "{}", "is not a ModelOpt config"),
        ("a.json", None, "cannot be read: No such file or directory"),
    ],
)
def test_algorithm_file(name: str, content: str | None, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    problem = preflight.algorithm_file_is_config(str(file))
    _expect(problem, message)
    assert problem is None or "\n" not in problem


def test_output_apart_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "a" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (tmp_path / "link").symlink_to(checkpoint)
    for path in (
        checkpoint,
        checkpoint / "context" / "out",
        tmp_path / "a",
        tmp_path / "link",
        tmp_path / "link" / "o",
    ):
        _expect(preflight.output_is_apart(path, checkpoint), "lie in each other: choose another directory")
    assert preflight.output_is_apart(tmp_path / "a" / "out", checkpoint) is None


def test_output_that_exists(tmp_path: Path) -> None:
    assert preflight.output_is_free(tmp_path / "new", False) is None
    _expect(preflight.output_is_free(tmp_path, False), "or set export_config.overwrite=true")
    assert preflight.output_is_free(tmp_path, True) is None  # empty
    (tmp_path / "thesis.tex").touch()
    _expect(preflight.output_is_free(tmp_path, True), "is not an export, so it is not overwritten")
    (tmp_path / "config.json").touch()
    assert preflight.output_is_free(tmp_path, True) is None
    _expect(preflight.output_is_free(tmp_path / "thesis.tex", True), "is not an export")


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    assert preflight.output_is_writable(tmp_path / "new" / "out") is None
    assert preflight.output_is_writable("/") is None  # that it exists is told by another rule
    (tmp_path / "file").touch()
    _expect(preflight.output_is_writable(tmp_path / "file" / "out"), f"{tmp_path}/file is not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_in_a_directory_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    _expect(preflight.output_is_writable(tmp_path / "out"), f"{tmp_path} is not writable")


def test_every_rule_is_applied() -> None:
    source = Path(preflight.__file__).read_text()
    rules = set(re.findall(r"^def ([a-z]\w*)\(", source, re.MULTILINE)) - {"check_job", "gather", "findings"}
    assert {rule.__name__ for rule in RULES} == rules


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
def test_sizes_are_accepted_if_every_shard_is_whole(model: CheckpointMetadata, tp: int, block: int) -> None:
    accepted = not any(
        [
            preflight.inference_tp_divides(tp, model),
            preflight.awq_blocks_fit_inference("int4_awq", block, "trtllm", tp, model),
        ]
    )
    heads, groups = model.num_attention_heads / tp, max(model.num_query_groups / tp, 1)
    ffn, rows = model.ffn_hidden_size / tp, (heads + 2 * groups) * model.head_size
    repeated = tp / model.num_query_groups if tp > model.num_query_groups else 1
    whole = all(count % 1 == 0 for count in (heads, groups, ffn, repeated))
    blocks = all(size % block == 0 for size in (rows, heads * model.head_size, ffn, model.hidden_size / tp))
    assert accepted == (whole and blocks)


def _expect(problem: str | None, message: str | None) -> None:
    if message is None:
        assert problem is None
    else:
        assert problem is not None
        assert message in problem
