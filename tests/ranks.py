# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks, as torchrun would, without paying for the imports on every call.

The ranks are forked from one server process that has imported PyTorch, Megatron-Core, ModelOpt, NeMo and what a job
imports already.
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
"""Makes processes that are forked from one that has imported what takes long."""
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class RankFailed(AssertionError):
    """A rank raised an error, died, or did not end in time."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(*args)` in `world_size` fresh processes that have torchrun's environment variables.

    The first failure ends the other ranks.

    Args:
        function: Defined at a module's top level. It and `args` are pickled, and so is what it returns.
        world_size: Number of ranks.
        args: Passed on to the function.
        timeout: Seconds until ranks that still run are ended. The first call's imports do not count.

    Returns:
        What the function returned, by rank.

    Raises:
        RankFailed: With the traceback of the rank that failed.
    """
    call = pickle.dumps((function, args))
    port = _free_port()
    receivers, processes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            environment = _torchrun_environment(rank, world_size, port)
            process = CONTEXT.Process(target=_run_rank, args=(sender, environment, call, timeout), daemon=True)
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        return _collect(receivers, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for receiver in receivers:
            receiver.close()


def _collect(receivers: Sequence[Connection], timeout: float) -> list[Any]:
    """Each rank sends "started" and then its outcome; a rank that dies closes its connection."""
    results: dict[int, Any] = {}
    ranks = {receiver: rank for rank, receiver in enumerate(receivers)}
    for receiver, rank in ranks.items():
        _receive(receiver, rank)
    deadline = time.monotonic() + timeout
    while len(results) < len(receivers):
        pending = [receiver for receiver, rank in ranks.items() if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            names = ", ".join(str(ranks[receiver]) for receiver in pending)
            raise RankFailed(f"rank {names} did not end within {timeout:g} s")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            results[ranks[receiver]] = _receive(receiver, ranks[receiver])
    return [results[rank] for rank in range(len(receivers))]


def _receive(receiver: Connection, rank: int) -> Any:
    try:
        error, result = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise RankFailed(f"rank {rank} died without an error message") from None
    if error:
        raise RankFailed(f"rank {rank} failed:\n{error}")
    return result


def _run_rank(sender: Connection, environment: dict[str, str], call: bytes, timeout: float) -> None:
    os.environ.update(environment)
    sender.send_bytes(pickle.dumps((None, None)))
    faulthandler.dump_traceback_later(max(0.1, timeout - 1))  # shows where the ranks hang
    try:
        function, args = pickle.loads(call)
        outcome = pickle.dumps((None, function(*args)))
    except BaseException:
        outcome = pickle.dumps((traceback.format_exc(), None))
    sender.send_bytes(outcome)
    _leave_process_group()


def _leave_process_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
