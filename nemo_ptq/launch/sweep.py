# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Several algorithms over one checkpoint, as one NeMo-Run experiment, and what to compare of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.errors import ConfigError, PtqError, did_you_mean
from nemo_ptq.launch.recipes import recipe_names
from nemo_ptq.tracking.runs import read_report

# What --algorithms is where neither it nor --model is given.
ALGORITHMS = ("fp8", "int8_sq", "int4_awq")
# What an outcome has from the summary of a report.
_FIGURES = ("export_bytes", "compression", "perplexity", "recovery", "kl_divergence")
_EXECUTOR = "run.executor=torchrun"


@dataclass(frozen=True)
class Outcome:
    """One algorithm of a sweep.

    Attributes:
        algorithm: Its name.
        path: The exported directory.
        failure: Why there is none.
        export_bytes: Size of its weights and scales.
        compression: Size of the checkpoint's weights over that.
        perplexity: Of the quantized model; None where it was not measured, as below.
        recovery: Perplexity of the unquantized model over that.
        kl_divergence: Against the unquantized model, in nats per token.
        seconds: All steps together.
        peak_memory_bytes: Of the step and the rank that needed most.
    """

    algorithm: str
    path: str
    failure: str | None = None
    export_bytes: int | None = None
    compression: float | None = None
    perplexity: float | None = None
    recovery: float | None = None
    kl_divergence: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None

    def texts(self) -> list[str]:
        """What stands in each of :data:`COLUMNS`."""
        if self.failure is not None:
            return ["FAILED", *[""] * (len(COLUMNS) - 1)]
        values = [(getattr(self, field), write) for field, write in COLUMNS.values()]
        return ["" if value is None else write(value) for value, write in values]


COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "size, GB": ("export_bytes", lambda value: f"{value / 1e9:.3g}"),
    "times smaller": ("compression", lambda value: f"{value:.2f}"),
    "perplexity": ("perplexity", lambda value: f"{value:.3f}"),
    "recovery": ("recovery", lambda value: f"{value:.4f}"),
    "KL, nats": ("kl_divergence", lambda value: f"{value:.4f}"),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
    "peak GB": ("peak_memory_bytes", lambda value: f"{value / 1e9:.3g}"),
}
"""The comparison: for each column's head the field of an outcome, and how it is written."""


def recipes_of(model: str) -> dict[str, str]:
    """Returns the recipes of a model by algorithm: a sweep over them has each with its own settings.

    Args:
        model: What its recipes' names begin with, e.g. "llama3_8b".

    Raises:
        ConfigError: If there is no such model.
    """
    # The name's last part is an algorithm of one or two words.
    models: dict[str, dict[str, str]] = {}
    for name in recipe_names():
        of_model, algorithm = next(
            (name.removesuffix(f"_{end}"), end) for end in ALGORITHMS if name.endswith(f"_{end}")
        )
        models.setdefault(of_model, {})[algorithm] = name
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
    """Reads what an algorithm came to from its export's report.

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
