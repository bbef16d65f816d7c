# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How NeMo-Run's command runs our task: everything is checked before anything starts, and a failed rank fails it."""

import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import catalogue
import fiddle as fdl
import nemo_run as run
import typer
from nemo_run.cli.api import EXECUTOR_CLASSES, RunContext
from nemo_run.cli.cli_parser import CLIException, parse_cli_args, parse_value
from nemo_run.config import get_type_namespace

from nemo_ptq.cli import read_command_line
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.executors import run_experiment, torchrun, world_size
from nemo_ptq.job import Job
from nemo_ptq.launch import read_launch
from nemo_ptq.options import did_you_mean
from nemo_ptq.preflight import check_job
from nemo_ptq.recipes import override, read_arguments, recipe_file

_RUN_OPTIONS = ("executor", "plugins", *(field.name for field in fields(RunContext) if field.init))
# What only NeMo-Run's own reader of YAML files understands.
_NEMO_RUNS_SYNTAX = re.compile("_factory_|_call_")
_PARALLEL_SIZES = ("calibration_tp", "calibration_pp", "calibration_ep")


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Adds what is raised inside to the problems. Factories of users raise what they like, so everything counts."""
    parser = logging.getLogger("nemo_run.cli.cli_parser")
    was_disabled, parser.disabled = parser.disabled, True  # it would print each problem a second time
    try:
        yield
    except ConfigError as error:
        problems.extend(error.problems)
    except Exception as error:
        problems.append(_first_line(error))
    finally:
        parser.disabled = was_disabled


def _first_line(error: Exception) -> str:
    """The message of an exception without the context that NeMo-Run's parser adds."""
    cause = error.__cause__ if isinstance(error, CLIException) and error.__cause__ else error
    message = str(cause).partition(" (Argument: ")[0].strip()
    return message.splitlines()[0] if message else type(cause).__name__


class PtqRunContext(RunContext):
    """Runs `nemo llm ptq`."""

    factory: str | None
    yaml: str | None

    def cli_execute(self, fn: Callable[..., Any], args: list[str], entrypoint_type: str = "task") -> None:
        """Runs the command; a problem that the user can mend is printed without a traceback.

        Args:
            fn: The task.
            args: The command's `name=value` arguments.
            entrypoint_type: Always "task".

        Raises:
            SystemExit: With status 2 if the command line is wrong, with 1 if the job fails. NeMo-Run turns any other
                exception into status 1.
        """
        try:
            self._execute(fn, args)
        except PtqError as error:
            for line in error.problems if isinstance(error, ConfigError) else [str(error)]:
                typer.echo(f"Error: {line}", err=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)

    def _execute(self, fn: Callable[..., Any], args: list[str]) -> None:
        problems: list[str] = []
        with _collecting(problems):
            args = self._with_recipe(fn, args)
        task = self._check(fn, args, problems)
        if any((self.to_yaml, self.to_toml, self.to_json, self.repl)):
            super()._execute_task(fn, [argument for argument in args if not argument.startswith("run.")])
            return
        run.dryrun_fn(task, executor=self.executor)
        if self.dryrun or not self._should_continue(self.skip_confirmation or not sys.stdin.isatty()):
            return
        if self.direct or self.executor is None:
            fdl.build(task)()
        else:
            run_experiment(task, self.executor, name=self.name, plugins=self.plugins, detach=self.detach)

    def _with_recipe(self, fn: Callable[..., Any], args: Sequence[str]) -> list[str]:
        """Puts what `--factory` and `--yaml` hold before the arguments, so that the same checks see all of it.

        What only NeMo-Run understands stays with it: factories of users, and files with its own syntax.

        Raises:
            ConfigError: If there is no such factory or file.
        """
        factory, file = self.factory, self.yaml
        recipe: list[str] = []
        if factory and not _is_nemo_runs_factory(fn, factory):
            self.factory = None
            recipe = read_arguments(recipe_file(factory))
        if file and not file.endswith(".toml"):
            # A recipe's file is found by its name, wherever the package is installed.
            self.yaml = None
            path = Path(file) if os.path.exists(file) else recipe_file(file)
            if _NEMO_RUNS_SYNTAX.search(path.read_text()):
                self.yaml = file
            else:
                recipe = override(recipe, read_arguments(path))
        return override(recipe, args)

    def _check(self, fn: Callable[..., Any], args: Sequence[str], problems: list[str]) -> run.Partial:
        """Parses the command line and checks the job that it describes; raises all problems together.

        Args:
            fn: The task.
            args: The command line, with the recipe's arguments.
            problems: Those that are known already.

        Returns:
            The task.
        """
        line = read_command_line(args, _RUN_OPTIONS)
        problems = [*problems, *line.problems, *line.run_problems]
        executor_is_known = False
        with _collecting(problems):
            self.parse_args(list(line.run))
            executor_is_known = not line.run_problems
        # The cache holds configs, which two command lines in one process would then share.
        parse_value.cache_clear()
        with _collecting(problems):
            task = self.parse_fn(fn, list(line.task))
            for option, value in line.mistyped.items():
                _set(task, option, value)
            arguments = _values(task)
            if executor_is_known:
                self._fit_executor(arguments)
            processes = self._world_size() if executor_is_known else None
            job = check_job(**arguments, world_size=processes)
        if problems:
            raise ConfigError(problems)
        _make_absolute(task, job)
        return task

    def parse_executor(self, name: str, *args: str) -> run.Partial:
        """Makes the executor that `run.executor=` names.

        Args:
            name: Name of a factory.
            *args: `name=value` settings of the executor.

        Raises:
            ConfigError: If there is no such factory, or the executor has no such setting.
        """
        try:
            config = super().parse_executor(name)
        except ValueError as error:
            known = _executor_names()
            hint = did_you_mean(name, known)
            raise ConfigError(
                [f"run.executor={name} is not known{hint} It must be one of {', '.join(known)}"]
            ) from error
        settings = inspect.signature(config.__fn_or_cls__).parameters
        problems: list[str] = []
        for argument in args:
            setting = re.split(r"\W", argument, maxsplit=1)[0]
            if setting not in settings:
                problems.append(
                    f"run.executor.{setting} is not a setting of {name}{did_you_mean(setting, list(settings))}"
                )
                continue
            mistakes: list[str] = []
            with _collecting(mistakes):
                _set_executor(config, argument)
            problems.extend(f"run.executor.{argument} is not valid: {mistake}" for mistake in mistakes)
        if problems:
            raise ConfigError(problems)
        self._size_is_ours = name == torchrun.__name__ and not any(arg.startswith("ntasks_per_node") for arg in args)
        return config

    def _fit_executor(self, arguments: dict[str, Any]) -> None:
        """Starts as many processes as the calibration needs, where the user does not say how many."""
        if self.executor is not None and getattr(self, "_size_is_ours", False):
            sizes = [arguments.get(size, 1) for size in _PARALLEL_SIZES]
            if all(isinstance(size, int) and size > 0 for size in sizes):
                self.executor.ntasks_per_node = -(-prod(sizes) // self.executor.nodes)

    def _world_size(self) -> int | None:
        return read_launch().world_size if self.direct or self.executor is None else world_size(self.executor)


def _is_nemo_runs_factory(fn: Callable[..., Any], name: str) -> bool:
    """Whether NeMo-Run finds a factory itself: one that was registered, imported, or is called with arguments."""
    registered = catalogue.check_exists(get_type_namespace(fn), name)
    return registered or not name.isidentifier() or hasattr(sys.modules["__main__"], name)


def _set_executor(config: run.Config, argument: str) -> None:
    """Applies `name=value` to an executor. Environment variables are added to those of its factory, as text."""
    if not argument.startswith("env_vars"):
        parse_cli_args(config, [argument])
        return
    before = config.__arguments__.get("env_vars", {})
    variable = re.fullmatch(r"env_vars\.(\w+)=(.*)", argument, re.DOTALL)
    if variable:
        added = {variable[1]: variable[2]}
    else:
        parse_cli_args(config, [argument])
        added = {name: str(value) for name, value in config.env_vars.items()}
    config.env_vars = {**before, **added}


def _executor_names() -> list[str]:
    names = {key[-1] for cls in EXECUTOR_CLASSES for key in catalogue._get_all((get_type_namespace(cls),))}
    return sorted(names)


def _set(task: run.Partial, option: str, value: Any) -> None:
    config, _, name = option.rpartition(".")
    setattr(getattr(task, config) if config else task, name, value)


def _values(task: run.Partial) -> dict[str, Any]:
    """The arguments of a task, built. A missing `export_config.path` is None: the checks of the job report it."""
    export = task.export_config
    if isinstance(export, fdl.Buildable) and "path" not in export.__arguments__:
        export.path = None
    arguments = task.__arguments__
    return {name: fdl.build(value) if isinstance(value, fdl.Buildable) else value for name, value in arguments.items()}


def _make_absolute(task: run.Partial, job: Job) -> None:
    """Names every file by its absolute path, since a job may start in another directory than the command did."""
    task.nemo_checkpoint, task.model_path = str(job.checkpoint), None
    task.export_config.path = str(job.output)
    if job.tokenizer_path and os.path.exists(job.tokenizer_path):
        task.tokenizer_path = os.path.abspath(job.tokenizer_path)
    if job.calibration_state:
        task.calibration_state = str(job.calibration_state)
        return
    if job.quantization.algorithm_file:
        task.quantization_config.algorithm = os.path.abspath(job.quantization.algorithm_file)
    if job.quantization.data_file:
        task.quantization_config.calibration_dataset = os.path.abspath(job.quantization.data_file)
