# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Factories of NeMo-Run executors that run in an image: Docker, Kubeflow on Kubernetes, and SkyPilot.

The command checks the checkpoint before it starts anything, so the job must see its files under the same paths.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from nemo_ptq.errors import ConfigError
from nemo_ptq.safe_path import VARIABLE

# NeMo-Run imports torch, which takes seconds: it is imported where it is needed.
if TYPE_CHECKING:
    import nemo_run as run


def docker(
    container_image: Optional[str] = None,
    volumes: Optional[Union[list[str], str]] = None,
    ntasks_per_node: Optional[int] = None,
    num_gpus: Optional[int] = None,
    shm_size: str = "8g",
    env_vars: Optional[dict[str, str]] = None,
) -> "run.Config[run.DockerExecutor]":
    """Several processes in a container on this machine, started by torchrun.

    Args:
        container_image: Image with nemo_ptq. Required.
        volumes: Paths that the container sees, as "/on/the/host:/in/the/container" with commas between.
        ntasks_per_node: Processes to start. None: as many as the calibration needs.
        num_gpus: GPUs that it sees; -1 for all. None: none, and the model is calibrated on CPUs.
        shm_size: Shared memory, which ranks exchange tensors through.
        env_vars: Environment variables for the processes.

    Raises:
        ConfigError: If there is no image, or Docker's package is missing.
    """
    import nemo_run as run

    _check("docker", {"container_image": container_image})
    return run.Config(
        run.DockerExecutor,
        container_image=container_image,
        launcher="torchrun",
        packager=run.Config(run.Packager),  # the code is in the image
        volumes=_listed(volumes),
        shm_size=shm_size,
        env_vars=_environment(env_vars),
        **_given(ntasks_per_node=ntasks_per_node, num_gpus=num_gpus),
    )


def kubeflow(
    image: Optional[str] = None,
    claims: Optional[Union[list[str], str]] = None,
    namespace: str = "default",
    nprocs_per_node: Optional[int] = None,
    gpus_per_node: Optional[int] = None,
    cpu_requests: Optional[str] = None,
    memory_requests: Optional[str] = None,
    env_vars: Optional[dict[str, str]] = None,
) -> "run.Config[run.KubeflowExecutor]":
    """A TrainJob of Kubeflow's with one pod, whose processes torchrun starts.

    Args:
        image: Image with nemo_ptq. Required.
        claims: Claims of persistent volumes that the pod mounts, as "claim:/path" with commas between. This machine
            has them under the same paths.
        namespace: Kubernetes' namespace.
        nprocs_per_node: Processes to start. None: as many as the calibration needs.
        gpus_per_node: GPUs of the pod. None: none are asked for, and the model is calibrated on CPUs.
        cpu_requests: CPUs that the pod asks for, e.g. "8".
        memory_requests: Memory that it asks for, e.g. "64Gi".
        env_vars: Environment variables for the processes.

    Raises:
        ConfigError: If there is no image, a claim is not valid, or the package of Kubernetes' client is missing.
    """
    import nemo_run as run

    pairs = [claim.partition(":") for claim in _listed(claims)]
    wrong = [name for name, _, path in pairs if not name or not path.startswith("/")]
    _check("kubeflow", {"image": image}, [f"claims={name} is not valid: write claim:/path" for name in wrong])
    names = {name: f"claim-{index}" for index, name in enumerate(dict.fromkeys(name for name, _, _ in pairs))}
    return run.Config(
        run.KubeflowExecutor,
        image=image,
        launcher="torchrun",
        packager=run.Config(run.Packager),
        namespace=namespace,
        volumes=[{"name": own, "persistentVolumeClaim": {"claimName": name}} for name, own in names.items()],
        volume_mounts=[{"name": names[name], "mountPath": path} for name, _, path in pairs],
        restart_policy="Never",
        env_vars=_environment(env_vars),
        **_given(
            nprocs_per_node=nprocs_per_node,
            gpus_per_node=gpus_per_node,
            cpu_requests=cpu_requests,
            memory_requests=memory_requests,
        ),
    )


def skypilot(
    container_image: Optional[str] = None,
    infra: Optional[str] = None,
    gpus: Optional[str] = None,
    gpus_per_node: Optional[int] = None,
    num_nodes: Optional[int] = None,
    file_mounts: Optional[dict[str, str]] = None,
    setup: Optional[str] = None,
    env_vars: Optional[dict[str, str]] = None,
) -> "run.Config[run.SkypilotExecutor]":
    """A task of SkyPilot's, whose processes torchrun starts on each node.

    Args:
        container_image: Image with nemo_ptq. None: `setup` installs it.
        infra: Where it runs, as SkyPilot writes it, e.g. "k8s/my-context".
        gpus: Kind of GPU, e.g. "H100".
        gpus_per_node: GPUs of each node.
        num_nodes: Nodes. None: as many as the calibration needs.
        file_mounts: Sources of the files that the task sees, by their paths there.
        setup: Shell commands that each node runs first.
        env_vars: Environment variables for the processes.

    Raises:
        ConfigError: If SkyPilot is missing.
    """
    import nemo_run as run

    _check("skypilot", {})
    return run.Config(
        run.SkypilotExecutor,
        launcher="torchrun",
        # It takes no other. What it copies is the repository that the command was started in.
        packager=run.Config(run.GitArchivePackager),
        env_vars=_environment(env_vars),
        **_given(
            container_image=container_image,
            infra=infra,
            gpus=gpus,
            gpus_per_node=gpus_per_node,
            num_nodes=num_nodes,
            file_mounts=file_mounts,
            setup=setup,
        ),
    )


_PACKAGES = {"docker": "docker", "kubeflow": "kubernetes", "skypilot": "sky"}


def _check(name: str, required: dict[str, Any], problems: Optional[list[str]] = None) -> None:
    found = [f"{setting} is missing: name an image with nemo_ptq" for setting, value in required.items() if not value]
    found += problems or []
    if find_spec(_PACKAGES[name]) is None:
        found.append(f"{name} needs the package {_PACKAGES[name]}: pip install 'nemo_run[{name}]'")
    if found:
        raise ConfigError(found)


def _environment(env_vars: Optional[dict[str, str]]) -> dict[str, str]:
    return {VARIABLE: "1", **(env_vars or {})}


def _listed(value: Optional[Union[list[str], str]]) -> list[str]:
    return [item for item in value.split(",") if item] if isinstance(value, str) else list(value or [])


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def seen_in_container(executor: Any) -> list[Path] | None:
    """The directories that a container of one of these executors sees; None of other executors.

    Args:
        executor: A `nemo_run.Executor`.
    """
    import nemo_run as run

    if isinstance(executor, run.DockerExecutor):
        return [Path(volume.split(":")[1]) for volume in executor.volumes if ":" in volume]
    if isinstance(executor, run.KubeflowExecutor):
        return [Path(mount["mountPath"]) for mount in executor.volume_mounts]
    if isinstance(executor, run.SkypilotExecutor):
        return [Path(path) for path in (*(executor.file_mounts or {}), *(executor.storage_mounts or {}))]
    return None
