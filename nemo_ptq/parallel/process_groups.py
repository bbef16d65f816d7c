# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where a job runs: device, process groups and seeds.

This is the only module that makes Megatron-Core run on a machine without CUDA.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from nemo_ptq.errors import PtqError
from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.parallel.environment import Launch

# Long enough for a rank that still reads its weights, short enough that a lost peer is noticed.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_SLURM_PORTS = range(20000, 30000)


def first_host(node_list: str) -> str:
    """Returns the first host of a Slurm node list.

    Args:
        node_list: Slurm's compressed form, e.g. ``"gpu[03-04,7],login1"``.

    Example:
        >>> first_host("gpu[03-04,7],login1")
        'gpu03'
    """
    first = re.match(r"(?:[^\[\],]+|\[[^\[\]]+\])+", node_list)
    if first is None:
        raise PtqError(f"SLURM_JOB_NODELIST={node_list!r} is not a Slurm node list: run under srun, or set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks meet: torchrun's address and port, the user's, or those that all tasks of a Slurm step derive."""
    address = environment.get("MASTER_ADDR")
    if address is None:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        address = first_host(nodes) if nodes else "127.0.0.1"
    if "MASTER_PORT" in environment:
        port = environment["MASTER_PORT"]
        if not port.isdigit():
            raise PtqError(f"MASTER_PORT={port} must be the number of a free port on {address}")
        return address, int(port)
    job = int(environment.get("SLURM_JOB_ID", "0")) * 31 + int(environment.get("SLURM_STEP_ID", "0"))
    return address, _SLURM_PORTS[job % len(_SLURM_PORTS)]


def pick_device(launch: Launch) -> torch.device:
    """One GPU for each local rank where there is CUDA, the CPU elsewhere.

    Raises:
        PtqError: If this node has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if os.environ.get("SLURM_GPUS_PER_TASK") == "1" and torch.cuda.device_count() == 1:
        return torch.device("cuda", 0)  # srun shows each task its own GPU only
    if launch.local_rank >= torch.cuda.device_count():
        raise PtqError(
            f"local rank {launch.local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            "start at most one rank for each GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", launch.local_rank)


@contextmanager
def megatron_on(device: torch.device) -> Iterator[None]:
    """Lets Megatron-Core build and run models on `device`.

    Megatron allocates on ``torch.cuda.current_device()``, calls ``torch.cuda.synchronize()`` and, where the first and
    the last stage of a pipeline share the embedding, moves it with ``Tensor.cuda()``, whatever the model's device is;
    without CUDA all three would raise. On a GPU only the current device is set.
    """
    from nemo_ptq.parallel.megatron import moe_utils

    with ExitStack() as stack:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            stack.enter_context(replaced(torch.cuda, "current_device", lambda: device))
            stack.enter_context(replaced(torch.cuda, "synchronize", lambda *_: None))
            stack.enter_context(replaced(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor))
        if not hasattr(moe_utils, "te_general_gemm"):
            # Without Transformer Engine Megatron forgets to define the name that its router looks for.
            stack.enter_context(replaced(moe_utils, "te_general_gemm", None))
        yield


# Jobs that this process has run: each finds its ranks under keys of its own.
_OPENED = itertools.count()


@cache
def _store(meeting_point: str, rank: int, world_size: int) -> Any:
    """Where the ranks find each other, open as long as the process.

    A rank may begin its next job while rank 0 still ends the last one: it must not find that one's addresses.
    """
    store, _, _ = next(dist.rendezvous(meeting_point, rank, world_size, timeout=COLLECTIVE_TIMEOUT))
    return store


@contextmanager
def process_groups(
    launch: Launch,
    device: torch.device,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    seed: int = 1234,
) -> Iterator[None]:
    """Opens torch.distributed and Megatron's parallel groups for the duration of a `with` block.

    gloo carries CPU tensors and NCCL those on a GPU. A process that is alone has nobody to send to, and goes without
    NCCL, whose groups take seconds to open and close. What is left of the ranks after TP and PP is data parallel.

    Args:
        launch: This process's place.
        device: The device that the model will be on.
        tensor_parallel: Ranks that share one layer.
        pipeline_parallel: Stages of consecutive layers.
        expert_parallel: Ranks that share the experts of one layer.
        seed: Seed for torch and for Megatron's generators.
    """
    from nemo_ptq.parallel.megatron import parallel_state
    from nemo_ptq.parallel.megatron import tensor_parallel as megatron_tensor_parallel

    address, port = _rendezvous(os.environ)
    has_nccl = device.type == "cuda" and launch.world_size > 1
    # A process that nobody launched takes any free port; torchrun has the meeting point open already, even for one.
    is_launched = launch.world_size > 1 or dist.is_torchelastic_launched()
    meeting_point = f"tcp://{address}:{port}" if is_launched else "tcp://127.0.0.1:0"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=dist.PrefixStore(f"job {next(_OPENED)}", _store(meeting_point, launch.rank, launch.world_size)),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if has_nccl else None,
    )
    try:
        with megatron_on(device):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor_parallel,
                pipeline_model_parallel_size=pipeline_parallel,
                expert_model_parallel_size=expert_parallel,
            )
            torch.manual_seed(seed)
            if device.type == "cuda":
                megatron_tensor_parallel.model_parallel_cuda_manual_seed(seed)
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
