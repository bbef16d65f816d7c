# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Several algorithms over one checkpoint, as one NeMo-Run experiment, and their figures to compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_ptq.errors import ConfigError, PtqError, did_you_mean
from nemo_ptq.launch.recipes import recipe_names
from nemo_ptq.quantization.algorithms import ALGORITHMS
from nemo_ptq.report.outcomes import Outcome
from nemo_ptq.tracking.runs import read_report

# The default of --algorithms without --model.
DEFAULT_ALGORITHMS = ("fp8", "int8_sq", "int4_awq")
# Fields of an outcome from the summary of a report.
_FIGURES = ("export_bytes", "compression", "perplexity", "recovery", "kl_divergence")
_EXECUTOR = "run.executor=torchrun"


def recipes_of(model: str) -> dict[str, str]:
    """Returns the recipes of a model by algorithm: a sweep over them has each with its own settings.

    Args:
        model: The beginning of its recipes' names, e.g. "llama3_8b".

    Raises:
        ConfigError: If there is no such model.
    """
    # The name's last part is an algorithm of one or two words.
    models: dict[str, dict[str, str]] = {}
    for name in recipe_names():
        algorithm = next((end for end in ALGORITHMS if name.endswith(f"_{end}")), None)
        if algorithm is not None:
            models.setdefault(name.removesuffix(f"_{algorithm}"), {})[algorithm] = name
    if model not in models:
        raise ConfigError([f"--model {model} has no recipes{did_you_mean(model, list(models))}"])
    return {algorithm: models[model][algorithm] for algorithm in ALGORITHMS if algorithm in models[model]}


def run_sweep(
    arguments: Sequence[str], recipes: Mapping[str, str | None], directory: Path, detach: bool = False
) -> dict[str, PtqError]:
    """Runs a sweep's jobs.

    Args:
        arguments: Those that all jobs share, as `name=value`.
        recipes: For each algorithm the recipe that it starts from, or None.
        directory: Each algorithm's export is made in it, under the algorithm's name.
        detach: Return once the jobs are submitted, where the executor can do that.

    Returns:
        By algorithm, why a job did not succeed.

    Raises:
        ConfigError: With the problems of all jobs; nothing has been started then.
    """
    import nemo_run as run

    from nemo_ptq.launch import executors
    from nemo_ptq.launch.experiment import run_tasks
    from nemo_ptq.launch.run_context import PtqRunContext
    from nemo_ptq.task import ptq
    from nemo_ptq.tracking.plugin import RunRecord

    executors.register()
    tasks: dict[str, tuple[run.Partial, run.Executor]] = {}
    problems: list[str] = []
    for algorithm, recipe in recipes.items():
        own = [f"quantization_config.algorithm={algorithm}", f"export_config.path={directory / algorithm}"]
        executor = [] if any(argument.startswith("run.executor=") for argument in arguments) else [_EXECUTOR]
        context = PtqRunContext(name=algorithm, factory=recipe, detach=detach)
        try:
            task, _, _ = context.prepare(ptq, [*executor, *arguments, *own])
            tasks[algorithm] = (task, context.executor)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    directory.mkdir(parents=True, exist_ok=True)
    return run_tasks(tasks, name="ptq_sweep", plugins=[RunRecord()], detach=detach)


def read_outcome(algorithm: str, path: Path, failure: PtqError | None = None) -> Outcome:
    """Reads an algorithm's outcome from its export's report.

    Args:
        algorithm: Its name.
        path: The exported directory.
        failure: Why there is none.
    """
    if failure is not None:
        return Outcome(algorithm, str(path), str(failure))
    _, report = read_report(path)
    steps = report["steps"]
    return Outcome(
        algorithm,
        str(path),
        **{name: report["summary"].get(name) for name in _FIGURES},
        seconds=sum(step["seconds"] for step in steps) if steps else None,
        peak_memory_bytes=max((step["peak_memory_bytes"] for step in steps), default=None),
    )
