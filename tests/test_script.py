# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The script takes NeMo's flags, speaks of flags, and its exit status says how it ended."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from nemo_ptq import script
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.job import Job
from nemo_ptq.launch.flags import FLAGS, in_flags, read_arguments, read_flags
from nemo_ptq.options import OPTIONS
from nemo_ptq.script import main
from tests.conftest import Demo


def read(*arguments: str) -> dict[str, Any]:
    task, problems = read_flags(arguments)
    assert not problems
    return task


@pytest.mark.parametrize(
    ("flags", "option", "value"),
    [
        (("-nc", "--nemo_checkpoint", "-mp", "--model_path"), "nemo_checkpoint", "ckpt"),
        (("-ctp", "--calibration_tp", "--calib_tp"), "calibration_tp", 2),
        (("-cpp", "--calibration_pp", "--calib_pp"), "calibration_pp", 2),
        (("-cep", "--calibration_ep"), "calibration_ep", 2),
        (("--num_layers_in_first_pipeline_stage",), "num_layers_in_first_pipeline_stage", 3),
        (("--num_layers_in_last_pipeline_stage",), "num_layers_in_last_pipeline_stage", 3),
        (("--devices",), "devices", 8),
        (("-nodes", "--num_nodes"), "num_nodes", 2),
        (("--tokenizer",), "tokenizer_path", "tok"),
        (("--adapter",), "adapter", "lora"),
        (("-algo", "--algorithm"), "quantization_config.algorithm", "int8_sq"),
        (("-awq_bs", "--awq_block_size"), "quantization_config.awq_block_size", 64),
        (("--sq_alpha",), "quantization_config.sq_alpha", 0.8),
        (("--kv_cache_qformat",), "quantization_config.kv_cache_qformat", "fp8"),
        (("-bs", "--batch_size"), "quantization_config.calibration_batch_size", 8),
        (("-sl", "--seq_len"), "quantization_config.calibration_seq_len", 64),
        (("-calib_size", "--calibration_dataset_size"), "quantization_config.calibration_dataset_size", 16),
        (("-calib_ds", "--calibration_dataset"), "quantization_config.calibration_dataset", "a.jsonl"),
        (("-out", "--export_path", "--output_path"), "export_config.path", "out"),
        (("--export_format",), "export_config.export_format", "trtllm"),
        (("-dt", "--dtype"), "export_config.dtype", "16"),
        (("--decoder_type",), "export_config.decoder_type", "llama"),
        (("-itp", "--inference_tp", "--tensor_parallelism_size"), "export_config.inference_tp", 2),
        (("-ipp", "--inference_pp", "--pipeline_parallelism_size"), "export_config.inference_pp", 2),
    ],
)
def test_flags_with_a_value(flags: tuple[str, ...], option: str, value: Any) -> None:
    config, _, name = option.rpartition(".")
    for flag in flags:
        for arguments in ([f"{flag}={value}"], [flag, str(value)]):
            task = read(*arguments)
            assert (getattr(task[config], name) if config else task[name]) == value


@pytest.mark.parametrize(
    ("flag", "option", "value"),
    [
        ("--enable_kv_cache", "quantization_config.enable_kv_cache", True),
        ("--disable_kv_cache", "quantization_config.enable_kv_cache", False),
        ("--generate_sample", "export_config.generate_sample", True),
        ("--overwrite", "export_config.overwrite", True),
    ],
)
def test_flags_without_a_value(flag: str, option: str, value: bool) -> None:
    config, _, name = option.rpartition(".")
    assert getattr(read(flag)[config], name) is value
    assert getattr(read()[config], name) is not value


def test_legacy_ckpt() -> None:
    assert read("--legacy_ckpt") == {**read(), "legacy_ckpt": True}


def test_defaults_are_those_of_the_configs() -> None:
    task = read()
    assert task == {"quantization_config": QuantizationConfig(), "export_config": ExportConfig("qnemo_fp8_tp1_pp1")}


def test_the_default_path_tells_what_is_in_it() -> None:
    assert read("-algo", "int4_awq", "-itp", "2", "-ipp", "4")["export_config"].path == "qnemo_int4_awq_tp2_pp4"


def test_every_option_has_a_flag() -> None:
    assert {flag.option for flag in FLAGS} == OPTIONS.keys() - {"forward_loop", "model_path"}
    names = [name for flag in FLAGS for name in flag.names]
    assert len(names) == len(set(names))


def test_arguments_come_in_either_spelling() -> None:
    task = read_arguments(["CKPT", "-ctp", "2", "quantization_config.algorithm=int8_sq", "run.executor=torchrun"])
    assert (task["nemo_checkpoint"], task["calibration_tp"]) == ("CKPT", 2)
    assert task["quantization_config"].algorithm == "int8_sq"
    assert task["export_config"].path == "qnemo_int8_sq_tp1_pp1"
    assert read_arguments(["CKPT", "nemo_checkpoint=OTHER"])["nemo_checkpoint"] == "OTHER"
    with pytest.raises(ConfigError) as caught:
        read_arguments(["CKPT", "--calib", "1", "calibration=2", "export_config=@mine"])
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "calibration",
        "export_config=@mine",
        "--calib",
    ]


def test_a_flag_that_does_not_exist_gets_the_nearest() -> None:
    _, problems = read_flags(["--inference_pt", "2", "--xyzzy"])
    assert problems == ["--inference_pt is not a flag: did you mean --inference_tp?", "--xyzzy is not a flag"]
    (problem,) = read_flags(["--trust_remote_code"])[1]
    assert "code that a checkpoint brings is never run; leave it out, and give --tokenizer=DIR" in problem
    assert read_flags(["stray"])[1] == [
        "stray stands without a flag: write one before it, such as --nemo_checkpoint stray"
    ]


@pytest.mark.parametrize("arguments", [["-ctp"], ["--legacy_ckpt=1"]])
def test_a_flag_with_too_little_or_too_much(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        read_flags(arguments)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("export_config.path=/a exists: set export_config.overwrite=true", "--export_path=/a exists: set --overwrite"),
        ("quantization_config.enable_kv_cache=true needs", "--enable_kv_cache needs"),
        ("nemo_checkpoint=/x/nemo_checkpoint/y is", "--nemo_checkpoint=/x/nemo_checkpoint/y is"),
        ("quantization_config.calibration_seq_len=9 is longer", "--seq_len=9 is longer"),
        ("model.num_layers is", "model.num_layers is"),
    ],
)
def test_problems_speak_of_flags(problem: str, expected: str) -> None:
    assert in_flags(problem) == expected


@pytest.fixture
def sound(demo: Demo, tmp_path: Path) -> list[str]:
    return ["-nc", str(demo.checkpoint), "-out", str(tmp_path / "out"), "-calib_ds", "builtin"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the engine: `run_job` collects jobs, until a test gives it another."""
    jobs: list[Job] = []
    module = SimpleNamespace(run_job=jobs.append, jobs=jobs)
    monkeypatch.setitem(sys.modules, "nemo_ptq.engine.run", module)
    return module


def test_a_sound_job_is_run(sound: list[str], engine: SimpleNamespace, tmp_path: Path) -> None:
    assert main([*sound, "-itp", "2"]) == 0
    (job,) = engine.jobs
    assert (job.output, job.export.inference_tp) == (tmp_path / "out", 2)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"},
    ],
)
def test_the_launcher_gives_the_world_size(
    environment: dict[str, str], sound: list[str], engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*sound, "-ctp", "2", "-cpp", "2"]) == 0
    assert len(engine.jobs) == 1


@pytest.mark.parametrize(
    ("environment", "fix"),
    [
        ({}, "(torchrun --nproc_per_node 2)"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"}, "(srun --ntasks 2)"),
    ],
)
def test_a_wrong_number_of_processes_is_the_launchers_to_correct(
    environment: dict[str, str],
    fix: str,
    sound: list[str],
    engine: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*sound, "-ctp", "2"]) == 2
    assert capsys.readouterr().err.endswith(f"start 2 processes {fix}\n")


def test_a_wrong_command_line_is_told_in_flags(
    sound: list[str], engine: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sound, "-ctp", "3", "--calibration_ppp=1", "-bs", "0"]) == 2
    starts = [
        "Error: --calibration_ppp=1 is not a flag: did you mean --calibration_pp?",
        "Error: --batch_size=0 is not valid: it must be a whole number of at least 1",
        "Error: world size 1 is not a multiple of --calibration_tp=3",
        "Error: --calibration_tp=3 does not divide",
    ]
    errors = capsys.readouterr().err.splitlines()
    assert [error.startswith(start) for error, start in zip(errors, starts, strict=True)] == [True] * len(starts)
    assert not engine.jobs


@pytest.mark.parametrize(
    ("rank", "local_rank", "speaks", "waits"), [(0, 0, True, False), (1, 1, False, True), (2, 0, True, True)]
)
def test_rank_0_speaks_first(
    rank: int,
    local_rank: int,
    speaks: bool,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(script.time, "sleep", waited.append)
    for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["-ctp", "two"]) == 2
    assert bool(capsys.readouterr().err) is speaks
    assert bool(waited) is waits


def test_a_job_that_fails_names_its_rank(
    sound: list[str], engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: Job) -> None:
        raise PtqError("no space left")

    engine.run_job = fail
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(sound) == 1
    assert capsys.readouterr().err == "Error on rank 1: no space left\n"


def test_torchrun_is_told_why_a_rank_ends(
    sound: list[str], engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    def fail(job: Job) -> None:
        raise PtqError("no space left")

    engine.run_job = fail
    for number, arguments in enumerate((sound, [*sound, "-ctp", "two", "-bs", "0"])):
        file = tmp_path / f"{number}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        status = main(arguments)
        said = ProcessFailure(0, 1, status, str(file)).error_file_data["message"]["message"]
        assert (
            said.splitlines()
            == (
                ["Error on rank 0: no space left"],
                [
                    "Error: --calibration_tp='two' is not valid: it must be a whole number of at least 1",
                    "Error: --batch_size=0 is not valid: it must be a whole number of at least 1",
                ],
            )[number]
        )


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"), True),
        (DistNetworkError("the client socket has failed"), True),
        (RuntimeError("shapes do not match"), False),
        (KeyError("Connection"), False),
    ],
)
def test_a_rank_that_has_lost_another_lets_it_speak(
    error: Exception, waits: bool, sound: list[str], engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def fail(job: Job) -> None:
        raise error

    engine.run_job = fail
    monkeypatch.setattr(script.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(type(error)):
        main(sound)
    assert bool(waited) is waits


def test_help_is_fast() -> None:
    program = (
        "import runpy, sys; sys.argv = ['script', '--help']\n"
        "try: runpy.run_module('nemo_ptq.script', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, *{'torch', 'nemo', 'nemo_run'} & sys.modules.keys())"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    *text, last = result.stdout.splitlines()
    assert last.split() == ["0"]
    assert [name for flag in FLAGS for name in flag.names if name not in "\n".join(text)] == []


def test_plan_only_prints_the_plan_once_and_starts_nothing(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "start", lambda job: pytest.fail("started"))
    arguments = [f"--nemo_checkpoint={demo.checkpoint}", f"--export_path={tmp_path}/out", "--plan_only"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "✓ the job fits and keeps every rule"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*arguments, "--calibration_tp=3"]) == 1
    assert capsys.readouterr().out == ""
