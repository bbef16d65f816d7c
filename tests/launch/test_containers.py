# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The jobs that NeMo-Run makes of the executors with an image, without a Docker daemon or a cluster."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from nemo_run.run.torchx_backend.schedulers.docker import PersistentDockerScheduler
from nemo_run.run.torchx_backend.schedulers.kubeflow import KubeflowScheduler

from nemo_ptq.config import ExportConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.launch import containers
from nemo_ptq.launch.containers import docker, kubeflow, skypilot
from nemo_ptq.launch.executors import fit, launcher_name, unmounted, world_size
from nemo_ptq.task import ptq

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: u, user: {}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""
needs_kubernetes = pytest.mark.skipif(find_spec("kubernetes") is None, reason="needs the package kubernetes")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names a cluster that nobody connects to."""
    (tmp_path / "kubeconfig").write_text(KUBECONFIG)
    config = import_module("kubernetes.config.kube_config")
    monkeypatch.setattr(config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))


@pytest.fixture
def every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets factories make configurations of executors whose packages are not there."""
    monkeypatch.setattr(containers, "find_spec", lambda _: True)


def submitted(executor: run.Executor, scheduler: type, directory: Path) -> Any:
    """What NeMo-Run would submit for our task."""
    from nemo_run.run.torchx_backend.packaging import package

    executor.assign("title_1", str(directory / "title_1"), "ptq", "ptq")
    task = run.Partial(ptq, nemo_checkpoint="/data/ckpt", export_config=run.Config(ExportConfig, path="/data/out"))
    app = package("ptq", task, executor, serialize_to_file=True)
    return scheduler("session")._submit_dryrun(app, executor).request


def fitted(config: run.Config, processes: int) -> Any:
    fit(config, processes)
    return fdl.build(config)


def assert_torchrun(command: list[str], processes: int, config: str) -> None:
    assert command[0] == "torchrun"
    assert command[command.index("--nproc-per-node") + 1] == str(processes)
    assert command[command.index("--rdzv-endpoint") + 1] == "localhost:0"
    assert command[command.index("-m") + 1] == "nemo_run.core.runners.fdl_runner"
    assert command[-1] == config


def test_the_container_of_docker(tmp_path: Path) -> None:
    executor = fitted(docker("image:1", "/data:/data,/tok:/tok:ro", num_gpus=2, env_vars={"A": "b c"}), 2)
    assert (world_size(executor), launcher_name(executor)) == (2, "run.executor=docker")
    (container,) = submitted(executor, PersistentDockerScheduler, tmp_path).containers
    assert_torchrun(container.command, 2, "/nemo_run/configs/ptq_fn_or_script")
    started: dict[str, Any] = {}
    client = SimpleNamespace(
        containers=SimpleNamespace(run=lambda image, command, **settings: started.update(settings, image=image)),
        networks=SimpleNamespace(create=lambda **_: None),
    )
    container.run(client, "id")
    assert started["image"] == "image:1"
    assert started["volumes"] == ["/data:/data", "/tok:/tok:ro"]
    assert started["environment"].items() >= {"A": "b c", "PYTHONSAFEPATH": "1"}.items()
    assert started["shm_size"] == "8g"
    assert started["device_requests"][0]["Count"] == 2
    assert unmounted(executor, {"nemo_checkpoint": Path("/data/ckpt"), "tokenizer_path": Path("/tok/a")}) == []
    assert unmounted(executor, {"export_config.path": Path("/out")}) == [
        "run.executor.volumes does not make export_config.path=/out visible in the container: add /out:/out"
    ]


@needs_kubernetes
def test_the_job_of_kubeflow(tmp_path: Path, cluster: None) -> None:
    executor = fitted(kubeflow("image:1", "models:/data,models:/more,scratch:/home/me", gpus_per_node=4), 4)
    assert (world_size(executor), launcher_name(executor)) == (4, "run.executor=kubeflow")
    command = submitted(executor, KubeflowScheduler, tmp_path).cmd
    assert_torchrun(command, 4, str(tmp_path / "title_1" / "ptq" / "configs" / "ptq_fn_or_script"))
    spec = executor.get_job_body("ptq-1", command)["spec"]
    assert spec["trainer"]["image"] == "image:1"
    assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (1, 4)
    assert spec["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "4"}
    assert {"name": "PYTHONSAFEPATH", "value": "1"} in spec["trainer"]["env"]
    pod = spec["podTemplateOverrides"][0]["spec"]
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == ["models", "scratch"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/data": "claim-0", "/more": "claim-0", "/home/me": "claim-1"}
    assert unmounted(executor, {"nemo_checkpoint": Path("/data/ckpt"), "NEMORUN_HOME": Path("/me/.nemo_run")}) == [
        "run.executor.claims does not make NEMORUN_HOME=/me/.nemo_run visible in the container: add CLAIM:/me/.nemo_run"
    ]


def test_the_configuration_of_skypilot(every_package: None) -> None:
    config = skypilot("image:1", "k8s/here", "H100", gpus_per_node=8, file_mounts={"/data": "/data"})
    fit(config, 16)
    assert (config.num_nodes, config.torchrun_nproc_per_node, config.launcher) == (2, 8, "torchrun")
    assert config.packager.__fn_or_cls__ is run.GitArchivePackager


@pytest.mark.parametrize(
    ("factory", "settings", "processes", "problem"),
    [
        (docker, {"num_gpus": 2}, 4, "run.executor.ntasks_per_node=4 is more than run.executor.num_gpus=2: each"),
        (kubeflow, {"gpus_per_node": 2}, 4, "run.executor.nprocs_per_node=4 is more than run.executor.gpus_per_node=2"),
    ],
)
def test_more_processes_than_gpus(
    factory: Callable[..., run.Config], settings: dict[str, int], processes: int, problem: str, every_package: None
) -> None:
    with pytest.raises(ConfigError, match=f"{problem}.*so take 4 GPUs"):
        fit(factory("image:1", **settings), processes)


def test_all_gpus_are_enough() -> None:
    assert fitted(docker("image:1", num_gpus=-1), 8).ntasks_per_node == 8


def test_pods_that_cannot_find_one_another(every_package: None) -> None:
    config = kubeflow("image:1")
    config.num_nodes = 2
    with pytest.raises(ConfigError, match=r"run.executor.num_nodes=2 is not possible here: torchrun starts one pod"):
        fit(config, 16)


@pytest.mark.parametrize(
    ("factory", "arguments", "problem"),
    [
        (docker, {}, "container_image is missing: name an image with nemo_ptq"),
        (kubeflow, {}, "image is missing: name an image with nemo_ptq"),
        (kubeflow, {"image": "i", "claims": "models"}, "claims=models is not valid: write claim:/path"),
    ],
)
def test_settings_that_are_missing(
    factory: Callable[..., run.Config], arguments: dict[str, str], problem: str, every_package: None
) -> None:
    with pytest.raises(ConfigError, match=problem):
        factory(**arguments)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"skypilot needs the package sky: pip install 'nemo_run\[skypilot\]'"):
        skypilot()
    with pytest.raises(ConfigError, match="kubeflow needs the package kubernetes"):
        kubeflow("image:1")
