# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How NeMo-Run's command runs our task: everything is checked before anything starts, and a failed rank fails it."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import catalogue
import fiddle as fdl
import nemo_run as run
from nemo_run.cli.api import RunContext
from nemo_run.cli.cli_parser import parse_value
from nemo_run.config import get_nemorun_home, get_type_namespace

from nemo_ptq.config import absolute_sources
from nemo_ptq.console.text import printable
from nemo_ptq.errors import ConfigError, JobFailed, PtqError
from nemo_ptq.export.leftover import tidy
from nemo_ptq.job import Job
from nemo_ptq.launch import front
from nemo_ptq.launch.arguments import read_command_line
from nemo_ptq.launch.executor_settings import make_executor
from nemo_ptq.launch.executors import fit, launcher_name, unmounted, world_size
from nemo_ptq.launch.experiment import processes_needed, run_experiment
from nemo_ptq.launch.parsing import collecting
from nemo_ptq.launch.recipes import find_file, override, read_arguments, recipe_file
from nemo_ptq.options import OPTIONS
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.tracking.plugin import RunRecord

_RUN_OPTIONS = ("executor", "plugins", *(field.name for field in fields(RunContext) if field.init))
# Syntax that only NeMo-Run's own reader of YAML files understands.
_NEMO_RUNS_SYNTAX = re.compile("_factory_|_call_")


class PtqRunContext(RunContext):
    """Runs `nemo llm ptq`."""

    factory: str | None
    yaml: str | None
    executor: run.Executor | None
    _executor_config: run.Config | None = None

    def cli_execute(self, fn: Callable[..., Any], args: list[str], entrypoint_type: str = "task") -> None:
        """Runs the command; a problem that the user can correct is printed without a traceback.

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
            front.end_with(error)

    def _execute(self, fn: Callable[..., Any], args: list[str]) -> None:
        task, job, args = self.prepare(fn, args)
        if any((self.to_yaml, self.to_toml, self.to_json, self.repl)):
            # NeMo-Run would call trusted code; the user of the file has to name it again.
            literal = ("run.", *(f"{name}=" for name, option in OPTIONS.items() if option.kind.names_code))
            super()._execute_task(fn, [argument for argument in args if not argument.startswith(literal)])
            return
        run.dryrun_fn(task, executor=self.executor)
        if self.dryrun or not self._should_continue(self.skip_confirmation or not sys.stdin.isatty()):
            return
        if self.direct or self.executor is None:
            fdl.build(task)()
        else:
            try:
                plugins = [*self.plugins, RunRecord()]
                run_experiment(task, self.executor, name=self.name, plugins=plugins, detach=self.detach)
            except JobFailed:
                with suppress(PtqError):  # another job has the directory
                    if leftover := tidy(job.output):  # a process that is killed leaves what it has written
                        print(
                            f"{leftover.blocks} finished blocks are kept: {printable(leftover.ways_on)}",
                            file=sys.stderr,
                        )
                raise

    def prepare(self, fn: Callable[..., Any], args: Sequence[str]) -> tuple[run.Partial, Job, list[str]]:
        """Parses and checks a command line, and starts nothing.

        Args:
            fn: The task.
            args: The command's `name=value` arguments.

        Returns:
            The task, the job that it is, and the arguments with those of the recipe.

        Raises:
            ConfigError: With all problems.
        """
        problems: list[str] = []
        whole = list(args)
        with collecting(problems):
            whole = self._with_recipe(fn, args)
        task, job = self._check(fn, whole, problems)
        return task, job, whole

    def _with_recipe(self, fn: Callable[..., Any], args: Sequence[str]) -> list[str]:
        """Puts the arguments of `--factory` and `--yaml` before the others, so that the same checks see all of them.

        Users' factories, and files in NeMo-Run's own syntax, are left to NeMo-Run.

        Raises:
            ConfigError: If there is no such factory or file.
        """
        factory, file = self.factory, self.yaml
        recipe: list[str] = []
        if factory and not _is_nemo_runs_factory(fn, factory):
            self.factory = None
            recipe = read_arguments(recipe_file(factory))
        if file and not file.endswith(".toml"):
            self.yaml = None
            path = find_file(file)
            if _NEMO_RUNS_SYNTAX.search(path.read_text()):
                self.yaml = file
            else:
                recipe = override(recipe, read_arguments(path))
        return override(recipe, args)

    def _check(self, fn: Callable[..., Any], args: Sequence[str], problems: list[str]) -> tuple[run.Partial, Job]:
        """Parses the command line and checks the job that it describes; raises all problems together.

        Args:
            fn: The task.
            args: The command line, with the recipe's arguments.
            problems: Those that are known already.

        Returns:
            The task, and the job that it is.
        """
        line = read_command_line(args, _RUN_OPTIONS)
        problems = [*problems, *line.problems, *line.run_problems]
        executor_is_known = False
        with collecting(problems):
            self.parse_args(list(line.run))
            executor_is_known = not line.run_problems
        # The cache holds configs, which two command lines in one process would then share.
        parse_value.cache_clear()
        task, arguments = None, {}
        processes, launcher = None, None
        with collecting(problems):
            task = self.parse_fn(fn, list(line.task))
            for option, value in line.literal.items():
                _set(task, option, value)
            arguments = _values(task)
            if executor_is_known:
                with collecting(problems):
                    processes, launcher = self._processes(arguments)
        if task is None or not arguments:
            raise ConfigError(problems)
        job = front.check(arguments, problems, world_size=processes, launcher=launcher)
        files = _files(job)
        if isinstance(self.executor, run.KubeflowExecutor):
            files["NEMORUN_HOME"] = Path(get_nemorun_home())  # where the pod finds the task
        if hidden := unmounted(self.executor, files):
            raise ConfigError(hidden)
        _make_absolute(task, job)
        return task, job

    def parse_executor(self, name: str, *args: str) -> run.Config:
        """Makes the executor that `run.executor=` names.

        Args:
            name: Name of a factory.
            *args: `name=value` settings of the executor.

        Raises:
            ConfigError: If there is no such factory, or the executor has no such setting.
        """
        self._executor_config = make_executor(name, args)
        return self._executor_config

    def _processes(self, arguments: dict[str, Any]) -> tuple[int | None, str | None]:
        """How many processes will run the job, and what starts them: as many as the calibration needs, if left open.

        Raises:
            ConfigError: If the executor cannot start them, or cannot be left although the user wants to.
        """
        if self.direct or self.executor is None:
            launch = read_launch()
            return launch.world_size, launch.launcher
        if self._executor_config is not None:
            fit(self._executor_config, processes_needed(arguments))
            try:
                self.executor = fdl.build(self._executor_config)
            except Exception as error:  # clients of clusters raise any kind of error
                reason = str(error).partition("\n")[0]
                raise ConfigError([f"the executor cannot be made: {reason}"]) from error
        if self.detach and not isinstance(self.executor, run.Experiment._DETACH_SUPPORTED_EXECUTORS):
            raise ConfigError(
                ["--detach needs an executor that can be left, such as slurm: this one ends with the command"]
            )
        return world_size(self.executor), launcher_name(self.executor)


def _is_nemo_runs_factory(fn: Callable[..., Any], name: str) -> bool:
    """Whether NeMo-Run finds a factory itself: one that was registered, imported, or is called with arguments."""
    registered = catalogue.check_exists(get_type_namespace(fn), name)
    return registered or not name.isidentifier() or hasattr(sys.modules["__main__"], name)


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


def _files(job: Job) -> dict[str, Path]:
    """The absolute path of every file and directory that a job reads or makes, by the option that names it."""
    files = {"nemo_checkpoint": job.checkpoint, "export_config.path": job.output}
    if job.adapter:
        files["adapter"] = job.adapter
    if job.tokenizer_path and os.path.exists(job.tokenizer_path):
        files["tokenizer_path"] = Path(os.path.abspath(job.tokenizer_path))
    if job.calibration_state:
        if not job.metadata.is_quantized:  # which holds its own
            files["calibration_state"] = job.calibration_state
        return files
    if job.quantization.algorithm_file and job.quantization.algorithm_file.exists():  # else a recipe of ModelOpt's
        files["quantization_config.algorithm"] = Path(os.path.abspath(job.quantization.algorithm_file))
    data = job.quantization.data_files
    for file in data:
        option = "quantization_config.calibration_dataset"
        files[option if len(data) == 1 else f"{option} ({file})"] = Path(os.path.abspath(file))
    return files


def _make_absolute(task: run.Partial, job: Job) -> None:
    """Names every file by its absolute path, since a job may start in another directory than the command did."""
    task.model_path, task.tracking = None, job.tracking
    for option, file in _files(job).items():
        if not option.startswith("quantization_config.calibration_dataset"):
            _set(task, option, str(file))
    if job.quantization.data_files and not job.calibration_state:
        sources = absolute_sources(job.quantization.calibration_dataset)
        _set(task, "quantization_config.calibration_dataset", sources)
