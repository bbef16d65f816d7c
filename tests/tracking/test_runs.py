# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every run leaves a record, however it was launched and however it ends; `nemo-ptq runs` lists them."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_run as run
import pytest

from nemo_ptq.cli import app
from nemo_ptq.errors import PtqError
from nemo_ptq.job import Job
from nemo_ptq.launch.start import start
from nemo_ptq.tracking import runs
from nemo_ptq.tracking.plugin import RunRecord
from tests.tracking.conftest import SUMMARY, write_output


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Job], Any]], None]:
    """Puts a function in the place of the engine."""

    def replace_engine(run_job: Callable[[Job], Any]) -> None:
        monkeypatch.setitem(sys.modules, "nemo_ptq.engine.run", SimpleNamespace(run_job=run_job))

    return replace_engine


def only_run(home: Path) -> runs.Run:
    (found,) = runs.read_runs(home)
    return found


def test_a_run_is_recorded_while_it_runs_and_when_it_has_ended(
    home: Path, job: Job, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_job(job: Job) -> None:
        assert capsys.readouterr().out == f"reading {job.checkpoint}\n"
        assert only_run(home).state == runs.RUNNING
        write_output(job.output)

    engine(run_job)
    start(job)
    ended = only_run(home)
    assert (ended.state, ended.error) == (runs.SUCCEEDED, None)
    assert (ended.algorithm, ended.path) == ("fp8", str(job.output))
    assert ended.metrics == {key: value for key, value in SUMMARY.items() if key not in ("model", "passed")}
    assert ended.arguments["quantization_config"]["calibration_seq_len"] == 128
    assert ended.versions["nvidia-modelopt"]
    assert ended.outputs["report"] == f"{job.output}/ptq/report.html"
    assert runs.figures(ended)["steps/pack_and_write/seconds"] == 0.5
    assert runs.flatten(ended.arguments)["export_config.path"] == str(job.output)


@pytest.mark.parametrize("error", [PtqError("no space left"), KeyboardInterrupt()])
def test_a_run_that_fails_says_why(home: Path, job: Job, engine: Any, error: BaseException) -> None:
    def run_job(job: Job) -> None:
        raise error

    engine(run_job)
    with pytest.raises(type(error)):
        start(job)
    ended = only_run(home)
    assert (ended.state, ended.error) == (runs.FAILED, str(error) or "KeyboardInterrupt")


def test_a_run_without_a_report_has_its_size(home: Path, job: Job, engine: Any) -> None:
    def run_job(job: Job) -> None:
        write_output(job.output)
        (job.output / "ptq" / "report.json").unlink()

    engine(run_job)
    start(job)
    assert only_run(home).metrics == {"export_bytes": 100}


def test_a_process_that_is_gone_has_died(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    runs.write(replace(runs.begin(job, 1), pid=ended.pid))
    assert only_run(home).state == runs.DIED
    monkeypatch.setattr(runs.socket, "gethostname", lambda: "another")
    assert only_run(home).state == runs.RUNNING


def test_only_the_first_rank_records(home: Path, job: Job, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran: list[Job] = []
    engine(ran.append)
    start(job)
    assert ran == [job]
    assert not home.exists()


def test_a_record_that_cannot_be_written_costs_no_job(
    home: Path, job: Job, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    home.write_text("")
    ran: list[Job] = []
    engine(ran.append)
    start(job)
    assert ran == [job]
    assert "this run is not recorded" in capsys.readouterr().err


def test_the_plugin_tells_a_job_where_its_record_goes(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with run.Experiment("ptq", base_dir=str(home)) as experiment:
        plugin = RunRecord()
        experiment.add(run.Script(inline="true"), run.LocalExecutor(env_vars={"A": "1"}), name="ptq", plugins=[plugin])
        variables = experiment.jobs[0].executor.env_vars
    assert variables["A"] == "1"
    assert variables[runs.EXPERIMENT_ID] == experiment._id
    for name in (runs.EXPERIMENT_ID, runs.JOB_DIR):
        monkeypatch.setenv(name, variables[name])
    record = runs.write(runs.begin(job, 1))
    assert record == home / "experiments" / "ptq" / experiment._id / "ptq" / runs.RECORD
    assert (only_run(home).id, only_run(home).job) == (experiment._id, "ptq")


def test_a_slurm_job_has_its_directory_from_the_batch_script(tmp_path: Path) -> None:
    executor = run.SlurmExecutor(account="a", tunnel=run.LocalTunnel(job_dir=str(tmp_path)))
    RunRecord().setup(None, executor)
    assert executor.env_vars[runs.JOB_DIR] == "/nemo_run"


def table_of(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["nemo-ptq", "runs", *options])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["[/red]", "[bold]", "a\x1b[31mb", "a\nb", "a\udcffb", "a\u202eb", ":smile:"])
def test_what_a_record_holds_is_shown_as_it_is(
    name: str, home: Path, job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.write(replace(runs.begin(job, 1), id="direct_1", state=runs.FAILED, job=name, model=name, path=f"/{name}"))
    _, line = table_of(home, capsys, monkeypatch).splitlines()
    shown = name.encode("ascii", "backslashreplace").decode() if "\udcff" in name or "\u202e" in name else name
    shown = shown.replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert line.split() == ["direct_1", shown, shown, "fp8", "FAILED", f"/{shown}"]


@pytest.mark.parametrize(
    "change",
    [
        {"started": 5},
        {"path": None},
        {"metrics": []},
        {"metrics": {"recovery": "much"}},
        {"seconds": "long"},
        {"id": {}},
    ],
)
def test_a_record_of_another_kind_is_left_out(
    change: dict[str, Any], home: Path, job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = runs.write(replace(runs.begin(job, 1), id="direct_1"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert table_of(home, capsys, monkeypatch) == f"no runs in {home}\n"


def test_the_table(home: Path, job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert table_of(home, capsys, monkeypatch) == f"no runs in {home}\n"
    older = replace(runs.begin(job, 1), id="direct_1", started="2026-01-01T00:00:00+00:00")
    runs.write(replace(older, state=runs.FAILED, error="no space left"))
    write_output(job.output)
    runs.write(runs.end(replace(older, id="direct_2", started="2026-01-02T00:00:00+00:00"), 3.0, None))
    (home / "ptq_runs" / "direct_1" / "another").mkdir()
    (home / "ptq_runs" / "broken").mkdir()
    (home / "ptq_runs" / "broken" / runs.RECORD).write_text("{")

    heads, first, second = table_of(home, capsys, monkeypatch).splitlines()
    assert heads.split() == ["id", "job", "model", "algorithm", "state", "recovery", "size", "path"]
    assert first.split() == [
        "direct_1",
        "ptq",
        job.metadata.config_class.rpartition(".")[2],
        "fp8",
        "FAILED",
        str(job.output),
    ]
    assert second.split()[4:] == ["SUCCEEDED", "0.9950", "1.23", "kB", str(job.output)]

    records = json.loads(table_of(home, capsys, monkeypatch, "--json", "--last", "1"))
    assert [record["id"] for record in records] == ["direct_2"]
    assert records[0]["metrics"]["perplexity"] == SUMMARY["perplexity"]
