# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The trackers that a user can name: a wrong address fails in seconds, and the figures arrive."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_ptq.config import ExportConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.job import Job
from nemo_ptq.launch.start import start
from nemo_ptq.plan.rules import check_job
from nemo_ptq.tracking import runs, trackers
from nemo_ptq.tracking.trackers import absolute_address, check_address, open_tracker
from tests.conftest import Demo
from tests.ranks import _free_port
from tests.tracking.conftest import SUMMARY, write_output

ROOT = Path(__file__).parents[2]


@pytest.fixture
def begun(job: Job) -> runs.Run:
    return replace(runs.begin(job, 1), id="ptq_1")


@pytest.fixture
def ended(begun: runs.Run, job: Job) -> runs.Run:
    write_output(job.output)
    return runs.end(begun, 3.0, None)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("mlflow:http://localhost:5000", None),
        ("tensorboard:logs", None),
        ("wandb:project", None),
        ("mlflow", "it must be one of mlflow:http://HOST:PORT, tensorboard:DIR, wandb:PROJECT"),
        ("mlflow:", "it must be one of"),
        ("mlflow:./mlruns", "it must be the address of a server"),
        ("comet:project", "it must be one of"),
    ],
)
def test_addresses(address: str, problem: str | None) -> None:
    found = check_address(address)
    assert found is None if problem is None else found is not None and problem in found


@pytest.mark.parametrize("password", ["secret", "sec@ret", "", "se:c?re=t"])
def test_credentials_in_an_address_are_refused_and_not_repeated(password: str) -> None:
    for kind in ("mlflow:", "comet:", ""):
        problem = check_address(f"{kind}http://user:{password}@host:5000/path@1")
        assert problem is not None
        assert problem.startswith(f"tracking={kind}http://***@host:5000/path@1 holds credentials")
        assert "user" not in problem.partition(" ")[0]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    assert check_address("wandb:project") == (
        "tracking=wandb:project needs the package wandb: pip install 'nemo_ptq[wandb]'"
    )


def test_the_checks_of_the_job_look_at_it(demo: Demo, tmp_path: Path) -> None:
    export = ExportConfig(path=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="tracking=comet:project is not valid"):
        check_job(nemo_checkpoint=demo.checkpoint, export_config=export, world_size=1, tracking="comet:project")


def test_what_a_library_says_of_an_address_holds_no_credentials(
    begun: runs.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: str, run: runs.Run) -> trackers.Tracker:
        raise OSError("401 Client Error for url: http://user:secret@host/api")

    monkeypatch.setattr(trackers, "TRACKERS", {"mlflow": refuse})
    with pytest.raises(PtqError, match=r"cannot be opened: 401 Client Error for url: http://\*\*\*@host/api"):
        open_tracker("mlflow:http://host", begun)


def test_a_directory_is_named_by_its_absolute_path() -> None:
    assert absolute_address("tensorboard:logs") == f"tensorboard:{Path.cwd()}/logs"
    assert absolute_address("wandb:logs") == "wandb:logs"


def test_a_wrong_address_fails_before_the_model_is_loaded(
    home: Path, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Job] = []
    monkeypatch.setitem(sys.modules, "nemo_ptq.engine.run", SimpleNamespace(run_job=ran.append))
    (tmp_path / "file").write_text("")
    for address in (f"mlflow:http://127.0.0.1:{_free_port()}", f"tensorboard:{tmp_path}/file/logs"):
        began = time.perf_counter()
        with pytest.raises(PtqError, match="cannot be opened") as caught:
            start(replace(job, tracking=address))
        assert "\n" not in str(caught.value)
        assert time.perf_counter() - began < 10
    assert not ran


def test_a_tracker_that_fails_at_the_end_costs_no_job(
    home: Path, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def finish(self, run: runs.Run) -> None:
            raise OSError("the server is gone")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda place, run: Broken())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "nemo_ptq.engine.run", SimpleNamespace(run_job=lambda _: write_output(job.output)))
    start(replace(job, tracking="tensorboard:logs"))
    assert capsys.readouterr().err == "warning: the figures did not reach the tracker: the server is gone\n"


def test_tensorboard(begun: runs.Run, ended: runs.Run, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    open_tracker(f"tensorboard:{tmp_path}/logs", begun).finish(ended)
    events = EventAccumulator(str(tmp_path / "logs" / "ptq_1_ptq"))
    events.Reload()
    scalars = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert scalars["recovery"] == pytest.approx(SUMMARY["recovery"])
    assert scalars["steps/load/seconds"] == 1.5
    (text,) = events.Tensors("arguments/text_summary")
    assert b"| quantization_config.algorithm | fp8 |" in text.tensor_proto.string_val[0]


@pytest.mark.slow
def test_wandb_offline(begun: runs.Run, ended: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    open_tracker("wandb:nemo_ptq", begun).finish(ended)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"recovery" in content
    assert b"quantization_config.algorithm" in content


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on this machine, from an environment of its own: MLflow does not go with NeMo's packages."""
    venv, place, port = ROOT / "build" / "mlflow-venv", tmp_path_factory.mktemp("mlflow"), _free_port()
    command = venv / "bin" / "mlflow"
    if not command.exists():
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        install = [str(venv / "bin" / "pip"), "install", "--quiet", "mlflow>=3,<4"]
        if subprocess.run(install, capture_output=True).returncode != 0:
            pytest.skip("MLflow cannot be installed here")
    arguments = ["--backend-store-uri", f"sqlite:///{place}/db", "--artifacts-destination", str(place / "artifacts")]
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            [str(command), "server", *arguments, *options], stdout=log, stderr=log, cwd=place, env=environment
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server, place / "log")
        yield address
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    import requests

    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            if requests.get(f"{address}/health", timeout=1).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mlflow(mlflow_server: str, begun: runs.Run, ended: runs.Run, job: Job) -> None:
    import requests

    for run in (ended, replace(ended, state=runs.FAILED)):
        open_tracker(f"mlflow:{mlflow_server}", begun).finish(run)
    api = f"{mlflow_server}/api/2.0/mlflow"
    experiment = requests.get(f"{api}/experiments/get-by-name", params={"experiment_name": "nemo_ptq"}, timeout=10)
    identity = experiment.json()["experiment"]["experiment_id"]
    found = requests.post(f"{api}/runs/search", json={"experiment_ids": [identity]}, timeout=10).json()["runs"]
    assert {run["info"]["status"] for run in found} == {"FINISHED", "FAILED"}
    (run,) = [run for run in found if run["info"]["status"] == "FINISHED"]
    metrics = {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}
    assert metrics == runs.figures(ended)
    parameters = {parameter["key"]: parameter["value"] for parameter in run["data"]["params"]}
    assert parameters["quantization_config.algorithm"] == "fp8"
    assert parameters["versions.torch"] == ended.versions["torch"]
    run_id = run["info"]["run_id"]
    files = requests.get(f"{api}/artifacts/list", params={"run_id": run_id}, timeout=10).json()["files"]
    assert {file["path"] for file in files} == {"report.html", "report.json", "manifest.json"}
    artifact = requests.get(
        f"{mlflow_server}/get-artifact", params={"path": "report.html", "run_uuid": run_id}, timeout=10
    )
    assert artifact.content == (job.output / "ptq" / "report.html").read_bytes()
