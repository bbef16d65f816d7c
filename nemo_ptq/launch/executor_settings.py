# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The executor that `run.executor=NAME run.executor.SETTING=VALUE` describe."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import catalogue
import fiddle as fdl
import nemo_run as run
from nemo_run.cli.api import EXECUTOR_CLASSES, RunContext
from nemo_run.cli.cli_parser import parse_cli_args, parse_factory
from nemo_run.config import get_type_namespace

from nemo_ptq.errors import ConfigError, did_you_mean
from nemo_ptq.launch.parsing import collecting


def make_executor(name: str, arguments: Sequence[str]) -> run.Config:
    """Makes an executor from a command line.

    Args:
        name: Name of a factory, e.g. "slurm".
        arguments: `name=value` settings: parameters of the factory, or else fields of the executor that it makes.

    Raises:
        ConfigError: If there is no such factory, or the executor has no such setting.
    """
    factory = _factories().get(name)
    parameters = list(inspect.signature(factory).parameters) if factory else []
    of_factory = [argument for argument in arguments if _setting(argument) in parameters]
    config = _call(factory, of_factory) if factory else _imported(name)
    fields = list(inspect.signature(config.__fn_or_cls__).parameters)
    unknown = {_setting(argument) for argument in arguments} - {*parameters, *fields}
    if unknown:
        known = list(dict.fromkeys([*parameters, *fields]))
        raise ConfigError(
            [f"run.executor.{setting} is not a setting of {name}{did_you_mean(setting, known)}" for setting in unknown]
        )
    _set(config, [argument for argument in arguments if argument not in of_factory])
    return config


def _setting(argument: str) -> str:
    return re.split(r"\W", argument, maxsplit=1)[0]


def _factories() -> dict[str, Callable[..., run.Config]]:
    """The executor factories that somebody has registered. Those of an earlier class win, as in NeMo-Run."""
    return {
        key[-1]: factory
        for cls in reversed(EXECUTOR_CLASSES)
        for key, factory in catalogue._get_all((get_type_namespace(cls),)).items()
    }


def _call(factory: Callable[..., run.Config], arguments: Sequence[str]) -> run.Config:
    maker = run.Partial(factory)
    _set(maker, arguments)
    try:
        return fdl.build(maker)()
    except ConfigError as error:
        raise ConfigError([f"run.executor.{problem}" for problem in error.problems]) from error


def _imported(name: str) -> run.Config:
    """An executor by its dotted path, or that of a factory called with arguments."""
    for cls in EXECUTOR_CLASSES:
        try:
            return parse_factory(RunContext, "executor", cls, name)
        except ValueError:
            continue
    known = sorted(_factories())
    raise ConfigError(
        [f"run.executor={name} is not known{did_you_mean(name, known)} It must be one of {', '.join(known)}"]
    )


def _set(config: run.Config | run.Partial, arguments: Sequence[str]) -> None:
    """Applies `name=value` settings; raises the problems with their values."""
    problems: list[str] = []
    for argument in arguments:
        mistakes: list[str] = []
        with collecting(mistakes):
            _set_one(config, argument)
        problems.extend(f"run.executor.{argument} is not valid: {mistake}" for mistake in mistakes)
    if problems:
        raise ConfigError(problems)


def _set_one(config: run.Config | run.Partial, argument: str) -> None:
    """Environment variables are added to those that are there already, as text."""
    if _setting(argument) != "env_vars":
        parse_cli_args(config, [argument])
        return
    before: dict[str, Any] = config.__arguments__.get("env_vars") or {}
    variable = re.fullmatch(r"env_vars\.(\w+)=(.*)", argument, re.DOTALL)
    if variable:
        added = {variable[1]: variable[2]}
    else:
        parse_cli_args(config, [argument])
        added = {name: str(value) for name, value in config.env_vars.items()}
    config.env_vars = {**before, **added}
