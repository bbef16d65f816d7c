# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The `name=value` arguments of `nemo llm ptq`: which ones exist, and which values are valid."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import did_you_mean
from nemo_ptq.options import OPTIONS, below

_ARGUMENT = re.compile(r"(?P<name>[\w.\[\]]+)\s*(?P<operation>[-+*/|&]?)=\s*(?P<value>.*)", re.DOTALL)
# An option is recognised by the last part of its name: people leave out or mix up prefixes.
_LAST_PARTS = {option.rpartition(".")[2]: option for option in OPTIONS}
_CONFIGS = ("quantization_config", "export_config")


@dataclass(frozen=True)
class CommandLine:
    """The arguments of one command.

    Attributes:
        task: Those for the task whose value NeMo-Run can parse, as they were given.
        run: Those for NeMo-Run that exist, without their "run." prefix.
        literal: Values that NeMo-Run must not parse: invalid ones, which the checks of the job report, and names of
            code, which it would import.
        problems: Problems with the names of the task's arguments, one line each.
        run_problems: The same for NeMo-Run's.
    """

    task: Sequence[str]
    run: Sequence[str]
    literal: Mapping[str, Any]
    problems: Sequence[str]
    run_problems: Sequence[str]


def read_command_line(arguments: Iterable[str], run_options: Collection[str]) -> CommandLine:
    """Sorts the arguments of a command, and finds problems with their names.

    Args:
        arguments: What follows `nemo llm ptq`, NeMo-Run's own `--options` excepted.
        run_options: Names that may follow "run.", e.g. "executor".
    """
    task: list[str] = []
    run: list[str] = []
    literal: dict[str, Any] = {}
    problems: list[str] = []
    for argument in arguments:
        match = _ARGUMENT.fullmatch(argument.lstrip("-"))
        if match is None or argument.startswith("-"):
            problems.append(_not_an_argument(argument, match["name"] if match else None))
            continue
        name, operation, value = match["name"], match["operation"], match["value"]
        if name.startswith("run."):
            run.append(argument.removeprefix("run."))
        elif name in OPTIONS and OPTIONS[name].kind.names_code:
            literal[name] = OPTIONS[name].kind.read(value)
        elif name in _CONFIGS or (name in OPTIONS and (operation or value.startswith("@"))):
            task.append(argument)
        elif name not in OPTIONS:
            problems.append(f"{name} is not an option{did_you_mean(name.rpartition('.')[2], _LAST_PARTS)}")
        else:
            kind = OPTIONS[name].kind
            if kind.problem(name, kind.read(value)):
                literal[name] = kind.read(value)
            else:
                task.append(argument)
    has_executor = any(argument.startswith("executor=") for argument in run)
    names = [re.split(r"[.\[=]", argument, maxsplit=1)[0] for argument in run]
    found = [_run_problem(argument, name, run_options, has_executor) for argument, name in zip(run, names, strict=True)]
    sound = [argument for argument, problem in zip(run, found, strict=True) if problem is None]
    return CommandLine(task, sound, literal, problems, [problem for problem in found if problem])


def option_values(line: CommandLine) -> tuple[dict[str, Any], list[str]]:
    """Reads the values of a command line's options without NeMo-Run.

    Returns:
        The values by their options' full names, right or not, and a line for each argument in NeMo-Run's own syntax.
    """
    values = dict(line.literal)
    problems: list[str] = []
    for argument in line.task:
        name, _, value = argument.partition("=")
        if name in OPTIONS and not value.startswith("@"):
            values[name] = OPTIONS[name].kind.read(value)
        else:
            problems.append(f"{argument} is for `nemo llm ptq`, whose parser is NeMo-Run's: write name=value")
    return values, problems


def read_pairs(arguments: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Reads the arguments of a job, as `name=value`, without NeMo-Run.

    Returns:
        The arguments of :func:`nemo_ptq.task.ptq`, right or not, and a line for each word that is no argument.
    """
    line = read_command_line(arguments, ())
    values, foreign = option_values(line)
    return task_arguments(values), [*line.problems, *foreign]


def task_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the arguments of :func:`nemo_ptq.plan.rules.check_job` of options.

    Args:
        values: By the options' full names. A missing `export_config.path` is None: the checks of the job report it.
    """
    return {
        "quantization_config": QuantizationConfig(**below("quantization_config.", values)),
        "export_config": ExportConfig(**{"path": None, **below("export_config.", values)}),
        **{name: value for name, value in values.items() if "." not in name},
    }


def _not_an_argument(argument: str, name: str | None) -> str:
    if name in OPTIONS:
        return f"{argument} is not an option: write {argument.lstrip('-')}, without dashes"
    if argument.startswith("-"):
        return f"{argument} is not an option{did_you_mean(argument.lstrip('-').replace('-', '_'), _LAST_PARTS)}"
    first, _, rest = argument.partition(" ")
    example = f"{first}={rest or 'VALUE'}" if first in OPTIONS else f"nemo_checkpoint={argument}"
    return f"{argument!r} is not an argument: write name=value, for example {example}"


def _run_problem(argument: str, name: str, options: Collection[str], has_executor: bool) -> str | None:
    if name not in options:
        return f"run.{argument} is not an option{did_you_mean(name, {option: f'run.{option}' for option in options})}"
    if name == "executor" and not has_executor:
        return f"run.{argument} needs an executor: add run.executor=torchrun"
    return None
