# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every recipe that ships is a sound job for the model that it is for, however it is launched."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest

from nemo_ptq.errors import ConfigError
from nemo_ptq.job import Job
from nemo_ptq.launch import executors, front, run_context
from nemo_ptq.launch.recipes import load_recipe, override, read_arguments, read_recipe, recipe_file, recipe_names
from nemo_ptq.launch.run_context import PtqRunContext
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.options import OPTIONS
from nemo_ptq.plan import make_plan, rules
from nemo_ptq.task import ptq
from tests.launch.recipe_shapes import MODELS, model_of, true_shapes
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
NAMES = recipe_names()
HARDWARE = re.compile(r"(?:(\d) nodes, each with )?(\d) GPUs? of (24|80) GB")
# The smallest devices of the plan with so many GB.
GPUS = {24: "L4", 80: "H100"}
OPTIONS_OF_NEMO_RUN = {"run.executor"}


@pytest.fixture(scope="session")
def shapes() -> Mapping[str, ModelSpec]:
    (found,) = run_ranks(true_shapes, 1)
    return found


@pytest.fixture(scope="module", autouse=True)
def registered_executors() -> None:
    executors.register()


def hardware(text: str) -> tuple[int, int]:
    """The number of GPUs in a phrase of a recipe, and their memory in GB."""
    nodes, gpus, memory = HARDWARE.fullmatch(text.removeprefix("for ")).groups()  # type: ignore[union-attr]
    return int(nodes or 1) * int(gpus), int(memory)


def job_of(arguments: Mapping[str, Any]) -> Job:
    """The job of a task's arguments."""
    built = {name: fdl.build(value) if isinstance(value, fdl.Buildable) else value for name, value in arguments.items()}
    return rules.check_job(**built, world_size=None)


@pytest.mark.parametrize(
    "name", [name if name.endswith("_fp8") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_works_three_ways(
    name: str, shapes: Mapping[str, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shapes[model_of(name)]
    monkeypatch.setattr(rules.gathering, "read_metadata", lambda _: model)
    monkeypatch.setattr(rules.gathering, "read_model", lambda _, allowed: None)
    size, _ = hardware(read_recipe(name).hardware)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    jobs: list[Job] = []
    monkeypatch.setattr(front, "check_job", lambda **arguments: jobs.append(rules.check_job(**arguments)) or jobs[-1])
    places = [f"nemo_checkpoint={tmp_path}/checkpoint", f"export_config.path={tmp_path}/out"]
    for way in ({"factory": name}, {"yaml": str(recipe_file(name))}):
        PtqRunContext(name="ptq", direct=True, dryrun=True, **way).cli_execute(ptq, places)

    task = load_recipe(name)
    task.nemo_checkpoint, task.export_config.path = f"{tmp_path}/checkpoint", f"{tmp_path}/out"
    jobs.append(job_of(task.__arguments__))
    assert jobs[0] == jobs[1] == jobs[2]
    # The checks passed with the stated number of GPUs: it is what the calibration needs, no more.
    assert jobs[0].calibration_tp * jobs[0].calibration_pp == size


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_its_hardware(name: str, shapes: Mapping[str, ModelSpec]) -> None:
    recipe, task = read_recipe(name), load_recipe(name)
    task.export_config.path = "OUT"
    quantization, export = fdl.build(task.quantization_config), fdl.build(task.export_config)
    _, memory = hardware(recipe.hardware)
    plan = make_plan(
        shapes[model_of(name)],
        quantization,
        export,
        calibration_tp=task.calibration_tp,
        calibration_pp=task.calibration_pp,
        device=GPUS[memory],
    )
    assert plan.ok, plan.problems
    # The result: its weights fill the GPUs that it is for to two thirds, or a little more.
    gpus, memory = hardware(recipe.result)
    fill = sum(file.bytes for file in plan.files if file.name.startswith("rank")) / (gpus * memory * 1e9)
    assert fill < 0.7, fill


@pytest.mark.parametrize("name", NAMES)
def test_its_head_tells_what_is_in_it(name: str) -> None:
    recipe, text = read_recipe(name), recipe_file(name).read_text()
    values = dict(argument.split("=", 1) for argument in recipe.arguments)
    assert name == f"{model_of(name)}_{values['quantization_config.algorithm']}"
    assert values.keys() <= OPTIONS.keys() | OPTIONS_OF_NEMO_RUN
    assert f"#   nemo llm ptq --factory {name} nemo_checkpoint=CKPT export_config.path=OUT" in text
    gpus, _ = hardware(recipe.hardware)
    assert values.get("run.executor") == ("torchrun" if 1 < gpus <= 8 else None)
    assert ("run.executor=slurm" in text) == (gpus > 8)
    assert hardware(recipe.result)[0] == int(values["export_config.inference_tp"])


def test_there_is_one_for_every_model_and_algorithm() -> None:
    assert {model_of(name) for name in NAMES} == set(MODELS)
    for model in MODELS:
        algorithms = [name.removeprefix(f"{model}_") for name in NAMES if model_of(name) == model]
        is_mixture = model.startswith("mixtral") or re.search(r"_a\d+b$", model)
        assert algorithms == (["fp8"] if is_mixture else ["fp8", "int4_awq", "int8_sq"])


def test_no_recipe_is_called_like_a_value() -> None:
    values = {name for option in OPTIONS.values() for name in option.kind.names}
    assert values.isdisjoint(NAMES)


def test_a_recipe_runs_on_as_many_ranks_as_it_needs(
    shapes: Mapping[str, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shapes["llama3_70b"]
    monkeypatch.setattr(rules.gathering, "read_metadata", lambda _: model)
    monkeypatch.setattr(rules.gathering, "read_model", lambda _, allowed: None)
    launched: list[Any] = []
    monkeypatch.setattr(run_context, "run_experiment", lambda task, executor, **_: launched.append((task, executor)))
    places = [f"nemo_checkpoint={tmp_path}/checkpoint", f"export_config.path={tmp_path}/out"]
    settings = ["calibration_tp=4", "quantization_config.calibration_seq_len=64"]
    PtqRunContext(name="ptq", factory="llama3_70b_fp8").cli_execute(ptq, [*places, *settings])
    ((task, executor),) = launched
    assert executor.ntasks_per_node == 4
    assert (task.calibration_tp, task.quantization_config.calibration_seq_len) == (4, 64)
    assert task.export_config.inference_tp == 2


@pytest.mark.parametrize(
    ("options", "arguments", "errors"),
    [
        (
            {"factory": "llama3_70b_fp9"},
            ["calibration_tpp=1"],
            [
                "llama3_70b_fp9 is not a recipe: did you mean llama3_70b_fp8? ",
                "calibration_tpp is not an option: did you mean calibration_tp?",
                "export_config.path is missing",
                "nemo_checkpoint is missing",
            ],
        ),
        (
            {"yaml": "recipes/llama3_70b_f8.yaml"},
            ["nemo_checkpoint=nowhere", "export_config.path=out"],
            [
                "recipes/llama3_70b_f8.yaml is neither a file nor a recipe: did you mean llama3_70b_fp8? ",
                "nemo_checkpoint=nowhere does not exist",
            ],
        ),
        (
            {"factory": "llama3_8b_fp8"},
            ["nemo_checkpoint=nowhere", "export_config.path=out", "quantization_config.sq_alpha=2", "run.exe=torchrun"],
            [
                "run.exe=torchrun is not an option",
                "quantization_config.sq_alpha=2.0 is not valid",
                "nemo_checkpoint=nowhere does not exist",
            ],
        ),
    ],
)
def test_all_problems_are_found_at_once(
    options: dict[str, str], arguments: list[str], errors: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        PtqRunContext(name="ptq", **options).cli_execute(ptq, arguments)
    assert caught.value.code == 2
    found = [line.removeprefix("Error: ") for line in capsys.readouterr().err.splitlines()]
    assert [line.startswith(start) for line, start in zip(found, errors, strict=True)] == [True] * len(errors), found


def test_a_wrong_name_in_a_file_is_found_as_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("calibration_tpp: 2\nquantization_config:\n  algorithm: fp9\n  sq_alpha: much\n")
    with pytest.raises(SystemExit):
        PtqRunContext(name="ptq", yaml=str(file)).cli_execute(ptq, ["nemo_checkpoint=nowhere", "export_config.path=o"])
    errors = capsys.readouterr().err
    assert "calibration_tpp is not an option: did you mean calibration_tp?" in errors
    assert "quantization_config.algorithm=fp9 is not known: did you mean fp8?" in errors
    assert "quantization_config.sq_alpha='much' is not valid" in errors


@pytest.mark.parametrize(
    ("content", "problem"), [("- a\n", "holds no arguments"), ("a: [\n", "is not YAML"), ("", "holds no arguments")]
)
def test_a_file_that_is_no_recipe(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        read_arguments(file)


def test_a_file_that_nemo_run_wrote_gives_the_same_job(
    shapes: Mapping[str, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(shapes["llama3_8b"])
    monkeypatch.setattr(rules.gathering, "read_metadata", lambda _: model)
    monkeypatch.setattr(rules.gathering, "read_model", lambda _, allowed: None)
    places = [f"nemo_checkpoint={tmp_path}/checkpoint", f"export_config.path={tmp_path}/out"]
    file = tmp_path / "job.yaml"
    PtqRunContext(name="ptq", factory="llama3_8b_int8_sq", to_yaml=str(file)).cli_execute(ptq, places)
    expected = override(read_arguments(recipe_file("llama3_8b_int8_sq")), places)
    assert set(expected) <= set(read_arguments(file))
    PtqRunContext(name="ptq", yaml=str(file), dryrun=True).cli_execute(ptq, [])


def test_a_factory_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @run.cli.factory(target=ptq)
    def job_of_this_test() -> run.Partial[ptq]:
        return run.Partial(ptq, calibration_tp=3)

    with pytest.raises(SystemExit):
        PtqRunContext(name="ptq", factory="job_of_this_test").cli_execute(ptq, ["nemo_checkpoint=nowhere"])
    assert "calibration_tp=3 * calibration_pp=1" in capsys.readouterr().err


def test_the_document_lists_the_files() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    recipes = [read_recipe(name) for name in NAMES]
    assert rows == [(recipe.name, recipe.hardware, recipe.result.removeprefix("for ")) for recipe in recipes]
