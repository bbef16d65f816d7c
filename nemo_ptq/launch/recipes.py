# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Settings for a known model and algorithm: one YAML file for each, named `<model>_<algorithm>.yaml`.

A recipe holds arguments of the main job, and those of the command line come after it: `nemo llm ptq --factory NAME`,
`nemo llm ptq --yaml FILE` and :func:`load_recipe` give the same task, and the same checks apply to it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ptq.errors import ConfigError, did_you_mean
from nemo_ptq.options import OPTIONS
from nemo_ptq.untrusted import FileError, read_yaml

# NeMo-Run imports torch, which takes seconds: it is imported where it is needed.
if TYPE_CHECKING:
    import nemo_run as run

DIRECTORY = Path(__file__).parents[1] / "recipes"
# Entries of NeMo-Run's own files that the task's signature implies already.
_TYPES = ("_target_", "_partial_")


@dataclass(frozen=True)
class Recipe:
    """The head of a recipe.

    Attributes:
        name: Its name, e.g. "llama3_70b_fp8".
        summary: The model and the algorithm.
        hardware: What it runs on.
        result: What the exported model is for.
        arguments: The `name=value` arguments that it stands for.
    """

    name: str
    summary: str
    hardware: str
    result: str
    arguments: Sequence[str]


def recipe_names() -> list[str]:
    """Names all recipes, in alphabetical order."""
    return sorted(file.stem for file in DIRECTORY.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Returns the file of a recipe.

    Args:
        name: The recipe's name, or a path that ends in its file's name.

    Raises:
        ConfigError: If there is no such recipe.
    """
    known, stem = recipe_names(), Path(name).stem
    if stem not in known:
        kind = "neither a file nor a recipe" if name != stem else "not a recipe"
        hint = did_you_mean(stem, known) or ":"
        raise ConfigError([f"{name} is {kind}{hint} `nemo-ptq recipes` lists the recipes"])
    return DIRECTORY / f"{stem}.yaml"


def find_file(name: str) -> Path:
    """Returns the file of that name, or else the recipe's: it is found wherever the package is installed.

    Raises:
        ConfigError: If there is neither.
    """
    return Path(name) if Path(name).exists() else recipe_file(name)


def read_recipe(name: str) -> Recipe:
    """Reads a recipe.

    Raises:
        ConfigError: If there is no such recipe.
    """
    file = recipe_file(name)
    comments = [line.removeprefix("# ") for line in file.read_text().splitlines() if line.startswith("# ")]
    facts = dict(line.rstrip(".").split(": ", 1) for line in comments if line.startswith(("Hardware: ", "Result: ")))
    summary = comments[2].rstrip(".")  # after the licence
    return Recipe(file.stem, summary, facts["Hardware"], facts["Result"], read_arguments(file))


def read_arguments(file: Path) -> list[str]:
    """Turns a YAML file into the `name=value` arguments that it stands for.

    Args:
        file: A recipe, or any file that `nemo llm ptq --to-yaml` wrote.

    Raises:
        ConfigError: If the file cannot be read.

    Example:
        >>> read_arguments(recipe_file("llama3_70b_fp8"))[:2]
        ['calibration_tp=8', 'quantization_config.algorithm=fp8']
    """
    try:
        content = read_yaml(file)
    except FileError as error:
        raise ConfigError([str(error)]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{file} holds no arguments: write `name: value` lines, as `nemo-ptq recipes NAME` shows"])
    return list(_flatten(content, ""))


def _flatten(content: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        elif key not in _TYPES:
            text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            yield f"{name}{text}" if name.endswith("=") else f"{name}={text}"


def override(recipe: Iterable[str], arguments: Sequence[str]) -> list[str]:
    """Appends arguments to those of a recipe, and leaves out those that they replace.

    Another executor has settings of its own, so that it replaces those of the recipe's executor as well.

    Example:
        >>> override(["calibration_tp=8", "run.executor=torchrun"], ["run.executor=slurm"])
        ['calibration_tp=8', 'run.executor=slurm']
    """
    given = {argument.partition("=")[0] for argument in arguments}
    kept = [argument for argument in recipe if argument.partition("=")[0] not in given]
    if "run.executor" in given:
        kept = [argument for argument in kept if not argument.startswith("run.executor.")]
    return [*kept, *arguments]


def load_recipe(name: str) -> "run.Partial":
    """Returns the task of a recipe, to be completed with `nemo_checkpoint` and `export_config.path`, and run.

    Args:
        name: A recipe's name, e.g. "llama3_70b_fp8".

    Raises:
        ConfigError: If there is no such recipe.

    Example:
        >>> task = load_recipe("llama3_70b_fp8")
        >>> task.nemo_checkpoint, task.export_config.path = "CKPT", "OUT"
        >>> run.run(task, executor=run.LocalExecutor(launcher="torchrun", ntasks_per_node=8))
    """
    import nemo_run as run

    from nemo_ptq.config import ExportConfig, QuantizationConfig
    from nemo_ptq.task import ptq

    configs = {
        "quantization_config": run.Config(QuantizationConfig),
        "export_config": run.Config(ExportConfig),
    }
    task = run.Partial(ptq, **configs)
    for argument in read_arguments(recipe_file(name)):
        option, _, value = argument.partition("=")
        if option in OPTIONS:  # the others are NeMo-Run's
            config, _, field = option.rpartition(".")
            setattr(configs[config] if config else task, field, OPTIONS[option].kind.read(value))
    return task
