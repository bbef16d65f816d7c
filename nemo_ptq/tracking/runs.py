# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The record of a run: one JSON file, written when the run begins and again when it ends.

A run that NeMo-Run launched has it in its job directory; any other one, below NeMo-Run's home directory.
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_ptq.job import Job

RECORD = "ptq_run.json"
REPORT = "ptq/report.json"
JOB_DIR, EXPERIMENT_ID = "NEMO_PTQ_JOB_DIR", "NEMO_PTQ_EXPERIMENT_ID"
"""Variables in which a job finds its directory, and its experiment's id."""
_PACKAGES = ("nemo_ptq", "nvidia-modelopt", "megatron-core", "nemo_toolkit", "nemo_run", "torch", "transformers")
_OUTPUTS = {
    "report": "ptq/report.html",
    "figures": REPORT,
    "model_card": "ptq/README.md",
    "manifest": "ptq/manifest.json",
}
RUNNING, SUCCEEDED, FAILED, DIED = "RUNNING", "SUCCEEDED", "FAILED", "DIED"


@dataclass(frozen=True)
class Run:
    """A run of the main job.

    Attributes:
        id: The experiment's id, as `nemo experiment status` takes it; "direct_..." for a run without one.
        job: The job's name in its experiment.
        state: "RUNNING", "SUCCEEDED" or "FAILED"; "DIED" where the process is gone without a word.
        started: When it began, in ISO 8601 with UTC.
        model: NeMo's config class, e.g. "Llama31Config8B".
        algorithm: Our name of the algorithm.
        path: The exported directory.
        arguments: All arguments of the task that matter, nested as its configs are.
        versions: Versions of the packages.
        world_size: Processes.
        host: Host of rank 0.
        pid: Process id of rank 0.
        seconds: Duration; None while it runs.
        error: Why it failed.
        metrics: Figures by name, from the report's summary: recovery, perplexity, export_bytes ...
        steps: Seconds and peak memory of each step, from the report.
        outputs: The files worth a look, by what they are.
    """

    id: str
    job: str
    state: str
    started: str
    model: str
    algorithm: str
    path: str
    arguments: Mapping[str, Any]
    versions: Mapping[str, str]
    world_size: int
    host: str
    pid: int
    seconds: float | None = None
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)


def nemo_run_home() -> Path:
    """Returns the directory in which NeMo-Run keeps its experiments."""
    return Path(os.environ.get("NEMORUN_HOME") or "~/.nemo_run").expanduser()


def begin(job: Job, world_size: int) -> Run:
    """Makes the record of a run that begins in this process."""
    return Run(
        id=os.environ.get(EXPERIMENT_ID) or f"direct_{time.time_ns()}",
        job=Path(os.environ.get(JOB_DIR) or "ptq").name,
        state=RUNNING,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=job.metadata.config_class.rpartition(".")[2],
        algorithm=job.quantization.algorithm_name,
        path=str(job.output),
        arguments=job.arguments,
        versions={package: metadata.version(package) for package in _PACKAGES},
        world_size=world_size,
        host=socket.gethostname(),
        pid=os.getpid(),
    )


def end(run: Run, seconds: float, error: BaseException | None) -> Run:
    """Returns the record of a run that has ended, with the figures of its report if it succeeded."""
    if error is not None:
        reason = str(error).strip() or type(error).__name__
        return replace(run, state=FAILED, seconds=seconds, error=reason)
    directory, report = read_report(Path(run.path))
    metrics = {name: value for name, value in report["summary"].items() if _is_figure(value)}
    return replace(
        run,
        state=SUCCEEDED,
        seconds=seconds,
        metrics=metrics,
        steps=tuple(report["steps"]),
        outputs={name: str(directory / file) for name, file in _OUTPUTS.items() if (directory / file).is_file()},
    )


def read_report(path: Path) -> tuple[Path, dict[str, Any]]:
    """Reads the report of an exported directory.

    Args:
        path: The directory. With several export formats it holds one for each, whose reports differ in sizes only.

    Returns:
        The directory that has the report, and the report; without any, one that tells the size alone.
    """
    found = sorted(path.glob(REPORT)) or sorted(path.glob(f"*/{REPORT}"))
    if not found:
        return path, {"summary": {"export_bytes": _size(path)}, "steps": []}
    return found[0].parents[1], json.loads(found[0].read_text(encoding="utf-8"))


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def write(run: Run) -> Path:
    """Writes a run's record where :func:`read_runs` finds it; an older one of the same run is replaced.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written.
    """
    job_dir = os.environ.get(JOB_DIR)
    file = (Path(job_dir) if job_dir else nemo_run_home() / "ptq_runs" / run.id) / RECORD
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)
    return file


def read_runs(home: Path) -> list[Run]:
    """Reads all records, the oldest first. What is no record of this version is left out.

    Args:
        home: NeMo-Run's home directory.
    """
    runs = [run for file in _record_files(home) if (run := _read(file)) is not None]
    return sorted(runs, key=lambda run: (run.started, run.id, run.job))


def _record_files(home: Path) -> Iterator[Path]:
    yield from home.glob(f"experiments/*/*/*/{RECORD}")
    yield from home.glob(f"ptq_runs/*/{RECORD}")


def _check_kinds(run: Run) -> None:
    """Raises TypeError at a record whose fields are not of the kinds that its readers count on."""
    texts = (run.id, run.job, run.state, run.started, run.model, run.algorithm, run.path, run.host)
    figures = (*run.metrics.values(), *(() if run.seconds is None else (run.seconds,)))
    if not (all(isinstance(text, str) for text in texts) and all(map(_is_figure, figures))):
        raise TypeError(f"{run.id}: a field is of another kind")


def _read(file: Path) -> Run | None:
    try:
        run = Run(**json.loads(file.read_text(encoding="utf-8")))
        _check_kinds(run)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    is_gone = run.state == RUNNING and run.host == socket.gethostname() and not Path(f"/proc/{run.pid}").exists()
    return replace(run, state=DIED) if is_gone else run


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names nested arguments as the command line does: `quantization_config.algorithm`."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def figures(run: Run) -> dict[str, float]:
    """All numbers of a run that has ended, under names that every tracker takes."""
    named: dict[str, float] = dict(run.metrics)
    if run.seconds is not None:
        named["seconds"] = run.seconds
    for step in run.steps:
        name = re.sub(r"[^\w.-]", "_", str(step["name"]))
        named[f"steps/{name}/seconds"] = step["seconds"]
        named[f"steps/{name}/peak_memory_bytes"] = step["peak_memory_bytes"]
    return named
