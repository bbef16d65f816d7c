# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Trackers that a user names with `tracking=KIND:PLACE`: the figures of the run's record go there as well.

Each is opened before the model is loaded, so that a wrong address fails in seconds. Their packages are imported only
when they are asked for.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from nemo_ptq.errors import PtqError
from nemo_ptq.tracking.runs import SUCCEEDED, Run, figures, flatten

# The name and the password in an address.
_CREDENTIALS = re.compile(r"//[^/\s]*@")
# Seconds that a server may take for an answer.
_PATIENCE = 10.0
# MLflow's limits: of a parameter's value, and of parameters or metrics in a request.
_LONGEST_VALUE, _MOST_ENTRIES = 500, 100


class Tracker(Protocol):
    """Where a run's figures go."""

    def finish(self, run: Run) -> None:
        """Writes everything about a run that has ended, and closes."""


def check_address(address: str) -> str | None:
    """Says in one line what is wrong with `tracking`, if anything is; nothing is opened."""
    kind, _, place = address.partition(":")
    if _CREDENTIALS.search(address):
        return (
            f"tracking={without_credentials(address)} holds credentials, which logs and configurations keep: give "
            "the address without them, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    if kind not in TRACKERS or not place:
        return f"tracking={address} is not valid: it must be one of {', '.join(_EXAMPLES.values())}"
    if kind == "mlflow" and not place.startswith(("http://", "https://")):
        return f"tracking={address} is not valid: it must be the address of a server, as in {_EXAMPLES[kind]}"
    module = "requests" if kind == "mlflow" else kind
    if find_spec(module) is None:
        return f"tracking={address} needs the package {module}: pip install 'nemo_ptq[{kind}]'"
    return None


def without_credentials(text: str) -> str:
    """Returns a text without the names and passwords in the addresses that it holds."""
    return _CREDENTIALS.sub("//***@", text)


def absolute_address(address: str) -> str:
    """Names a directory by its absolute path, since a job may start in another one than the command did."""
    kind, _, place = address.partition(":")
    return f"{kind}:{Path(place).expanduser().absolute()}" if kind == "tensorboard" else address


def open_tracker(address: str, run: Run) -> Tracker:
    """Opens a tracker.

    Args:
        address: `mlflow:http://HOST:PORT`, `tensorboard:DIR` or `wandb:PROJECT`.
        run: The run that begins.

    Raises:
        PtqError: If there is none at the address.
    """
    kind, _, place = address.partition(":")
    try:
        return TRACKERS[kind](place, run)
    except Exception as error:  # each library raises its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PtqError(f"tracking={address} cannot be opened: {without_credentials(reason)}") from error


class MlflowServer:
    """A run on an MLflow server, over its REST API (https://mlflow.org/docs/latest/rest-api.html).

    MLflow's own package cannot be installed beside NeMo's. The experiment's name comes from `MLFLOW_EXPERIMENT_NAME`,
    credentials from `MLFLOW_TRACKING_TOKEN`, or from `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`.

    Args:
        address: The server's address.
        run: The run that begins.
    """

    def __init__(self, address: str, run: Run) -> None:
        import requests

        self._address = address.rstrip("/")
        self._session = requests.Session()
        if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            self._session.headers["Authorization"] = f"Bearer {token}"
        elif user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            self._session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        created = self._call(
            "POST",
            "runs/create",
            json={
                "experiment_id": self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "nemo_ptq")),
                "run_name": f"{run.model} {run.algorithm}",
                "start_time": _milliseconds(),
                "tags": _entries({"nemo_ptq.id": run.id, "nemo_ptq.job": run.job, "nemo_ptq.path": run.path}),
            },
        )["run"]["info"]
        self._run_id, self._artifacts = created["run_id"], created["artifact_uri"]

    def _experiment(self, name: str) -> str:
        found = self._call("GET", "experiments/search", params={"filter": f"name = '{name}'", "max_results": 1})
        if found.get("experiments"):
            return str(found["experiments"][0]["experiment_id"])
        return str(self._call("POST", "experiments/create", json={"name": name})["experiment_id"])

    def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        answer = self._session.request(method, f"{self._address}/api/2.0/mlflow/{path}", timeout=_PATIENCE, **content)
        answer.raise_for_status()
        return answer.json()

    def finish(self, run: Run) -> None:
        """Logs arguments, versions, figures and the report's files, and ends the run."""
        now = _milliseconds()
        parameters = _entries({**flatten(run.arguments), **_versions(run)})
        metrics = [{"key": key, "value": value, "timestamp": now, "step": 0} for key, value in figures(run).items()]
        for kind, entries in (("params", parameters), ("metrics", metrics)):
            for start in range(0, len(entries), _MOST_ENTRIES):
                batch = entries[start : start + _MOST_ENTRIES]
                self._call("POST", "runs/log-batch", json={"run_id": self._run_id, kind: batch})
        for file in run.outputs.values():
            self._upload(Path(file))
        status = "FINISHED" if run.state == SUCCEEDED else "FAILED"
        self._call("POST", "runs/update", json={"run_id": self._run_id, "status": status, "end_time": _milliseconds()})

    def _upload(self, file: Path) -> None:
        scheme, _, path = self._artifacts.partition(":")
        if scheme != "mlflow-artifacts":
            return  # the server leaves uploads to clients that reach its store
        place = f"{self._address}/api/2.0/mlflow-artifacts/artifacts/{path.lstrip('/')}/{file.name}"
        with file.open("rb") as content:
            self._session.put(place, data=content, timeout=_PATIENCE).raise_for_status()


class TensorBoardDirectory:
    """A directory that TensorBoard shows, with a directory in it for the run.

    Args:
        directory: TensorBoard's `--logdir`.
        run: The run that begins.
    """

    def __init__(self, directory: str, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(directory).expanduser() / f"{run.id}_{run.job}"))

    def finish(self, run: Run) -> None:
        """Writes arguments and versions as a text, and the figures as scalars."""
        rows = "\n".join(
            f"| {name} | {value} |" for name, value in {**flatten(run.arguments), **_versions(run)}.items()
        )
        self._writer.add_text("arguments", f"| | |\n|---|---|\n{rows}")
        self._writer.add_text("outputs", "\n".join(f"- {name}: {file}" for name, file in run.outputs.items()))
        for name, value in figures(run).items():
            self._writer.add_scalar(name, value)
        self._writer.close()


class WandbProject:
    """A run in a project of Weights & Biases; `WANDB_MODE=offline` keeps it on this machine.

    Args:
        project: The project's name.
        run: The run that begins.
    """

    def __init__(self, project: str, run: Run) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=f"{run.model} {run.algorithm}",
            config={**flatten(run.arguments), **_versions(run)},
            settings=wandb.Settings(init_timeout=3 * _PATIENCE, silent=True),
        )

    def finish(self, run: Run) -> None:
        """Writes the figures, and the report's files as an artifact."""
        self._run.summary.update(figures(run))
        if run.outputs:
            artifact = self._wandb.Artifact(f"report-{run.id}", type="report")
            for file in run.outputs.values():
                artifact.add_file(file)
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if run.state == SUCCEEDED else 1)


TRACKERS: Mapping[str, Callable[[str, Run], Tracker]] = {
    "mlflow": MlflowServer,
    "tensorboard": TensorBoardDirectory,
    "wandb": WandbProject,
}
_EXAMPLES = {"mlflow": "mlflow:http://HOST:PORT", "tensorboard": "tensorboard:DIR", "wandb": "wandb:PROJECT"}


def _versions(run: Run) -> dict[str, str]:
    return {f"versions.{package}": version for package, version in run.versions.items()}


def _entries(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"key": key, "value": str(value)[:_LONGEST_VALUE]} for key, value in values.items()]


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000
